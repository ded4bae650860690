"""Mounts that note which requests get as far as Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import cowfs, force_umount, is_mounted, mount_arguments, project_root
from tests.support.squashfs import mksquashfs
from tests.support.system import run

# Mount, with a note of each request that gets as far as Python.
_NOTING = """
import sys
{first}
from cowfs.cli.main import main
from cowfs.fuse.adapter import Adapter

def noting(name, handler):
    def noted(self, *arguments):
        print(name, *(a for a in arguments if type(a) is bytes and len(a) < 100), file=notes)
        return handler(self, *arguments)
    return noted

def opening(init):
    def opened(self, *arguments, **more):
        global notes  # in the daemon, which keeps no file of its parent's and reaches none once it is mounted
        notes = open(sys.argv[1], "a", buffering=1)
        init(self, *arguments, **more)
    return opened

Adapter.__init__ = opening(Adapter.__init__)
for name in (
    "_beyond", "create", "fsyncdir", "getattr", "getxattr", "link", "listxattr", "lookup", "mkdir", "mknod",
    "opendir", "read", "readdir", "readlink", "releasedir", "rename", "setattr", "setxattr", "symlink",
    "unlink", "write",
):
    setattr(Adapter, name, noting(name, getattr(Adapter, name)))
sys.exit(main(sys.argv[2:]))
"""


class Noted:
    """A mount whose requests are counted."""

    def __init__(self, path: Path, notes: Path, log: Path, command: Sequence[str | os.PathLike[str]]) -> None:
        self.path = path
        self.log = log
        self._notes = notes
        self._command = command

    def start(self) -> None:
        """Mount."""
        run(*self._command, cwd=project_root())

    def remount(self) -> None:
        """Unmount, and mount again; count from here."""
        cowfs("umount", self.path, check=True)
        self.start()
        self.forget()

    def requests(self, kind: str, name: bytes = b"") -> int:
        """Return how many requests of this kind, or with this name, came since :meth:`forget`."""
        lines = [line.partition(" ") for line in self._notes.read_text().splitlines()]
        return sum(line[0] == kind and (not name or line[2] == repr(name)) for line in lines)

    def forget(self) -> None:
        """Count from here."""
        self._notes.write_text("")


@contextmanager
def noted_mount(
    tmp_path: Path, first: str = "", options: tuple[str, ...] = (), *, packed: bool = False
) -> Iterator[Noted]:
    lower, store, path = tmp_path / "lower", tmp_path / "store", tmp_path / "mnt"
    lower.mkdir()
    (lower / "file").write_bytes(b"below\n" * 1000)
    (lower / "large").write_bytes(b"below\n" * 200_000)
    (lower / "link").symlink_to("file")
    (lower / "d").mkdir()
    (lower / "d/small").write_bytes(b"small\n")
    (lower / "d/small").chmod(0o604)
    os.utime(lower / "d/small", (7, 7))
    (lower / "d/empty").touch()
    for number in range(100):
        (lower / f"d/{number}").mkdir(parents=True)
    path.mkdir()
    packed_lower = mksquashfs(tmp_path / "lower.sqsh", lower) if packed else lower
    (tmp_path / "notes").touch()
    log, notes = tmp_path / "log", tmp_path / "notes"
    mounting = mount_arguments(packed_lower, path, store, options=[f"log={log}", "passthrough=off", *options])
    noted = Noted(path, notes, log, [sys.executable, "-c", _NOTING.format(first=first), notes, *mounting])
    noted.start()
    try:
        yield noted
    finally:
        cowfs("umount", path)
        if is_mounted(path):
            force_umount(path)
