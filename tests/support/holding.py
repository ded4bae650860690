"""A FUSE filesystem that shows a directory and can delay requests.

Its arguments are the directory, the mountpoint and GATES.

While the directory GATES contains a file with the name of a request, for example ``read``, such requests wait
if they are for the name in the file. When one waits, it creates ``held-read``. A directory called ``endless``
has an endless list of names.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from tests.support.mounts import eventually, is_mounted, project_root


class Holding(pyfuse3.Operations):
    """The filesystem. The kernel caches nothing, so that each system call sends a request."""

    def __init__(self, source: str, gates: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: source}
        self._numbers = {source: pyfuse3.ROOT_INODE}
        self._gates = gates

    async def _pass(self, request: str, path: str) -> None:
        """Wait while the gate for *request* is closed for the name of *path*."""
        gate = f"{self._gates}/{request}"
        while True:
            try:
                with open(gate, encoding="utf-8") as file:
                    wanted = file.read()
            except FileNotFoundError:
                return
            if wanted != os.path.basename(path):
                return
            with open(f"{self._gates}/held-{request}", "w", encoding="utf-8"):
                pass
            await trio.sleep(0.005)

    def _attributes(self, path: str) -> EntryAttributes:
        try:
            info = os.lstat(path)
        except OSError as error:
            raise FUSEError(error.errno or 0) from None
        entry = EntryAttributes()
        number = self._numbers.setdefault(path, len(self._numbers) + 1)
        self._paths[number] = path
        entry.st_ino = number
        for name in ("mode", "nlink", "uid", "gid", "rdev", "size", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(entry, f"st_{name}", getattr(info, f"st_{name}"))
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        path = f"{self._paths[parent_inode]}/{os.fsdecode(name)}"
        await self._pass("lookup", path)
        return self._attributes(path)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        await self._pass("getattr", self._paths[inode])
        return self._attributes(self._paths[inode])

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        await self._pass("readlink", self._paths[inode])
        return os.fsencode(os.readlink(self._paths[inode]))

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        await self._pass("getxattr", self._paths[inode])
        try:
            return os.getxattr(self._paths[inode], name, follow_symlinks=False)
        except OSError as error:
            raise FUSEError(error.errno or 0) from None

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        await self._pass("listxattr", self._paths[inode])
        return [os.fsencode(name) for name in os.listxattr(self._paths[inode], follow_symlinks=False)]

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        path = self._paths[fh]
        await self._pass("readdir", path)
        if path.endswith("/endless"):
            while pyfuse3.readdir_reply(token, b"%040d" % start_id, self._attributes(path), start_id + 1):
                start_id += 1
            return
        names = sorted(os.listdir(path))
        for number, name in list(enumerate(names, 1))[start_id:]:
            if not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._attributes(f"{path}/{name}"), number
            ):
                return

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        await self._pass("open", self._paths[inode])
        return FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._pass("read", self._paths[fh])
        with open(self._paths[fh], "rb") as file:
            return os.pread(file.fileno(), size, off)

    async def flush(self, fh: int) -> None:
        await self._pass("flush", self._paths[fh])

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()

    async def release(self, fh: int) -> None:
        pass


def _main(source: str, mountpoint: str, gates: str) -> None:
    pyfuse3.init(Holding(source, gates), mountpoint, {"allow_other", "fsname=holding"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


class Lower:
    """The mounted filesystem, to use as a lower."""

    def __init__(self, path: Path, gates: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self._gates = gates
        self._process = process

    def hold(self, request: str, name: str) -> None:
        """Make requests of this kind for *name* wait."""
        new = self._gates / "new"
        new.write_text(name)
        new.rename(self._gates / request)

    def is_held(self, request: str) -> bool:
        """Return whether such a request waits, or has waited."""
        return (self._gates / f"held-{request}").exists()

    def let_go(self) -> None:
        """Let all waiting requests proceed."""
        for gate in self._gates.iterdir():
            gate.unlink()

    def die(self) -> None:
        """Kill the daemon, so that waiting and later requests fail."""
        self._process.kill()
        self._process.wait()


@contextmanager
def holding(source: Path, place: Path) -> Iterator[Lower]:
    """Mount *source* in *place*. Requests that still wait at the end fail."""
    at, gates = place / "held", place / "gates"
    at.mkdir()
    gates.mkdir()
    assert stat.S_ISDIR(source.stat().st_mode)
    command = [sys.executable, "-m", "tests.support.holding", str(source), str(at), str(gates)]
    environment = {**os.environ, "PYTHONPATH": project_root()}
    process = subprocess.Popen(command, env=environment)
    lower = Lower(at, gates, process)
    try:
        eventually(lambda: is_mounted(at) or process.poll() is not None, "the lower is mounted")
        yield lower
    finally:
        lower.die()
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
