"""The host's VT-x or AMD-V through /dev/kvm and its ioctls."""
