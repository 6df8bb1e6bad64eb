"""Direct execution: a paravirtual guest, kernel and programs, in ring 3 of a KVM machine over a stub in ring 0."""
