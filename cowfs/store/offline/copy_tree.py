"""Copy a directory store with all its attributes, in passes: each copies what has changed since the last."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from cowfs.errors import StoreError
from cowfs.layers import beneath
from cowfs.linux import files

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_EMPTY = {b"work/work", b"cowfs/lock"}
"""Parts that belong to the mount that uses the store. They are not copied."""

_TICK_NS, _COARSE_TICK_NS = 20_000_000, 1_000_000_000
"""Two changes that are closer together, in ns, may get the same ctime: the kernel's clock ticks at least 100
times a second, and some filesystems store whole seconds."""

_State = tuple[int, int, int, int, int]
"""A state of an inode, including its ctime, which only the kernel sets. It differs after any change."""


class TreeCopy:
    """Makes the directory *target* a copy of *source*. Both are descriptors, which the caller closes.

    Owners, modes, times, extended attributes, devices, hard links and holes are kept. Nothing is left out:
    OSError with the path if something cannot be read or made; StoreError if something is mounted in *source*.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._ways = beneath.guarded(source)
        self._states: dict[bytes, _State] = {}
        self._links: dict[tuple[int, int], tuple[bytes, _State | None]] = {}
        """Inodes with several names that this pass has copied: the path in the target, and the state
        copied."""
        self._way: list[tuple[bytes, int, int]] = []
        """The directories down to the last one, each with its descriptors in both trees."""

    def run(self) -> Iterator[int]:
        """Do one pass; yield the number of bytes copied for each inode. Blocks; OSError.

        Takes two descriptors for each directory on the way down.
        """
        try:
            yield from self._pass()
        finally:
            self._leave_to(0)

    def _pass(self) -> Iterator[int]:
        self._links.clear()
        seen: set[bytes] = set()
        waiting = [(b"", False)]
        while waiting:
            path, is_full = waiting.pop()
            try:
                source, target = self._open(path)
            except (FileNotFoundError, NotADirectoryError):  # removed meanwhile: the next pass handles it
                continue
            if is_full:
                _set_attributes(os.fstat(source), source, _place(target, b"."))
                continue
            waiting.append((path, True))
            names = [] if path in _EMPTY else [os.fsencode(name) for name in os.listdir(source)]
            for name in {os.fsencode(name) for name in os.listdir(target)}.difference(names):
                _remove(target, name)
            for name in names:
                below = path + b"/" + name if path else name
                seen.add(below)
                copied = self._entry(source, target, name, below)
                if copied is None:
                    waiting.append((below, False))
                yield copied or 0
        for gone in self._states.keys() - seen:
            del self._states[gone]

    def _open(self, path: bytes) -> tuple[int, int]:
        """Return descriptors of a directory in both trees, valid until the next call."""
        names = path.split(b"/") if path else []
        same = beneath.shared(self._way, names)
        self._leave_to(same)
        for name in names[same:]:
            source, target = self._last()
            below = self._ways.open(source, name, _DIRECTORY)
            try:
                self._way.append((name, below, os.open(name, _DIRECTORY, dir_fd=target)))
            except OSError:
                os.close(below)
                raise
        return self._last()

    def _last(self) -> tuple[int, int]:
        return self._way[-1][1:] if self._way else (self._source, self._target)

    def _leave_to(self, depth: int) -> None:
        while len(self._way) > depth:
            _, source, target = self._way.pop()
            os.close(source)
            os.close(target)

    def _entry(self, source: int, target: int, name: bytes, path: bytes) -> int | None:
        """Copy the inode of a name if it has changed; return the bytes copied, or None for a directory."""
        try:
            now = beneath.now()
            info = self._ways.stat(source, name)
        except FileNotFoundError:  # removed meanwhile: the next pass handles it
            self._states.pop(path, None)
            with suppress(FileNotFoundError):
                _remove(target, name)
            return 0
        except OSError as error:
            if error.errno == errno.EXDEV:
                hint = "unmount it: what is there is not the store's"
                raise StoreError(f"{os.fsdecode(path)}: another filesystem is mounted there", hint) from None
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
        state = info.st_dev, info.st_ino, info.st_ctime_ns, info.st_size, info.st_mode
        if stat.S_ISDIR(info.st_mode):
            self._states.pop(path, None)
            try:
                os.mkdir(name, 0o700, dir_fd=target)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=target, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=target)
                    os.mkdir(name, 0o700, dir_fd=target)
            return None
        if self._stays(target, name, path, info, state):
            return 0
        with suppress(FileNotFoundError):
            _remove(target, name)
        try:
            wanted = state if _is_settled(info, now) else None
            size, copied = self._other(source, target, name, path, info, wanted)
        except FileNotFoundError:
            self._states.pop(path, None)
            with suppress(FileNotFoundError):
                _remove(target, name)
            return 0
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
        if copied is not None:
            self._states[path] = copied
        else:
            self._states.pop(path, None)
        return size

    def _stays(self, target: int, name: bytes, path: bytes, info: os.stat_result, state: _State) -> bool:
        """Whether the copy is still up to date, and the same inode as the copies of its other names."""
        if self._states.get(path) != state:
            return False
        if info.st_nlink < 2:
            return True
        first, _ = self._links.setdefault((info.st_dev, info.st_ino), (path, state))
        if first == path:
            return True
        made = os.stat(first, dir_fd=self._target, follow_symlinks=False)
        return os.path.samestat(made, os.stat(name, dir_fd=target, follow_symlinks=False))

    def _other(
        self,
        source: int,
        target: int,
        name: bytes,
        path: bytes,
        info: os.stat_result,
        state: _State | None,
    ) -> tuple[int, _State | None]:
        """Make a name in the target; return the number of bytes copied, and the state that was copied."""
        inode = info.st_dev, info.st_ino
        first = self._links.get(inode)
        if first is not None:
            os.link(first[0], name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
            return 0, first[1]
        size = 0
        fd = self._ways.open(source, name, os.O_PATH)
        try:
            if not _is_same(info, os.fstat(fd)):  # the next pass handles it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if stat.S_ISREG(info.st_mode):
                size = _copy_file(fd, target, name, 0 if path in _EMPTY else info.st_size)
            elif stat.S_ISLNK(info.st_mode):
                os.symlink(beneath.readlink(fd), name, dir_fd=target)
            else:
                os.mknod(name, stat.S_IFMT(info.st_mode) | 0o600, info.st_rdev, dir_fd=target)
            _set_attributes(info, fd, _place(target, name))
        finally:
            os.close(fd)
        if info.st_nlink > 1:
            self._links[inode] = path, state
        return size, state


def _is_settled(info: os.stat_result, now: int) -> bool:
    """Whether a change from *now* on gets another ctime."""
    return info.st_ctime_ns + (_TICK_NS if info.st_ctime_ns % 10**9 else _COARSE_TICK_NS) < now


def _is_same(info: os.stat_result, now: os.stat_result) -> bool:
    """Whether a name still has the same inode. Otherwise it may be another user's, or a fifo."""
    return os.path.samestat(info, now) and (info.st_mode, info.st_uid) == (now.st_mode, now.st_uid)


def _copy_file(source: int, target: int, name: bytes, size: int) -> int:
    with open(beneath.reopen(source, os.O_RDONLY | os.O_CLOEXEC), "rb", buffering=0) as reading:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=target), "r+b", buffering=0) as writing:
            if size and files.reflink(reading.fileno(), writing.fileno()):
                return 0
            os.ftruncate(writing.fileno(), size)
            for start, stop in files.segments(reading.fileno(), size):
                at = start
                while at < stop:
                    data = os.pread(reading.fileno(), min(1 << 20, stop - at), at)
                    if not data:
                        break  # the file has become shorter: the next pass handles it
                    done = 0
                    while done < len(data):
                        done += os.pwrite(writing.fileno(), memoryview(data)[done:], at + done)
                    at += len(data)
    return size


def _set_attributes(info: os.stat_result, source: int, target: bytes) -> None:
    """Set all attributes of a copy; the owner first, because setting it clears others."""
    os.chown(target, info.st_uid, info.st_gid, follow_symlinks=False)
    wanted = set(map(os.fsdecode, beneath.listxattr(source)))
    for extra in set(os.listxattr(target, follow_symlinks=False)) - wanted - {"security.selinux"}:
        os.removexattr(target, extra, follow_symlinks=False)
    for xattr in wanted - {"security.selinux"}:
        value = beneath.getxattr(source, os.fsencode(xattr))
        os.setxattr(target, xattr, value, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _place(directory: int, name: bytes) -> bytes:
    return b"/proc/self/fd/%d/%s" % (directory, name)


def _remove(directory: int, name: bytes) -> None:
    beneath.remove_tree(directory, name)
