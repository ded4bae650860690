"""A directory of an upper layer as a lower layer: an upper that is no longer written."""

from __future__ import annotations

from cowfs.layers.base import Key, UpperLayer, is_flagged
from cowfs.layers.reopened import Reopens


class FrozenLayer:
    """The tree of *layer* below the directory *root*.

    The keys are those of the layer, so an inode keeps its key when its upper is frozen.
    """

    def __init__(self, layer: UpperLayer, root: Key) -> None:
        self.name = layer.name
        self.root = root
        self.dev = layer.dev
        self.generation = layer.generation
        self.waits = layer.waits
        self.has_descriptors = layer.has_descriptors
        self.data_only = False
        # Call the layer directly, so that calls cost no more than the upper's.
        self.lookup = layer.lookup
        self.stat = layer.stat
        self.readdir = layer.readdir
        self.pieces = layer.pieces
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
