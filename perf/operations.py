"""Operations whose requests are counted, each small enough to be recognised by its requests.

Those of one system call or a few are done on several files in turn, those of a program once, on a small tree.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perf import machine

BLOCK = b"block".ljust(4096, b".")
LISTED = 40
"""Names in each of the directories that are listed."""
INSERTS = 10
LARGE = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where one operation is done."""

    merged: Path
    """The mount."""
    name: str
    """Of a directory of the lower with files 0, 1, ... and directories listed-0, ...; nobody else's."""
    outside: Path
    """A directory elsewhere, with the repository ``repository``, for all."""

    def lower(self, number: int) -> str:
        """A file of the lower, of one block."""
        return f"{self.merged}/{self.name}/{number}"

    def directory(self, number: int) -> str:
        """A directory of the lower, with LISTED names."""
        return f"{self.merged}/{self.name}/listed-{number}"

    def new(self, number: int) -> str:
        """A name that the lower has not, in a directory of the store."""
        return f"{self.merged}/new-{self.name}/{number}"


Step = Callable[[Place, int], object]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done, and what is made for it before, with other names for each number."""

    title: str
    do: Step
    before: Step = lambda place, number: None
    program: str = ""
    """Whose version the requests depend on; "" for plain system calls."""


def put(path: str, data: bytes = b"", flags: int = os.O_CREAT | os.O_EXCL) -> None:
    """Open, write if there is something, and close."""
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    if data:
        os.write(fd, data)
    os.close(fd)


def large(path: str) -> None:
    """Make a file of LARGE bytes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for _ in range(LARGE >> 20):
        os.write(fd, bytes(1 << 20))
    os.close(fd)


def read_large(path: str) -> None:
    """Read it, with nothing of it in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)


def synced(path: str) -> None:
    """Make a file of one block that is on disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, BLOCK)
    os.fsync(fd)
    os.close(fd)


def get(path: str) -> None:
    """Open, read and close a file of one block, as a program does that knows its size."""
    fd = os.open(path, os.O_RDONLY)
    if len(os.read(fd, 4096)) != 4096:
        raise AssertionError(f"{path} is too short")
    os.close(fd)


def made(place: Place, number: int) -> None:
    """Make a file of one block."""
    put(place.new(number), BLOCK)


def listed(path: str, *, stat: bool = False) -> None:
    """List a directory; look at each name too."""
    with os.scandir(path) as entries:
        found = [entry.stat(follow_symlinks=False).st_size if stat else entry.name for entry in entries]
    if len(found) != LISTED:
        raise AssertionError(f"{path} has {len(found)} names")


def missing(path: str) -> None:
    """Look for what is not there."""
    if os.path.lexists(path):
        raise AssertionError(f"{path} is there")


def ran(*argv: str) -> None:
    """Run a program, with nothing of this user's or machine's settings."""
    subprocess.run(argv, check=True, capture_output=True, env=CLEAN, timeout=60)


def inserts(path: str) -> None:
    """Insert rows, each in a transaction of its own, into a database that is there."""
    with sqlite3.connect(path, isolation_level=None) as database:
        for number in range(INSERTS):
            database.execute("INSERT INTO rows VALUES (?)", (number,))
    database.close()


def two(path: str) -> None:
    """Make two files, one to be renamed over the other."""
    put(path, BLOCK)
    put(f"{path}-over")


def changed(path: str) -> None:
    """Change the mode and look."""
    os.chmod(path, 0o600)
    os.stat(path)


def database(path: str) -> None:
    """Make a database with an empty table."""
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE rows (number)")
    made.close()


def linked(path: str) -> None:
    """Make a symbolic link and read it."""
    os.symlink("target", path)
    os.readlink(path)


CLEAN = {
    **os.environ,
    **{"LC_ALL": "C", "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull},
    **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in
       (("NAME", "A"), ("EMAIL", "a@example.org"), ("DATE", "2000-01-01T00:00:00Z"))},
}  # fmt: skip

FILES = [
    Operation("stat, name not known yet", lambda p, n: os.stat(p.lower(n))),
    Operation("stat again", lambda p, n: os.stat(p.lower(n)), lambda p, n: os.stat(p.lower(n))),
    Operation("look for a name that is not there", lambda p, n: missing(f"{p.lower(n)}-not")),
    Operation(
        "look for it again",
        lambda p, n: missing(f"{p.lower(n)}-not"),
        lambda p, n: missing(f"{p.lower(n)}-not"),
    ),
    Operation("open, read 4 KiB, close; name not known yet", lambda p, n: get(p.lower(n))),
    Operation("open, read 4 KiB, close again", lambda p, n: get(p.lower(n)), lambda p, n: get(p.lower(n))),
    Operation("create, close", lambda p, n: put(p.new(n))),
    Operation("create, write 4 KiB, close", made),
    Operation("create, write 4 KiB, fsync, close", lambda p, n: synced(p.new(n))),
    Operation("read back what was written", lambda p, n: get(p.new(n)), made),
    Operation("truncate, write 4 KiB, close", lambda p, n: put(p.new(n), BLOCK, os.O_TRUNC), made),
    Operation("append to a file of the store", lambda p, n: put(p.new(n), b"+", os.O_APPEND), made),
    Operation("append to a file of the lower", lambda p, n: put(p.lower(n), b"+", os.O_APPEND)),
    Operation("chmod", lambda p, n: os.chmod(p.new(n), 0o600), made),
    Operation("chmod, then stat", lambda p, n: changed(p.new(n)), made),
    Operation("chown of a file of the lower", lambda p, n: os.chown(p.lower(n), 12, 34)),
    Operation("set times", lambda p, n: os.utime(p.new(n), (1, 2)), made),
    Operation("truncate by name", lambda p, n: os.truncate(p.new(n), 17), made),
    Operation("create, write 4 MiB, close", lambda p, n: large(p.new(n))),
    Operation("open, read 4 MiB, close", lambda p, n: read_large(p.new(n)), lambda p, n: large(p.new(n))),
    Operation("set an attribute", lambda p, n: os.setxattr(p.new(n), "user.x", b"1"), made),
]

NAMES = [
    Operation("mkdir", lambda p, n: os.mkdir(p.new(n))),
    Operation("rmdir", lambda p, n: os.rmdir(p.new(n)), lambda p, n: os.mkdir(p.new(n))),
    Operation("symlink, readlink", lambda p, n: linked(p.new(n))),
    Operation("link", lambda p, n: os.link(p.new(n), f"{p.new(n)}-too"), made),
    Operation("rename", lambda p, n: os.rename(p.new(n), f"{p.new(n)}-moved"), made),
    Operation(
        "rename over a file",
        lambda p, n: os.rename(p.new(n), f"{p.new(n)}-over"),
        lambda p, n: two(p.new(n)),
    ),
    Operation("unlink", lambda p, n: os.unlink(p.new(n)), made),
    Operation(
        "unlink a file of the lower", lambda p, n: os.unlink(p.lower(n)), lambda p, n: os.stat(p.lower(n))
    ),
    Operation(f"list {LISTED} names", lambda p, n: listed(p.directory(n))),
    Operation(f"list {LISTED} names, stat each", lambda p, n: listed(p.directory(n), stat=True)),
]

TREE = "tree"
"""Of the lower: what programs copy."""
PROGRAMS_DO = [
    Operation(
        "cp -a of 8 directories, 32 files, 8 links",
        lambda p, n: ran("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "rm -rf of that copy",
        lambda p, n: ran("rm", "-rf", p.new(n)),
        lambda p, n: ran("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "chown -R of that copy",
        lambda p, n: ran("chown", "-R", "12:34", p.new(n)),
        lambda p, n: ran("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "tar x of the same",
        lambda p, n: ran("tar", "-xf", f"{p.outside}/{TREE}.tar", "-C", p.new(n)),
        lambda p, n: os.mkdir(p.new(n)),
        program="tar",
    ),
    Operation(
        "git clone of 32 files",
        lambda p, n: ran(
            "git", "clone", "-q", "--template=", "--no-hardlinks", f"{p.outside}/repository", p.new(n)
        ),
        program="git",
    ),
    Operation(
        f"sqlite, {INSERTS} inserts, each a transaction",
        lambda p, n: inserts(p.new(n)),
        lambda p, n: database(p.new(n)),
        program="sqlite",
    ),
]
OPERATIONS = [*FILES, *NAMES, *PROGRAMS_DO]


def versions() -> dict[str, str]:
    """What the counts depend on, to two numbers: the kernel's version and those of the programs."""
    found = {
        "Linux": os.uname().release,
        "coreutils": machine.version_in(["cp", "--version"]),
        "tar": machine.version_in(["tar", "--version"]),
        "git": machine.version_in(["git", "--version"]),
        "sqlite": sqlite3.sqlite_version,
    }
    return {name: ".".join(re.findall(r"\d+", text)[:2]) for name, text in found.items()}


def lower_tree(lower: Path, count: int) -> None:
    """Make what the lower must hold for *count* times each operation."""
    for directory in range(8):
        made = lower / TREE / str(directory)
        made.mkdir(parents=True)
        for number in range(4):
            (made / f"file {number}").write_bytes(b"%d %d\n" % (directory, number) * 400)
        (made / "link").symlink_to("file 0")
    for place in range(len(OPERATIONS)):
        if OPERATIONS[place].program:
            continue
        (lower / str(place)).mkdir()
        for number in range(count):
            (lower / str(place) / str(number)).write_bytes(BLOCK)
            if OPERATIONS[place].title.startswith("list "):
                (lower / str(place) / f"listed-{number}").mkdir()
                for name in range(LISTED):
                    (lower / str(place) / f"listed-{number}" / f"name {name}").touch()


def outside_tree(outside: Path, lower: Path) -> None:
    """Make what programs take from elsewhere."""
    ran("tar", "-cf", f"{outside}/{TREE}.tar", "-C", str(lower), TREE)
    repository = f"{outside}/repository"
    ran("cp", "-r", f"{lower}/{TREE}", repository)
    for arguments in (["init", "-q", "--template="], ["add", "."], ["commit", "-q", "-m", "all"]):
        ran("git", "-C", repository, *arguments)
