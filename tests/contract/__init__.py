"""Test every kind of layer against the protocols in cowfs/layers/base.py."""
