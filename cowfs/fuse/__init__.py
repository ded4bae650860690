"""FUSE: the only package that uses pyfuse3 and trio."""

from cowfs.fuse import libfuse as libfuse  # first: it must be loaded before pyfuse3
