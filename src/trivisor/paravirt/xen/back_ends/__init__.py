"""Back ends of split devices: the halves of disk and network whose front ends are drivers in the guest."""
