"""A filesystem in memory, as simple as possible: what the union must look like.

It knows nothing of layers. The order of its checks is that of the kernel's VFS.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.direct import shown_content
from tests.support.tree import Snapshot, group_links

NOREPLACE, EXCHANGE = 1, 2
_numbers = itertools.count(1)


@dataclass(eq=False)
class Inode:
    """An inode. *mtime* is None if its value cannot be predicted."""

    kind: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    data: bytes = b""
    mtime: int | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, Inode] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_numbers))


def fail(code: int) -> OSError:
    """Return the error of the system call."""
    return OSError(code, os.strerror(code))


class Model:
    """The tree."""

    def __init__(self) -> None:
        self.root = Inode("dir", 0o755)

    # -- finding -----------------------------------------------------------------------------

    def find(self, path: str) -> Inode:
        """Return the inode at *path*."""
        inode = self.root
        for name in filter(None, path.split("/")):
            if inode.kind != "dir":
                raise fail(errno.ENOTDIR)
            if name not in inode.names:
                raise fail(errno.ENOENT)
            inode = inode.names[name]
        return inode

    def place(self, path: str) -> tuple[Inode, str]:
        """Return the parent and the last name."""
        parent, _, name = path.rpartition("/")
        inode = self.find(parent)
        if inode.kind != "dir":
            raise fail(errno.ENOTDIR)
        return inode, name

    def walk(self) -> Iterator[tuple[str, Inode]]:
        """Yield every path with its inode; the root is ``.``."""

        def below(path: str, inode: Inode) -> Iterator[tuple[str, Inode]]:
            yield path or ".", inode
            for name in sorted(inode.names):
                yield from below(f"{path}/{name}" if path else name, inode.names[name])

        return below("", self.root)

    def nlink(self, inode: Inode) -> int:
        """Return the number of names of a non-directory."""
        return sum(other is inode for _path, other in self.walk())

    # -- operations --------------------------------------------------------------------------

    def add(self, path: str, inode: Inode) -> None:
        """Add the name *path*, which must be free, to *inode*."""
        parent, name = self.place(path)
        if name in parent.names:
            raise fail(errno.EEXIST)
        parent.names[name] = inode
        parent.mtime = None

    def link(self, old: str, new: str) -> None:
        """link(2)."""
        inode = self.find(old)
        parent, name = self.place(new)
        if name in parent.names:
            raise fail(errno.EEXIST)
        if inode.kind == "dir":
            raise fail(errno.EPERM)
        parent.names[name] = inode
        parent.mtime = None

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        parent, name = self.place(path)
        if name not in parent.names:
            raise fail(errno.ENOENT)
        if parent.names[name].kind == "dir":
            raise fail(errno.EISDIR)
        del parent.names[name]
        parent.mtime = None

    def rmdir(self, path: str) -> None:
        """rmdir(2)."""
        parent, name = self.place(path)
        if name not in parent.names:
            raise fail(errno.ENOENT)
        if parent.names[name].kind != "dir":
            raise fail(errno.ENOTDIR)
        if parent.names[name].names:
            raise fail(errno.ENOTEMPTY)
        del parent.names[name]
        parent.mtime = None

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        """renameat2(2), with checks in the order of do_renameat2 and vfs_rename."""
        parent, name = self.place(old)
        new_parent, new_name = self.place(new)
        if name not in parent.names:
            raise fail(errno.ENOENT)
        inode, target = parent.names[name], new_parent.names.get(new_name)
        if f"{new}/".startswith(f"{old}/") and new != old:
            raise fail(errno.EINVAL)
        if f"{old}/".startswith(f"{new}/") and new != old:
            raise fail(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
        self._may_replace(inode, target, flags)
        if inode is target:
            return
        parent.mtime = new_parent.mtime = None
        if flags & EXCHANGE:
            assert target is not None
            parent.names[name], new_parent.names[new_name] = target, inode
            return
        del parent.names[name]
        new_parent.names[new_name] = inode

    def _may_replace(self, inode: Inode, target: Inode | None, flags: int) -> None:
        if flags & EXCHANGE:
            if target is None:
                raise fail(errno.ENOENT)
            return
        if target is None:
            return
        if flags & NOREPLACE:
            raise fail(errno.EEXIST)
        if inode is target:
            return
        if inode.kind == "dir" and target.kind != "dir":
            raise fail(errno.ENOTDIR)
        if target.kind == "dir" and inode.kind != "dir":
            raise fail(errno.EISDIR)
        if target.names:
            raise fail(errno.ENOTEMPTY)

    @staticmethod
    def write(inode: Inode, data: bytes, offset: int) -> None:
        """pwrite(2). Writing no data has no effect."""
        if not data:
            return
        before = inode.data[:offset].ljust(offset, b"\0")
        inode.data = before + data + inode.data[offset + len(data) :]
        inode.mtime = None

    @staticmethod
    def truncate(inode: Inode, size: int) -> None:
        """ftruncate(2)."""
        inode.data = inode.data[:size].ljust(size, b"\0")
        inode.mtime = None

    # -- looking -----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the tree in the form of :func:`tests.support.tree.snapshot`."""
        result: Snapshot = {}
        for path, inode in self.walk():
            facts: dict[str, object] = {
                "type": inode.kind,
                "mode": oct(inode.mode),
                "owner": f"{inode.uid}:{inode.gid}",
                "mtime": inode.mtime,
                "ino": inode.number,
                "xattrs": {name: value.hex() for name, value in sorted(inode.xattrs.items())},
            }
            if inode.kind != "dir":
                facts["nlink"] = self.nlink(inode)
            if inode.kind in {"file", "symlink"}:
                facts["size"] = len(inode.data)
            if inode.kind == "file":
                facts["content"] = shown_content(inode.data)
            if inode.kind == "symlink":
                facts["target"] = os.fsdecode(inode.data)
            result[path] = facts
        group_links(result)
        return result
