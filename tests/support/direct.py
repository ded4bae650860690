"""A union without FUSE: operations on paths in an :class:`Overlay`, as the kernel's VFS would do them.

Like the kernel, it counts its references to each inode, and gives them back later.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

from cowfs.layers.base import UpperLayer
from cowfs.layers.slow import SlowLayer
from cowfs.overlay.attr import NewAttributes
from cowfs.overlay.dir import Owner
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from cowfs.types import Attr
from cowfs.union import Union, UnionOptions, open_union
from tests.support.asking import Asking, serve, treat_lowers_as_slow
from tests.support.tree import NOT_OURS, PRIVATE, TYPES, Snapshot, group_links

EXCHANGE = 2


def failure(code: int) -> OSError:
    """Return the OSError with *code*, as the VFS would raise it."""
    return OSError(code, os.strerror(code))


class Direct:
    """A union that is opened in this process. Paths are relative to its root."""

    def __init__(
        self,
        store: str,
        lowers: Sequence[str],
        wrap: Callable[[UpperLayer], UpperLayer] = lambda layer: layer,
        *,
        slow: bool = False,
        fakeroot: bool = False,
    ) -> None:
        """Open the union; *wrap* wraps its upper, and *slow* treats its lowers as slow."""
        self._slow = slow
        self._options = UnionOptions(lowers=tuple(lowers), store=store, fakeroot=fakeroot)
        self._wrap = wrap
        self._taken: list[Node] = []
        self.caching = True
        """Whether to keep references, as the kernel does while it has memory for its cache."""
        self.union: Union
        self.fs: Overlay
        self._open()

    def _open(self) -> None:
        with treat_lowers_as_slow() if self._slow else nullcontext():
            self.union = open_union(self._options)
        self.fs = self.union.overlay
        self.fs.upper = self._wrap(self.fs.upper)
        if self._slow:
            for layer in self.fs.base:
                assert isinstance(layer, SlowLayer)
                serve(layer)
            self.fs = cast(Overlay, Asking(self.fs))

    def close(self) -> None:
        """Give all references back and close the union."""
        self.forget()
        self.union.close()

    def remount(self) -> None:
        """Close the union and open it again. No file may be open."""
        self.close()
        self._open()

    def reopen(self) -> None:
        """Open the closed union again."""
        self._open()

    def crash(self) -> None:
        """Close the union without giving references back, and open it again."""
        self._taken.clear()
        self.union.close()
        self._open()

    def forget(self) -> None:
        """Give all references back, the deepest first, like a kernel that drops its caches."""
        taken, self._taken = self._taken, []
        for node in reversed(taken):
            self.fs.forget(node, 1)

    def done(self) -> None:
        """End an operation: give its references back unless ``caching`` is true."""
        if not self.caching:
            self.forget()

    def take(self, node: Node) -> Node:
        """Count a reference to *node*; return it."""
        node.lookups += 1
        self._taken.append(node)
        return node

    # -- paths -------------------------------------------------------------------------------

    def find(self, path: str) -> Node:
        """Return the node at *path*. ENOENT, ENOTDIR."""
        node = self.fs.root
        for name in filter(None, path.split("/")):
            node = self._step(node, os.fsencode(name))
        return node

    def _step(self, node: Node, name: bytes) -> Node:
        if not node.is_dir:
            raise failure(errno.ENOTDIR)
        found = self.fs.lookup(node, name)
        if found is None:
            raise failure(errno.ENOENT)
        return self.take(found[0])

    def place(self, path: str) -> tuple[Node, bytes]:
        """Return the node of the parent directory, and the last name."""
        parent, _, name = path.rpartition("/")
        node = self.find(parent)
        if not node.is_dir:
            raise failure(errno.ENOTDIR)
        return node, os.fsencode(name)

    def exists(self, parent: Node, name: bytes) -> Node | None:
        """Return the node with this name; None if there is none."""
        found = self.fs.lookup(parent, name)
        return self.take(found[0]) if found else None

    # -- operations --------------------------------------------------------------------------

    def create(self, path: str, data: bytes = b"", mode: int = 0o644) -> None:
        """Create a file with *data*."""
        parent, name = self.place(path)
        node, _attr, file = self.fs.create(parent, name, mode, Owner(0, 0))
        self.take(node)
        handle = self.fs.attach(node, file)
        try:
            if data:
                self.fs.write(handle, data, 0)
        finally:
            self.fs.release_handle(handle)

    def open(self, path: str, flags: int) -> Handle:
        """Open a file; return its handle."""
        return self.fs.open(self.find(path), flags)

    def write(self, path: str, data: bytes, offset: int = 0, flags: int = os.O_WRONLY) -> None:
        """Open a file, write *data* and close it."""
        handle = self.open(path, flags)
        try:
            self.fs.write(handle, data, offset)
        finally:
            self.fs.release_handle(handle)

    def read(self, path: str) -> bytes:
        """Return the content of a file, up to 16 MiB."""
        node = self.find(path)
        handle = self.fs.open(node, os.O_RDONLY)
        try:
            return handle.file.pread(1 << 24, 0)
        finally:
            self.fs.release_handle(handle)

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """mkdir(2)."""
        self.take(self.fs.mkdir(*self.place(path), mode, Owner(0, 0))[0])

    def symlink(self, target: bytes, path: str) -> None:
        """symlink(2)."""
        self.take(self.fs.symlink(*self.place(path), target, Owner(0, 0))[0])

    def mknod(self, path: str, mode: int, rdev: int = 0) -> None:
        """mknod(2)."""
        self.take(self.fs.mknod(*self.place(path), mode, rdev, Owner(0, 0))[0])

    def link(self, old: str, new: str) -> None:
        """link(2)."""
        node = self.find(old)
        parent, name = self.place(new)
        if self.exists(parent, name) is not None:
            raise failure(errno.EEXIST)
        self.fs.link(node, parent, name)
        self.take(node)

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        self.fs.unlink(*self.place(path))

    def rmdir(self, path: str) -> None:
        """rmdir(2)."""
        self.fs.rmdir(*self.place(path))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        """renameat2(2). Like the VFS, this refuses to rename a directory into itself."""
        source, target = self.place(old), self.place(new)
        if self.exists(*source) is None:
            raise failure(errno.ENOENT)
        if f"{new}/".startswith(f"{old}/") and new != old:
            raise failure(errno.EINVAL)
        if f"{old}/".startswith(f"{new}/") and new != old:
            raise failure(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
        self.exists(*target)
        self.fs.rename(*source, *target, flags)

    def set(self, path: str, **values: Any) -> None:
        """setattr: mode, uid, gid, size, atime_ns, mtime_ns."""
        self.fs.setattr(self.find(path), NewAttributes(**values))

    def setxattr(self, path: str, name: bytes, value: bytes) -> None:
        """lsetxattr(2)."""
        self.fs.setxattr(self.find(path), name, value)

    def removexattr(self, path: str, name: bytes) -> None:
        """lremovexattr(2)."""
        self.fs.removexattr(self.find(path), name)

    def listdir(self, path: str) -> list[str]:
        """Return the sorted names in a directory."""
        return sorted(os.fsdecode(entry.name) for entry in self.fs.readdir(self.find(path)))

    # -- snapshots ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the merged tree in the form of :func:`tests.support.tree.snapshot`."""
        result: Snapshot = {}
        self._look(self.fs.root, "", result)
        group_links(result)
        return result

    @property
    def _lacks_link_counts(self) -> bool:
        """Whether a layer has no link counts of directories, as on btrfs, or is slow."""
        layers = [
            (self.fs.upper, self.fs.root.upper),
            *((self.fs.lowers[n], k) for n, k in self.fs.stack.roots),
        ]
        return any(layer.waits or layer.stat(key).st_nlink < 2 for layer, key in layers)

    def _look(self, node: Node, path: str, result: Snapshot) -> None:
        fs = self.fs
        facts = self._facts(node, fs.stat(node))
        result[path or "."] = facts
        if node.is_dir:
            inside = 0
            for entry in sorted(fs.readdir(node)):
                child = os.fsdecode(entry.name)
                found = self._step(node, entry.name)
                inside += found.is_dir
                self._look(found, f"{path}/{child}" if path else child, result)
            # The link count is right from the first stat on. It is 1 on filesystems without it, and if slow.
            assert facts["nlink"] in {2 + inside, 1 if self._lacks_link_counts else -1}, (
                path,
                facts["nlink"],
                inside,
            )

    def _facts(self, node: Node, attr: Attr) -> dict[str, Any]:
        kind = TYPES[stat.S_IFMT(attr.st_mode)]
        assert stat.S_IFMT(node.mode) == stat.S_IFMT(attr.st_mode)
        facts: dict[str, Any] = {
            "type": kind,
            "mode": oct(stat.S_IMODE(attr.st_mode)),
            "owner": f"{attr.st_uid}:{attr.st_gid}",
            "mtime": attr.st_mtime_ns,
            "ino": node.ino,
            "nlink": self.fs.nlink(node, attr),
            "xattrs": self._xattrs(node),
        }
        if kind in {"file", "symlink"}:
            facts["size"] = attr.st_size
        if kind in {"char", "block"}:
            facts["rdev"] = attr.st_rdev
        if kind == "symlink":
            facts["target"] = os.fsdecode(self.fs.readlink(node))
        if kind == "file":
            handle = self.fs.open(node, os.O_RDONLY)
            try:
                content = handle.file.pread(attr.st_size + 1, 0)
            finally:
                self.fs.release_handle(handle)
            facts["content"] = shown_content(content)
        return facts

    def _xattrs(self, node: Node) -> dict[str, str]:
        names = sorted(os.fsdecode(name) for name in self.fs.listxattr(node))
        return {
            name: self.fs.getxattr(node, os.fsencode(name)).hex()
            for name in names
            if name not in NOT_OURS and not name.startswith(PRIVATE)
        }


def shown_content(content: bytes) -> str:
    """Return *content* in the form that a snapshot has."""
    if len(content) <= 64:
        return repr(content)
    return f"{len(content)} bytes, hash {hashlib.blake2b(content, digest_size=8).hexdigest()}"
