"""The Nth call of the upper layer fails, for every N: the merged tree is the old or the new one."""
