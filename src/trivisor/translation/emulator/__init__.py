"""Sensitive and rare instructions, exceptions and interrupts, done wholly in Python."""
