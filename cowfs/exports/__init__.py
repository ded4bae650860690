"""Write changes, or a whole merged tree, in formats that other programs read."""
