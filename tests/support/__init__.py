"""Code that several test suites share: trees, mounts, and a check for things left behind."""
