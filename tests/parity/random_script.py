"""Random operations on a tree, the same for the same seed as long as the trees behave the same.

They use few names, so that each name sees many operations. Standard library only.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.parity.script import RENAME_EXCHANGE, RENAME_NOREPLACE, attempt, renameat2
from tests.parity.trees import directory, link, opaque, symlink, whiteout
from tests.support.call_things import link_followed
from tests.support.tree import EPOCH_NS, Node, Tree

DEEPEST = 5
"""The maximum depth of new directories."""
SLOTS = 4
"""The number of files that are open at the same time."""
_LOOK = 25
"""The number of steps between walks of the tree."""

TOP: Tree = {
    "a/a": b"top\n",
    "a/b/c": b"top\n",
    "b": opaque(),
    "b/d": b"new\n",
    "c/e": whiteout(),
    "d": b"a file\n",
}
BOTTOM: Tree = {
    "a/a": b"below\n",
    "a/b/a": b"below\n",
    "a/b/e": Node(data=b"long" * 2000, mode=0o755),
    "a/d/a": b"deep\n",
    "a/d/b": symlink("a"),  # it never leads out of the tree, even after renames
    "b/a": b"hidden\n",
    "c/a": b"linked\n",
    "c/b": link("c/a"),
    "a/e": link("c/a"),
    "c/c": Node("fifo"),
    "c/d": directory(0o700),
    "c/e": b"hidden\n",
    "d/a": b"hidden\n",
    "e/a/b/c": b"deepest\n",
    "e/b": Node(data=b"x", xattrs={"user.b": b"2"}),
    "e/c": symlink("a"),
}


class RandomScript:
    """Operations on the tree at *root*, with their results in :attr:`results`."""

    NAMES: Sequence[str] = ("a", "b", "c", "d", "e")

    def __init__(self, root: str, seed: int) -> None:
        self.root = root
        self.results: list[tuple[str, Any]] = []
        self._chance = random.Random(seed)
        self._there: list[str] = []
        self._open: list[int] = [-1] * SLOTS
        self._operations: list[tuple[Callable[[], None], int]] = [
            (self._create, 10), (self._write, 8), (self._truncate, 4), (self._unlink, 5), (self._mkdir, 9),
            (self._rmdir, 4), (self._rename, 14), (self._link, 5), (self._symlink, 1), (self._chmod, 4),
            (self._chown, 2), (self._utime, 2), (self._xattr, 4), (self._read, 6), (self._list, 3),
            (self._stat, 6), (self._mknod, 2), (self._use_slot, 10), (self._open_slot, 6), (self._tmpfile, 2),
            (self._cut, 2), (self._copy, 2), (self._mode_of_directory, 2),
        ]  # fmt: skip

    def go_on(self, steps: int) -> None:
        """Do *steps* more operations."""
        acts, weights = zip(*self._operations, strict=True)
        for number, act in enumerate(self._chance.choices(acts, weights, k=steps)):
            if number % _LOOK == 0:
                self._there = self._walk()
            act()

    def close(self) -> None:
        """Close all files, so that the tree can be unmounted."""
        for slot, fd in enumerate(self._open):
            if fd >= 0:
                os.close(fd)
            self._open[slot] = -1

    def _walk(self) -> list[str]:
        found = []
        for where, directories, files in os.walk(self.root):
            directories.sort()
            found += [os.path.relpath(f"{where}/{name}", self.root) for name in sorted(directories + files)]
        return found

    def _path(self) -> str:
        """Return a path, usually one that existed some steps ago."""
        if self._there and self._chance.random() < 0.65:
            return self._chance.choice(self._there)
        return "/".join(self._chance.choices(self.NAMES, k=self._chance.choice((1, 2, 2, 3, 3, 4))))

    def _new(self) -> str:
        """Return a new path, in a directory that existed some steps ago."""
        name = self._chance.choice(self.NAMES)
        above = self._chance.choice(["", *self._there])
        return f"{above}/{name}" if above and above.count("/") < DEEPEST else name

    def _do(self, said: str, operation: Callable[[], Any]) -> None:
        self.results.append((said, attempt(operation)))

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _on(self, path: str, flags: int, use: Callable[[int], Any]) -> Callable[[], Any]:
        at = self._at(path)

        def operation() -> Any:
            fd = os.open(at, flags | os.O_NONBLOCK, 0o640)
            try:
                return use(fd)
            finally:
                os.close(fd)

        return operation

    def _data(self) -> bytes:
        return bytes([self._chance.randrange(256)]) * self._chance.choice((1, 10, 100, 5000))

    def _create(self) -> None:
        path, data = self._new(), self._data()
        extra = self._chance.choice((0, os.O_EXCL, os.O_TRUNC, os.O_APPEND))
        self._do(
            f"create {path} {extra:#o}",
            self._on(path, os.O_CREAT | os.O_WRONLY | extra, lambda fd: os.write(fd, data)),
        )

    def _write(self) -> None:
        path, data, offset = self._path(), self._data(), self._chance.choice((0, 3, 4096, 9000))
        self._do(
            f"write {path} {len(data)} at {offset}",
            self._on(path, os.O_RDWR, lambda fd: os.pwrite(fd, data, offset)),
        )

    def _truncate(self) -> None:
        path, size = self._path(), self._chance.choice((0, 1, 5000, 20_000))
        self._do(f"truncate {path} {size}", lambda: os.truncate(self._at(path), size))

    def _unlink(self) -> None:
        path = self._path()
        self._do(f"unlink {path}", lambda: os.unlink(self._at(path)))

    def _mkdir(self) -> None:
        path = self._new()
        self._do(f"mkdir {path}", lambda: os.mkdir(self._at(path)))

    def _rmdir(self) -> None:
        path = self._path()
        self._do(f"rmdir {path}", lambda: os.rmdir(self._at(path)))

    def _rename(self) -> None:
        old, new = self._path(), self._new()
        flags = self._chance.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
        self._do(f"rename {old} {new} {flags}", lambda: renameat2(self._at(old), self._at(new), flags))

    def _link(self) -> None:
        old, new = self._path(), self._new()
        self._do(f"link {old} {new}", lambda: os.link(self._at(old), self._at(new), follow_symlinks=False))

    def _symlink(self) -> None:
        target, path = self._path(), self._new()
        self._do(f"symlink {target} {path}", lambda: os.symlink(target, self._at(path)))

    def _chmod(self) -> None:
        path, mode = self._path(), self._chance.choice((0o600, 0o755, 0o4711, 0o2770, 0o1777))
        self._do(f"chmod {path} {mode:o}", lambda: os.chmod(self._at(path), mode))

    def _mode_of_directory(self) -> None:
        path = self._path()
        self._do(
            f"fchmod {path}", self._on(path, os.O_RDONLY | os.O_DIRECTORY, lambda fd: os.fchmod(fd, 0o711))
        )

    def _chown(self) -> None:
        path, uid = self._path(), self._chance.choice((0, 5, 70_000))
        self._do(f"chown {path} {uid}", lambda: os.lchown(self._at(path), uid, uid))

    def _utime(self) -> None:
        path, when = self._path(), EPOCH_NS + self._chance.randrange(10**9)
        self._do(f"utime {path}", lambda: os.utime(self._at(path), ns=(when, when), follow_symlinks=False))

    def _xattr(self) -> None:
        path, name = self._path(), self._chance.choice(("user.a", "user.b", "trusted.a"))
        act, value = self._chance.choice(("set", "get", "remove", "list")), self._data()[:100]
        at = self._at(path)
        acts: dict[str, Callable[[], Any]] = {
            "set": lambda: os.setxattr(at, name, value, follow_symlinks=False),
            "get": lambda: os.getxattr(at, name, follow_symlinks=False),
            "remove": lambda: os.removexattr(at, name, follow_symlinks=False),
            "list": lambda: sorted(os.listxattr(at, follow_symlinks=False)),
        }
        self._do(f"{act}xattr {path} {name}", acts[act])

    def _read(self) -> None:
        path = self._path()
        self._do(f"read {path}", self._on(path, os.O_RDONLY, lambda fd: os.read(fd, 30_000)))

    def _list(self) -> None:
        path = self._path()
        self._do(f"list {path}", lambda: sorted(os.listdir(self._at(path))))

    def _stat(self) -> None:
        path = self._path()

        def operation() -> Any:
            info = os.lstat(self._at(path))
            is_directory = os.path.isdir(self._at(path)) and not os.path.islink(self._at(path))
            links_and_size = (0, 0) if is_directory else (info.st_nlink, info.st_size)
            return oct(info.st_mode), info.st_uid, info.st_gid, *links_and_size

        self._do(f"stat {path}", operation)

    def _mknod(self) -> None:
        path, kind = self._new(), self._chance.choice((0o010644, 0o100600, 0o140600, 0o020600))
        self._do(f"mknod {path} {kind:o}", lambda: os.mknod(self._at(path), kind, os.makedev(1, 3)))

    def _cut(self) -> None:
        path = self._path()
        self._do(f"ftruncate {path}", self._on(path, os.O_RDWR, lambda fd: os.ftruncate(fd, 12_345)))

    def _copy(self) -> None:
        source, target = self._path(), self._path()
        size = self._chance.choice((3, 5000))

        def operation() -> Any:
            data = self._on(source, os.O_RDONLY, lambda fd: os.pread(fd, size, 1))()
            return self._on(target, os.O_WRONLY, lambda fd: os.pwrite(fd, data, 2))()

        self._do(f"copy {source} {target}", operation)

    def _tmpfile(self) -> None:
        where, path, data = self._path(), self._new(), self._data()

        def use(fd: int) -> None:
            os.write(fd, data)
            link_followed(f"/proc/self/fd/{fd}", self._at(path))

        self._do(f"O_TMPFILE in {where}, then {path}", self._on(where, os.O_TMPFILE | os.O_RDWR, use))

    def _open_slot(self) -> None:
        slot, path = self._chance.randrange(SLOTS), self._path()
        flags = self._chance.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT))

        def operation() -> None:
            if self._open[slot] >= 0:
                os.close(self._open[slot])
                self._open[slot] = -1
            self._open[slot] = os.open(self._at(path), flags | os.O_NONBLOCK, 0o644)

        self._do(f"open {path} {flags:#o} as {slot}", operation)

    def _use_slot(self) -> None:
        slot, data, offset = self._chance.randrange(SLOTS), self._data(), self._chance.choice((0, 100, 6000))
        act, fd = self._chance.choice(("pread", "pread", "pwrite", "ftruncate", "size")), self._open[slot]
        acts: dict[str, Callable[[], Any]] = {
            "pread": lambda: os.pread(fd, 200, offset),
            "pwrite": lambda: os.pwrite(fd, data, offset),
            "ftruncate": lambda: os.ftruncate(fd, offset),
            "size": lambda: 0 if os.path.isdir(f"/proc/self/fd/{fd}") else os.fstat(fd).st_size,
        }
        self._do(f"{act} of {slot} at {offset}", acts[act] if fd >= 0 else lambda: None)
