"""Every kind of request to a mount, including requests that fail. Each can be repeated."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cowfs.client import ask
from cowfs.errors import CowfsError

LOWER_FILES = 100


def lower_tree(lower: Path) -> None:
    """Create the files that the lower must have."""
    (lower / "below").mkdir(parents=True)
    for number in range(LOWER_FILES):
        (lower / "below" / f"{number}").write_text(f"{number}\n")


class Requests:
    """The requests to a mount. Use it as a context manager, because it keeps files open."""

    def __init__(self, mount: Path) -> None:
        self.at = os.fspath(mount)
        self.file, self.big, self.dir = f"{self.at}/file", f"{self.at}/big", f"{self.at}/dir"
        Path(self.file).write_text("some text")
        Path(self.big).write_bytes(b"x" * 300_000)
        os.makedirs(f"{self.dir}/full")
        Path(f"{self.dir}/full/x").touch()
        os.symlink("target", f"{self.at}/link")
        os.setxattr(self.file, "user.x", b"1")
        self.fd, self.big_fd = os.open(self.file, os.O_RDWR), os.open(self.big, os.O_RDWR)
        device = os.stat(self.at).st_dev
        self.dev = f"{os.major(device)}:{os.minor(device)}"
        self.kinds: dict[str, Callable[[int], object]] = {
            **self._attributes(),
            **self._failing(),
            **self._files(),
            **self._names(),
            **self._directories(),
            "control": self._control,
        }

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        os.close(self.big_fd)

    def _attributes(self) -> dict[str, Callable[[int], object]]:
        file = self.file
        return {
            "utime": lambda i: os.utime(file),
            "chmod": lambda i: os.chmod(file, 0o600 | i & 7),
            "truncate": lambda i: os.truncate(file, i & 63),
            "getxattr": lambda i: os.getxattr(file, "user.x"),
            "listxattr": lambda i: os.listxattr(file),
            "setxattr": lambda i: os.setxattr(file, "user.y", b"%d" % i),
            "setxattr and removexattr": _in_turn(
                lambda i: os.setxattr(file, "user.z", b"z"),
                lambda i: os.removexattr(file, "user.z"),
            ),
            "statvfs": lambda i: os.statvfs(self.at),
        }

    def _failing(self) -> dict[str, Callable[[int], object]]:
        at, file = self.at, self.file
        return {
            "getxattr of a capability": lambda i: fails(os.getxattr, file, "security.capability"),
            "the same of a directory": lambda i: fails(os.getxattr, self.dir, "security.capability"),
            "getxattr of a lower file": lambda i: fails(os.getxattr, f"{at}/below/0", "security.capability"),
            "getxattr, missing": lambda i: fails(os.getxattr, file, "user.missing"),
            "removexattr, missing": lambda i: fails(os.removexattr, file, "user.missing"),
            "setxattr, no such namespace": lambda i: fails(os.setxattr, file, "nonsense.y", b"y"),
            "stat, missing": lambda i: fails(os.stat, f"{at}/missing {i}"),
            "stat, too long": lambda i: fails(os.stat, f"{at}/" + "n" * 256),
            "open, missing": lambda i: fails(os.open, f"{at}/missing", os.O_RDONLY),
            "mkdir, there": lambda i: fails(os.mkdir, self.dir),
            "rmdir, full": lambda i: fails(os.rmdir, f"{self.dir}/full"),
            "link, there": lambda i: fails(os.link, file, self.big),
            "rename over a directory": lambda i: fails(os.rename, file, self.dir),
            "rename into itself": lambda i: fails(os.rename, self.dir, f"{self.dir}/full/y"),
            "unlink, missing": lambda i: fails(os.unlink, f"{at}/missing"),
            "mknod of a device 0:0": lambda i: make_null(f"{at}/null"),
            "lseek beyond": lambda i: fails(os.lseek, self.big_fd, 1 << 40, os.SEEK_DATA),
        }

    def _files(self) -> dict[str, Callable[[int], object]]:
        return {
            "open to write": lambda i: os.close(os.open(self.file, os.O_RDWR)),
            "open to truncate": lambda i: os.close(os.open(f"{self.at}/emptied", TRUNCATING, 0o600)),
            "open a lower file": lambda i: os.close(os.open(f"{self.at}/below/1", os.O_RDONLY)),
            "read": self._read,
            "write": lambda i: os.pwrite(self.fd, b"abc", i & 4095),
            "lseek": lambda i: os.lseek(self.big_fd, i % 1000, os.SEEK_DATA),
            "fsync": _sometimes(50, lambda i: os.fsync(self.fd)),
            "mmap": _sometimes(10, lambda i: self._mmap()),
        }

    def _names(self) -> dict[str, Callable[[int], object]]:
        at = self.at
        return {
            "create and unlink": _in_turn(lambda i: touch(f"{at}/c{i}"), lambda i: os.unlink(f"{at}/c{i}")),
            "create with O_SYNC": _sometimes(
                50, lambda i: touch(f"{at}/c{i}", os.O_SYNC), lambda i: os.unlink(f"{at}/c{i}")
            ),
            "create, unlink and write": self._unlinked,
            "symlink": _in_turn(
                lambda i: os.symlink("a", f"{at}/s{i}"),
                lambda i: os.readlink(f"{at}/s{i}"),
                lambda i: os.unlink(f"{at}/s{i}"),
            ),
            "link": _in_turn(lambda i: os.link(self.file, f"{at}/l{i}"), lambda i: os.unlink(f"{at}/l{i}")),
            "mknod": _in_turn(lambda i: os.mkfifo(f"{at}/p{i}"), lambda i: os.unlink(f"{at}/p{i}")),
            "rename": _in_turn(
                lambda i: os.rename(f"{at}/link", f"{at}/r"), lambda i: os.rename(f"{at}/r", f"{at}/link")
            ),
            "rename over": _in_turn(
                lambda i: touch(f"{at}/t{i}"), lambda i: os.rename(f"{at}/t{i}", f"{at}/over")
            ),
            "rename a directory": _in_turn(
                lambda i: os.rename(self.dir, f"{at}/moved"),
                lambda i: os.rename(f"{at}/moved", self.dir),
            ),
            "unlink and make what is below": self._whiteout,
            "many at a time": self._many,
        }

    def _directories(self) -> dict[str, Callable[[int], object]]:
        at = self.at
        return {
            "mkdir, list and rmdir": _in_turn(
                lambda i: os.mkdir(f"{at}/m{i}"),
                lambda i: os.listdir(f"{at}/m{i}"),
                lambda i: os.rmdir(f"{at}/m{i}"),
            ),
            "list after a change": _in_turn(
                lambda i: touch(f"{self.dir}/new"),
                lambda i: os.listdir(self.dir),
                lambda i: os.unlink(f"{self.dir}/new"),
            ),
            "list a part": self._list_a_part,
            "fsync of a directory": _sometimes(50, lambda i: self._fsync_directory()),
        }

    def _read(self, i: int) -> None:
        os.posix_fadvise(self.big_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(self.big_fd, 4096, i % 60 * 4096)

    def _mmap(self) -> None:
        with mmap.mmap(self.big_fd, 4096) as memory:
            memory[0] = 65

    def _unlinked(self, i: int) -> None:
        fd = os.open(f"{self.at}/u{i}", os.O_CREAT | os.O_RDWR, 0o600)
        os.unlink(f"{self.at}/u{i}")
        os.write(fd, b"x")
        os.close(fd)

    def _whiteout(self, i: int) -> None:
        path = f"{self.at}/below/{2 + i % (LOWER_FILES - 2)}"
        os.unlink(path)
        touch(path)

    def _many(self, i: int) -> None:
        touch(f"{self.at}/many{i % 500}")
        if i % 500 == 499:
            for number in range(500):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.at}/many{number}")

    def _list_a_part(self, i: int) -> None:
        with os.scandir(f"{self.at}/below") as entries:
            next(entries)
        touch(f"{self.at}/below/new")
        os.unlink(f"{self.at}/below/new")

    def _fsync_directory(self) -> None:
        fd = os.open(self.dir, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def _control(self, i: int) -> None:
        """Send a command, an unknown command, and one whose reply is not read to the end."""
        if i % 20 == 0:
            list(ask(self.dev, "info"))
            with suppress(CowfsError):
                list(ask(self.dev, "nonsense"))
            answers: Any = ask(self.dev, "diff")
            with suppress(StopIteration):
                next(answers)
            answers.close()


TRUNCATING = os.O_CREAT | os.O_TRUNC | os.O_WRONLY


def _in_turn(*steps: Callable[[int], object]) -> Callable[[int], object]:
    """Return a function that makes the requests one after the other."""

    def act(i: int) -> None:
        for step in steps:
            step(i)

    return act


def _sometimes(every: int, *steps: Callable[[int], object]) -> Callable[[int], object]:
    """Return a function that makes the requests when the number is a multiple of *every*."""

    def act(i: int) -> None:
        if i % every == 0:
            _in_turn(*steps)(i)

    return act


def touch(path: str, flags: int = 0) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | flags, 0o600))


def make_null(path: str) -> None:
    """Create a device 0:0, which is a whiteout in a layer, and remove it."""
    os.mknod(path, 0o20600, 0)
    os.unlink(path)


def fails(call: Callable[..., object], *arguments: object) -> None:
    """Make a call that must fail, but not with EIO."""
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno != errno.EIO, error
    else:
        raise AssertionError(f"{call.__name__}{arguments} did not fail")
