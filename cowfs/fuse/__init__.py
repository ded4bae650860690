"""FUSE: the only part that knows pyfuse3 and trio."""

from cowfs.fuse import libfuse as libfuse  # first: it must be loaded before pyfuse3 is
