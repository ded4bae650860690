"""The union without FUSE: paths on top of an :class:`Overlay`, doing what the kernel's VFS would do.

The kernel counts the references it has to each inode and gives them back later; so does this.
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
from tests.support.asking import Asking, all_wait, serve
from tests.support.tree import NOT_OURS, PRIVATE, Snapshot, group_links

EXCHANGE = 2
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def failure(code: int) -> OSError:
    """The OSError that the VFS itself would give."""
    return OSError(code, os.strerror(code))


class Direct:
    """A union opened in this process; paths are relative and their parts bytes-like strings."""

    def __init__(
        self,
        store: str,
        lowers: Sequence[str],
        wrap: Callable[[UpperLayer], UpperLayer] = lambda layer: layer,
        *,
        slow: bool = False,
    ) -> None:
        """*slow*: the lowers are such that may wait for others."""
        self._slow = slow
        self._options = UnionOptions(lowers=tuple(lowers), store=store)
        self._wrap = wrap
        self._taken: list[Node] = []
        self.caching = True
        """Whether the references are kept, as the kernel keeps its cache while there is memory."""
        self.union: Union
        self.fs: Overlay
        self._open()

    def _open(self) -> None:
        with all_wait() if self._slow else nullcontext():
            self.union = open_union(self._options)
        self.fs = self.union.overlay
        self.fs.upper = self._wrap(self.fs.upper)
        if self._slow:
            for layer in self.fs.base:
                assert isinstance(layer, SlowLayer)
                serve(layer)
            self.fs = cast(Overlay, Asking(self.fs))

    def close(self) -> None:
        """Give everything back and close the union."""
        self.forget()
        self.union.close()

    def remount(self) -> None:
        """Close and open again. No file may be open."""
        self.close()
        self._open()

    def reopen(self) -> None:
        """Open again what is closed."""
        self._open()

    def crash(self) -> None:
        """Close without giving anything back, and open again."""
        self._taken.clear()
        self.union.close()
        self._open()

    def forget(self) -> None:
        """Give all references back, the deepest first, as the kernel does when it drops its caches."""
        taken, self._taken = self._taken, []
        for node in reversed(taken):
            self.fs.forget(node, 1)

    def done(self) -> None:
        """One operation is over."""
        if not self.caching:
            self.forget()

    def take(self, node: Node) -> Node:
        """Count one reference."""
        node.lookups += 1
        self._taken.append(node)
        return node

    # -- paths -------------------------------------------------------------------------------

    def find(self, path: str) -> Node:
        """The node at *path*; ENOENT, ENOTDIR."""
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
        """The parent directory's node and the last name."""
        parent, _, name = path.rpartition("/")
        node = self.find(parent)
        if not node.is_dir:
            raise failure(errno.ENOTDIR)
        return node, os.fsencode(name)

    def exists(self, parent: Node, name: bytes) -> Node | None:
        """The node under a name."""
        found = self.fs.lookup(parent, name)
        return self.take(found[0]) if found else None

    # -- operations --------------------------------------------------------------------------

    def create(self, path: str, data: bytes = b"", mode: int = 0o644) -> None:
        """A new file with *data*."""
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
        """An open file."""
        return self.fs.open(self.find(path), flags)

    def write(self, path: str, data: bytes, offset: int = 0, flags: int = os.O_WRONLY) -> None:
        """Open, write, close."""
        handle = self.open(path, flags)
        try:
            self.fs.write(handle, data, offset)
        finally:
            self.fs.release_handle(handle)

    def read(self, path: str) -> bytes:
        """The whole content."""
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
        """renameat2(2); the VFS sees to it that neither is above the other."""
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
        """The names, sorted."""
        return sorted(os.fsdecode(entry.name) for entry in self.fs.readdir(self.find(path)))

    # -- looking -----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The merged tree, in the form of :func:`tests.support.tree.snapshot`."""
        result: Snapshot = {}
        self._look(self.fs.root, "", result)
        group_links(result)
        return result

    @property
    def _nobody_counts(self) -> bool:
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
            # As on ext3, from the first stat; where nobody counts them (btrfs), or that may wait, it is 1.
            assert facts["nlink"] in {2 + inside, 1 if self._nobody_counts else -1}, (
                path,
                facts["nlink"],
                inside,
            )

    def _facts(self, node: Node, attr: Attr) -> dict[str, Any]:
        kind = _KINDS[stat.S_IFMT(attr.st_mode)]
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
    """Content as a snapshot shows it."""
    if len(content) <= 64:
        return repr(content)
    return f"{len(content)} bytes, hash {hashlib.blake2b(content, digest_size=8).hexdigest()}"
