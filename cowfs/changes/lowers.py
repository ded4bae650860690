"""The lower layers merged among themselves: what a tree was before anything was changed.

The rules are those of the kernel's overlayfs (ovl_lookup and its helpers in fs/overlayfs/namei.c):
in each layer, topmost first, a whiteout or anything but a directory ends the search, an opaque
directory ends it below itself, and a redirect renames what is searched in the layers below.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass

from cowfs.changes.marks import Marks, is_whiteout
from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.redirect import may_exist
from cowfs.types import Attr

Place = tuple[int, Key]
"""An inode of a lower: the index of the layer, and its key there."""


@dataclass(slots=True)
class Lower:
    """What the merged lowers show under one path."""

    attr: Attr
    places: list[Place]
    """For a directory all that are merged into it, topmost first; for a file the one with its
    attributes and, if that is a metacopy, the one with its data."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attr.st_mode)


class LowerView:
    """Looks things up in the merged lowers. *lowers* are topmost first. Blocks as the layers do.

    A :class:`Lower` holds keys of the layers: give it back with :meth:`forget`.
    """

    def __init__(self, lowers: Sequence[LowerLayer], marks: Marks) -> None:
        self.layers = tuple(lowers)
        self._marks = marks
        self._roots: list[Place] = [(number, layer.root) for number, layer in enumerate(self.layers)]

    def root(self) -> Lower | None:
        """Return the root directory; None when there is no lower at all."""
        if not self.layers:
            return None
        top = self.layers[0]
        return Lower(top.stat(top.root), list(self._roots))

    def lookup(self, directory: Lower, name: bytes) -> Lower | None:
        """Return what *name* in a directory shows, None when nothing."""
        return self._find(directory.places, name)

    def resolve(self, path: bytes) -> Lower | None:
        """Return what a path from the root (without a leading slash) shows, None when nothing."""
        return self._find(self._roots, b"/" + path) if path else self.root()

    def names(self, directory: Lower) -> set[bytes]:
        """Return the names in a merged directory."""
        shown: set[bytes] = set()
        hidden: set[bytes] = set()
        for number, key in directory.places:
            layer = self.layers[number]
            here = layer.readdir(key)
            for entry in here:
                if entry.name in shown or entry.name in hidden:
                    continue
                gone = False
                if entry.type in {0, stat.S_IFCHR}:
                    hit = layer.lookup(key, entry.name)
                    gone = hit is None or is_whiteout(hit[1])
                    if hit is not None:
                        layer.forget(hit[0])
                (hidden if gone else shown).add(entry.name)
        return shown

    def forget(self, node: Lower) -> None:
        """The caller will not use *node* again."""
        for number, key in node.places:
            layer = self.layers[number]
            if key is not layer.root:
                layer.forget(key)

    def _find(self, stack: Sequence[Place], name: bytes) -> Lower | None:
        search = _Search(self, self._marks, name)
        found: list[tuple[Place, Attr]] = []
        position = 0
        while position < len(stack) and not search.stop:
            number, base = stack[position]
            position += 1
            hit = search.in_layer(number, base)
            if hit is None:
                continue
            key, attr = hit
            # Of a chain of metacopies the first has the attributes and the last the data.
            if len(found) == 2 and not search.is_dir:
                (spare_number, spare), _ = found.pop()
                self.layers[spare_number].forget(spare)
            found.append(((number, key), attr))
            if search.name.startswith(b"/") and stack is not self._roots:
                stack, position = self._roots, number + 1
        if not found:
            return None
        return Lower(found[0][1], [place for place, _ in found])


class _Search:
    """One search on its way down the layers (struct ovl_lookup_data)."""

    __slots__ = ("_layers", "_marks", "is_dir", "metacopy", "name", "stop")

    def __init__(self, view: LowerView, marks: Marks, name: bytes) -> None:
        self._layers = view.layers
        self._marks = marks
        self.name = name
        """What is looked for in the next layer: a name, or a path from the root."""
        self.stop = False
        self.is_dir = False
        self.metacopy = False

    def in_layer(self, number: int, base: Key) -> tuple[Key, Attr] | None:
        """Return what this layer has under the name (ovl_lookup_layer)."""
        if not self.name.startswith(b"/"):
            return self._step(number, base, b"", self.name, b"")
        layer = self._layers[number]
        key, rest = base, self.name[1:]
        while True:
            part, slash, after = rest.partition(b"/")
            before = self.name[: len(self.name) - len(rest)]
            hit = self._step(number, key, before, part, slash + after)
            if key is not base:
                layer.forget(key)
            if hit is None or not slash:
                return hit
            key, rest = hit[0], after

    def _step(
        self, number: int, base: Key, before: bytes, part: bytes, after: bytes
    ) -> tuple[Key, Attr] | None:
        """Look up one component; *before* and *after* are the rest of the path (ovl_lookup_single)."""
        layer = self._layers[number]
        hit = layer.lookup(base, part) if may_exist(part) else None
        if hit is None:
            return None
        key, attr = hit
        if is_whiteout(attr) or not self._wanted(attr, last=not after):
            self.stop = True
            layer.forget(key)
            return None
        bottom = number == len(self._layers) - 1  # nothing below that a note could be about
        if not stat.S_ISDIR(attr.st_mode):
            self.metacopy = stat.S_ISREG(attr.st_mode) and not bottom and self._marks.metacopy(layer, key)
            self.stop = not self.metacopy
            if not self.metacopy:
                return hit
        else:
            self.is_dir = self.is_dir or not after
            if bottom:
                return hit
            if self._marks.opaque(layer, key):
                self.stop = True
                return hit
        redirect = self._marks.redirect(layer, key)
        if redirect is not None:
            if redirect.startswith(b"/"):
                # An opaque directory on the way says nothing about a place elsewhere.
                self.stop = False
                before = b""
            self.name = before + redirect + after
        return hit

    def _wanted(self, attr: Attr, *, last: bool) -> bool:
        if last and self.metacopy:
            return stat.S_ISREG(attr.st_mode)
        return stat.S_ISDIR(attr.st_mode) or (last and not self.is_dir)
