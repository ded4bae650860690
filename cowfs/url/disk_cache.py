"""A disk cache of blocks of files on servers, shared by all mounts of a user: limited, and with checksums.

A file in the cache is one version of one file on a server. Its blocks are at their offsets, between holes,
behind a table with the SHA-256 of each cached block. A block is written first and its checksum afterwards,
and a block whose checksum does not match counts as missing. So several processes may write at the same time,
be killed, or lose power, and the disk may lose bits.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import random
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from cowfs.linux.trust import who_can_redirect
from cowfs.url.protocol import Version

log = logging.getLogger(__name__)

_MAGIC = b"cowfs blocks 1\n"
_HEAD = struct.Struct("<16sII")  # magic, size of a block, bytes of JSON that follow
_TABLE = 4096
"""Where the table of checksums begins."""
_SUM = 32
_NONE = bytes(_SUM)
_SUMS = 1024
"""How many of them are read at once."""
_END = ".blocks"
_LOOK = 16 << 20
"""After this many bytes written the total size is checked."""
_LOWEST = 0.9
"""To this part of the limit room is made."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def default_directory() -> str | None:
    """Return the directory of the user's cache, /var/cache for root; None for a user without a home."""
    if os.geteuid() == 0:
        return "/var/cache/cowfs"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        home = os.environ.get("HOME", "")
        if not home.startswith("/"):
            return None
        base = f"{home}/.cache"
    return f"{base}/cowfs"


def open_directory(path: str) -> int:
    """Return a descriptor of a directory for caches; create it if it is missing.

    OSError. EPERM if others can write there or control the path: they could decide what cowfs reads, and
    where its files are.
    """
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if who_can_redirect(there) is not None:
        raise PermissionError(errno.EPERM, "others can lead elsewhere")
    if not os.path.isdir(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise PermissionError(errno.EPERM, "others can write there")
    return fd


class DiskCache:
    """The blocks of one version of one file. Any thread may call the methods; none raises OSError."""

    def __init__(self, directory: int, url: str, version: Version, block: int, limit: int) -> None:
        """Takes over *directory*; *limit* is in bytes, for all files there. OSError."""
        self._directory = directory
        self._version = version
        self._block = block
        self._limit = limit
        self._count = -(-version.size // block)
        self._begin = _TABLE + -(-self._count * _SUM // 4096) * 4096
        self._written = _LOOK  # look at once
        self._making_room = threading.Lock()
        about = json.dumps({"url": url, **version.to_json()}, sort_keys=True)
        self._name = hashlib.sha256(f"{block} {about}".encode()).hexdigest()[:32] + _END
        try:
            self._fd = self._open(about.encode())
        except BaseException:
            os.close(directory)
            raise

    def _open(self, about: bytes) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        head = _HEAD.pack(_MAGIC, self._block, len(about)) + about[: _TABLE - _HEAD.size]
        for _ in range(2):
            fd = os.open(self._name, flags, 0o600, dir_fd=self._directory)
            try:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                    raise PermissionError(errno.EPERM, "others can write there")
                there = os.pread(fd, len(head), 0)
                if there in {head, b""}:
                    if not there:
                        os.pwrite(fd, head, 0)
                    os.utime(fd)  # make it the most recently opened
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            os.unlink(self._name, dir_fd=self._directory)
        raise OSError(errno.EIO, "another process writes there")

    def get(self, number: int) -> bytes | None:
        """Return a block if it is cached and intact. Reads from the disk."""
        try:
            known = os.pread(self._fd, _SUM, _TABLE + number * _SUM)
            if len(known) != _SUM or known == _NONE:
                return None
            size = min(self._block, self._version.size - number * self._block)
            data = os.pread(self._fd, size, self._begin + number * self._block)
        except OSError:
            return None
        return data if len(data) == size and hashlib.sha256(data).digest() == known else None

    def has(self, number: int) -> bool:
        """Whether a block is probably cached. Does not read it."""
        try:
            return os.pread(self._fd, _SUM, _TABLE + number * _SUM) not in {_NONE, b""}
        except OSError:
            return False

    def put(self, number: int, data: bytes) -> None:
        """Cache a block if there is space."""
        self._written += len(data)
        if self._written >= _LOOK and self._making_room.acquire(blocking=False):
            try:
                self._written = 0
                self._make_room()
            finally:
                self._making_room.release()
        try:
            os.pwrite(self._fd, data, self._begin + number * self._block)
            os.pwrite(self._fd, hashlib.sha256(data).digest(), _TABLE + number * _SUM)
        except OSError as error:
            self._written = _LOOK
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                log.debug("the cache on the disk: %s", error.strerror)

    def forget(self, number: int) -> None:
        """Remove a block from the cache."""
        with suppress(OSError):
            os.pwrite(self._fd, _NONE, _TABLE + number * _SUM)

    def _make_room(self) -> None:
        """Remove the files opened longest ago, and then blocks of this file in any order."""
        try:
            files = sorted(self._files())
            free = os.fstatvfs(self._directory)
            used = sum(size for _, size, _ in files)
            limit = min(self._limit, (used + free.f_bavail * free.f_frsize) // 2)
            if used <= limit:
                return
            for _, size, name in files:
                if used <= limit * _LOWEST:
                    return
                if name != self._name:
                    os.unlink(name, dir_fd=self._directory)  # a process that has it open can still use it
                    used -= size
            self._make_space(used - int(limit * _LOWEST))
        except OSError as error:
            log.debug("the cache on the disk: %s", error.strerror)

    def _files(self) -> list[tuple[float, int, str]]:
        """Return for each file when it was last opened, how many bytes it uses, and its name."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(_END):
                    with suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        found.append((info.st_mtime, info.st_blocks * 512, entry.name))
        return found

    def _make_space(self, size: int) -> None:
        for number in self._kept():
            if size <= 0:
                return
            self.forget(number)
            at = self._begin + number * self._block
            if _libc.fallocate(self._fd, _KEEP_SIZE | _PUNCH_HOLE, at, self._block):
                return  # this filesystem has no holes
            size -= self._block

    def _kept(self) -> Iterator[int]:
        """Yield the cached blocks, starting anywhere: their order of use is not recorded.

        Only reads the used part of the table, because a server may claim any file size.
        """
        begin = random.randrange(self._count)
        for number, end in ((begin, self._count), (0, begin)):
            while number < end:
                try:
                    there = os.lseek(self._fd, _TABLE + number * _SUM, os.SEEK_DATA)
                except OSError:  # ENXIO: there is no more data
                    break
                number = max(number, (there - _TABLE) // _SUM)
                sums = os.pread(self._fd, min(_SUMS, max(end - number, 0)) * _SUM, _TABLE + number * _SUM)
                for at in range(0, len(sums), _SUM):
                    if sums[at : at + _SUM] != _NONE:
                        yield number + at // _SUM
                number += _SUMS

    def close(self) -> None:
        with suppress(OSError):
            os.utime(self._fd, (time.time(), time.time()))
        os.close(self._fd)
        os.close(self._directory)
