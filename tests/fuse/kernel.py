"""A stand-in for the kernel, which calls an adapter's handlers like pyfuse3."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import FUSEError

from cowfs.fuse.adapter import Adapter
from cowfs.overlay.overlay import Overlay

ROOT = pyfuse3.ROOT_INODE
CTX: Any = SimpleNamespace(uid=0, gid=0, pid=0, umask=0o022)
FIELDS = ("mode", "uid", "gid", "size", "atime", "mtime")


def changes(**values: int) -> tuple[Any, Any]:
    """Return the arguments of setattr: attributes, and the fields to set."""
    attr = pyfuse3.EntryAttributes()
    fields = SimpleNamespace(**{f"update_{name}": name in values for name in FIELDS})
    for name, value in values.items():
        setattr(attr, f"st_{name}", value)
    return attr, fields


@dataclass
class Page:
    """The kernel's buffer in readdir."""

    room: int
    names: list[bytes] = field(default_factory=list)
    inos: list[int] = field(default_factory=list)
    next: int = 0

    def reply(self, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        """Add an entry; return whether it fits."""
        if len(self.names) >= self.room:
            return False
        self.names.append(name)
        self.inos.append(entry.st_ino)
        self.next = next_id
        return True


def fake_readdir_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the adapter fill Pages."""

    def reply(page: Any, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        return bool(page.reply(name, entry, next_id))

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)


class Kernel:
    """Counts the references that it gets, and gives them back."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.given: dict[int, int] = {}

    def took(self, entry: pyfuse3.EntryAttributes) -> int:
        """Count a reference; return the inode number."""
        ino = int(entry.st_ino)
        if ino:
            self.given[ino] = self.given.get(ino, 0) + 1
        return ino

    async def find(self, path: str) -> int:
        """Return the inode number of a path. ENOENT."""
        ino = int(ROOT)
        for name in filter(None, path.split("/")):
            ino = self.took(await self.adapter.lookup(ino, name.encode(), CTX))
            if not ino:
                raise FUSEError(errno.ENOENT)
        return ino

    async def list(self, ino: int, room: int = 1000) -> list[bytes]:
        """Return all names of a directory, listed *room* at a time."""
        fh = await self.adapter.opendir(ino, CTX)
        names: list[bytes] = []
        start = 0
        while True:
            page = Page(room)
            await self.adapter.readdir(fh, start, page)  # type: ignore[arg-type]
            if not page.names:
                break
            names += page.names
            start = page.next
            self.count(page)
        await self.adapter.releasedir(fh)
        return names

    def count(self, page: Page) -> None:
        """Count the references of readdirplus, which gives none for . and .."""
        for name, ino in zip(page.names, page.inos, strict=True):
            if name not in {b".", b".."}:
                self.given[ino] = self.given.get(ino, 0) + 1

    async def forget_all(self) -> None:
        """Give all references back."""
        given, self.given = self.given, {}
        await self.adapter.forget(list(given.items()))


class Slow:
    """Delays the data of copy-ups, by the name of the file."""

    def __init__(self, fs: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gates: dict[bytes, threading.Event] = {}
        self.begun: list[bytes] = []
        self.failing: dict[bytes, OSError] = {}
        prepare = fs.prepare_copy_up

        def slow_prepare(node: Any, size: int | None = None) -> Any:
            job = prepare(node, size)
            if job is None:
                return None
            name, run = node.name, job.run
            self.begun.append(name)
            gate = self._gates.setdefault(name, threading.Event())

            def slow_run() -> None:
                if not gate.wait(20):
                    raise TimeoutError
                if name in self.failing:
                    raise self.failing.pop(name)
                run()

            setattr(job, "run", slow_run)  # noqa: B010 - its class does not matter
            return job

        monkeypatch.setattr(fs, "prepare_copy_up", slow_prepare, raising=False)

    def let_go(self, name: bytes) -> None:
        """Let copy-ups of this file proceed, now and later."""
        self._gates.setdefault(name, threading.Event()).set()

    def hold(self, name: bytes) -> None:
        """Delay later copy-ups of this file again."""
        self._gates[name] = threading.Event()
