"""A directory of an upper layer, as a lower layer: an upper that nobody writes to any more."""

from __future__ import annotations

from cowfs.layers.base import Key, UpperLayer, is_flagged
from cowfs.layers.reopened import Reopens


class FrozenLayer:
    """What *layer* has below the directory *root*. The keys are the layer's own: an inode of the upper
    that is frozen has the key that it had."""

    def __init__(self, layer: UpperLayer, root: Key) -> None:
        self.name = layer.name
        self.root = root
        self.dev = layer.dev
        self.generation = layer.generation
        self.waits = layer.waits
        self.has_descriptors = layer.has_descriptors
        self.data_only = False
        # Calls go directly to the layer: they cost no more than the upper's.
        self.lookup = layer.lookup
        self.stat = layer.stat
        self.readdir = layer.readdir
        self.names = layer.names
        self.readlink = layer.readlink
        self.listxattr = layer.listxattr
        self.getxattr = layer.getxattr
        self.open = layer.open
        self.statfs = layer.statfs
        self.handle = layer.handle
        self.handle_ino = layer.handle_ino
        self.forget = layer.forget
        if is_flagged(layer):
            self.getflags = layer.getflags
            self.birth = layer.birth
        if isinstance(layer, Reopens):
            self.reopened = layer.reopened

    def close(self) -> None:
        """Do nothing: the caller that opened the layer closes it."""
