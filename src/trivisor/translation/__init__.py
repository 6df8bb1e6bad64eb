"""Technique 1: full virtualization by binary translation, in the manner of VMware's software monitor."""
