"""A mount on a place of autofs, as for x-systemd.automount: who mounts must not wait for itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import COWFS
from tests.support.system import needs_fuse, needs_root

pytestmark = [
    needs_root,
    needs_fuse,
    pytest.mark.skipif("autofs" not in Path("/proc/filesystems").read_text(), reason="needs autofs"),
]

APART = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""With its own processes, so that none is left if it waits for itself."""
MANAGER = r"""
import ctypes, fcntl, os, struct, subprocess, sys, threading
place, *command = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
READY, EXPIRE_MULTI = 0x9360, 0x40049366  # linux/auto_fs.h
def mount(kind, data):
    if libc.mount(kind, place.encode(), kind, 0, data):
        raise OSError(ctypes.get_errno(), "mount")
os.setpgrp()
reading, writing = os.pipe()
mount(b"autofs", b"fd=%d,pgrp=%d,minproto=5,maxproto=5,direct" % (writing, os.getpgrp()))
os.close(writing)
here = os.open(place, os.O_RDONLY)
def asked():  # by the kernel, for someone outside of the group
    kind, token = struct.unpack_from("=4xiI", os.read(reading, 4096))
    return token
user = subprocess.Popen(["ls", place + "/"], start_new_session=True)
token = asked()
subprocess.run([*command, "mount", "lower", place, "--store", "store"], timeout=20, check=True)
fcntl.ioctl(here, READY, token)
user.wait()
expire = threading.Thread(target=lambda: fcntl.ioctl(here, EXPIRE_MULTI, struct.pack("i", 1)))
expire.start()
token = asked()
subprocess.run([*command, "umount", place], timeout=20, check=True)
fcntl.ioctl(here, READY, token)
expire.join()
os.close(here)
os.close(reading)
libc.umount2(place.encode(), 2)
print("expired", flush=True)
"""


def test_a_place_of_autofs(tmp_path: Path) -> None:
    for name in ("lower", "place"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/file").touch()
    place = tmp_path / "place"
    done = subprocess.run(
        [*APART, sys.executable, "-c", MANAGER, place, *COWFS],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["file", "expired"], done.stdout + done.stderr
    assert done.returncode == 0
