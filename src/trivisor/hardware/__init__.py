"""Technique 2: hardware-assisted virtualization, where the processor itself traps what is sensitive."""
