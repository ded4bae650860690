"""The directory that changes are applied to, and the temporary names in it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cowfs.errors import UsageError
from cowfs.layers import beneath
from cowfs.linux import files, locks
from cowfs.linux.sockets import open_control_directory
from cowfs.linux.trust import who_can_redirect

NOT_THERE = {errno.ENOENT, errno.ENOTDIR}
_PREFIX, _RANDOM = b".cowfs-apply-", 16
"""Temporary names: a prefix, and a number of random bytes."""
_LOCK = "applying"
"""The lock file, in the directory of the control sockets."""


class Root:
    """The directory to which changes are applied. No symbolic link and no mount leads out of it."""

    def __init__(self, path: str) -> None:
        """OSError. UsageError if another cowfs applies changes there, or another user controls the path."""
        self.path = path
        with ExitStack() as stack:
            self._given = beneath.open_given(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, self._given)
            reason = who_can_redirect(path, self._given)
            if reason is not None:
                raise UsageError(f"{path}: {reason}", "give the path of the directory itself")
            stack.enter_context(_alone(path, self._given))
            self._root, self._ways = beneath.enclosed(self._given)
            if self._root != self._given:
                stack.callback(os.close, self._root)
            self._release = stack.pop_all()
        self.magic = files.fs_magic(self._given)
        self._way: list[tuple[bytes, int]] = []
        """The directories on the way to the last path, each open."""

    def close(self) -> None:
        """Close it, so that other processes can apply changes there."""
        self._leave_to(0)
        self._release.close()

    def stat(self) -> os.stat_result:
        """Return the attributes of the directory itself."""
        return os.fstat(self._given)

    def fsid(self) -> int | None:
        """Return the filesystem ID (f_fsid of statvfs(3)); None if it has none."""
        return os.fstatvfs(self._given).f_fsid or None

    def sync(self) -> None:
        """Write everything to disk. Blocks. OSError."""
        files.syncfs(self._given)

    def directory(self, path: bytes) -> int:
        """Return a descriptor (O_PATH) of a directory, valid until the next call. ENOENT, ENOTDIR, EXDEV."""
        names = path.split(b"/") if path else []
        same = beneath.shared(self._way, names)
        self._leave_to(same)
        for name in names[same:]:
            beneath.check_name(name)
            above = self._way[-1][1] if self._way else self._root
            try:
                fd = self._ways.open(above, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError as error:
                code = errno.ENOTDIR if error.errno == errno.ELOOP else error.errno
                raise OSError(code, os.strerror(code or 0), b"/" + path) from None
            self._way.append((name, fd))
        return self._way[-1][1] if self._way else self._root

    def forget(self, path: bytes) -> None:
        """Forget the open directories below *path*, which is about to be replaced."""
        self._leave_to(path.count(b"/"))

    def open(self, path: bytes) -> int | None:
        """Open *path* with O_PATH; None if it does not exist. The caller closes the descriptor."""
        if not path:
            return os.dup(self._root)
        try:
            return self._ways.open(*self.place(path), os.O_PATH)
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            raise OSError(error.errno, error.strerror, b"/" + path) from None

    def place(self, path: bytes) -> tuple[int, bytes]:
        """Return the directory that contains *path*, valid until the next call, and the name in it.

        The root contains itself, as ``.``. EINVAL for a path that leads out of the root.
        """
        if not path:
            return self._root, b"."
        above, _, name = path.rpartition(b"/")
        beneath.check_name(name)
        return self.directory(above), name

    def stat_in(self, directory: int, name: bytes) -> os.stat_result | None:
        """Return the attributes of a name; None if it does not exist."""
        try:
            return self._ways.stat(directory, name)
        except FileNotFoundError:
            return None

    def enter(self, directory: int, name: bytes, flags: int) -> int:
        """Open a name in a directory, without following a symbolic link."""
        return self._ways.open(directory, name, flags)

    def remove(self, directory: int, name: bytes) -> None:
        """Remove a name in a directory, and everything below it."""
        beneath.remove_tree(directory, name, self._ways)

    def _leave_to(self, depth: int) -> None:
        while len(self._way) > depth:
            os.close(self._way.pop()[1])


@contextmanager
def _alone(path: str, fd: int) -> Iterator[None]:
    """Keep other processes of this user from applying changes to the directory *fd*.

    The lock is on a file that other users cannot open, so that they cannot hold it.
    """
    info = os.fstat(fd)
    place = locks.place_of(info.st_dev, info.st_ino)
    directory = open_control_directory()
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        if not locks.take_place(lock, place):
            who = locks.who_has_place(lock, place)
            by = "" if who is None else f" (pid {who})"
            raise UsageError(f"{path}: another cowfs{by} applies changes there", "wait until it ends")
        yield
    finally:
        os.close(lock)


def is_ours(name: bytes) -> bool:
    """Whether a name is a temporary one, as an interrupted apply leaves it."""
    random = name.removeprefix(_PREFIX)
    return random != name and len(random) == _RANDOM and not random.strip(b"0123456789abcdef")


def new_name() -> bytes:
    """Return a new temporary name."""
    return _PREFIX + secrets.token_hex(_RANDOM // 2).encode()
