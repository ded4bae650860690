"""A lower that hangs, or is dead, blocks those who use it and nobody else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowfs.linux.remote import may_wait
from tests.support.holding import Lower, holding
from tests.support.mounts import (
    COWFS,
    Mounted,
    cowfs,
    eventually,
    is_mounted,
    mount_arguments,
    mounted,
    project_root,
)
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.victim import VICTIM

pytestmark = [needs_fuse, needs_root]


def as_victim(script: str, where: Path) -> str:
    """Return what a command of another user prints; it must not wait for the slow lower."""
    prefix = ["setpriv", f"--reuid={VICTIM}", f"--regid={VICTIM}", "--clear-groups", "--"]
    return run(*prefix, "sh", "-e", "-c", script, cwd=where, timeout=15).stdout


@dataclass
class Place:
    """A mount of all users' whose lower can be made to hang."""

    lower: Lower
    here: Mounted
    store: Path
    attacks: list[subprocess.Popen[str]]

    def attack(self, script: str) -> subprocess.Popen[str]:
        """Let nobody run a command in the mount."""
        command = [*as_nobody_prefix(), "sh", "-c", script]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=self.here.path, stdout=pipe, stderr=pipe, text=True)
        self.attacks.append(process)
        return process

    def hang(self, request: str, name: str, script: str) -> subprocess.Popen[str]:
        """Let nobody run a command that waits, for a request about *name*."""
        self.lower.hold(request, name)
        process = self.attack(script)
        eventually(lambda: self.lower.is_held(request), f"{script} waits in {request}")
        return process

    def others_work(self, number: int = 0) -> None:
        """Somebody else looks at, lists, reads and makes files."""
        script = f"""
            stat calm/file{number} && ls calm && cat calm/file{number} && readlink calm/alias && stat -f .
            echo new > own/made{number} && mv own/made{number} own/moved && cat own/moved
            rm own/moved && ls own
            echo more >> calm/theirs && chmod 600 calm/theirs && cat calm/theirs
        """
        said = as_victim(script, self.here.path)
        assert f"content {number}\n" in said and "\nnew\n" in said and said.endswith("more\n")

    def mount_arguments(self) -> list[str]:
        """Return the arguments to mount it with."""
        options = ["allow_other", f"log={self.here.log}"]
        return mount_arguments(self.lower.path, self.here.path, self.store, None, options)


@pytest.fixture
def place(nobody_path: Path) -> Iterator[Place]:
    """Mounted; the end may not take long."""
    with made(nobody_path) as it:
        yield it


@contextmanager
def made(scratch: Path) -> Iterator[Place]:
    source, at = scratch / "source", scratch / "mnt"
    for directory in (source / "calm", source / "hung", at):
        directory.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        (source / "calm" / f"file{number}").write_text(f"content {number}\n")
    (source / "calm" / "large").write_bytes(bytes(300_000))
    (source / "calm" / "alias").symlink_to("file0")
    (source / "calm" / "theirs").write_text("theirs\n")
    (source / "hung" / "held").write_text("held\n")
    (source / "hung" / "other").write_text("other\n")
    (source / "hung" / "large").write_bytes(bytes(300_000))
    (source / "hung" / "link").symlink_to("held")
    os.setxattr(source / "hung" / "held", "user.color", b"red")
    for path in (source / "hung", *(source / "hung").iterdir()):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.chown(source / "calm" / "theirs", VICTIM, VICTIM)
    with holding(source, scratch) as lower:
        it = Place(lower, Mounted(at, scratch / "log"), scratch / "store", [])
        try:
            done = cowfs(*it.mount_arguments())
            assert done.returncode == 0, done.stderr
            (at / "own").mkdir()
            os.chown(at / "own", VICTIM, VICTIM)
            yield it
        finally:
            with suppress(OSError):
                lower.let_go()
            lower.die()
            for process in it.attacks:
                process.communicate(timeout=20)
            if is_mounted(at):
                it.here.umount()


HANGS = {
    "lookup": ("lookup", "held", "stat -c %s hung/held", "5\n"),
    "getattr": ("getattr", "held", "stat -c %s hung/held", "5\n"),
    "readdir": ("readdir", "hung", "ls hung", "held\nlarge\nlink\nother\n"),
    "attributes of a listing": ("getattr", "other", "ls hung", "held\nlarge\nlink\nother\n"),
    "open": ("open", "held", "cat hung/held", "held\n"),
    "read": ("read", "held", "cat hung/held", "held\n"),
    "read of a large file": ("read", "large", "cat hung/large | wc -c", "300000\n"),
    "readlink": ("readlink", "link", "readlink hung/link", "held\n"),
    "getxattr": ("getxattr", "held", "getfattr --only-values -n user.color hung/held", "red"),
    "listxattr": ("listxattr", "held", "getfattr hung/held | grep user", "user.color\n"),
    "close": ("flush", "held", "cat hung/held", "held\n"),
    "copy-up of data": ("read", "held", "echo x >> hung/held && cat hung/held", "held\nx\n"),
    "copy-up of attributes": ("listxattr", "held", "chmod 755 hung/held && stat -c %a hung/held", "755\n"),
    "truncation": ("open", "held", "truncate -s 4 hung/held && cat hung/held", "held"),
    "truncation to nothing": ("listxattr", "held", "echo > hung/held && cat hung/held", "\n"),
    "making a name": ("lookup", "new", "mkdir hung/new && ls hung", "held\nlarge\nlink\nnew\nother\n"),
    "removal": ("getattr", "held", "rm -f hung/held && ls hung", "large\nlink\nother\n"),
    "renaming": ("lookup", "new", "mv hung/held hung/new && cat hung/new", "held\n"),
    "a link": ("read", "held", "ln hung/held hung/new && cat hung/new", "held\n"),
}


@pytest.mark.parametrize("what", HANGS)
def test_others_are_served_while_one_waits(what: str, place: Place) -> None:
    request, name, script, answer = HANGS[what]
    waiting = place.hang(request, name, script)
    place.others_work()
    if what != "close":  # nobody waits for that
        assert waiting.poll() is None
    place.lower.let_go()
    assert waiting.communicate(timeout=20) == (answer, "")
    place.here.umount()
    assert place.here.trouble() == []


def test_many_requests_of_one_user_wait(place: Place) -> None:
    """More than there are threads for one user: who waits for a thread hangs too, and nobody else."""
    waiting = [place.hang("read", "held", "cat hung/held")]
    waiting += [place.attack("cat hung/held") for _ in range(40)]
    place.lower.hold("getattr", "other")
    waiting += [place.attack("cat hung/other hung/held") for _ in range(20)]
    place.others_work()
    place.lower.let_go()
    said = {process.communicate(timeout=20) for process in waiting}
    assert said == {("held\n", ""), ("other\nheld\n", "")}
    place.here.umount()
    assert place.here.trouble() == []


def test_many_reads_wait(nobody_path: Path) -> None:
    """More than the kernel lets a filesystem have under way at a time, unless that asks for more."""
    for number in range(40):
        (nobody_path / "source" / "many" / str(number)).mkdir(parents=True)
        (nobody_path / "source" / "many" / str(number) / "held").write_bytes(bytes(300_000))
    with made(nobody_path) as place:
        place.lower.hold("read", "held")
        waiting = [place.attack(f"cat many/{number}/held | wc -c") for number in range(40)]
        eventually(lambda: place.lower.is_held("read"), "they wait")
        eventually(lambda: open_files(place) >= 4, "several wait")
        place.others_work()
        as_victim("cat calm/large | wc -c", place.here.path)
        place.lower.let_go()
        assert {process.communicate(timeout=30) for process in waiting} == {("300000\n", "")}
        place.here.umount()


def open_files(place: Place) -> int:
    shown = cowfs("info", place.here.path, "--json", check=True).stdout
    return int(json.loads(shown)["open_files"])


def test_changes_are_told_while_a_lower_hangs(place: Place) -> None:
    """cowfs diff waits for the lower; others do not wait for cowfs diff."""
    place.attack("echo longer >> hung/held").communicate(timeout=20)
    place.lower.hold("getattr", "held")
    told = subprocess.Popen(
        [*COWFS, "diff", place.here.path],
        stdout=subprocess.PIPE,
        text=True,
    )
    place.attacks.append(told)
    eventually(lambda: place.lower.is_held("getattr"), "the diff waits")
    place.others_work()
    assert cowfs("info", place.here.path, timeout=10).returncode == 0
    here = place.here.path
    for words in (("du", here), ("explain", here, "hung/held"), ("vacuum", here), ("revert", here, "--all")):
        refused = cowfs(*words, timeout=10)  # they would wait, and all others with them
        assert (refused.returncode, refused.stdout) == (32, "")
        assert (
            "a lower is on a filesystem that may hang" in refused.stderr and refused.stderr.count("\n") == 1
        )
    place.others_work()
    place.lower.let_go()
    said = told.communicate(timeout=20)[0]
    assert "hung/held" in said and told.returncode in {0, 1}


def test_dead_lower(place: Place) -> None:
    """Requests to the dead lower fail, waiting ones too; everything else works, and so does the unmount."""
    waiting = place.hang("read", "held", "cat hung/held")
    place.lower.die()
    said, wrong = waiting.communicate(timeout=20)
    assert said == "" and "cat: hung/held: " in wrong
    assert "not connected" in place.attack("stat hung/other").communicate(timeout=20)[1]
    script = "echo new > own/file && cat own/file && mkdir own/dir && ls own"
    assert as_victim(script, place.here.path) == "new\ndir\nfile\n"
    place.here.umount()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("SIGTERM", "lookup"),
        pytest.param("SIGTERM", "close", marks=pytest.mark.nightly),
        pytest.param("SIGTERM", "copy-up of data", marks=pytest.mark.nightly),
        ("umount -l", "read"),
        pytest.param("umount -l", "close", marks=pytest.mark.nightly),
    ],
)
def test_the_end_waits_for_nobody(what: str, how: str, place: Place) -> None:
    """The mount ends, and its store is free for another, while the lower still hangs; the log says so."""
    request, name, script, _ = HANGS[what]
    pid = place.here.pid()
    waiting = place.hang(request, name, script)
    if how == "SIGTERM":
        os.kill(pid, signal.SIGTERM)
    else:
        assert cowfs("umount", "-l", place.here.path, timeout=20).returncode == 0
    eventually(lambda: not is_mounted(place.here.path), "the mount is gone", 30)
    if what != "close":
        wrong = waiting.communicate(timeout=20)[1]  # a read is tried again, of a mount that has gone
        assert "Input/output error" in wrong or "connection abort" in wrong
        eventually(lambda: "does not answer" in place.here.log.read_text(), "the log says so")
    other = place.here.path.with_name("calm lower")
    other.mkdir()
    with mounted(other, place.here.path.with_name("mnt2"), place.store, options=["force_lower"]) as again:
        assert (again.path / "own").is_dir()
        assert not (again.path / "hung" / "held").exists() or what != "copy-up of data"
    place.lower.let_go()
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the process ends when the lower answers", 20)


def test_an_image_on_a_filesystem_that_hangs(nobody_path: Path) -> None:
    """Reads of the image wait; the rest of the union does not."""
    source, tree = nobody_path / "source", nobody_path / "tree"
    tree.mkdir()
    content = random.Random(1).randbytes(300_000)
    (tree / "file").write_bytes(content)
    source.mkdir()
    run("mksquashfs", tree, source / "image", "-quiet", "-no-progress")
    with holding(source, nobody_path) as lower:
        at, options = nobody_path / "mnt", ["allow_other"]
        with mounted(lower.path / "image", at, nobody_path / "store", options=options) as here:
            (at / "new").mkdir()
            os.chown(at / "new", VICTIM, VICTIM)
            lower.hold("read", "image")
            waiting = subprocess.Popen(["cat", at / "file"], stdout=subprocess.PIPE)
            try:
                eventually(lambda: lower.is_held("read"), "the image is read")
                script = "echo x > x && mkdir y && ls && cat x && df ."
                assert as_victim(script, at / "new").startswith("x\ny\nx\n")
                lower.let_go()
                assert waiting.communicate(timeout=20)[0] == content
            finally:
                lower.let_go()
                waiting.communicate(timeout=20)
            assert here.trouble() == []


def test_which_filesystems_may_wait(nobody_path: Path) -> None:
    """FUSE, images on it, what the kernel has mounted of those, and the device between; not our own disks."""
    source, at = nobody_path / "source", nobody_path / "mnt"
    (source / "directory").mkdir(parents=True)
    at.mkdir()
    run("mksquashfs", source, nobody_path / "local", "-quiet", "-no-progress")
    shutil.copy(nobody_path / "local", source / "image")
    with holding(source, nobody_path) as lower:
        assert all(waits(lower.path / name) for name in ("", "directory", "image"))
        assert not any(
            waits(path) for path in (source, nobody_path / "local", Path("/proc"), Path("/dev/shm"))
        )
        for image, expected in ((lower.path / "image", True), (nobody_path / "local", False)):
            run("mount", "-o", "loop,ro", image, at)
            try:
                device = run("findmnt", "-no", "SOURCE", at).stdout.strip()
                assert (waits(at), waits(Path(device))) == (expected, expected)
            finally:
                run("umount", at)


def waits(path: Path) -> bool:
    fd = os.open(path, os.O_PATH)
    try:
        return may_wait(fd)
    finally:
        os.close(fd)


def test_mounting_can_be_interrupted(nobody_path: Path) -> None:
    """The lower hangs before it is mounted: whoever waits for it can leave."""
    source = nobody_path / "source"
    source.mkdir()
    at = nobody_path / "mnt"
    at.mkdir()
    with holding(source, nobody_path) as lower:
        lower.hold("getattr", "source")
        command = [*COWFS, *mount_arguments(lower.path, at, nobody_path / "store")]
        said = nobody_path / "said"
        with said.open("wb") as file:
            waiting = subprocess.Popen(command, stderr=file)
        try:
            eventually(lambda: lower.is_held("getattr"), "the mount waits")
            waiting.terminate()
            assert waiting.wait(20) == 128 + signal.SIGTERM
        finally:
            lower.die()
            waiting.kill()
            waiting.wait(20)
        assert said.read_text().startswith("cowfs: interrupted; the daemon (pid ")
        assert not is_mounted(at)


_LITTLE = """
import sys
from cowfs.cli.main import main
from cowfs.layers import beneath
beneath.most_listed = lambda: 2 << 20
sys.exit(main(sys.argv[1:]))
"""
"""A cowfs that has little memory for names."""


def test_a_listing_without_end_ends(nobody_path: Path) -> None:
    at, log = nobody_path / "mnt", nobody_path / "log"
    for directory in (nobody_path / "source" / "endless", at):
        directory.mkdir(parents=True)
    with holding(nobody_path / "source", nobody_path) as lower:
        options = ["allow_other", f"log={log}"]
        arguments = mount_arguments(lower.path, at, nobody_path / "store", None, options)
        run(sys.executable, "-c", _LITTLE, *arguments, env={**os.environ, "PYTHONPATH": project_root()})
        try:
            listed = run("ls", at / "endless", env={"LC_ALL": "C"}, check=False)
            assert "Structure needs cleaning" in listed.stderr
            assert run("ls", at).stdout == "endless\n"
        finally:
            Mounted(at, log).umount()
    assert "more names than the memory has room for" in log.read_text()
