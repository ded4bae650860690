"""Changes, or a whole merged tree, written in formats that others read."""
