"""Read the merged lowers: the tree before any change."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from cowfs.errors import MountFailure
from cowfs.layers.base import LowerLayer
from cowfs.overlay.stack import Merging, Path, Place, Stack
from cowfs.types import Attr

_Result = TypeVar("_Result")


def must_not_wait(lowers: Iterable[LowerLayer]) -> None:
    """MountFailure if a lower may wait for other processes: the whole mount would wait."""
    if any(layer.waits for layer in lowers):
        raise MountFailure(
            "a lower is on a filesystem that may hang (NFS, FUSE)", "unmount, and name the store instead"
        )


def at_once(steps: Generator[None, None, _Result]) -> _Result:
    """Return what a generator returns, without any other work in between."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return cast(_Result, done.value)


@dataclass(slots=True)
class Lower:
    """What the merged lowers show under one path."""

    attr: Attr
    places: list[Place]
    """For a directory: all that are merged, topmost first. For a file: the inode with its attributes and, if
    that is a metacopy, the inode with its data."""

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.st_mode)


class LowerView:
    """Looks up names in the merged lowers. Blocks as the layers do; OSError.

    A :class:`Lower` holds keys of the layers: give it back with :meth:`forget`.
    """

    def __init__(self, stack: Stack) -> None:
        self.layers = stack.layers
        self.format = stack.format
        self._stack = stack

    def root(self) -> Lower | None:
        """Return the root directory; None if there is no lower."""
        if not self.layers:
            return None
        top = self.layers[0]
        return Lower(top.stat(self._stack.roots[0][1]), list(self._stack.roots))

    def lookup(self, directory: Lower, name: bytes) -> Lower | None:
        """Return the inode of *name* in a directory; None if there is none."""
        return self._find(directory.places, (name,))

    def resolve(self, path: bytes) -> Lower | None:
        """Return the inode at a path from the root (without a leading slash); None if there is none."""
        return self._find(self._stack.roots, tuple(path.split(b"/"))) if path else self.root()

    def names(self, directory: Lower) -> set[bytes]:
        """Return the names in a merged directory."""
        return at_once(self.names_by_steps(directory))

    def names_by_steps(self, directory: Lower) -> Generator[None, None, set[bytes]]:
        """Return the same; yield now and then, when the caller may do other work."""
        merging = Merging(self._stack.format)
        names: set[bytes] = set()
        for number, key in directory.places:
            layer = self.layers[number]
            for some in layer.pieces(key):
                names.update(entry.name for entry in some if merging.shows(layer, key, entry))
                yield
        return names

    def forget(self, node: Lower) -> None:
        """Free the keys of *node*, which the caller no longer uses."""
        for number, key in node.places:
            layer = self.layers[number]
            if key is not self._stack.root_of[number]:
                layer.forget(key)

    def _find(self, places: Sequence[Place], path: Path) -> Lower | None:
        hits = self._stack.look(places, path).hits  # also of a metacopy without data
        return Lower(hits[0][2], [(number, key) for number, key, _ in hits]) if hits else None
