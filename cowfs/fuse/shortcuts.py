"""Answers requests without a coroutine for each.

C calls these functions (``shortcuts.c``). They do what the handlers of the same names do if nothing has to be
awaited. Everything else is left to those handlers, including errors, because a handler knows what to retry.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cowfs.fuse import libfuse
from cowfs.fuse.open_directories import DOTS
from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.overlay import protect
from cowfs.overlay.dir import Owner, add_file, remove_file
from cowfs.overlay.node import APART, Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.protect import protection
from cowfs.overlay.readdir import Listing, plain_nodes
from cowfs.overlay.whole import copy_up_small
from cowfs.types import Attr

_TOO_LATE = 1 << 63
"""The first time in ns, in the year 2262, that does not fit into C's number."""
_AT_ONCE = 256
"""The most names that are listed in one answer, so that others need not wait."""
Made = tuple[int, int, int]
"""The number and generation of a new inode, and its number in the image."""
Plain = tuple[int, bytes, int, int, int]
"""A place in a listing, the name that stands before it, and what Made says; zeros for ``.`` and ``..``."""
Described = tuple[int, bytes, tuple[int, ...]]
"""The same with what :meth:`Shortcuts.lookup` returns."""
Entries = list[Plain | Described]


class Directories(NamedTuple):
    """Functions for open directories."""

    open: Callable[[int, int], int]
    """Open the directory of this inode for this user; return the handle number. OSError, FUSEError."""
    close: Callable[[int], None]
    """Close a handle number."""
    names: Callable[[int, int], Listing | None]
    """Return the names for a handle number and a place to begin at; None if finding them takes long."""


class Shortcuts:
    """The functions for one mount."""

    def __init__(
        self,
        fs: Overlay,
        upper: Ext3Layer,
        masked: Callable[[Node, int, int], int],
        is_quiet: Callable[[], bool],
        directories: Directories,
        capability_removed: set[int],
    ) -> None:
        """*upper* is the image; *masked* applies the umask to the mode of a new inode in a directory;
        *is_quiet* says whether no other request waits. *capability_removed* are the inodes whose capability
        the kernel has just removed."""
        self._directories = directories
        self._capability_removed = capability_removed
        self._is_quiet = is_quiet
        self._fs = fs
        self._upper = upper
        self._nodes = fs.nodes
        self._masked = masked

    def lookup(self, ino: int, name: bytes) -> tuple[int, ...] | bool | None:
        """Return what is known of *name* in the directory *ino*; False if there is nothing. None: ask the
        handler."""
        parent = self._nodes.get(ino)
        if parent is None:
            return None
        try:
            found = self._fs.lookup(parent, name)
            if found is None:
                return False
            return self._entry(*found) if _has_usual_times(found[1]) else None
        except Exception:
            return None

    def getattr(self, ino: int) -> tuple[int, ...] | None:
        """Return the same for the inode *ino*. None: ask the handler."""
        node = self._nodes.get(ino)
        if node is None:
            return None
        try:
            attr = self._fs.stat(node)
            return self._description(node, attr) if _has_usual_times(attr) else None
        except Exception:
            return None

    def _entry(self, node: Node, attr: Attr) -> tuple[int, ...]:
        """Describe a node, and count the kernel's reference to it."""
        described = self._description(node, attr)
        node.lookups += 1
        return described

    def _description(self, node: Node, attr: Attr) -> tuple[int, ...]:
        links = self._fs.nlink(node, attr)
        return (
            node.ino, node.generation, attr.st_mode, links, attr.st_uid, attr.st_gid, attr.st_rdev,
            attr.st_size, attr.st_blocks, attr.st_blksize,
            attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns,
        )  # fmt: skip

    def create(self, ino: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Made | None:
        """Create a regular file in the directory *ino*. None: ask the handler."""
        parent = self._directory(ino)
        if parent is None or name == libfuse.NO_NAME:
            return None
        try:
            mode = stat.S_IFREG | self._masked(parent, mode, umask)
            owner = Owner(uid, gid)
            node = add_file(self._fs, self._upper, parent, name, mode, owner)
            return _made(node or self._fs.mknod(parent, name, mode, 0, owner)[0])
        except Exception:
            return None

    def mkdir(self, ino: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Made | None:
        """Create a directory in the directory *ino*. None: ask the handler."""
        parent = self._directory(ino)
        if parent is None:
            return None
        try:
            mode = self._masked(parent, mode, umask)
            return _made(self._fs.mkdir(parent, name, mode, Owner(uid, gid))[0])
        except Exception:
            return None

    def symlink(self, ino: int, name: bytes, target: bytes, umask: int, uid: int, gid: int) -> Made | None:
        """Create a symbolic link in the directory *ino*; it has no umask. None: ask the handler."""
        del umask
        parent = self._directory(ino)
        if parent is None:
            return None
        try:
            return _made(self._fs.symlink(parent, name, target, Owner(uid, gid))[0])
        except Exception:
            return None

    def link(self, ino: int, parent_ino: int, name: bytes) -> tuple[int, ...] | None:
        """Give the inode *ino* of a file of the store another name. None: ask the handler."""
        parent, node = self._directory(parent_ino), self._nodes.get(ino)
        if parent is None or node is None or not _is_simple(node):
            return None
        try:
            if not _has_usual_times(self._fs.stat(node)):
                return None
            return self._entry(node, self._fs.link(node, parent, name))
        except Exception:
            return None

    def unlink(self, ino: int, name: bytes) -> bool | None:
        """Remove a name of a file of the store from the directory *ino*. None: ask the handler."""
        parent = self._directory(ino)
        node = None if parent is None else self._nodes.child(parent, name)
        if parent is None or node is None or not _is_simple(node):
            return None
        try:
            if not remove_file(self._fs, self._upper, parent, name, node):
                self._fs.unlink(parent, name)
            return True
        except Exception:
            return None

    def rename(self, ino: int, name: bytes, new_ino: int, new_name: bytes) -> bool | None:
        """Rename a file of the store, perhaps over another. None: ask the handler."""
        parent, new_parent = self._directory(ino), self._directory(new_ino)
        if parent is None or new_parent is None:
            return None
        node, target = self._nodes.child(parent, name), self._nodes.child(new_parent, new_name)
        if node is None or not _is_simple(node) or (target is not None and not _is_simple(target)):
            return None
        try:
            self._fs.rename(parent, name, new_parent, new_name)
            return True
        except Exception:
            return None

    def read(self, ino: int, size: int, offset: int) -> bytes | None:
        """Return data of a small file of an image below. None: ask the handler."""
        node = self._nodes.get(ino)
        found = None if node is None or ino & APART else self._image_below(node)
        if node is None or found is None:
            return None
        layer, key = found
        try:
            data = layer.read_small(key, size, offset, self._is_quiet)
            if data is not None and node.upper is not None and not libfuse.request()[2] & os.O_NOATIME:
                self._fs.was_read(node)
            return data
        except Exception:
            return None

    def _image_below(self, node: Node) -> tuple[SquashfsLayer, int] | None:
        """Return the squashfs image that has all data of a lower file or of a metacopy, and the key there."""
        if node.upper is None:
            if not isinstance(node.below, int):
                return None
        elif not node.metacopy or node.partial is not None or node.indexed is not None or node.dead:
            return None
        number, key = node.lowers[-1]
        layer = self._fs.lowers[number]
        # What wraps such a layer may wait.
        return (layer, key) if node.copying is None and type(layer) is SquashfsLayer else None

    def readlink(self, ino: int) -> bytes | None:
        """Return the target of a symbolic link. None: ask the handler."""
        node = self._nodes.get(ino)
        try:
            return None if node is None else self._fs.readlink(node)
        except Exception:
            return None

    def opendir(self, ino: int, uid: int) -> int | None:
        """Open the directory *ino*; return the handle number. None: ask the handler."""
        try:
            return self._directories.open(ino, uid)
        except Exception:
            return None

    def releasedir(self, number: int) -> bool:
        """Close an open directory; False: ask the handler."""
        try:
            self._directories.close(number)
            return True
        except Exception:
            return False

    def list(self, ino: int, number: int, start: int, space: int) -> Entries | None:
        """Return the names that follow *start*, as many as fit into *space* bytes. None: ask the handler."""
        node = self._nodes.get(ino)
        if node is None or node.children is None:
            return None
        entries: Entries = []
        try:
            names = self._directories.names(number, start)
            if names is None:
                return None
            for dots in range(start, DOTS):
                this = node if dots == 0 else self._fs.above(node)
                entries.append((dots + 1, b"." * (dots + 1), this.ino, 0, 0))
                space -= _size_of_entry(b"..")
            following = names.after(max(start - DOTS, 0))
            if node.upper is None or node.is_merged or ino & APART:
                return self._list_each(node, following, space, entries)
            return self._list_plain(node, following, space, entries)
        except Exception:
            return None

    def _list_plain(
        self, node: Node, following: Iterable[tuple[int, bytes]], space: int, entries: Entries
    ) -> Entries | None:
        """Add names of a directory that only the image has."""
        next_ones: list[tuple[int, bytes]] = []
        for place, name in following:
            space -= _size_of_entry(name)
            if space < 0 or len(next_ones) == _AT_ONCE:
                break
            next_ones.append((place, name))
        nodes = plain_nodes(self._fs, self._upper, node, [name for _, name in next_ones])
        if next_ones and not nodes:
            return None
        for (place, name), found in zip(next_ones, nodes, strict=False):
            found.lookups += 1
            entries.append((DOTS + place, name, *_numbers(found)))
        return entries

    def _list_each(
        self, node: Node, following: Iterable[tuple[int, bytes]], space: int, entries: Entries
    ) -> Entries | None:
        """Add names of any directory, up to the first that the handler must look up; None if that is the
        first of all, or if too many names are not shown."""
        for looked_up, (place, name) in enumerate(following):
            if _size_of_entry(name) > space:
                break
            described = self.lookup(node.ino, name) if looked_up < _AT_ONCE else None
            if described is None:
                return entries or None
            if isinstance(described, tuple):
                entries.append((DOTS + place, name, described))
                space -= _size_of_entry(name)
        return entries

    def copy_up(self, ino: int, in_place: bool) -> int:
        """Copy up a small file of an image below, for a write that C makes; or, *in_place*, a file of any
        size, for a change of owner, mode or times. Return its number in the store's image; 0: ask the handler
        to make the change.

        A metacopy already has what such a change needs. For it, the result has the number of blocks of its
        data, plus 1, in the bits from 32 on.
        """
        node = self._nodes.get(ino)
        if node is None or ino & APART:
            return 0
        try:
            if self._image_below(node) is None:
                return 0
            if node.upper is None:
                if not copy_up_small(self._fs, node, in_place=in_place):
                    return 0
            elif not in_place or protection(self._fs, node):
                return 0
            blocks = self._fs.stat(node).st_blocks + 1 if node.metacopy else 0
            return blocks << 32 | int(node.upper or 0)
        except Exception:
            return 0

    def has_no_capability(self, ino: int) -> bool:
        """Whether an inode is known to have no file capability, and none was removed a moment ago."""
        return not self._capability_removed and self.has_no_xattrs(ino)

    def has_no_xattrs(self, ino: int) -> bool:
        """Whether an inode is known to have no extended attributes at all."""
        node = self._nodes.get(ino)
        if node is None or ino & APART:
            return False
        try:
            if node.upper is not None:
                return not self._upper.listxattr(node.upper)
            number, key = node.lowers[0]
            layer = self._fs.lowers[number]
            return number >= 0 and isinstance(layer, SquashfsLayer) and not layer.listxattr(key)
        except Exception:
            return False

    def is_synced(self, ino: int) -> bool:
        """Whether a directory that the image has is on disk already, with its names."""
        node = self._directory(ino)
        if node is None or node.upper is None:
            return False
        return self._upper.image.directory_is_synced(node.upper)

    def _directory(self, ino: int) -> Node | None:
        """Return the node of a directory that the image has, and that need not be synchronous; else None."""
        node = self._nodes.get(ino)
        if node is None or node.upper is None or node.children is None or ino & APART:
            return None
        return node if node.protection == 0 or not protect.is_synchronous(self._fs, node) else None


def _has_usual_times(attr: Attr) -> bool:
    """Whether the times fit into C's numbers."""
    times = attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns
    return max(times) < _TOO_LATE and min(times) >= -_TOO_LATE


def _is_simple(node: Node) -> bool:
    """Whether a node is no directory, and the store has all of it."""
    return node.upper is not None and node.children is None and not node.metacopy and node.copying is None


def _made(node: Node) -> Made:
    """Count the kernel's reference to a new node, and describe it."""
    node.lookups += 1
    return _numbers(node)


def _numbers(node: Node) -> Made:
    assert node.upper is not None
    return node.ino, node.generation, node.upper


def _size_of_entry(name: bytes) -> int:
    """Return the size of an entry in the answer to READDIRPLUS (FUSE_DIRENTPLUS_SIZE in linux/fuse.h)."""
    return 152 + len(name) + 7 & ~7
