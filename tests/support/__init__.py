"""What several test suites share: trees, mounts, and a watch over what is left behind."""
