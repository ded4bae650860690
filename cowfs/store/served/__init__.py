"""The store while a mount uses it: open it, lock it, watch its disk."""
