"""``cowfs watch``: each change is told once, in order, with who made it, and the mount waits for nobody."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cowfs.api import watch
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, force_umount, mounted, project_root
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse
from tests.support.watching import watching

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse
_IS_ROOT = os.geteuid() == 0


def lay(place: Path) -> Path:
    """Make a lower of a few files, which nobody can read."""
    (place / "lower/etc").mkdir(parents=True)
    (place / "lower/etc/hosts").write_text("localhost\n")
    (place / "lower/large").write_bytes(bytes(1 << 20))
    return place / "lower"


@pytest.fixture(params=["image", "directory", "fakeroot"])
def mount(request: pytest.FixtureRequest, nobody_path: Path) -> Iterator[Mounted]:
    """A mount with a store of some kind."""
    lower, store = lay(nobody_path), nobody_path / "store"
    if request.param == "image":
        store = nobody_path / "s.bs"
        cowfs("create", store, "64", check=True)
    nobody = request.param == "fakeroot" and _IS_ROOT
    if nobody:
        store.mkdir()
        os.chown(store, NOBODY, NOBODY)
        for path in (lower, lower / "etc", lower / "etc/hosts", lower / "large"):
            os.chown(path, NOBODY, NOBODY)
    options = ["fakeroot"] if request.param == "fakeroot" else []
    with mounted(lower, nobody_path / "mnt", store, options=options, nobody=nobody) as made:
        yield made


WORK = """
import os, sys
os.chdir(sys.argv[1])
os.mkdir("d")
with open("d/new", "w") as file: file.write("one")
os.chmod("d/new", 0o600)
os.chown("d/new", 1, 1)
os.utime("d/new", (1, 1))
os.truncate("d/new", 1)
os.link("d/new", "d/link")
os.symlink("x", "d/symlink")
os.mkfifo("d/fifo")
os.rename("d/new", "moved")
os.rename("d", "e")
os.setxattr("moved", "user.a", b"b")
os.removexattr("moved", "user.a")
with open("etc/hosts", "a") as file: file.write("more")
with open("large", "rb") as old, open("copy", "wb") as new: os.copy_file_range(old.fileno(), new.fileno(), 5)
os.unlink("e/link")
os.unlink("e/fifo")
os.unlink("e/symlink")
os.rmdir("e")
try: os.rmdir("e")
except OSError: pass
"""
TOLD = [
    ("mkdir", "d"),
    ("create", "d/new"),
    ("write", "d/new"),
    ("chmod", "d/new"),
    ("chown", "d/new"),
    ("utimes", "d/new"),
    ("truncate", "d/new"),
    ("link", "d/new", "d/link"),
    ("symlink", "d/symlink"),
    ("mknod", "d/fifo"),
    ("rename", "d/new", "moved"),
    ("rename", "d", "e"),
    ("setxattr", "moved"),
    ("removexattr", "moved"),
    ("write", "etc/hosts"),
    ("create", "copy"),
    ("write", "copy"),
    ("remove", "e/link"),
    ("remove", "e/fifo"),
    ("remove", "e/symlink"),
    ("rmdir", "e"),
]


def test_each_change_once_in_order_with_who_made_it(mount: Mounted, tmp_path: Path) -> None:
    prefix = as_nobody_prefix() if mount.nobody else []
    with watching(mount.path, tmp_path, nobody=mount.nobody) as watch:
        command = [*prefix, sys.executable, "-c", WORK, os.fspath(mount.path)]
        with subprocess.Popen(command) as worker:
            assert worker.wait() == 0
        watch.wait_for("rmdir", "e")
        mount.umount()
        assert watch.end() == (
            0,
            f"cowfs: {mount.path}: watching (Ctrl-C ends it)\ncowfs: {mount.path}: was unmounted\n",
        )
    assert watch.changes() == TOLD
    *lines, last = watch.lines()
    assert last["version"] == 1 and last["ended"] == "unmounted"
    for line in lines:
        assert line["version"] == 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
        process = line["process"]
        assert process["pid"] == worker.pid
        assert process["uid"] == (NOBODY if mount.nobody else os.geteuid())
        assert process["command"] == command[len(prefix) :]
        assert "python" in process["program"]
        assert {"cgroup", "unit", "container"} <= process.keys()
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_what_goes_on_is_told_again_after_its_end(mount: Mounted, tmp_path: Path) -> None:
    if mount.nobody:
        pytest.skip("needs to write as who mounted; the other stores show it")
    with watching(mount.path, tmp_path) as watch:
        with open(mount.path / "log", "wb", buffering=0) as file:
            for number in range(50):
                file.write(b"%d" % number)
        if os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("2\n")  # the kernel forgets the file
        before = watch.wait_for("write", "log")
        assert before[:2] == [("create", "log"), ("write", "log")]
        eventually(lambda: watch.changes().count(("write", "log")) == 2, "the end of it is told")
        (mount.path / "marker").mkdir()
        assert watch.wait_for("mkdir", "marker").count(("write", "log")) == 2


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Mounted]:
    """A mount with a store in memory."""
    with mounted(lay(tmp_path), tmp_path / "mnt") as made:
        yield made


def test_several_with_patterns(in_memory: Mounted, tmp_path: Path) -> None:
    root = in_memory.path
    with ExitStack() as stack:
        every, below, named, absolute = (
            stack.enter_context(watching(root, tmp_path, *patterns))
            for patterns in ([], ["etc"], ["*.so", "/etc/h?sts"], [f"{root}/etc/"])
        )
        for name in ("etc/hosts", "etcetera", "lib.so", "etc/deep.so", "other"):
            (root / name).touch()
        os.rename(root / "other", root / "etc/in")
        os.rename(root / "etc/in", root / "out")
        (root / "last.so").touch()
        (root / "etc/last").touch()
        every.wait_for("create", "etc/last")
        for watch in (below, absolute):
            seen = watch.wait_for("create", "etc/last")
            assert [change[1] for change in seen if change[0] in {"create", "rename"}] == [
                "etc/deep.so", "other", "etc/in", "etc/last",
            ]  # fmt: skip
        seen = named.wait_for("create", "last.so")
        assert [change for change in seen if change[0] != "utimes"] == [
            ("create", "lib.so"), ("create", "etc/deep.so"), ("create", "last.so"),
        ]  # fmt: skip
        assert ("utimes", "etc/hosts") in seen
        below.process.send_signal(signal.SIGINT)
        assert below.end()[0] == 0
        (root / "after").touch()
        every.wait_for("create", "after")


def test_a_daemon_that_dies_is_told(in_memory: Mounted, tmp_path: Path) -> None:
    pid = in_memory.pid()
    with (
        watching(in_memory.path, tmp_path) as watch,
        watching(in_memory.path, tmp_path, json_lines=False) as text,
    ):
        (in_memory.path / "new").touch()
        watch.wait_for("create", "new")
        os.kill(pid, signal.SIGKILL)
        for each in (watch, text):
            code, said = each.end()
            assert code == 32 and "its daemon has died" in said.splitlines()[-1]
        assert watch.lines()[-1]["ended"] == "died"
    force_umount(in_memory.path)


def test_who_reads_slowly_is_left_with_a_mark(in_memory: Mounted) -> None:
    """The mount does not wait either: nobody reads anything until all changes are made."""
    command = [*COWFS, "watch", os.fspath(in_memory.path), "--json"]
    env = {**os.environ, "PYTHONPATH": project_root()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert b"watching" in watch.stderr.readline()
        directory = in_memory.path / ("d" * 200)
        count = 20_000
        for _ in range(count // 2):
            directory.mkdir()
            directory.rmdir()
        lines = [json.loads(line) for line in watch.stdout]
        assert watch.wait(30) == 2
        assert b"faster than they were read" in watch.stderr.read()
    assert lines.pop()["ended"] == "slow"
    assert 4_000 < len(lines) < count  # 4 MiB of them are kept
    assert [line["operation"] for line in lines] == (["mkdir", "rmdir"] * count)[: len(lines)]
    (in_memory.path / "goes on").touch()


def test_names_as_text_and_with_nul(in_memory: Mounted, tmp_path: Path) -> None:
    name = b"a\n\x1b[31m \xff"
    with (
        watching(in_memory.path, tmp_path, json_lines=False) as text,
        watching(in_memory.path, tmp_path, "-z", json_lines=False) as null,
        watching(in_memory.path, tmp_path) as lines,
        watch(str(in_memory.path), ["b"]) as events,
    ):
        os.mkdir(os.fsencode(in_memory.path) + b"/" + name)
        os.rename(os.fsencode(in_memory.path) + b"/" + name, in_memory.path / "b")
        event = next(iter(events))
        assert event[1:4] == ("rename", name, b"b")
        lines.wait_for("rename", name.decode(errors="replace"), "b")
        eventually(lambda: text.out.read_bytes().count(b"\n") == 2, "two lines")
        eventually(lambda: null.out.read_bytes().count(b"\0") == 14, "two times seven fields")
        assert "path_b64" in lines.lines()[0]
        assert lines.lines()[1] == {"version": 1, **event.to_json()}
    assert rb"a\n\033[31m \377" in text.out.read_bytes() and b"\x1b" not in text.out.read_bytes()
    assert f"(pid {os.getpid()}, uid {os.geteuid()}" in text.out.read_text()
    fields = null.out.read_bytes().split(b"\0")
    assert [fields[1:4], fields[8:11]] == [[b"mkdir", name, b""], [b"rename", name, b"b"]]
    assert fields[4:6] == [b"%d" % os.getpid(), b"%d" % os.geteuid()]


def test_what_is_taken_back_is_told(tmp_path: Path) -> None:
    with mounted(lay(tmp_path), tmp_path / "mnt", tmp_path / "store", options=["blame"]) as mount:
        with (
            watching(mount.path, tmp_path) as watch,
            watching(mount.path, tmp_path, json_lines=False) as text,
        ):
            os.rename(mount.path / "etc", mount.path / "moved")
            (mount.path / "moved/before").touch()
            cowfs("revert", mount.path, "--all", check=True)
            (mount.path / "etc/after").touch()
            seen = watch.wait_for("create", "etc/after")
            assert ("create", "moved/before") in seen
            assert any(change[0] == "revert" for change in seen[seen.index(("create", "moved/before")) :])
            eventually(lambda: b"etc/after" in text.out.read_bytes(), "all lines")
            assert re.search(rb"  revert      \S+\n", text.out.read_bytes())
        done = cowfs("blame", mount.path, "etc/after", check=True).stdout
        assert "create, by" in done


def test_a_mapping_is_written_by_the_kernel(in_memory: Mounted, tmp_path: Path) -> None:
    with watching(in_memory.path, tmp_path, "large") as watch:
        with open(in_memory.path / "large", "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
            mapping[:3] = b"new"
            mapping.flush()
        watch.wait_for("write", "large")
        (line,) = [line for line in watch.lines() if line["operation"] == "write"]
        assert line["process"] is None


def test_a_file_that_the_kernel_writes_by_itself(tmp_path: Path) -> None:
    """The kernel had the file before anybody watched; its change is reported when it is closed."""
    if not _IS_ROOT:
        pytest.skip("needs root: only root's files are lent to the kernel")
    with mounted(lay(tmp_path), tmp_path / "mnt", tmp_path / "store") as mount:
        (mount.path / "kept").write_bytes(b"x" * 10_000)
        (mount.path / "kept").read_bytes()  # lent, and perhaps mapped: it is lent for good
        with watching(mount.path, tmp_path) as watch:
            with open(mount.path / "kept", "r+b", buffering=0) as file:
                file.write(b"one")
                file.write(b"two")
            (mount.path / "marker").mkdir()
            eventually(lambda: ("write", "kept") in watch.changes(), "the write is told")
            with open(mount.path / "kept", "r+b", buffering=0):
                pass
            (mount.path / "fresh").write_bytes(b"new")
            (mount.path / "end").mkdir()
            seen = watch.wait_for("mkdir", "end")
        assert seen.count(("write", "kept")) == 1
        assert seen.count(("write", "fresh")) == 1


def test_wrong_arguments(in_memory: Mounted, tmp_path: Path) -> None:
    done = cowfs("watch", tmp_path)
    assert done.returncode == 32 and done.stderr.count("\n") == 1 and "cowfs mountpoint" in done.stderr
    done = cowfs("watch")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    done = cowfs("watch", in_memory.path, "--json", "-z")
    assert done.returncode == 1 and "not allowed with" in done.stderr
    if _IS_ROOT:
        done = cowfs("watch", in_memory.path, nobody=True)
        assert done.returncode == 32 and "belongs to another user" in done.stderr


def test_too_many_watchers_are_refused(in_memory: Mounted) -> None:
    from cowfs.client import ask, the_mount

    dev = the_mount(os.fspath(in_memory.path)).dev
    waiting: list[Any] = [ask(dev, "watch", timeout=20) for _ in range(32)]
    for each in waiting:
        assert next(each) == {"watching": True}
    done = cowfs("watch", in_memory.path)
    assert done.returncode == 2 and "watch this mount already" in done.stderr
    for each in waiting:
        each.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        last: Any = ask(dev, "watch", timeout=20)
        try:
            assert next(last) == {"watching": True}
            return
        except Exception:
            last.close()
    raise AssertionError("those who have left still count")
