"""Technique 3, paravirtualization: the guest calls the monitor instead of using sensitive instructions."""
