"""Tests that call the FUSE adapter directly, without a mount."""
