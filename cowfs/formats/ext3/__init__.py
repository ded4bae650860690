"""Read and write ext3 images in this process, without a mount, a loop device or privileges."""
