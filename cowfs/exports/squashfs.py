"""Write a squashfs image, by piping a tar archive to tar2sqfs (squashfs-tools-ng).

mksquashfs also reads archives, but always gives the root directory the current time.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cowfs.errors import SystemFailure, os_error
from cowfs.exports.entries import Entry, Tick
from cowfs.exports.losses import Losses
from cowfs.exports.tar import Tar
from cowfs.linux import programs

COMPRESSIONS = ("gzip", "xz", "zstd", "lz4", "lzo")
_KEPT = (b"user.", b"trusted.", b"security.")
_SECOND = 1_000_000_000
_FULL = 1 << 20
"""A disk with fewer free bytes counts as full."""
_LATEST = (1 << 32) - 1
"""The latest time in a squashfs, in seconds since the epoch: 32 bits, unsigned."""


class Squashfs:
    """A :class:`cowfs.exports.entries.Sink` that writes to tar2sqfs."""

    def __init__(self, tar: Tar, losses: Losses) -> None:
        self._tar = tar
        self._losses = losses

    def add(self, entry: Entry) -> None:
        seconds, nanoseconds = divmod(entry.mtime_ns, _SECOND)
        if nanoseconds:
            self._losses.add("times rounded to seconds", entry.path, exact=False)
        if not 0 <= seconds <= _LATEST:
            self._losses.add("times that are not between 1970 and 2106", entry.path)
            seconds = min(max(seconds, 0), _LATEST)
        self._tar.add(replace(entry, mtime_ns=seconds * _SECOND))

    def whiteout(self, path: bytes) -> None:
        self._tar.whiteout(path)


@contextmanager
def making(
    fd: int, losses: Losses, tick: Tick, style: str, compression: str, made: int
) -> Iterator[Squashfs]:
    """Let tar2sqfs write a squashfs to *fd*, with what the block adds; wait for it at the end.

    *made*, the time of creation, is in seconds since the epoch. SystemFailure if tar2sqfs fails.
    """
    program = programs.find("tar2sqfs")
    if program is None:
        raise SystemFailure("tar2sqfs is not installed", "apt install squashfs-tools-ng")
    made = min(max(made, 0), _LATEST)
    options = ["--quiet", "--no-skip", "--force", "--exportable", "--compressor", compression]
    command = [program, *options, "--defaults", f"mtime={made}", f"/proc/self/fd/{fd}"]
    command = programs.dying_with_us(command)  # it would go on for hours with the holes of a large file
    environment = programs.environment() | {"SOURCE_DATE_EPOCH": str(made)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, pass_fds=[fd],
            start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            tar = Tar(process.stdin.write, losses, tick, style, accepts=_keeps)
            try:
                yield Squashfs(tar, losses)
                tar.close()
                process.stdin.close()
            except BrokenPipeError:
                raise _failure(process, said.fileno(), fd) from None
            if process.wait():
                raise _failure(process, said.fileno(), fd)
        except BaseException:
            process.kill()
            process.wait()
            raise


def _keeps(name: bytes, _: bytes) -> bool:
    return name.startswith(_KEPT)


def _failure(process: subprocess.Popen[bytes], said: int, fd: int) -> Exception:
    """Return the error: ENOSPC if the disk is full, which tar2sqfs does not report, or SystemFailure."""
    process.wait()
    room = os.fstatvfs(fd)
    if room.f_bavail * room.f_frsize < _FULL:
        return os_error(errno.ENOSPC)
    size = os.fstat(said).st_size
    lines = os.pread(said, 4096, max(size - 4096, 0)).decode(errors="replace").strip().splitlines()
    return SystemFailure(f"tar2sqfs failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
