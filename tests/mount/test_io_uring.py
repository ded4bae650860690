"""Requests by io_uring: everything that the loop over /dev/fuse is right under, on a kernel that has it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.mounts import (
    Mounted,
    cowfs,
    eventually,
    is_mounted,
    mount_arguments,
    mounted,
    project_root,
)
from tests.support.system import as_nobody_prefix, needs_root, run
from tests.support.transport import IO_URING, SWITCH

TRANSPORT = IO_URING
pytestmark = [
    needs_root,
    pytest.mark.skipif(not SWITCH.exists(), reason="this kernel has no FUSE over io_uring (Linux 6.14)"),
]
CLIENTS = 8


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    """A mount of a few files, with a store in an image."""
    lower = tmp_path / "lower"
    lower.mkdir()
    for number in range(40):
        (lower / f"large{number}").write_bytes(os.urandom(1 << 20))
    (lower / "file").write_text("here\n")
    assert cowfs("create", tmp_path / "s.bs", "128").returncode == 0
    with mounted(lower, tmp_path / "mnt", tmp_path / "s.bs", options=["io_uring=on"]) as made:
        yield made
    assert run("e2fsck", "-fn", tmp_path / "s.bs", check=False).returncode == 0


def transport(mount: Mounted) -> str:
    """Return the transport that ``cowfs info`` shows."""
    found: str = json.loads(cowfs("info", mount.path, "--json", check=True).stdout)["transport"]
    return found


def test_info_tells(mount: Mounted) -> None:
    assert transport(mount).startswith("io_uring, ")
    assert "requests:   by io_uring" in cowfs("info", mount.path).stdout


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_it_is_used_by_itself(nobody_path: Path, nobody: bool) -> None:
    (nobody_path / "lower").mkdir()
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody=nobody) as made:
        shown = cowfs("info", made.path, "--json", nobody=nobody, check=True).stdout
        assert json.loads(shown)["transport"].startswith("io_uring")


def test_off(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", options=["io_uring=off"]) as made:
        assert transport(made) == "/dev/fuse"


def test_on_where_it_is_turned_off(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "N").write_text("N\n")
    done = run(
        "unshare", "-m", "sh", "-euc", f'mount --bind "$1" {SWITCH}; shift; "$@"', "sh", tmp_path / "N",
        sys.executable, "-m", "cowfs.cli.main", "mount", tmp_path / "lower", tmp_path / "mnt",
        "-o", "io_uring=on", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip() == (
        f"cowfs: io_uring cannot be used: it is turned off (as root: echo Y > {SWITCH}) "
        "(remove io_uring=on: the default uses it where possible)"
    )
    assert not is_mounted(tmp_path / "mnt")


def test_a_value_that_is_none(tmp_path: Path) -> None:
    done = cowfs("mount", tmp_path, tmp_path, "-o", "io_uring=maybe")
    assert "unknown io_uring 'maybe' (give one of auto, on, off)" in done.stderr


def test_one_cpu_serves_all_queues(tmp_path: Path) -> None:
    """A daemon that may not use the CPUs on which its clients are."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/file").write_text("here\n")
    (tmp_path / "mnt").mkdir()
    first = min(os.sched_getaffinity(0))
    run(
        "taskset", "-c", str(first), sys.executable, "-m", "cowfs.cli.main", "mount",
        tmp_path / "lower", tmp_path / "mnt", "-o", "io_uring=on",
    )  # fmt: skip
    try:
        assert transport(Mounted(tmp_path / "mnt", tmp_path / "log")) == "io_uring, 1 thread"
        for cpu in os.sched_getaffinity(0):
            seen = run("taskset", "-c", str(cpu), "sh", "-c", f"cat {tmp_path}/mnt/file; ls {tmp_path}/mnt")
            assert seen.stdout == "here\nfile\n"
    finally:
        assert cowfs("umount", tmp_path / "mnt").returncode == 0


def test_many_clients_at_once(mount: Mounted) -> None:
    def work(number: int) -> bytes:
        kept = b""
        mine = mount.path / f"of{number}"
        for turn in range(25):
            mine.mkdir()
            (mine / "file").write_bytes(b"%d" % turn * 5000)
            os.link(mine / "file", mine / "other")
            os.rename(mine / "other", mine / "third")
            assert sorted(os.listdir(mine)) == ["file", "third"]
            kept = (mine / "third").read_bytes()
            os.unlink(mine / "file")
            os.unlink(mine / "third")
            mine.rmdir()
        return kept

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert list(clients.map(work, range(CLIENTS))) == [b"24" * 5000] * CLIENTS


def test_more_wait_than_a_queue_has_entries(mount: Mounted) -> None:
    """Copy-ups, each with a thread, leave the queue to others, and none is lost."""

    def change(number: int) -> bytes:
        with open(mount.path / f"large{number}", "r+b") as file:
            file.write(b"new")
            os.fsync(file.fileno())
        return (mount.path / f"large{number}").read_bytes()[:3]

    with ThreadPoolExecutor(40) as clients:
        changes = [clients.submit(change, number) for number in range(40)]
        for _ in range(100):
            assert (mount.path / "file").read_text() == "here\n"
        assert [each.result() for each in changes] == [b"new"] * 40


def test_work_of_more_users_than_there_are_workers(mount: Mounted) -> None:
    """Each user has some turns, and there are fewer workers than turns of all."""
    write = """
import concurrent.futures, os

def write(number):
    file = os.open(str(number), os.O_CREAT | os.O_RDWR)
    for turn in range(30):
        os.pwrite(file, b"%d" % turn * 1000, 0)
        os.fsync(file)
    return os.pread(file, 100, 0)

with concurrent.futures.ThreadPoolExecutor(6) as clients:
    assert list(clients.map(write, range(6))) == [b"29" * 50] * 6
"""
    writers = []
    for uid in range(60_000, 60_006):
        place = mount.path / str(uid)
        place.mkdir()
        os.chown(place, uid, uid)
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        writers.append(subprocess.Popen([*user, sys.executable, "-c", write], cwd=place))
    assert [writer.wait(60) for writer in writers] == [0] * 6


def test_room_that_was_given_back_is_there_at_once(mount: Mounted) -> None:
    """FORGET requests come over /dev/fuse, and later."""
    for _ in range(5):
        before = os.statvfs(mount.path).f_bavail
        (mount.path / "huge").write_bytes(bytes(4 << 20))
        os.unlink(mount.path / "huge")
        assert os.statvfs(mount.path).f_bavail >= before - 64
    for _ in range(3):
        (mount.path / "huge").write_bytes(bytes(70 << 20))
        os.unlink(mount.path / "huge")


# A disk that holds an fdatasync back from an "h" in a FIFO until an "r".
_SLOW_DISK = """
import os, sys, threading
from cowfs.cli.main import main
from cowfs.formats.ext3._engine import lib
from cowfs.fuse.adapter import Adapter

def obey(image):
    commands = os.open(sys.argv[1], os.O_RDWR)
    while command := os.read(commands, 1):
        kind = lib.X3_FDATASYNC if command == b"h" else 0
        lib.x3_inject(image.handle, kind, 1, 0, 0)
        os.write(done, b"x")

def opening(init):
    def opened(self, fs, *arguments, **more):
        global done
        done = os.open(sys.argv[2], os.O_RDWR)
        threading.Thread(target=obey, args=(fs.upper.image,), daemon=True).start()
        init(self, fs, *arguments, **more)
    return opened

Adapter.__init__ = opening(Adapter.__init__)
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def quick_disk() -> Iterator[Path]:
    """Return a directory in memory: fsync(2) takes no time there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def test_a_slow_disk_does_not_hold_up_others_on_the_same_cpu(tmp_path: Path, quick_disk: Path) -> None:
    """A quick fsync is done where the requests of its CPU arrive; those that take longer are not."""
    fifos, path = [tmp_path / "commands", tmp_path / "done"], tmp_path / "mnt"
    for fifo in fifos:
        os.mkfifo(fifo)
    (tmp_path / "lower").mkdir()
    path.mkdir()
    cowfs("create", quick_disk / "s.bs", "16", check=True)
    mounting = mount_arguments(tmp_path / "lower", path, quick_disk / "s.bs", options=["io_uring=on"])
    run(sys.executable, "-c", _SLOW_DISK, *fifos, *mounting, cwd=project_root())
    commands, done = (os.open(fifo, os.O_RDWR) for fifo in fifos)
    cpu = min(os.sched_getaffinity(0))

    syncs: list[int] = []

    def sync(times: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        with (path / "file").open("wb", buffering=0) as file:
            for _ in range(times):
                file.write(b"x")
                syncs.append(threading.get_native_id())
                os.fsync(file.fileno())
                syncs.clear()

    def until_it_waits() -> None:
        """Wait until a thread waits for the answer to fsync(2)."""
        while not syncs or "request_wait" not in Path(f"/proc/self/task/{syncs[0]}/wchan").read_text():
            time.sleep(0.01)

    def look() -> list[str]:
        os.sched_setaffinity(0, {cpu})
        (path / "other").touch()
        return sorted(os.listdir(path))

    def tell(command: bytes) -> None:
        os.write(commands, command)
        assert os.read(done, 1) == b"x"

    try:
        with ThreadPoolExecutor(2) as threads:
            threads.submit(sync, 20).result()
            tell(b"h")
            syncing = threads.submit(sync, 1)
            until_it_waits()
            time.sleep(0.1)  # this is how long that takes
            tell(b"r")
            syncing.result()
            tell(b"h")
            syncing = threads.submit(sync, 1)
            try:
                until_it_waits()
                assert threads.submit(look).result(timeout=60) == ["file", "other"]
                assert not syncing.done()
            finally:
                tell(b"r")
            syncing.result()
    finally:
        tell(b"r")
        assert cowfs("umount", path).returncode == 0
        os.close(commands)
        os.close(done)


def policies(pid: int) -> set[int]:
    """Return the scheduling policies of the threads of a process (proc(5))."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int((task / "stat").read_text().rpartition(")")[2].split()[38]) for task in tasks}


def test_threads_are_idle_only_while_they_give_way(mount: Mounted) -> None:
    """A caller continues on its CPU while the thread that has answered is SCHED_IDLE, for a moment."""
    seen: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.update(policies(mount.pid()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for number in range(100_000):
            (mount.path / f"new{number % 100}").touch()
            os.unlink(mount.path / f"new{number % 100}")
            if number > 1000 and os.SCHED_IDLE in seen:
                break
    finally:
        stop.set()
        looking.join()
    eventually(lambda: policies(mount.pid()) == {os.SCHED_OTHER}, "no thread stays behind")
    assert seen <= {os.SCHED_OTHER, os.SCHED_IDLE}
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        assert os.SCHED_IDLE in seen


CALLER = """
import os, sys, time
path = sys.argv[1]
def use_cpu():
    begun, used = time.monotonic(), time.thread_time()
    while time.thread_time() < used + 0.08:
        pass
    os.write(1, f"{begun} {time.monotonic()}\\n".encode())
for turn in range(5):
    wait, go = os.pipe()
    for _ in range(4):
        if not os.fork():
            os.close(go)
            os.read(wait, 1)
            use_cpu()
            os._exit(0)
    for number in range(600):
        os.chmod(path, 0o600 + number % 2)
    os.close(go)
    os.close(wait)
    use_cpu()
    for _ in range(4):
        os.wait()
"""
OTHER = """
import os, select, sys, time
while not select.select([0], [], [], 0.002)[0]:
    begun = time.monotonic()
    os.access(f"{sys.argv[1]}/{begun}", os.F_OK)
    os.write(1, f"{begun} {time.monotonic()}\\n".encode())
"""


def times(lines: str) -> list[tuple[float, float]]:
    """Return when things began and ended."""
    return [(float(begun), float(end)) for begun, end in map(str.split, lines.splitlines())]


def test_a_thread_that_gives_way_comes_back(mount: Mounted) -> None:
    """It answers others although the caller for which it gave way does not stop using the CPU."""
    (mount.path / "file").touch()
    here = ["taskset", "-c", f"{min(os.sched_getaffinity(0))}", sys.executable, "-c"]
    asking = [*here, OTHER, os.fspath(mount.path)]
    with subprocess.Popen(asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        used = times(run(*here, CALLER, mount.path / "file", timeout=60).stdout)
        asked = times(other.communicate("end\n", timeout=60)[0])
    assert len(used) == 25
    brief = min(end - begun for begun, end in used) / 2
    late = [(begun, end) for begun, end in asked if end - begun > brief]
    assert not late, f"{late} while the CPU was used in {sorted(used)}"


@pytest.mark.parametrize("how", ["umount", "term", "kill"])
def test_an_end_while_it_is_busy(mount: Mounted, how: str) -> None:
    stop = threading.Event()
    failures: set[int | None] = set()

    def load() -> None:
        while not stop.is_set():
            try:
                (mount.path / "busy").write_bytes(bytes(100_000))
                os.unlink(mount.path / "busy")
            except OSError as error:
                failures.add(error.errno)
                return

    pid = mount.pid()
    worker = threading.Thread(target=load)
    worker.start()
    try:
        if how == "umount":
            assert cowfs("umount", "--lazy", mount.path).returncode == 0
        else:
            os.kill(pid, signal.SIGTERM if how == "term" else signal.SIGKILL)
        eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the daemon ends", 30)
    finally:
        stop.set()
        worker.join(30)
        subprocess.run(["umount", "-l", mount.path], check=False, capture_output=True)
    assert not worker.is_alive(), "a client hangs"
    if how == "kill":
        assert cowfs("check", mount.path.with_name("s.bs")).returncode == 0


def test_it_stops_and_goes_on(mount: Mounted) -> None:
    pid = mount.pid()
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit((mount.path / "file").read_text)
        os.kill(pid, signal.SIGCONT)
        assert waiting.result(10) == "here\n"


def test_an_idle_mount_does_nothing(mount: Mounted) -> None:
    """No thread is woken while nobody asks."""
    pid = mount.pid()
    (mount.path / "file").read_text()

    def switches() -> int:
        status = [Path(task, "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return sum(
            int(line.split()[1]) for text in status for line in text.splitlines() if "ctxt_switches" in line
        )

    quiet = [switches()]

    def idle() -> bool:
        quiet.append(switches())
        return quiet[-1] == quiet[-20:][0] and len(quiet) > 20

    eventually(idle, "it is idle")


def test_a_user_with_little_memory_to_lock(nobody_path: Path) -> None:
    for name in ("lower", "mnt"):
        (nobody_path / name).mkdir()
        os.chown(nobody_path / name, 65534, 65534)
    done = run(
        *as_nobody_prefix(), "sh", "-euc",
        'ulimit -l 0; python=$1; shift; "$python" -m cowfs.cli.main mount "$1" "$2"; '
        'echo x >"$2/new"; cat "$2/new"; "$python" -m cowfs.cli.main umount "$2"',
        "sh", sys.executable, nobody_path / "lower", nobody_path / "mnt",
    )  # fmt: skip
    assert done.stdout == "x\n"
    assert "slower than it could be: io_uring cannot be used: Cannot allocate memory" in done.stderr


_WITHOUT = """
import ctypes, os, struct, sys
# seccomp(2): load the number of the call; io_uring_setup(2) is EPERM, all else is allowed.
program = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7FFF_0000),
))
kept = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
assert ctypes.CDLL(None).prctl(22, 2, filter) == 0
os.execv(sys.executable, [sys.executable, "-m", "cowfs.cli.main", *sys.argv[1:]])
"""


def test_rings_that_cannot_be_had(tmp_path: Path) -> None:
    """Without permission for io_uring, as in containers, a mount says so and works; with =on it fails."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "mnt").mkdir()
    places = [tmp_path / "lower", tmp_path / "mnt"]
    command: list[str | Path] = [sys.executable, "-c", _WITHOUT, "mount", *places]
    done = run(*command)
    made = Mounted(tmp_path / "mnt", tmp_path / "log")
    try:
        assert "io_uring cannot be used: Operation not permitted" in done.stderr
        assert transport(made) == "/dev/fuse"
        (made.path / "new").write_text("x")
    finally:
        assert cowfs("umount", made.path).returncode == 0
    done = run(*command, "-o", "io_uring=on", check=False)
    assert done.returncode != 0
    assert "io_uring cannot be used: Operation not permitted" in done.stderr
