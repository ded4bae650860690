"""Kill the daemon during an operation: then the tree is the old or the new one, and the store is sound."""
