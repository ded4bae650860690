"""Find names in the lowers that changed because another hard link of the same inode was copied up.

The kernel's overlayfs, with ``index=on``, also puts the inode of a copied-up hard link into an index, under
its origin. The other names of the inode then show it too, although the upper has no entries for them.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field

from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.paths import join
from cowfs.changes.scan import entries
from cowfs.layers.base import Key, UpperLayer
from cowfs.overlay.index import Index
from cowfs.overlay.xattr_format import is_whiteout_device

_LEFT_OUT = {errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
"""Errors of directories that the user may not read, or that somebody removes meanwhile: they are left out."""


@dataclass(slots=True)
class Aliases:
    """The names in the lowers of the inodes in the index."""

    keys: dict[bytes, Key] = field(default_factory=dict)
    """Path in the lowers to inode in the index."""
    inside: dict[bytes, set[bytes]] = field(default_factory=dict)
    """Directory in the lowers to the names in it that lead to a path in ``keys``."""

    def add(self, path: bytes, key: Key) -> None:
        """Add a path and its inode in the index."""
        self.keys[path] = key
        while path:
            directory, _, name = path.rpartition(b"/")
            self.inside.setdefault(directory, set()).add(name)
            path = directory


def find_aliases(
    upper: UpperLayer, root: Key, index: Key, view: LowerView, within: Collection[bytes] = ()
) -> Generator[None, None, Aliases]:
    """Return the names of all indexed inodes in the lowers: all names, or those *within* some paths.

    If the index is empty, because no file with several names has changed, the lowers are not read. Otherwise
    they are listed until all names are found. Directories that the upper has below *root* come first, because
    the names of an inode are mostly near each other. Unreadable directories are left out. Blocks, but yields
    before each inode; OSError.
    """
    aliases = Aliases()
    wanted: set[bytes] = set()
    for entry in entries(upper, index):
        if entry is None:
            yield
        elif not entry.name.startswith(b"#"):
            wanted.add(entry.name)
    missing: dict[bytes, int] = dict.fromkeys(wanted, -1)  # names still to be found; -1: unknown
    if not missing:
        return aliases
    listed = Index(upper, index, wanted, view.format)
    for found in _linked_files(view, upper, root, within):
        if found is None:
            yield
            continue
        path, lower = found
        number, key = lower.places[0]
        hit = listed.named(view.layers[number].handle(key))
        links = lower.attr.st_nlink
        view.forget(lower)
        if hit is None:
            continue
        name, copy, attr = hit
        if is_whiteout_device(attr) or stat.S_ISDIR(attr.st_mode):
            missing.pop(name, None)
        else:
            aliases.add(path, copy)
            left = missing.pop(name, 0)
            left = (links if left < 0 else left) - 1
            if left > 0:
                missing[name] = left
        if not missing:
            break
    return aliases


def _names(view: LowerView, directory: Lower) -> Generator[None, None, Iterable[bytes]]:
    try:
        return (yield from view.names_by_steps(directory))
    except OSError as error:
        if error.errno not in _LEFT_OUT:
            raise
        return ()


def _linked_files(
    view: LowerView, upper: UpperLayer, upper_root: Key, within: Collection[bytes]
) -> Iterator[tuple[bytes, Lower] | None]:
    """Yield each name of an inode with several names in the merged lowers; the caller must forget the inode.

    Also yield None before each inode.
    """
    root = None if within else view.root()
    near: list[tuple[bytes, Lower, Key]] = [] if root is None else [(b"", root, upper_root)]
    far: list[tuple[bytes, Lower]] = []
    try:
        for path in within:
            found = view.resolve(path)
            if found is not None and found.is_dir:
                far.append((path, found))
            elif found is not None:
                yield path, found
        while near or far:
            base, directory, beside = near.pop() if near else (*far.pop(), None)
            for name in (yield from _names(view, directory)):
                yield None
                try:
                    lower = view.lookup(directory, name)
                except OSError as error:
                    if error.errno not in _LEFT_OUT:
                        raise
                    continue
                if lower is None:
                    continue
                if lower.is_dir:
                    hit = None if beside is None else upper.lookup(beside, name)
                    if hit is not None and stat.S_ISDIR(hit[1].st_mode):
                        near.append((join(base, name), lower, hit[0]))
                        continue
                    far.append((join(base, name), lower))
                    if hit is not None:
                        upper.forget(hit[0])
                elif lower.attr.st_nlink > 1:
                    yield join(base, name), lower
                else:
                    view.forget(lower)
            view.forget(directory)
            if beside is not None and beside is not upper_root:
                upper.forget(beside)
    finally:
        for _, directory, beside in near:
            view.forget(directory)
            if beside is not upper_root:
                upper.forget(beside)
        for _, directory in far:
            view.forget(directory)
