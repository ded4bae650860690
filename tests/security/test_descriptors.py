"""Descriptors of the daemon: no user has all of them, whatever it holds on to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, Mounted, eventually, is_mounted, mount_arguments, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.victim import VICTIM

pytestmark = [needs_fuse, needs_root]

ATTACKER = 65534
LIMIT = 256
"""The limit of the daemon's descriptors."""


@contextmanager
def with_few(place: Path, prefix: Sequence[str] = (), engine: str | None = None) -> Iterator[Mounted]:
    """A mount for all users whose daemon may have LIMIT descriptors; the store is a directory, so that files
    need some."""
    at = place / "mnt"
    run(*prefix, "mkdir", at)
    options = [*([] if prefix else ["allow_other"]), f"log={place / 'log'}"]
    arguments = mount_arguments(place / "lower", at, place / "store", engine, options)
    environment = {**os.environ, "PYTHONPATH": project_root()}
    run("prlimit", f"--nofile={LIMIT}", *prefix, *COWFS, *arguments, env=environment)
    here = Mounted(at, place / "log", bool(prefix))
    try:
        yield here
    finally:
        if is_mounted(at):
            here.umount()


@pytest.fixture
def mount(nobody_path: Path) -> Iterator[Mounted]:
    lower = nobody_path / "lower"
    lower.mkdir()
    for number in range(2 * LIMIT):
        (lower / f"{number}").write_text(f"{number}\n")
    (lower / "big").write_bytes(bytes(1 << 20))
    for name, uid in (("attackers", ATTACKER), ("victims", VICTIM)):
        (lower / name).mkdir()
        for number in range(2 * LIMIT):
            (lower / name / f"{number}").mkdir()
            os.chown(lower / name / f"{number}", uid, uid)
        os.chown(lower / name, uid, uid)
    with with_few(nobody_path) as here:
        yield here
    assert here.trouble() == []


_HOLD = """
import errno, os, sys
at, what, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
own = f"{at}/attackers"
held, refused = [], 0
def reading(number):
    held.append(os.open(f"{at}/{number}", os.O_RDONLY))
def writing(number):
    held.append(os.open(f"{own}/new{number}", os.O_RDWR | os.O_CREAT))
def unlinked(number):
    writing(number)
    os.unlink(f"{own}/new{number}")
def by_path(number):  # the daemon is told nothing of it
    os.close(os.open(f"{own}/new{number}", os.O_RDWR | os.O_CREAT))
    held.append(os.open(f"{own}/new{number}", os.O_PATH))
    os.unlink(f"{own}/new{number}")
def replaced(number):
    for name in ("new", "other"):
        os.close(os.open(f"{own}/{name}{number}", os.O_RDWR | os.O_CREAT))
    held.append(os.open(f"{own}/new{number}", os.O_PATH))
    os.rename(f"{own}/other{number}", f"{own}/new{number}")
def removed(number):
    held.append(os.open(f"{own}/{number}", os.O_PATH))
    os.rmdir(f"{own}/{number}")
def directories(number):
    held.append(os.open(f"{own}/{number}", os.O_RDONLY | os.O_DIRECTORY))
    os.listdir(held[-1])
for number in range(2 * limit):
    try:
        globals()[what](number)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        refused += 1
print(len(held), refused, flush=True)
sys.stdin.read()
"""

_VICTIM = """
import os, sys
own = f"{sys.argv[1]}/victims"
held = []
for number in range(8):
    held.append(os.open(f"{sys.argv[1]}/{number}", os.O_RDONLY))
    held.append(os.open(f"{own}/file{number}", os.O_RDWR | os.O_CREAT))
    os.write(held[-1], b"text")
    os.unlink(f"{own}/file{number}")
    assert os.fstat(held[-1]).st_nlink == 0 and os.pread(held[-1], 9, 0) == b"text"
    assert os.pread(held[-2], 9, 0) == b"%d\\n" % number
    os.rmdir(f"{own}/{number}")
assert len(os.listdir(own)) == int(sys.argv[2])
"""


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


@contextmanager
def holding(mount: Mounted, what: str, uid: int = ATTACKER) -> Iterator[tuple[int, int]]:
    """Let a user hold what they get; how much they got, and how often they were refused."""
    command: list[str | Path] = [*as_user(uid), sys.executable, "-c", _HOLD, mount.path, what, str(LIMIT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        held, refused = map(int, process.stdout.readline().split())
        yield held, refused
        process.stdin.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


HELD = ["reading", "writing", "unlinked", "by_path", "replaced", "removed", "directories"]


@pytest.mark.parametrize("what", HELD)
def test_one_user_takes_what_they_can(mount: Mounted, what: str) -> None:
    pid = mount.pid()
    before = descriptors(pid)
    with holding(mount, what) as (held, refused):
        assert (held, refused) == (2 * LIMIT, 0)
        assert descriptors(pid) < LIMIT - 16
        run(*as_user(VICTIM), sys.executable, "-c", _VICTIM, mount.path, str(2 * LIMIT - 8), timeout=20)
        # Root, too, and the daemon itself: a copy-up, the control socket.
        run(
            "sh",
            "-c",
            "echo x > $0/roots && echo x >> $0/big && sync $0/big && ls $0 > /dev/null",
            mount.path,
        )
        assert mount.pid() == pid
    # Directories stay open for later use, as many as they may be.
    eventually(lambda: descriptors(pid) <= before + LIMIT // 8 + 4, "descriptors are given back")
    work = mount.path.parent / "store" / "work" / "work"
    eventually(lambda: not [name for name in os.listdir(work) if name.startswith("#gone")], "so are names")


def test_what_was_given_back_can_be_had_again(mount: Mounted) -> None:
    got = []
    for _ in range(3):
        with holding(mount, "reading") as (held, _refused):
            got.append(held)
    assert got[0] == got[1] == got[2]


def test_two_users_leave_a_third_something(mount: Mounted) -> None:
    with holding(mount, "reading") as (first, _), holding(mount, "reading", 65531) as (second, _):
        # They read the same files, and who reads the same shares.
        assert first <= second
        run(*as_user(VICTIM), sys.executable, "-c", _VICTIM, mount.path, str(2 * LIMIT - 8), timeout=20)


_MANY = """
import os, sys
at, limit = sys.argv[1], int(sys.argv[2])
lower = [os.open(f"{at}/{number}", os.O_RDONLY) for number in range(2 * limit)]
new = [os.open(f"{at}/new{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400) for number in range(2 * limit)]
again = os.open(f"{at}/again", os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o600)
assert os.write(again, b"synchronous") == 11 and os.pread(again, 99, 0) == b"synchronous"
for number, fd in enumerate(new):
    assert os.write(fd, b"%d" % number) and os.write(fd, b" text")
for number in range(limit):
    os.unlink(f"{at}/new{number}")
    os.rename(f"{at}/new{number + limit}", f"{at}/moved{number}")
os.fsync(new[0]), os.fsync(new[-1]), os.fdatasync(new[limit])
for number, fd in enumerate(new):
    assert os.pread(fd, 99, 0) == b"%d text" % number
    assert os.fstat(fd).st_nlink == (number >= limit)
os.ftruncate(new[-1], 3)
assert os.pread(new[-1], 99, 0) == (b"%d" % (2 * limit - 1))[:3] and os.lseek(new[-1], 0, os.SEEK_HOLE) == 3
for number, fd in enumerate(lower):
    assert os.pread(fd, 99, 0) == b"%d\\n" % number
with open(f"{at}/{2 * limit - 1}", "ab") as file:
    file.write(b"more")
assert os.pread(lower[-1], 99, 0) == b"%d\\nmore" % (2 * limit - 1)
print("done")
"""


@pytest.mark.parametrize("engine", ["directory", "kernel", "nobody"])
def test_there_may_be_more_open_files_than_descriptors(nobody_path: Path, engine: str) -> None:
    """Only the caller's own limit (RLIMIT_NOFILE) counts."""
    prefix = as_user(ATTACKER) if engine == "nobody" else []
    lower = nobody_path / "lower"
    run(*prefix, "mkdir", lower)
    run(*prefix, "sh", "-c", f"for n in $(seq 0 {2 * LIMIT - 1}); do echo $n > {lower}/$n; done")
    store = nobody_path / "store"
    if engine == "kernel":
        run(*COWFS, "create", store, "16")
    with with_few(nobody_path, prefix, "kernel" if engine == "kernel" else None) as mount:
        done = run(*prefix, sys.executable, "-c", _MANY, mount.path, str(LIMIT))
        assert done.stdout == "done\n"
    assert mount.trouble() == []


def test_one_file_needs_one(mount: Mounted) -> None:
    """However often it is open for reading, before and after it is copied up."""
    pid = mount.pid()
    files = [open(mount.path / "1", "rb") for _ in range(2 * LIMIT)]
    before = descriptors(pid)
    with open(mount.path / "1", "ab") as file:
        file.write(b"more\n")
    assert {os.pread(file.fileno(), 99, 0) for file in files} == {b"1\nmore\n"}
    assert descriptors(pid) <= before + 2
    for one in files:
        one.close()
