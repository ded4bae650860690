"""Let the Nth call of the upper layer fail, for every N: the merged tree must be the old or the new one."""
