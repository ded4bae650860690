"""Notice when somebody deletes, renames or replaces the store or the lowers of a mount."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cowfs.layers.base import LowerLayer, UpperLayer
from cowfs.linux import helper_process
from cowfs.linux.places import Inode, Places
from cowfs.linux.remote import may_wait
from cowfs.overlay.aufs import written_through
from cowfs.store.format.sizes import format_size
from cowfs.store.format.sniff import split_subdir
from cowfs.store.served.store import Store
from cowfs.url.names import is_url


def lost(store: Store) -> str:
    """Return why data written to a store cannot be found again later; "" if it can. Does not block."""
    if store.kind == "image" and store.fd >= 0:
        seen = os.fstat(store.fd)
        if stat.S_ISBLK(seen.st_mode):
            return ""
        store.most_bytes = max(store.most_bytes, seen.st_size)
        if not seen.st_nlink:
            return "its file was deleted"
        if seen.st_size < store.most_bytes:
            return f"its file was truncated to {format_size(seen.st_size)}"
    elif store.kind == "directory":
        with suppress(AttributeError):
            root: Any = written_through(store.layer).root
            if root.fd >= 0 and not os.fstat(root.fd).st_nlink:
                return "the directory was deleted"
        try:
            if not store.layer.stat(store.upper).st_nlink:
                return "its directory upper was deleted"
        except OSError:
            return "its directory upper was deleted, renamed or replaced"
    return ""


class Whereabouts:
    """Whether a store and its lowers are still where they were when they were opened."""

    mounts_move = False
    """Whether moved mounts are ignored."""

    def __init__(self, store: Store, lowers: Sequence[LowerLayer], paths: Sequence[str]) -> None:
        """*paths* are those of the lowers. Create the object before the mount."""
        self._store = store
        self._upper = store.upper
        self._names = [layer.name for layer in lowers]
        self._opened = [_opened_inode(store), *(None for _ in _PARTS)]
        for layer, path in zip(lowers, paths, strict=True):
            is_known = not layer.waits and os.path.isdir(path)  # an image's may be the root in it
            self._opened.append(_inode(_root(layer)) if is_known else None)
        elsewhere = helper_process.current()  # it opens them in the mounts that other processes see
        self._places = None if elsewhere is not None else Places(watched(store.path, paths))

    def of_store(self) -> str:
        """Return what happened to the store, without damage so far; "" for nothing."""
        return "" if lost(self._store) else _goes_on(self._change_of_store())

    def of_lowers(self) -> list[str]:
        """Return what happened to the lowers."""
        said = zip(self._names, self._changes()[1 + len(_PARTS) :], strict=False)
        return [f"{name}: {_goes_on(what)}" for name, what in said if what]

    def described(self) -> list[str]:
        """Return what happened to the store and the lowers, each with its name."""
        store = self.of_store()
        return [*([f"{self._store.path}: {store}"] if store else []), *self.of_lowers()]

    def is_in_place(self) -> bool:
        """Whether the store's path still leads to that store."""
        return not self._change_of_store()

    def store_is_at(self, fd: int) -> None:
        """Watch the store at *fd* (O_PATH) from now on: it was in memory before. May wait for a disk."""
        if may_wait(fd):
            return
        self._opened[0] = _inode(self._store.fd)
        if self._places is not None:
            self._places.put(0, fd)
        elif (elsewhere := helper_process.current()) is not None:
            elsewhere.ask("store", [fd])

    def close(self) -> None:
        if self._places is not None:
            self._places.close()

    def _change_of_store(self) -> str:
        whole, *parts = self._changes()[: 1 + len(_PARTS)]
        if self._store.upper is not self._upper:  # a checkpoint was made or restored
            parts[0] = ""
        found = (
            what.replace("the", f"its {part}", 1) for part, what in zip(_PARTS, parts, strict=True) if what
        )
        return whole or next(found, "")

    def _changes(self) -> list[str]:
        if self._places is not None:
            return self._places.changes(self._opened, mounts_move=self.mounts_move)
        elsewhere = helper_process.current()
        try:
            asked = None if elsewhere is None else elsewhere.ask("places", opened=self._opened)
        except OSError:  # the helper was killed
            asked = None
        return [""] * (1 + len(_PARTS)) if asked is None else list(asked["changes"])


_PARTS = ("upper", "work")


def watched(store: str, lowers: Sequence[str]) -> list[str]:
    """Return the paths of a store, and of its parts if it is a directory, then those of the lowers.

    For one of several stores in an image, it is the image's path. For memory and URLs, it is empty.
    """
    path = "" if store == "memory" else split_subdir(store)[0]
    parts = [path and os.path.join(path, part) for part in _PARTS]
    return [path, *parts, *("" if is_url(lower) else lower for lower in lowers)]


def _goes_on(change: str) -> str:
    return f"{change}; the mount continues with what it has open" if change else ""


def _opened_inode(store: Store) -> Inode | None:
    """Return the inode that should be at the path of a store."""
    if store.path == "memory":
        return None
    if store.is_apart:  # the path is the upper's; the layer's root has none
        upper = store.layer.stat(store.upper)
        return upper.st_dev, upper.st_ino
    return _inode(store.fd if store.kind == "image" else _root(written_through(store.layer)))


def _root(layer: LowerLayer | UpperLayer) -> int:
    return int(getattr(layer.root, "fd", -1))


def _inode(fd: int) -> Inode | None:
    if fd < 0:
        return None
    info = os.fstat(fd)
    return info.st_dev, info.st_ino
