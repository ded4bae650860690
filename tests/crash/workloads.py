"""Workloads to kill the daemon in: ``python workloads.py NAME ROOT`` prints each step to stdout.

Standard library only. Ends with exit code 0 as soon as the filesystem does not answer any more.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing

FILES = 160
SYNC_EVERY = 7
MARK = b"-- appended --\n"


def content(number: int) -> bytes:
    """Return the content of file *number* of the lower. Some are empty, some larger than a request."""
    size = (0, 10, 5_000, 70_000, 300_000)[number % 5]
    return (b"%06d:" % number * (size // 7 + 1))[:size]


def fresh(number: int) -> bytes:
    """Return the content of the new file *number*."""
    return content(number)[::-1] + b"end"


def append(root: str) -> Iterator[str]:
    """Append to every file of the lower, which copies each up."""
    for number in range(FILES):
        fd = os.open(f"{root}/d{number % 9}/f{number}", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, MARK)
            if number % SYNC_EVERY == 0:
                os.fsync(fd)
        finally:
            os.close(fd)
        yield f"done {number}"


def untar(root: str) -> Iterator[str]:
    """Create directories and files, like unpacking an archive."""
    for number in range(FILES):
        folder = f"{root}/new/n{number % 7}"
        os.makedirs(folder, exist_ok=True)
        fd = os.open(f"{folder}/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            data = fresh(number)
            for start in range(0, len(data), 65536):
                os.write(fd, data[start : start + 65536])
            if number % SYNC_EVERY == 0:
                os.fsync(fd)
        finally:
            os.close(fd)
        yield f"done {number}"


def replace(root: str) -> Iterator[str]:
    """Save files like editors: write and sync a new file, and rename it over the old one."""
    for number in range(FILES):
        path = f"{root}/d{number % 9}/f{number}"
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, fresh(number))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path + ".new", path)
        yield f"done {number}"


def shuffle(root: str) -> Iterator[str]:
    """Rename and remove files, and change attributes."""
    for number in range(FILES):
        path = f"{root}/d{number % 9}/f{number}"
        if number % 3 == 0:
            os.unlink(path)
        elif number % 3 == 1:
            os.rename(path, f"{root}/d{number % 9}/moved{number}")
        else:
            os.chmod(path, 0o600)
        yield f"done {number}"
    for number in range(9):
        os.rename(f"{root}/d{number}", f"{root}/m{number}")
        yield f"done {FILES + number}"


def names(root: str) -> Iterator[str]:
    """Create, move and remove directories and files without fsync."""
    os.mkdir(f"{root}/names")
    yield "done 0"
    for number, step in enumerate(named_steps(), 1):
        how, *where = step
        paths = [f"{root}/names/{path}" for path in where]
        if how == "make":
            os.close(os.open(paths[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        else:
            getattr(os, how)(*paths)
        yield f"done {number}"


def named_steps() -> Iterator[tuple[str, ...]]:
    """Yield the operations of `names`, the same in each run."""
    chance, directories = random.Random(1), [""]
    files: list[str] = []
    for number in range(STEPS["names"]):
        how = chance.choice(("make", "make", "mkdir", "rename", "rename", "unlink", "rmdir", "symlink"))
        new = f"{chance.choice(directories)}{number}"
        if how in {"make", "mkdir", "symlink"} or not files:
            if how == "mkdir":
                directories.append(f"{new}/")
                yield "mkdir", new
                continue
            files.append(new)
            yield ("symlink", "target", new) if how == "symlink" else ("make", new)
        elif how == "rename":
            old = files.pop(chance.randrange(len(files)))
            files.append(new)
            yield "rename", old, new
        elif how == "rmdir" and (empty := empty_one(directories, files)):
            directories.remove(empty)
            yield "rmdir", empty.rstrip("/")
        else:
            yield "unlink", files.pop(chance.randrange(len(files)))


def empty_one(directories: list[str], files: list[str]) -> str:
    """Return an empty directory, or "" if there is none."""
    return next(
        (
            one for one in directories[1:]
            if not any(path != one and path.startswith(one) for path in (*directories, *files))
        ),
        "",
    )  # fmt: skip


def named_after(steps: int) -> set[str]:
    """Return the tree after this number of steps of `names`."""
    found: set[str] = set()
    for how, *where in list(named_steps())[:steps]:
        if how in {"rename", "unlink", "rmdir"}:
            found.discard(where[0])
        if how in {"make", "mkdir", "rename", "symlink"}:
            found.add(where[-1])
    return found


def git(root: str) -> Iterator[str]:
    """Create a repository and one commit after the other."""
    run_git(root, "init", "-q", f"{root}/repository")
    for number in range(STEPS["git"]):
        for name in (f"file{number}", "changed"):
            with open(f"{root}/repository/{name}", "w") as file:
                file.write(f"{number}\n" * 100)
        run_git(root, "-C", f"{root}/repository", "add", ".")
        run_git(root, "-C", f"{root}/repository", "commit", "-q", "-m", f"{number}")
        yield f"done {number}"


def run_git(root: str, *arguments: str) -> str:
    """Run git. Raise ENOTCONN if it fails because *root* no longer answers."""
    settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "HOME": root}
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody", "-c", "gc.auto=0"]
    done = subprocess.run(
        ["git", *who, *arguments], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        os.statvfs(root)
        raise RuntimeError(f"git {arguments}: {done.returncode}: {done.stderr}")
    return done.stdout


def sqlite(root: str, mode: str, synchronous: str) -> Iterator[str]:
    """Insert a row in each transaction."""
    with closing(sqlite3.connect(f"{root}/database", isolation_level=None)) as database:
        database.execute(f"pragma journal_mode={mode}")
        database.execute(f"pragma synchronous={synchronous}")
        database.execute("create table rows (number integer primary key, data text)")
        for number in range(STEPS[f"sqlite-{synchronous}"]):
            database.execute("insert into rows values (?, ?)", (number, f"{number}" * 300))
            yield f"done {number}"


def sqlite_full(root: str) -> Iterator[str]:
    return sqlite(root, "delete", "full")


def sqlite_normal(root: str) -> Iterator[str]:
    return sqlite(root, "wal", "normal")


WORKLOADS = {
    "append": append, "untar": untar, "replace": replace, "shuffle": shuffle, "names": names,
    "git": git, "sqlite-full": sqlite_full, "sqlite-normal": sqlite_normal,
}  # fmt: skip
STEPS = {
    **dict.fromkeys(("append", "untar", "replace", "shuffle"), FILES),
    **{"names": 400, "git": 8, "sqlite-full": 60, "sqlite-normal": 150},
}
"""The number of steps of each workload after which the daemon may be killed."""


# --- afterwards


def verify_git(root: str) -> Iterator[str]:
    """Print the number of commits; fail if the repository is broken."""
    repository = f"{root}/repository"
    if not os.path.exists(f"{repository}/.git/refs/heads"):
        yield "0"
        return
    run_git(root, "-C", repository, "fsck", "--full", "--strict")
    has_any = os.listdir(f"{repository}/.git/refs/heads")
    yield run_git(root, "-C", repository, "rev-list", "--count", "HEAD").strip() if has_any else "0"


def verify_sqlite(root: str) -> Iterator[str]:
    """Print the number of rows; fail if any is damaged or missing."""
    with closing(sqlite3.connect(f"{root}/database")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        if not database.execute("select count(*) from sqlite_master").fetchone()[0]:
            yield "0"
            return
        rows = database.execute("select number, data from rows order by number").fetchall()
        assert rows == [(number, f"{number}" * 300) for number in range(len(rows))]
        yield str(len(rows))


def verify_names(root: str) -> Iterator[str]:
    """Print the whole tree."""
    top = f"{root}/names"
    for where, directories, files in os.walk(top):
        for name in (*directories, *files):
            yield os.path.relpath(f"{where}/{name}", top)


VERIFY = {"verify-git": verify_git, "verify-sqlite": verify_sqlite, "verify-names": verify_names}


def main() -> None:
    name, root = sys.argv[1:]
    if name in VERIFY:
        for said in VERIFY[name](root):
            print(said)
        return
    try:
        for said in WORKLOADS[name](root):
            print(said, flush=True)
    except (OSError, sqlite3.Error) as error:
        # ECANCELED: the kernel was about to put the request into a ring (fuse_uring_send_in_task()).
        gone = {errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED, errno.EIO}
        if isinstance(error, sqlite3.Error) or error.errno not in gone:
            wait_until_gone(root, error)
    print("over", flush=True)


def wait_until_gone(root: str, why: Exception) -> None:
    """Raise *why* unless the filesystem does not answer, now or soon."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.statvfs(root)
        except OSError as error:
            if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
                return
        time.sleep(0.01)
    raise why


if __name__ == "__main__":
    main()
