"""One user reads what is long to decompress, and the others notice nothing of it."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path

from tests.support.mounts import mounted
from tests.support.system import needs_fuse

PIECE, PIECES = 16 << 20, 12


def archive() -> bytes:
    """A zip archive of 200 KB with a member of 192 MiB: to read its end is long work."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(PIECE)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = piece * PIECES + packer.flush()
    name, size = b"big", PIECE * PIECES
    facts = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0)
    entry = b"PK\1\2" + b"\x14\3" + facts + struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, 0) + name
    start = b"PK\3\4" + facts + name + data
    return start + entry + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(start), 0)


@needs_fuse
def test_others_are_served_while_one_decompresses(tmp_path: Path) -> None:
    (tmp_path / "lower.zip").write_bytes(archive())
    with mounted(tmp_path / "lower.zip", tmp_path / "mnt") as here:
        fd = os.open(here.path / "big", os.O_RDONLY)
        begins, is_read = threading.Event(), threading.Event()

        def read() -> None:
            begins.set()
            assert os.pread(fd, 10, PIECE * (PIECES - 1)) == bytes(10)
            is_read.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert begins.wait(60)
        served = 0
        while not is_read.is_set():
            assert not (here.path / f"absent {served}").exists()
            served += 1
        thread.join()
        os.close(fd)
    assert served > 5
