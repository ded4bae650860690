"""Read the merged tree of a mounted union through system calls, as any program does."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress

from cowfs.changes.paths import join
from cowfs.changes.scan import GONE
from cowfs.changes.version import Node, Version
from cowfs.layers import beneath
from cowfs.layers.base import File
from cowfs.layers.kernel_file import KernelFile
from cowfs.types import Attr

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 20
_NO_XATTRS = {errno.ENODATA, errno.EOPNOTSUPP}


class MountedTree:
    """The tree below a directory (:class:`cowfs.changes.version.Tree`). It follows no symbolic links.

    A directory on which something else is mounted looks empty. Blocks; OSError.
    """

    def __init__(self, path: str) -> None:
        self._way: list[tuple[bytes, int]] = [
            (b"", os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        ]
        self._dev = os.fstat(self._way[0][1]).st_dev
        self.dev = f"{os.major(self._dev)}:{os.minor(self._dev)}"
        """The number of the mount's device, as in mountinfo."""
        self._ways = beneath.guarded(self._way[0][1])

    def close(self) -> None:
        while self._way:
            os.close(self._way.pop()[1])

    def node(self, path: bytes) -> Node | None:
        parent, _, name = path.rpartition(b"/")
        fd = self._directory(parent)
        if fd < 0:
            return None
        try:
            attr = os.stat(name or b".", dir_fd=fd, follow_symlinks=False)
        except GONE:
            return None
        place = b"/proc/self/fd/%d/%s" % (fd, name or b".")
        return Node(
            attr,
            (0, attr.st_dev, attr.st_ino),
            functools.partial(_xattrs, place),
            functools.partial(os.readlink, name, dir_fd=fd),
            functools.partial(_open, self._ways, name, fd),
        )

    def version(self, path: bytes) -> Version | None:
        """Return the version of the file at *path*; None if there is none. Its content is read later."""
        node = self.node(path)
        return None if node is None else Version(node.attr, functools.partial(self._read, path, node.attr))

    def _read(self, path: bytes, attr: Attr) -> bytes:
        """Return the content or the target of what :meth:`version` found. ESTALE if it was replaced."""
        if not (stat.S_ISREG(attr.st_mode) or stat.S_ISLNK(attr.st_mode)):
            return b""
        node = self.node(path)
        if node is None or stat.S_IFMT(node.attr.st_mode) != stat.S_IFMT(attr.st_mode):
            raise beneath.stale(b"/" + path)
        if stat.S_ISLNK(attr.st_mode):
            return node.target()
        with closing(node.open()) as file:
            return b"".join(_pieces(file, attr.st_size))  # it may grow meanwhile

    def names(self, path: bytes) -> set[bytes]:
        fd = self._directory(path)
        if fd < 0 or os.fstat(fd).st_dev != self._dev:
            return set()
        try:
            return set(map(os.fsencode, os.listdir(fd)))
        except OSError as error:
            raise OSError(error.errno, error.strerror, b"/" + path) from None  # *error* names the descriptor

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        numbers = {ino for _, _, ino in wanted}
        waiting = [b""] if numbers else []
        while waiting:
            base = waiting.pop()
            try:
                names = sorted(self.names(base))
            except PermissionError:
                continue  # the change may have been elsewhere in the tree
            for name in names:
                path = join(base, name)
                fd = self._directory(base)
                with suppress(*GONE):
                    attr = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISDIR(attr.st_mode):
                        waiting.append(path)
                    elif attr.st_ino in numbers and attr.st_dev == self._dev:
                        yield path

    def _directory(self, path: bytes) -> int:
        """Return a descriptor of the directory at *path*, valid until the next call; -1 if it is not one."""
        while self._way[-1][0] and not (path + b"/").startswith(self._way[-1][0] + b"/"):
            os.close(self._way.pop()[1])
        here, fd = self._way[-1]
        rest = path[len(here) :].strip(b"/")
        for name in rest.split(b"/") if rest else ():
            try:
                fd = self._ways.open(fd, name, _DIRECTORY)
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV}:
                    return -1
                raise
            here = join(here, name)
            self._way.append((here, fd))
        return fd


def _open(ways: beneath.Ways, name: bytes, fd: int) -> File:
    found = ways.open(fd, name, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise beneath.stale(name)
        return KernelFile(beneath.reopen(found, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(found)


def _pieces(file: File, size: int) -> Iterator[bytes]:
    at = 0
    while at < size and (piece := file.pread(min(_PIECE, size - at), at)):
        yield piece
        at += len(piece)


def _xattrs(place: bytes) -> dict[bytes, bytes]:
    values = {}
    try:
        for name in os.listxattr(place, follow_symlinks=False):
            with suppress(OSError):
                values[os.fsencode(name)] = os.getxattr(place, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_XATTRS:
            raise
    return values
