"""List what fills a store: the blocks of each inode, and why the store has it."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cowfs.changes.diff import in_order
from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.paths import join
from cowfs.changes.scan import GONE, entries, renamed, source_of
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.overlay.stack import Stack, is_whiteout, notes_of
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.types import Attr

REASONS = {
    "new": "files that the lower does not have",
    "changed": "copies of files of the lower, changed or not",
    "metadata": "files of which only owner, mode, times or attributes were copied",
    "whiteouts": "marks of deleted names",
    "directories": "directories that contain changes",
    "trash": "what cowfs revert has taken back",
    "checkpoints": "checkpoints that the present tree is not based on",
    "overhead": "the journal, and other filesystem metadata",
}
APART = {"trash", "checkpoints", "overhead"}
"""Those without paths: what the tree does not show."""
_BLOCK = 512
"""The unit of st_blocks, in bytes."""


class Used(NamedTuple):
    """The space that an inode of the store takes."""

    path: bytes
    reason: str
    """One of :data:`REASONS`."""
    size: int
    """Bytes of its blocks; 0 for another name of an inode that was listed before."""
    is_dir: bool = False


def usage(
    upper: UpperLayer,
    root: Key,
    private: Key | None,
    lowers: Sequence[LowerLayer],
    prefix: bytes,
    frozen: Sequence[LowerLayer] = (),
    others: Sequence[Key] = (),
) -> Iterator[Used | None]:
    """Yield the space of each inode of a store, and None before each. Blocks as the layers do; OSError.

    *root* is the directory of the changes, *private* that of the store's own files, if it has one. *frozen*
    are the layers of checkpoints below *root*; their contents are listed under the paths that they had then.
    *others* are the directories of the other checkpoints.
    """
    seen: set[int] = set()
    yield from _Usage(upper, [*frozen, *lowers], prefix, seen).run(root)
    for number, layer in enumerate(frozen):
        below = [*frozen[number + 1 :], *lowers]
        yield from _Usage(layer, below, prefix, seen).run(layer.root)
    trash = None if private is None else upper.lookup(private, b"trash")
    if trash is not None:
        yield from _all_of(upper, trash[0], "trash", seen)
    for other in others:
        yield from _all_of(upper, other, "checkpoints", seen)


class _Usage:
    def __init__(
        self, upper: LowerLayer, lowers: Sequence[LowerLayer], prefix: bytes, seen: set[int]
    ) -> None:
        self._upper = upper
        self._xattrs = XattrFormat(prefix)
        self._view = LowerView(Stack(lowers, self._xattrs))
        self._seen = seen
        self._moved: dict[bytes, bytes] = {}

    def run(self, root: Key) -> Iterator[Used | None]:
        self._moved = yield from renamed(self._upper, root, self._xattrs)
        yield Used(b"", "directories", self._upper.stat(root).st_blocks * _BLOCK, is_dir=True)
        waiting: list[tuple[bytes, Key, Lower | None, bytes]] = [(b"", root, self._view.root(), b"")]
        while waiting:
            path, directory, base, base_path = waiting.pop()
            below = []
            names = set()
            for entry in entries(self._upper, directory):
                if entry is None:
                    yield None
                else:
                    names.add(entry.name)
            for name in (yield from in_order(names)):
                yield None
                try:
                    used, inside = self._entry(directory, name, join(path, name), base, join(base_path, name))
                except GONE:
                    continue
                yield used
                if inside is not None:
                    below.append(inside)
            waiting += reversed(below)
            if directory is not root:
                self._upper.forget(directory)
            if base is not None:
                self._view.forget(base)

    def _entry(
        self, directory: Key, name: bytes, path: bytes, base: Lower | None, natural: bytes
    ) -> tuple[Used | None, tuple[bytes, Key, Lower | None, bytes] | None]:
        hit = self._upper.lookup(directory, name)
        if hit is None:
            return None, None
        key, attr = hit
        size = _size_of(attr, self._seen)
        if is_whiteout(self._upper, key, attr, self._xattrs):
            self._upper.forget(key)
            return Used(path, "whiteouts", size), None
        notes = notes_of(self._upper, key, self._xattrs) or {}
        source = source_of(notes, attr, natural.rpartition(b"/")[0], self._xattrs)
        if source is not None:
            natural, found = source, self._view.resolve(source)
        else:
            found = None if base is None or natural in self._moved else self._view.lookup(base, name)
        if stat.S_ISDIR(attr.st_mode):
            reason = "new" if found is None else "directories"
            merged = found if found is not None and found.is_dir else None
            return Used(path, reason, size, is_dir=True), (path, key, merged, natural)
        if self._xattrs.is_metacopy(notes, attr):
            reason = "metadata"
        else:
            reason = "new" if found is None else "changed"
        if found is not None:
            self._view.forget(found)
        self._upper.forget(key)
        return Used(path, reason, size), None


def _all_of(upper: UpperLayer, root: Key, reason: str, seen: set[int]) -> Iterator[Used | None]:
    waiting = [root]
    while waiting:
        here = waiting.pop()
        yield Used(b"", reason, upper.stat(here).st_blocks * _BLOCK)
        for entry in entries(upper, here):
            yield None
            if entry is None:
                continue
            hit = upper.lookup(here, entry.name)
            if hit is None:
                continue
            if stat.S_ISDIR(hit[1].st_mode):
                waiting.append(hit[0])
            else:
                yield Used(b"", reason, _size_of(hit[1], seen))
                upper.forget(hit[0])
        if here is not root:
            upper.forget(here)


def _size_of(attr: Attr, seen: set[int]) -> int:
    """Return the bytes of an inode's blocks; 0 if it was *seen* under another name."""
    if attr.st_nlink > 1 and not stat.S_ISDIR(attr.st_mode):
        if attr.st_ino in seen:
            return 0
        seen.add(attr.st_ino)
    return attr.st_blocks * _BLOCK
