"""Find stores on the disks of this machine, as a boot does."""
