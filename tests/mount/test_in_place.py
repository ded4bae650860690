"""A mountpoint that is a layer or the store, inside one, or above it: the daemon never waits for itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, eventually, force_umount, is_mounted, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import build

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, pytest.mark.timeout(110)]

_HANGS = 40.0
"""Seconds after which a mount is broken off: whoever waits for it gets an error, and the test fails."""


@contextmanager
def never_hanging(below: Path) -> Iterator[None]:
    """Break off every FUSE mount below a directory if the test takes too long: a process that waits for a
    daemon that waits for itself cannot even be killed. Ends all of them in any case."""
    control = below.with_name(f"{below.name}.fusectl")
    control.mkdir()

    def abort() -> None:
        run("mount", "-t", "fusectl", "none", control)
        for dev in _fuse_mounts(below):
            with suppress(OSError):
                (control / dev.partition(":")[2] / "abort").write_text("1")
        run("umount", control)

    timer = threading.Timer(_HANGS, abort)
    if os.geteuid() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for _ in _fuse_mounts(below):
            for line in _lines(below):
                force_umount(line[4])
        control.rmdir()


def _lines(below: Path) -> list[list[str]]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [line for line in lines if line[4].startswith(str(below)) and "fuse.cowfs" in line]


def _fuse_mounts(below: Path) -> set[str]:
    return {line[2] for line in _lines(below)}


@dataclass(frozen=True)
class Place:
    """The places of the parts of a union, as names in one directory."""

    lowers: str
    at: str
    store: str = ""


WORKS = {
    "the mountpoint is the lower": Place("d", "d"),
    "the same, with a store": Place("d", "d", "s"),
    "the same, with a store in an image": Place("d", "d", "x.bs"),
    "by a symbolic link": Place("link", "d"),
    "inside the lower": Place("d", "d/sub"),
    "inside the lower, with a store": Place("d", "d/sub", "s"),
    "above the lower": Place("d", "."),
    "above lower and store": Place("d", ".", "s"),
    "above images": Place("i.sqsh", ".", "x.bs"),
    "the mountpoint is the store": Place("d", "s", "s"),
    "lower, mountpoint and store's place": Place("i.sqsh:d", "d", "x.bs"),
    "the store's image in the lower": Place("d", "m", "d/in.bs"),
    "the store's image in lower and mountpoint": Place("d", "d", "d/in.bs"),
    "a lower in a lower": Place("d:d/sub", "m"),
    "a lower above a lower": Place("d/sub:d", "m"),
    "a lower in a lower, mounted on both": Place("d/sub:d", "d/sub"),
}
REFUSED = {
    "the store in the lower": (Place("d", "m", "d/sub/s"), "inside the lower"),
    "the store is the lower": (Place("d", "m", "d"), "inside the lower"),
    "the lower in the store": (Place("s/upper", "m", "s"), "inside the store"),
    "the store in the lower, by a link": (Place("d", "m", "link/s"), "inside the lower"),
    "the mountpoint in the store": (Place("d", "s/upper", "s"), "inside the store"),
}


@pytest.fixture(params=["root", "nobody"])
def nobody(request: pytest.FixtureRequest) -> bool:
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    return bool(request.param == "nobody")


@pytest.fixture
def base(nobody_path: Path) -> Iterator[Path]:
    """Lowers, stores, mountpoints."""
    made = nobody_path / "base"
    build(made / "d", {"file": b"lower\n", "gone": b"x", "sub/below": b"y", "sub/deep/er": b"z"})
    for name in ("s", "s/upper", "s/work", "m"):
        (made / name).mkdir()
    (made / "link").symlink_to("d")
    run("chmod", "-R", "go-w", made)
    with never_hanging(made):
        yield made


def own(base: Path, nobody: bool) -> None:
    """Let all of it, and all in the image, belong to who mounts."""
    if nobody and os.geteuid() == 0:
        run("chown", "-hR", "nobody:nogroup", base)
    run("mksquashfs", base / "d", base / "i.sqsh", "-quiet", "-no-progress")


CHANGES = """
cd "$1"
cat file; ls -lR . >/dev/null; rm gone; echo more >>file; mkdir -p new/dir; mv file renamed
ls -A sub; touch sub/touched
"""
LOOK = """
cd "$1"
cat renamed; test ! -e gone; test -d new/dir; test -e sub/touched; ls -lR . >/dev/null
"""


def inside(at: Path, script: str, prefix: Sequence[str]) -> str:
    """Return what a shell in the union prints; it must end soon."""
    return run(*prefix, "timeout", "-k1", "20", "sh", "-euc", script, "sh", at, timeout=30).stdout


@pytest.mark.parametrize("what", WORKS)
def test_it_works(base: Path, nobody: bool, what: str) -> None:
    """Mounted, used, asked, grown, and mounted again with what was changed; the place is free afterwards."""
    place = WORKS[what]
    if place.store.endswith(".bs"):
        cowfs("create", base / place.store, "16", check=True)
    own(base, nobody)
    lowers = [base / lower for lower in place.lowers.split(":")]
    at, store = base / place.at, base / place.store if place.store else None
    prefix, log = as_nobody_prefix() if nobody else [], base.parent / "log"
    before = sorted(os.listdir(at))
    for script in (CHANGES, LOOK) if store else (CHANGES,):
        with mounted(lowers, at, store, nobody=nobody, log=log, quiet=at != store) as here:
            assert (at == store) == ("is the store, too" in here.said)
            inside(at, script, prefix)
            done = cowfs("diff", at, nobody=nobody, timeout=20, check=True)
            assert "D  gone\n" in done.stdout and "renamed" in done.stdout and "A  new/dir/\n" in done.stdout
            assert "mounted at" in cowfs("info", at, nobody=nobody, timeout=20, check=True).stdout
            if place.store.endswith(".bs") and script == CHANGES:
                done = cowfs("grow", at, "24", nobody=nobody, timeout=30, check=True)
                assert "24 MiB" in done.stdout
                inside(at, LOOK, prefix)
        assert not is_mounted(at)
    after = sorted({*os.listdir(at)} - {"cowfs", "upper", "work"})
    assert after == [name for name in before if name not in {"upper", "work"}]
    assert (base / "d/file").read_bytes() == b"lower\n"


@pytest.mark.matrix
@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(base: Path, nobody: bool, what: str) -> None:
    """At once, in one line that says why; nothing is made."""
    place, why = REFUSED[what]
    own(base, nobody)
    before = run("ls", "-R", base).stdout
    arguments = [str(base / place.lowers), str(base / place.at), "--store", str(base / place.store)]
    done = cowfs("mount", *arguments, nobody=nobody, timeout=20)
    assert done.returncode == 32 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert run("ls", "-R", base).stdout == before


@needs_root
def test_a_store_in_the_lower_by_a_bind_mount(base: Path, nobody: bool) -> None:
    (base / "d/sub/s").mkdir()
    own(base, nobody)
    run("mount", "--bind", base / "d/sub", base / "m")
    try:
        done = cowfs("mount", base / "d", base / "s", "--store", base / "m/s", nobody=nobody, timeout=20)
        assert done.returncode == 32 and "inside the lower" in done.stderr
    finally:
        run("umount", base / "m")


@needs_root
def test_the_union_mounted_into_its_lower(base: Path) -> None:
    """By a bind mount, where mounts are shared as on a system with systemd: the layer does not see it."""
    run("mount", "--bind", base, base)
    run("mount", "--make-shared", base)
    try:
        with mounted(base / "d", base / "m", log=base.parent / "log"):
            inside(base / "m", CHANGES, [])
            run("mount", "--bind", base / "m", base / "d/sub")
            shown = inside(base / "m", 'cd "$1"; ls -lR . >/dev/null; ls -A sub', [])
            assert shown.split() == ["below", "deep", "touched"]
            run("umount", base / "d/sub")
    finally:
        run("umount", "-l", base)


def test_a_mountpoint_by_a_link(base: Path, nobody: bool) -> None:
    """Every command follows it."""
    own(base, nobody)
    link = base / "link"
    cowfs("mount", base / "d", link, "-o", f"log={base.parent / 'log'}", nobody=nobody, check=True)
    inside(link, CHANGES, as_nobody_prefix() if nobody else [])
    assert "D  gone\n" in cowfs("diff", link, nobody=nobody, check=True).stdout
    assert f"mounted at: {base}/d\n" in cowfs("info", link, nobody=nobody, check=True).stdout
    cowfs("umount", link, nobody=nobody, check=True)
    assert not is_mounted(base / "d")


def test_again_and_again(base: Path, nobody: bool) -> None:
    """A directory is made writable in place five times, and each time is what it was before."""
    own(base, nobody)
    at, log = base / "d", base.parent / "log"
    for _ in range(5):
        with mounted(at, at, nobody=nobody, log=log):
            inside(at, "touch $1/new", as_nobody_prefix() if nobody else [])
        assert sorted(os.listdir(at)) == ["file", "gone", "sub"]


def test_the_place_of_a_dead_daemon(base: Path, nobody: bool) -> None:
    """When the daemon of a directory mounted on itself was killed, the directory is had back."""
    own(base, nobody)
    at = base / "d"
    cowfs("mount", at, at, "-o", f"log={base.parent / 'log'}", nobody=nobody, check=True)
    shown = cowfs("info", at, "--json", nobody=nobody, check=True).stdout
    pid = next(int(line.split(":")[1].strip(" ,")) for line in shown.splitlines() if '"pid"' in line)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: "Z" in _state(pid), "the daemon is dead")
    cowfs("umount", at, nobody=nobody, check=True, timeout=20)
    assert sorted(os.listdir(at)) == ["file", "gone", "sub"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


USR = """
grow() { head -c 160M /dev/zero >"$at/large"; }
set -eu
place=$1 kept=$2; shift 2
at=$place
[ "$place" != / ] || at=/..  # "/" itself stays what it was, for all that run already
"$@" mount "$place" "$place" -o size=300M,log="$kept/log"
trap 'umount -l "$place"' EXIT
test -e "$at/large" && exit 3
"$@" info "$place" >/dev/null
grow
"$@" diff "$place" | grep -q 'A  large'
"$@" persist "$place" "$kept/x.bs" 300
"$@" grow "$place" 320
ls -lR "$at" | head -n 20000 >/dev/null
"$@" umount -l "$place"  # Python runs from it
trap - EXIT
test ! -e "$at/large"
"""
PLACES = {
    "/": "/",
    "/usr": "/usr",
    "/lib": os.path.realpath("/lib"),
    "python": project_root(),
    "the environment": sys.prefix,
    "the standard library": os.path.dirname(os.__file__),
    "programs": "/usr/sbin",
}
PARTS = {"/lib", "/usr", "the standard library", "programs"}  # of others


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[pytest.mark.nightly] * (place in PARTS)) for place in PLACES],
)
def test_a_place_that_the_daemon_itself_comes_from(tmp_path: Path, place: str) -> None:
    """/usr, with e2fsprogs, libraries and Python, and the directory of cowfs's own modules: nothing is looked
    for there while the daemon serves. The store in memory grows there, is kept, and grows again."""
    command = ["unshare", "-m", "sh", "-c", USR, "sh", PLACES[place], str(tmp_path), *COWFS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=unmeasured(),
        cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        kill_daemons(tmp_path)  # they alone can let go of the others
        process.communicate(timeout=10)
        raise
    assert process.returncode == 0, said
    assert "Traceback" not in (tmp_path / "log").read_text()


def unmeasured() -> dict[str, str]:
    """The environment, but that coverage does not measure what gets it: it looks for the file of each module
    when that runs for the first time, and would look into the mount."""
    kept = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
    return {**kept, "PYTHONPATH": project_root(), "PYTHONDONTWRITEBYTECODE": "1"}


def kill_daemons(log: Path) -> None:
    """Those whose log is in a directory."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"log={log}".encode() in entry.read_bytes():
                os.kill(int(entry.parts[2]), signal.SIGKILL)


SEEN = """
place=$1; shift
"$@" && ls -l "$place" >/dev/null && echo seen && read wait
"""


@needs_root
@pytest.mark.matrix
@pytest.mark.parametrize("place", ["/etc", "/usr/share", "/sys/power", "/dev", "/run", "/tmp", "/var"])
@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_a_place_that_the_daemon_may_ask_later(tmp_path: Path, place: str, propagation: str) -> None:
    """The time zone, the log's and the service manager's sockets, the disks and their sleep: whatever is
    hidden, the daemon is ready, answers, writes into its log, and ends when it is asked to."""
    log = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        # Shared, as systemd has them: what is mounted comes to who has mounts of its own.
        command = ["unshare", "-m", "--propagation", propagation, "sh", "-c", SEEN, "sh", place, *COWFS]
        command += ["mount", place, place, "-o", f"log={log}"]
        environment = {**unmeasured(), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment, cwd="/", **pipes) as user:  # type: ignore[call-overload]
            try:
                said = dict(line.split("=") for line in manager.recv(4096).decode().splitlines())
                assert said["READY"] == "1" and user.stdout.readline() == b"seen\n"
                pid = int(said["MAINPID"])
                os.kill(pid, signal.SIGTERM)
                eventually(lambda: "Z" in _state(pid), "the daemon has ended")
            finally:
                kill_daemons(tmp_path)
                user.stdin.close()
    assert "SIGTERM: unmounting" in log.read_text() and "Traceback" not in log.read_text()


@needs_root
def test_what_a_thread_needs_at_its_end_is_loaded(tmp_path: Path) -> None:
    """The C library looks for it when Python ends a thread with the process, and aborts without it."""
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt") as here:
        assert "/libgcc_s.so" in Path(f"/proc/{here.pid()}/maps").read_text()
