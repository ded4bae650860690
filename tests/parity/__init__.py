"""The same operations on the kernel's overlayfs and on cowfs: whatever can be seen must be equal."""
