"""Operations whose FUSE requests are counted, each small enough to explain its requests.

An operation of a few system calls is done on several files in turn; that of a program once, on a small tree.
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
"""Number of names in each directory that is listed."""
INSERTS = 10
LARGE = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """The files and directories for one operation."""

    merged: Path
    """The mountpoint."""
    name: str
    """The operation's own directory in the lower, with files 0, 1, ... and directories listed-0, ..."""
    outside: Path
    """A directory outside the mount, with a repository and an archive, for all operations."""

    def lower(self, number: int) -> str:
        """Return the path of a file of the lower, of one block."""
        return f"{self.merged}/{self.name}/{number}"

    def directory(self, number: int) -> str:
        """Return the path of a directory of the lower, with LISTED names."""
        return f"{self.merged}/{self.name}/listed-{number}"

    def new(self, number: int) -> str:
        """Return a path that is not in the lower, in a directory of the store."""
        return f"{self.merged}/new-{self.name}/{number}"


Step = Callable[[Place, int], object]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation and its preparation, with different names for each number."""

    title: str
    do: Step
    prepare: Step = lambda place, number: None
    program: str = ""
    """The program whose version the requests depend on; "" for plain system calls."""


def put(path: str, data: bytes = b"", flags: int = os.O_CREAT | os.O_EXCL) -> None:
    """Open a file, write *data* if there is any, and close it."""
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    if data:
        os.write(fd, data)
    os.close(fd)


def create_large(path: str) -> None:
    """Create a file of LARGE bytes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for _ in range(LARGE >> 20):
        os.write(fd, bytes(1 << 20))
    os.close(fd)


def read_uncached(path: str) -> None:
    """Read a file that is not in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)


def create_synced(path: str) -> None:
    """Create a file of one block and sync it to disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, BLOCK)
    os.fsync(fd)
    os.close(fd)


def read_block(path: str) -> None:
    """Open, read and close a file of one block, without a further read for the end of the file."""
    fd = os.open(path, os.O_RDONLY)
    if len(os.read(fd, 4096)) != 4096:
        raise AssertionError(f"{path} is too short")
    os.close(fd)


def read_lower(place: Place, number: int) -> None:
    """Read a file of the lower."""
    read_block(place.lower(number))


def create_block(place: Place, number: int) -> None:
    """Create a file of one block."""
    put(place.new(number), BLOCK)


def list_directory(path: str, *, stat: bool = False) -> None:
    """List a directory, with *stat* of each name."""
    with os.scandir(path) as entries:
        names = [entry.stat(follow_symlinks=False).st_size if stat else entry.name for entry in entries]
    if len(names) != LISTED:
        raise AssertionError(f"{path} has {len(names)} names")


def expect_missing(path: str) -> None:
    """Look up a name that does not exist."""
    if os.path.lexists(path):
        raise AssertionError(f"{path} exists")


def run_program(*argv: str) -> None:
    """Run a program, without settings of this user or machine."""
    subprocess.run(argv, check=True, capture_output=True, env=CLEAN_ENVIRONMENT, timeout=60)


def insert_rows(path: str) -> None:
    """Insert INSERTS rows into an existing database, each in its own transaction."""
    with sqlite3.connect(path, isolation_level=None) as database:
        for number in range(INSERTS):
            database.execute("INSERT INTO rows VALUES (?)", (number,))
    database.close()


def create_two(path: str) -> None:
    """Create two files, to rename one over the other."""
    put(path, BLOCK)
    put(f"{path}-over")


def chmod_and_stat(path: str) -> None:
    """Change the mode, then stat."""
    os.chmod(path, 0o600)
    os.stat(path)


def create_database(path: str) -> None:
    """Create a database with an empty table."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rows (number)")
    connection.close()


def create_and_read_link(path: str) -> None:
    """Create a symbolic link and read it."""
    os.symlink("target", path)
    os.readlink(path)


CLEAN_ENVIRONMENT = {
    **os.environ,
    **{"LC_ALL": "C", "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull},
    **{f"GIT_{person}_{field}": value for person in ("AUTHOR", "COMMITTER") for field, value in
       (("NAME", "A"), ("EMAIL", "a@example.org"), ("DATE", "2000-01-01T00:00:00Z"))},
}  # fmt: skip

FILES = [
    Operation("stat, name not known yet", lambda p, n: os.stat(p.lower(n))),
    Operation("stat again", lambda p, n: os.stat(p.lower(n)), lambda p, n: os.stat(p.lower(n))),
    Operation("look for a name that is not there", lambda p, n: expect_missing(f"{p.lower(n)}-not")),
    Operation(
        "look for it again",
        lambda p, n: expect_missing(f"{p.lower(n)}-not"),
        lambda p, n: expect_missing(f"{p.lower(n)}-not"),
    ),
    Operation("open, read 4 KiB, close; name not known yet", read_lower),
    Operation("open, read 4 KiB, close again", read_lower, read_lower),
    Operation("create, close", lambda p, n: put(p.new(n))),
    Operation("create, write 4 KiB, close", create_block),
    Operation("create, write 4 KiB, fsync, close", lambda p, n: create_synced(p.new(n))),
    Operation("read back what was written", lambda p, n: read_block(p.new(n)), create_block),
    Operation("truncate, write 4 KiB, close", lambda p, n: put(p.new(n), BLOCK, os.O_TRUNC), create_block),
    Operation("append to a file of the store", lambda p, n: put(p.new(n), b"+", os.O_APPEND), create_block),
    Operation("append to a file of the lower", lambda p, n: put(p.lower(n), b"+", os.O_APPEND)),
    Operation("chmod", lambda p, n: os.chmod(p.new(n), 0o600), create_block),
    Operation("chmod, then stat", lambda p, n: chmod_and_stat(p.new(n)), create_block),
    Operation("chown of a file of the lower", lambda p, n: os.chown(p.lower(n), 12, 34)),
    Operation("set times", lambda p, n: os.utime(p.new(n), (1, 2)), create_block),
    Operation("truncate by name", lambda p, n: os.truncate(p.new(n), 17), create_block),
    Operation("create, write 4 MiB, close", lambda p, n: create_large(p.new(n))),
    Operation(
        "open, read 4 MiB, close",
        lambda p, n: read_uncached(p.new(n)),
        lambda p, n: create_large(p.new(n)),
    ),
    Operation("set an attribute", lambda p, n: os.setxattr(p.new(n), "user.x", b"1"), create_block),
]

NAMES = [
    Operation("mkdir", lambda p, n: os.mkdir(p.new(n))),
    Operation("rmdir", lambda p, n: os.rmdir(p.new(n)), lambda p, n: os.mkdir(p.new(n))),
    Operation("symlink, readlink", lambda p, n: create_and_read_link(p.new(n))),
    Operation("link", lambda p, n: os.link(p.new(n), f"{p.new(n)}-too"), create_block),
    Operation("rename", lambda p, n: os.rename(p.new(n), f"{p.new(n)}-moved"), create_block),
    Operation(
        "rename over a file",
        lambda p, n: os.rename(p.new(n), f"{p.new(n)}-over"),
        lambda p, n: create_two(p.new(n)),
    ),
    Operation("unlink", lambda p, n: os.unlink(p.new(n)), create_block),
    Operation(
        "unlink a file of the lower", lambda p, n: os.unlink(p.lower(n)), lambda p, n: os.stat(p.lower(n))
    ),
    Operation(f"list {LISTED} names", lambda p, n: list_directory(p.directory(n))),
    Operation(f"list {LISTED} names, stat each", lambda p, n: list_directory(p.directory(n), stat=True)),
]

TREE = "tree"
"""The directory of the lower that programs copy."""
PROGRAMS = [
    Operation(
        "cp -a of 8 directories, 32 files, 8 links",
        lambda p, n: run_program("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "rm -rf of that copy",
        lambda p, n: run_program("rm", "-rf", p.new(n)),
        lambda p, n: run_program("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "chown -R of that copy",
        lambda p, n: run_program("chown", "-R", "12:34", p.new(n)),
        lambda p, n: run_program("cp", "-a", f"{p.merged}/{TREE}", p.new(n)),
        program="coreutils",
    ),
    Operation(
        "tar x of the same",
        lambda p, n: run_program("tar", "-xf", f"{p.outside}/{TREE}.tar", "-C", p.new(n)),
        lambda p, n: os.mkdir(p.new(n)),
        program="tar",
    ),
    Operation(
        "git clone of 32 files",
        lambda p, n: run_program(
            "git", "clone", "-q", "--template=", "--no-hardlinks", f"{p.outside}/repository", p.new(n)
        ),
        program="git",
    ),
    Operation(
        f"sqlite, {INSERTS} inserts, each a transaction",
        lambda p, n: insert_rows(p.new(n)),
        lambda p, n: create_database(p.new(n)),
        program="sqlite",
    ),
]
OPERATIONS = [*FILES, *NAMES, *PROGRAMS]


def versions() -> dict[str, str]:
    """Return the versions that the counts depend on, of the kernel and the programs: two numbers of each."""
    full = {
        "Linux": os.uname().release,
        "coreutils": machine.version_in(["cp", "--version"]),
        "tar": machine.version_in(["tar", "--version"]),
        "git": machine.version_in(["git", "--version"]),
        "sqlite": sqlite3.sqlite_version,
    }
    return {name: ".".join(re.findall(r"\d+", text)[:2]) for name, text in full.items()}


def make_lower_tree(lower: Path, count: int) -> None:
    """Make the content of the lower for *count* times each operation."""
    for directory in range(8):
        path = lower / TREE / str(directory)
        path.mkdir(parents=True)
        for number in range(4):
            (path / f"file {number}").write_bytes(b"%d %d\n" % (directory, number) * 400)
        (path / "link").symlink_to("file 0")
    for index, operation in enumerate(OPERATIONS):
        if operation.program:
            continue
        path = lower / str(index)
        path.mkdir()
        for number in range(count):
            (path / str(number)).write_bytes(BLOCK)
            if operation.title.startswith("list "):
                (path / f"listed-{number}").mkdir()
                for name in range(LISTED):
                    (path / f"listed-{number}" / f"name {name}").touch()


def make_outside_tree(outside: Path, lower: Path) -> None:
    """Make the archive and the repository that programs read, in *outside*."""
    run_program("tar", "-cf", f"{outside}/{TREE}.tar", "-C", str(lower), TREE)
    repository = f"{outside}/repository"
    run_program("cp", "-r", f"{lower}/{TREE}", repository)
    for arguments in (["init", "-q", "--template="], ["add", "."], ["commit", "-q", "-m", "all"]):
        run_program("git", "-C", repository, *arguments)
