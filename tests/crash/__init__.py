"""The daemon is killed during an operation: afterwards the tree is the old or the new one, and the store is
sound."""
