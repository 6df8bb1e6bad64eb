"""What every technique virtualises: memory, buses, interrupts, time, the typed exits and the vCPU protocol."""
