"""A layer that shows another one with something changed."""

from __future__ import annotations

from cowfs.layers.base import Key, LowerLayer

_OPTIONAL = (
    "birth", "caches", "getflags", "image", "reopened", "resume", "setflags", "shrink", "suspend", "version",
)  # fmt: skip
"""Optional members of a layer, which the wrapped layer provides unchanged if it has them."""


class WrappedLayer:
    """The base of layers that pass most calls on to *inner*. Its keys are those of *inner*."""

    def __init__(self, inner: LowerLayer) -> None:
        self.inner = inner
        self.name = inner.name
        self.root: Key = inner.root
        self.dev = inner.dev
        self.generation = inner.generation
        self.waits = inner.waits
        self.has_descriptors = inner.has_descriptors
        self.data_only = inner.data_only
        self.readlink = inner.readlink
        self.open = inner.open
        self.statfs = inner.statfs
        self.handle_ino = inner.handle_ino
        for name in _OPTIONAL:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def close(self) -> None:
        self.inner.close()
