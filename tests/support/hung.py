"""FUSE mounts that never reply to a request."""

from __future__ import annotations

import os
import select
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSYS
from pathlib import Path

from cowfs.linux import mounts

_INIT = 26
_HEADER = struct.Struct("<IIQ")


@contextmanager
def hung(place: Path, source: str | None = None, user: int = 0) -> Iterator[int]:
    """Mount a FUSE filesystem of *user* that hangs; yield the descriptor of its connection."""
    place.mkdir()
    connection = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={connection},rootmode=40000,user_id={user},group_id={user},allow_other"
        mounts.mount(source or os.fspath(place), os.fspath(place), "fuse", 0, options)
        try:
            yield connection
        finally:
            mounts.umount2(os.fspath(place), mounts.MNT_DETACH)
    finally:
        os.close(connection)


@contextmanager
def hung_around_a_process(place: Path) -> Iterator[None]:
    """Mount a FUSE filesystem that hangs and is the working directory of a process."""
    with (
        hung(place, user=65534) as connection,
        subprocess.Popen(
            ["sh", "-c", 'cd "$1" && echo there && exec cat', "sh", place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        ) as process,
    ):
        assert process.stdin and process.stdout
        try:
            _answer_until(connection, process.stdout.fileno())
            yield
        finally:
            process.kill()


def _answer_until(connection: int, there: int) -> None:
    """Reply with ENOSYS until *there* can be read."""
    while there not in (ready := select.select([connection, there], [], [], 20)[0]):
        assert ready, "the process did not start"
        _, opcode, unique = _HEADER.unpack_from(os.read(connection, 1 << 18))
        if opcode == _INIT:
            body = struct.pack("<IIIIHHII36x", 7, 31, 0, 0, 0, 0, 4096, 1)
            os.write(connection, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)
        else:
            os.write(connection, struct.pack("<IiQ", 16, -ENOSYS, unique))
