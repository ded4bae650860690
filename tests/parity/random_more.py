"""Random operations with what :mod:`tests.parity.random_script` leaves out: ACLs that directories pass on,
groups, mmap(2), fallocate(2), copy_file_range(2), large attributes, long names, and names that are no text.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from tests.parity.random_script import RandomScript
from tests.support.call_things import link_followed

_LONG = "l" * 255
_NO_TEXT = os.fsdecode(b"\xff\xfe\n")
_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE, _ZERO, _INSERT = 1, 2, 8, 16, 32
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_EVERYBODY = 0xFFFFFFFF


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """Return the value of an ACL of (tag, permissions, id) (linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 0x10, 0x20
ACLS = (
    _acl((_USER_OBJ, 7, _EVERYBODY), (_GROUP_OBJ, 5, _EVERYBODY), (_OTHER, 1, _EVERYBODY)),
    _acl(
        *((_USER_OBJ, 6, _EVERYBODY), (_USER, 7, 5), (_GROUP_OBJ, 4, _EVERYBODY)),
        *((_MASK, 5, _EVERYBODY), (_OTHER, 0, _EVERYBODY)),
    ),
    _acl(
        *((_USER_OBJ, 7, _EVERYBODY), (_GROUP_OBJ, 7, _EVERYBODY), (_GROUP, 3, 70_000)),
        *((_MASK, 7, _EVERYBODY), (_OTHER, 7, _EVERYBODY)),
    ),
)


class MoreRandomScript(RandomScript):
    """See the module."""

    NAMES: Sequence[str] = ("a", "b", "c", _LONG, _NO_TEXT)

    def __init__(self, root: str, seed: int) -> None:
        super().__init__(root, seed)
        self._operations += [
            (self._acl, 6), (self._group, 4), (self._mmap, 6), (self._fallocate, 6), (self._range, 6),
            (self._large_xattr, 5), (self._tmpfile_with_all, 3), (self._sparse, 3), (self._umasked, 4),
        ]  # fmt: skip

    def _acl(self) -> None:
        path, name = self._path(), "system.posix_acl_" + self._chance.choice(("access", "default", "default"))
        act, value = self._chance.choice(("set", "set", "get", "remove")), self._chance.choice(ACLS)
        at = self._at(path)
        acts: dict[str, Callable[[], Any]] = {
            "set": lambda: os.setxattr(at, name, value, follow_symlinks=False),
            "get": lambda: os.getxattr(at, name, follow_symlinks=False),
            "remove": lambda: os.removexattr(at, name, follow_symlinks=False),
        }
        self._do(f"{act} {name} {path!r}", acts[act])

    def _group(self) -> None:
        """Make a directory one that passes on its group."""
        path, gid = self._path(), self._chance.choice((5, 70_000))

        def use(fd: int) -> None:
            os.fchown(fd, -1, gid)
            os.fchmod(fd, 0o2775)

        self._do(f"group {path!r} {gid}", self._on(path, os.O_RDONLY | os.O_DIRECTORY, use))

    def _umasked(self) -> None:
        path, umask, is_file = self._new(), self._chance.choice((0, 0o27, 0o77)), self._chance.random() < 0.5

        def operation() -> Any:
            before = os.umask(umask)
            try:
                if is_file:
                    os.close(os.open(self._at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o6777))
                else:
                    os.mkdir(self._at(path), 0o3777)
            finally:
                os.umask(before)

        self._do(f"make {path!r} with umask {umask:o}", operation)

    def _mmap(self) -> None:
        path, data, offset = self._path(), self._data()[:300], self._chance.choice((0, 10, 4000, 8192))

        def use(fd: int) -> Any:
            size = os.fstat(fd).st_size
            with mmap.mmap(fd, size) as view:
                before = view[offset : offset + 20]
                view[offset : offset + len(data)] = data
                view.flush()
                return before

        def operation() -> Any:
            try:
                return self._on(path, os.O_RDWR, use)()
            except (ValueError, IndexError) as error:  # it is empty, or too small
                return str(error)

        self._do(f"mmap {path!r} {len(data)} at {offset}", operation)

    def _fallocate(self) -> None:
        path = self._path()
        modes = (0, _KEEP_SIZE, *[_PUNCH_HOLE | _KEEP_SIZE] * 3, _ZERO, _COLLAPSE, _INSERT)
        mode, offset = self._chance.choice(modes), self._chance.choice((0, 4096, 5000))
        length = self._chance.choice((0, 1, 4096, 20_000))

        def use(fd: int) -> None:
            if _libc.fallocate(fd, mode, offset, length):
                raise OSError(ctypes.get_errno(), "fallocate")

        self._do(f"fallocate {path!r} {mode} {offset} {length}", self._on(path, os.O_RDWR, use))

    def _range(self) -> None:
        """Copy a range in the kernel. overlayfs cannot do that between two filesystems."""
        source, target = self._path(), self._path()
        length, offset, at = (self._chance.choice((1, 4096, 9000)) for _ in range(3))

        def copy(from_: int, to: int) -> Any:
            try:
                return os.copy_file_range(from_, to, length, offset, at)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                return os.pwrite(to, os.pread(from_, length, offset), at)

        self._do(
            f"copy_file_range {source!r} {target!r} {length} {offset} {at}",
            self._on(source, os.O_RDONLY, lambda fd: self._on(target, os.O_RDWR, lambda to: copy(fd, to))()),
        )

    def _large_xattr(self) -> None:
        path, name = self._path(), self._chance.choice(("user.a", "user.b", "trusted.a", "user." + "n" * 250))
        size, flags = self._chance.choice((0, 1500, 5000, 70_000)), self._chance.choice((0, 0, 1, 2))
        self._do(
            f"setxattr {path!r} {name} {size} {flags}",
            lambda: os.setxattr(self._at(path), name, b"v" * size, flags, follow_symlinks=False),
        )

    def _tmpfile_with_all(self) -> None:
        where, path, mode = self._path(), self._new(), self._chance.choice((0o600, 0o2755, 0o4711))
        final = self._chance.choice((0, os.O_EXCL))

        def use(fd: int) -> Any:
            os.ftruncate(fd, 9000)
            os.pwrite(fd, b"unnamed", 8000)
            os.fchown(fd, 5, 70_000)
            os.fchmod(fd, mode)
            os.setxattr(fd, "user.a", b"1")
            link_followed(f"/proc/self/fd/{fd}", self._at(path))
            return os.fstat(fd).st_nlink

        self._do(
            f"O_TMPFILE {final:#o} in {where!r}, then {path!r}",
            self._on(where, os.O_TMPFILE | os.O_RDWR | final, use),
        )

    def _sparse(self) -> None:
        path, size = self._path(), self._chance.choice((70_000, 300_000))

        def use(fd: int) -> Any:
            os.ftruncate(fd, size)
            os.pwrite(fd, b"end", size - 10)
            return os.pread(fd, 100, size - 50)

        self._do(f"sparse {path!r} {size}", self._on(path, os.O_RDWR, use))
