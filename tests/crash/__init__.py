"""The daemon is killed in the midst of work: what is there afterwards is old or new, the store is sound."""
