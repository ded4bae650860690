"""The FUSE adapter called directly, without a mount."""
