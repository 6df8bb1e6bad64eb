"""The architecture as facts."""

LONGEST_INSTRUCTION = 15
"""Bytes (Intel SDM 2A 2.3.11)."""
