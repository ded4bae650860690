"""Descriptors of the daemon: no user has all of them, whatever it holds on to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, Mounted, eventually, is_mounted, mount_arguments, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.victim import VICTIM

pytestmark = [needs_fuse, needs_root]

ATTACKER = 65534
LIMIT = 256
"""How many descriptors the daemon may have."""


@contextmanager
def with_few(place: Path) -> Iterator[Mounted]:
    """A mount for all users whose daemon may have LIMIT descriptors; the store is a directory, so that files
    need some."""
    at = place / "mnt"
    at.mkdir()
    options = ["allow_other", f"log={place / 'log'}"]
    arguments = mount_arguments(place / "lower", at, place / "store", None, options)
    environment = {**os.environ, "PYTHONPATH": project_root()}
    run("prlimit", f"--nofile={LIMIT}", *COWFS, *arguments, env=environment)
    here = Mounted(at, place / "log")
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
    command = [*as_user(uid), sys.executable, "-c", _HOLD, mount.path, what, str(LIMIT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        held, refused = map(int, process.stdout.readline().split())
        yield held, refused
        process.stdin.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


BOUNDED = ["reading", "writing", "unlinked"]
UNBOUNDED = ["by_path", "replaced", "removed", "directories"]


@pytest.mark.parametrize("what", BOUNDED + UNBOUNDED)
def test_one_user_takes_what_they_can(mount: Mounted, what: str) -> None:
    pid = mount.pid()
    before = descriptors(pid)
    with holding(mount, what) as (held, refused):
        if what in BOUNDED:
            assert LIMIT // 8 < held < LIMIT and refused == 2 * LIMIT - held
        else:
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


def test_one_file_needs_one(mount: Mounted) -> None:
    """However often it is open for reading, before and after it is copied up."""
    pid = mount.pid()
    files = [open(mount.path / "1", "rb") for _ in range(2 * LIMIT)]
    before = descriptors(pid)
    with open(mount.path / "1", "ab") as file:
        file.write(b"more\n")
    assert {os.pread(file.fileno(), 99, 0) for file in files} == {b"1\nmore\n"}
    assert descriptors(pid) <= before + 2
    for file in files:
        file.close()
