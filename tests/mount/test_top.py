"""``cowfs top``, and the same from ``cowfs info --json``: requests are counted once, and timed right."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.holding import holding
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse
N = 20
MIB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    """A mount of a few files, with a store in memory."""
    lower = tmp_path / "lower"
    (lower / "full/of").mkdir(parents=True)
    (lower / "file").write_bytes(os.urandom(100_000))
    with open(lower / "large", "wb") as large:
        for _ in range(48):
            large.write(os.urandom(MIB))
    with mounted(lower, tmp_path / "mnt") as made:
        yield made


def told(mount: Mounted) -> dict[str, Any]:
    """Return what ``cowfs info`` says about requests."""
    shown = cowfs("info", mount.path, "--json", nobody=mount.nobody, check=True).stdout
    requests: dict[str, Any] = json.loads(shown)["requests"]
    return requests


def came(mount: Mounted, before: dict[str, Any], what: str, of: str = "count") -> int:
    """Return how many requests of an operation came since *before*, or their errors, or their ns."""
    known = [requests["operations"].get(what, {}).get(of, 0) for requests in (before, told(mount))]
    return int(known[1] - known[0])


def counts(text: str) -> dict[str, int]:
    """Return how many requests of each operation a table shows."""
    return {
        match[1]: int(match[2].replace(",", ""))
        for match in re.finditer(r"^([A-Z][A-Z_0-9]+) +([\d,]+) ", text, re.MULTILINE)
    }


# --- what is counted


def test_each_request_is_counted_once(mount: Mounted) -> None:
    before = told(mount)
    for number in range(N):
        os.mkdir(mount.path / f"d{number}")
    assert came(mount, before, "MKDIR") == N
    assert came(mount, before, "MKDIR", "errors") == 0
    for number in range(N):
        os.rename(mount.path / f"d{number}", mount.path / f"e{number}")
    assert came(mount, before, "RENAME") + came(mount, before, "RENAME2") == N
    for number in range(N):
        os.rmdir(mount.path / f"e{number}")
    assert came(mount, before, "RMDIR") == N
    assert came(mount, before, "MKDIR") == N


def test_a_name_that_is_not_there_is_no_error(mount: Mounted) -> None:
    before = told(mount)
    for _ in range(2):  # the second time the kernel knows
        for number in range(N):
            assert not os.path.lexists(mount.path / f"missing{number}")
    assert came(mount, before, "LOOKUP") == N
    assert came(mount, before, "LOOKUP", "errors") == 0


def test_errors(mount: Mounted) -> None:
    before = told(mount)
    for _ in range(N):
        with pytest.raises(OSError) as failure:
            os.rmdir(mount.path / "full")
        assert failure.value.errno == errno.ENOTEMPTY
    assert came(mount, before, "RMDIR") == came(mount, before, "RMDIR", "errors") == N


def test_what_the_kernel_forgets_has_no_answer(mount: Mounted) -> None:
    (mount.path / "new").touch()
    (mount.path / "new").unlink()
    kinds = ("FORGET", "BATCH_FORGET")
    eventually(lambda: any(kind in told(mount)["operations"] for kind in kinds), "it is forgotten")
    operations = told(mount)["operations"]
    for kind in operations.keys() & kinds:
        assert operations[kind]["count"] == 1 and operations[kind]["durations_ns"] == []
        assert operations[kind]["mean_ns"] is operations[kind]["p99_ns"] is None
    shown = cowfs("top", mount.path, "-n", "1", check=True).stdout
    assert re.search(r"\n(BATCH_)?FORGET +1 .* 0 % +- +- +- +0\n", shown), shown


def test_reads_without_python(mount: Mounted) -> None:
    """C reads files that have a descriptor of the kernel's; files of an image have none."""
    (mount.path / "new").write_bytes(bytes(MIB))
    before = told(mount)
    assert len((mount.path / "file").read_bytes()) == 100_000
    after = told(mount)
    reads = came(mount, before, "READ")
    assert after["direct_reads"] - before["direct_reads"] == reads >= 1
    fd = os.open(mount.path / "new", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if len((mount.path / "new").read_bytes()) == MIB and came(mount, after, "READ"):
        assert told(mount)["direct_reads"] == after["direct_reads"]


@needs_mksquashfs
def test_what_images_have_in_memory(tmp_path: Path) -> None:
    """A second read is a cache hit; asking for the figures changes nothing."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"some text\n" * 100_000)
    image = mksquashfs(tmp_path / "image.dat", tmp_path / "tree")
    assert cowfs("create", tmp_path / "s.bs", "16").returncode == 0

    def caches(here: Mounted) -> dict[str, dict[str, int]]:
        shown = cowfs("info", here.path, "--json", check=True).stdout
        found: dict[str, dict[str, int]] = json.loads(shown)["caches"]
        return found

    with mounted(image, tmp_path / "mnt", tmp_path / "s.bs", engine="process") as here:
        assert set(caches(here)) == {"squashfs metadata", "squashfs data", "ext3 metadata"}
        assert caches(here)["squashfs data"]["misses"] == 0
        assert (here.path / "file").read_bytes() == b"some text\n" * 100_000
        first = caches(here)
        assert first["squashfs data"]["misses"] == 8, "as many blocks of 128 KiB as there are"
        fd = os.open(here.path / "file", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(os.pread(fd, 1_000_000, 0)) == 1_000_000
        os.close(fd)
        second = caches(here)
        assert second["squashfs data"]["misses"] == 8
        assert second["squashfs data"]["hits"] >= first["squashfs data"]["hits"] + 8
        third = caches(here)
        for name in ("squashfs metadata", "squashfs data"):  # the store's rises by itself, with each commit
            assert third[name] == second[name]
        (here.path / "new").mkdir()
        assert caches(here)["ext3 metadata"]["hits"] > second["ext3 metadata"]["hits"]
        assert 0 < caches(here)["ext3 metadata"]["misses"] < 100
        shown = cowfs("top", here.path, "-n", "1", check=True).stdout
        hits, misses = second["squashfs data"].values()
        assert f"squashfs data {100 * hits / (hits + misses):.0f} %" in shown, shown


# --- what is timed


def test_durations_are_those_that_the_caller_sees(mount: Mounted) -> None:
    before = told(mount)
    start = time.monotonic_ns()
    for number in range(50):
        os.mkdir(mount.path / f"d{number}")
    took = time.monotonic_ns() - start
    assert 50 * 1000 < came(mount, before, "MKDIR", "total_ns") < took
    for name, operation in told(mount)["operations"].items():
        durations = operation["durations_ns"]
        assert sum(count for _, _, count in durations) == operation["count"], name
        least, most = (sum(one[end] * one[2] for one in durations) for end in (0, 1))
        assert least <= operation["total_ns"] < most, name
        assert operation["mean_ns"] == operation["total_ns"] / operation["count"]
        assert durations[0][0] < operation["p50_ns"] <= operation["p99_ns"] < durations[-1][1]
        assert all(high <= max(low * 1.25, 4) for low, high, _ in durations), "or they say too little"
    mkdir = told(mount)["operations"]["MKDIR"]
    assert mkdir["p50_ns"] < took / 25, "half of them took less than twice the mean"


def test_a_copy_up_in_a_thread_is_in_its_own_row(mount: Mounted) -> None:
    """Another thread answers the request later than the one that received it."""
    before = told(mount)
    start = time.monotonic_ns()
    os.close(os.open(mount.path / "large", os.O_RDWR))
    took = time.monotonic_ns() - start
    assert came(mount, before, "OPEN") == 1
    total = came(mount, before, "OPEN", "total_ns")
    assert took / 5 < total < took, "to copy so much is most of what the caller waits for"
    assert told(mount)["operations"]["OPEN"]["durations_ns"][-1][1] > total / 2
    assert not told(mount)["under_way"]
    (mount.path / "small").touch()
    assert came(mount, before, "OPEN") == 1


@needs_root
def test_what_waits_is_under_way_and_then_counted_once(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("held", "other"):
        (tmp_path / "source" / name).write_text(f"{name}\n")
    with holding(tmp_path / "source", tmp_path) as lower, mounted(lower.path, tmp_path / "mnt") as mount:
        os.listdir(mount.path)
        before = told(mount)
        lower.hold("open", "held")
        reader = threading.Thread(target=(mount.path / "held").read_bytes)
        reader.start()
        try:
            eventually(lambda: lower.is_held("open"), "it is held")
            waited = time.monotonic_ns()
            os.mkdir(mount.path / "meanwhile")
            assert [one["operation"] for one in told(mount)["under_way"]] == ["OPEN"]
            shown = cowfs("top", mount.path, "-n", "1", check=True).stdout
            assert re.search(r"requests/s; 1 under way, OPEN, for [\d.]+ (ms|s)\n", shown), shown
            assert came(mount, before, "OPEN") == 0
        finally:
            waited = time.monotonic_ns() - waited
            lower.let_go()
            reader.join()
        assert not told(mount)["under_way"]
        assert came(mount, before, "OPEN") == 1
        assert came(mount, before, "OPEN", "total_ns") > waited
        assert told(mount)["operations"]["OPEN"]["durations_ns"][-1][1] > waited


def test_many_clients_lose_nothing(mount: Mounted) -> None:
    before = told(mount)

    def work(client: int) -> None:
        for number in range(100):
            os.mkdir(mount.path / f"of{client}-{number}")

    clients = [threading.Thread(target=work, args=(client,)) for client in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert came(mount, before, "MKDIR") == 400
    assert not told(mount)["under_way"]


def test_a_libfuse_that_lets_nobody_between(tmp_path: Path) -> None:
    """There are no figures, and a message says so; the mount works."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "mnt").mkdir()
    source = tmp_path / "refusing.c"
    source.write_text(
        "int fuse_session_custom_io(void) { return -95; }\n"
        "int fuse_session_custom_io_317(void) { return -95; }\n"
    )
    run("cc", "-shared", "-fPIC", "-o", tmp_path / "refusing.so", source)
    log = tmp_path / "log"
    run(
        *COWFS, "mount", tmp_path / "lower", tmp_path / "mnt", "-o", f"io_uring=off,log={log}",
        env={**os.environ, "PYTHONPATH": project_root(), "LD_PRELOAD": str(tmp_path / "refusing.so")},
    )  # fmt: skip
    here = Mounted(tmp_path / "mnt", log)
    try:
        (here.path / "new").write_text("new\n")
        assert told(here) is None
        assert "served" not in cowfs("info", here.path, check=True).stdout
        done = cowfs("top", here.path, "-n", "1")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            f"cowfs: {here.path}: requests are not counted: libfuse was built without custom I/O\n"
        )
    finally:
        here.umount()


# --- what is shown


def test_since_the_mount(mount: Mounted) -> None:
    for number in range(N):
        os.mkdir(mount.path / f"d{number}")
    shown = cowfs("top", mount.path, "-n", "1", check=True).stdout
    assert shown.startswith(f"{mount.path}: since the mount, 0:00:")
    assert counts(shown)["MKDIR"] == N
    facts = json.loads(cowfs("info", mount.path, "--json", check=True).stdout)
    assert f"\nby {facts['transport']}; " in shown
    assert f"; {facts['inodes_known']:,} inodes known, 0 open files\n" in shown
    assert counts(shown) == {name: one["count"] for name, one in facts["requests"]["operations"].items()}
    by_time = sorted(facts["requests"]["operations"].items(), key=lambda item: -item[1]["total_ns"])
    assert list(counts(shown)) == [name for name, _ in by_time]
    served = sum(counts(shown).values())
    assert f"served:     {served:,}; cowfs top {mount.path}\n" in cowfs("info", mount.path).stdout
    shares = [int(share) for share in re.findall(r" (\d+) % ", shown.partition("OPERATION")[2])]
    assert 100 - len(shares) <= sum(shares) <= 100 + len(shares)


@contextmanager
def running(mount: Mounted, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``cowfs top`` in the background, its output in pipes."""
    environment = {**os.environ, "PYTHONPATH": project_root()}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COWFS, "top", mount.path, *options], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as top:
        try:
            yield top
        finally:
            top.kill()


def test_rounds_in_a_pipe(mount: Mounted) -> None:
    os.mkdir(mount.path / "before")
    with running(mount, "-n", "3", "-d", "0.5") as top:
        assert top.stdout is not None and top.stderr is not None
        first = top.stdout.readline()
        for number in range(N):
            os.mkdir(mount.path / f"d{number}")
        rest = top.stdout.read()
        assert (top.wait(30), top.stderr.read()) == (0, "")
    assert "\x1b" not in first + rest
    rounds = (first + rest).split(f"\n\n{mount.path}: the last ")
    assert len(rounds) == 3 and rounds[0].startswith(f"{mount.path}: since the mount, ")
    assert "INIT" in counts(rounds[0]) and "INIT" not in counts(rounds[1])
    assert sum(counts(one).get("MKDIR", 0) for one in rounds) == N + 1


def test_rounds_as_json(mount: Mounted) -> None:
    os.mkdir(mount.path / "before")
    with running(mount, "--json", "-n", "2", "-d", "1") as top:
        assert top.stdout is not None
        first = json.loads(top.stdout.readline())
        for number in range(N):
            os.mkdir(mount.path / f"d{number}")
        second = json.loads(top.stdout.read())
        assert top.wait(30) == 0
    assert (first["since_mount"], second["since_mount"]) == (True, False)
    assert first["requests"]["operations"]["MKDIR"]["count"] == 1
    assert second["requests"]["operations"]["MKDIR"]["count"] == N
    assert "INIT" in first["requests"]["operations"] and "INIT" not in second["requests"]["operations"]
    assert 0.9 < second["seconds"] < 30
    for one in (first, second):
        assert one["mountpoint"] == str(mount.path)
        assert one["rss"] > MIB and one["inodes_known"] >= 1 and one["open_files"] == 0
        assert one["transport"].startswith(("io_uring", "/dev/fuse"))
        for operation in one["requests"]["operations"].values():
            assert operation["p50_ns"] <= operation["p99_ns"] and operation["errors"] <= operation["count"]
            assert sum(count for _, _, count in operation["durations_ns"]) == operation["count"]


@pytest.mark.parametrize("asks", ["nobody", "root"])
def test_a_users_mount(nobody_path: Path, asks: str) -> None:
    if asks == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    (nobody_path / "lower").mkdir()
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody=True) as here:
        shown = cowfs("top", here.path, "-n", "1", nobody=asks == "nobody", check=True).stdout
        assert counts(shown)["INIT"] == 1


@needs_root
def test_strangers_are_refused(tmp_path: Path, nobody_path: Path) -> None:
    (nobody_path / "lower").mkdir()
    with mounted(nobody_path / "lower", nobody_path / "mnt") as here:
        done = cowfs("top", here.path, nobody=True)
        assert done.returncode == 32 and done.stderr.count("\n") == 1 and "another user" in done.stderr


# --- its end


@pytest.mark.parametrize("how", ["umount", "kill", "another"])
def test_the_mount_goes_away(mount: Mounted, how: str) -> None:
    pid = mount.pid()
    with running(mount, "-d", "0.1") as top:
        assert top.stdout is not None and top.stderr is not None
        top.stdout.readline()
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            mount.umount()
        if how == "another":
            cowfs("mount", mount.path.with_name("lower"), mount.path, check=True)
        said = top.stderr.read()
        assert top.wait(30) == 32, said
    if how == "kill":
        assert said.startswith(f"cowfs: {mount.path}: the daemon "), said
        assert "cowfs umount" in said
    else:
        assert said == f"cowfs: {mount.path}: no longer mounted (mount it again, then run this again)\n"
    assert said.count("\n") == 1
    if is_mounted(mount.path):
        mount.umount()


def test_ctrl_c(mount: Mounted) -> None:
    with running(mount, "-d", "60") as top:
        assert top.stdout is not None and top.stderr is not None
        while not top.stdout.readline().startswith("INIT"):
            pass
        top.send_signal(signal.SIGINT)
        assert (top.wait(30), top.stderr.read()) == (0, "")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-n", "0"], "'0' is not a number of rounds"),
        (["-n", "-1"], "'-1' is not a number of rounds"),
        (["-n", "1.5"], "'1.5' is not a number of rounds"),
        (["-d", "0"], "'0' is not a number of seconds"),
        (["-d", "nan"], "'nan' is not a number of seconds"),
        (["-d", "soon"], "'soon' is not a number of seconds"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, options: list[str], why: str) -> None:
    done = cowfs("top", tmp_path, *options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert why in done.stderr


def test_what_is_no_mount(tmp_path: Path) -> None:
    done = cowfs("top", tmp_path)
    assert done.returncode == 32
    assert done.stderr.startswith(f"cowfs: {tmp_path}: not a cowfs mountpoint (")


# --- on a terminal


def on_terminal(mount: Mounted, *options: str, columns: int, rows: int, term: str = "xterm") -> str:
    """Return what ``cowfs top`` writes to a terminal of this size."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": term, "PYTHONPATH": project_root(), "PYTHONUTF8": "1"}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.execve(COWFS[0], [*COWFS, "top", str(mount.path), *options], environment)
    written = b""
    with suppress(OSError):  # EIO: it has ended
        while more := os.read(terminal, 65536):
            written += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written
    return written.decode()


def test_it_redraws_in_place(mount: Mounted) -> None:
    written = on_terminal(mount, "-n", "2", "-d", "0.1", columns=132, rows=50)
    assert written.startswith("\x1b[H\x1b[2J")
    frames = written.split("\x1b[H")[1:]
    assert len(frames) == 2 and all(frame.endswith("\x1b[J") for frame in frames)
    assert counts(frames[0])["INIT"] == 1
    assert frames[1].startswith(f"{mount.path}: the last 0.")
    assert set(re.findall(r"\x1b\[.", written)) == {"\x1b[H", "\x1b[2", "\x1b[K", "\x1b[J"}


def test_it_is_no_larger_than_the_terminal(tmp_path: Path) -> None:
    """A line that is too long would take two, and one more than there are would make it roll."""
    (tmp_path / "lower").mkdir()
    place = tmp_path / "\u5bbd\u5bbd\n\x1b[31m\u5bbd"
    with mounted(tmp_path / "lower", place, log=tmp_path / "log") as mount:
        os.listdir(place)
        lines = [""]
        for columns, rows in ((40, 8), (12, 4), (len(str(tmp_path)) + 4, 24), (300, 24)):
            written = on_terminal(mount, "-n", "1", columns=columns, rows=rows)
            lines = re.sub(r"\x1b\[(H|2J|K|J)", "", written).split("\r\n")
            assert lines[-1] == "" and 2 <= len(lines) <= rows, lines
            for line in lines:
                assert "\x1b" not in line and "\n" not in line
                assert sum(2 if character == "\u5bbd" else 1 for character in line) <= columns, line
    assert lines[0].startswith(f"{tmp_path}/\u5bbd\u5bbd\\n\\x1b[31m\u5bbd: since the mount")


def test_a_terminal_that_can_do_nothing(mount: Mounted) -> None:
    assert "\x1b" not in on_terminal(mount, "-n", "2", "-d", "0.1", columns=80, rows=24, term="dumb")
