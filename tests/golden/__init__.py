"""What the translator makes of a small corpus, kept as text so that a change to it shows as a diff."""
