"""Helpers that several test suites share: trees, mounts, and a check for leftover mounts and processes."""
