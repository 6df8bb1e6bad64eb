"""Timings of trivisor, side by side with QEMU's TCG: `python -m bench`."""
