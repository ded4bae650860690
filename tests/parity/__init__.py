"""Run the same operations on the kernel's overlayfs and on cowfs, and compare everything visible."""
