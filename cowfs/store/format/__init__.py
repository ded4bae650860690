"""What a store looks like on disk: header, mark, layout, checkpoints, log of changes."""
