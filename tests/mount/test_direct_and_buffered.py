"""Reads return what was written last, with asynchronous direct writes beside buffered reads."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.support import mixed_io
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True
_libc = ctypes.CDLL(None, use_errno=True)
_SETUP, _GETEVENTS, _SUBMIT = 206, 208, 209  # of x86_64
PAGE, SECONDS = 4096, 2.0


def write_asynchronously(context: ctypes.c_ulong, fd: int, memory: mmap.mmap) -> None:
    """io_submit(2), and io_getevents(2)."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    block = ctypes.create_string_buffer(
        struct.pack("=QIIHhIQQqQII", 0, 0, 0, 1, 0, fd, address, PAGE, 0, 0, 0, 0)
    )
    pointer, events = ctypes.c_void_p(ctypes.addressof(block)), ctypes.create_string_buffer(32)
    assert _libc.syscall(_SUBMIT, context, 1, ctypes.byref(pointer)) == 1
    assert _libc.syscall(_GETEVENTS, context, 1, 1, events, None) == 1
    assert struct.unpack("=QQqq", events.raw)[2] == PAGE


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the system calls of x86_64")
def test_asynchronous_direct_writes(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    cowfs("create", tmp_path / "store", "64", check=True)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        path = here.path / "file"
        path.write_bytes(bytes(PAGE))
        context = ctypes.c_ulong()
        assert _libc.syscall(_SETUP, 4, ctypes.byref(context)) == 0
        direct, buffered = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDONLY)
        ended = threading.Event()

        def read_on() -> None:
            while not ended.is_set():
                os.pread(buffered, PAGE, 0)

        reader = threading.Thread(target=read_on)
        reader.start()
        memory, number, until = mmap.mmap(-1, PAGE), 0, time.monotonic() + SECONDS
        try:
            while time.monotonic() < until:
                number += 1
                wanted = struct.pack("=Q", number) * (PAGE // 8)
                memory[:] = wanted
                write_asynchronously(context, direct, memory)
                assert os.pread(buffered, PAGE, 0) == wanted, number
        finally:
            ended.set()
            reader.join()
            os.close(direct)
            os.close(buffered)


KINDS = {
    "image": (None, ()),
    "directory": (None, ()),
    "kernel": ("kernel", ()),
    "directory through the daemon": (None, ("passthrough=off",)),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the system calls of x86_64")
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        pytest.param("image", 1.5),
        pytest.param("directory", 1.5),
        *(pytest.param(kind, 20.0, marks=pytest.mark.nightly, id=f"{kind}, long") for kind in KINDS),
    ],
)
def test_every_mix(tmp_path: Path, kind: str, seconds: float) -> None:
    """Use a lower file, which is copied up meanwhile, and a new one."""
    (tmp_path / "lower").mkdir()
    content = os.urandom(50_000)
    (tmp_path / "lower" / "old").write_bytes(content)
    engine, options = KINDS[kind]
    if not kind.startswith("directory"):
        cowfs("create", tmp_path / "store", "64", check=True)
    with mounted(
        tmp_path / "lower", tmp_path / "mnt", tmp_path / "store", engine=engine, options=options
    ) as here:
        (here.path / "new").write_bytes(content)
        # Where the kernel reads the store itself, fuse_direct_IO() makes io_uring read on from the beginning.
        ends_short = kind not in {"directory", "kernel"}
        for name in ("old", "new"):
            seed = int.from_bytes(os.urandom(4))
            print("seed", seed)
            assert mixed_io.go_on(here.path / name, seed, seconds / 2, ends_short=ends_short)
