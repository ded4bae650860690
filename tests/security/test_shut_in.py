"""Root's daemon, once it serves, reaches nothing but its layers; and every command still works."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import (
    COWFS,
    Mounted,
    cowfs,
    eventually,
    force_umount,
    is_mounted,
    mount_arguments,
    mounted,
    project_root,
)
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]


@pytest.fixture(autouse=True)
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is measured keeps the directory for that."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    made = tmp_path / "lower"
    (made / "dir/deep").mkdir(parents=True)
    (made / "file").write_text("below\n")
    (made / "dir/deep/file").write_text("deep\n")
    return made


def table(pid: int) -> set[tuple[str, str]]:
    """Return what is mounted where, as a process sees it."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {(line.split(" ")[4], line.partition(" - ")[2].split(" ")[0]) for line in lines}


def climbs_to(directory: str) -> os.stat_result:
    """Follow ``..`` to the end, and return that directory."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        while True:
            above = os.open("..", os.O_PATH | os.O_DIRECTORY, dir_fd=fd)
            same = os.path.samestat(os.fstat(above), os.fstat(fd))
            os.close(fd)
            fd = above
            if same:
                return os.fstat(fd)
    finally:
        os.close(fd)


def nothing_is_in_reach(here: Mounted, *allowed: Path) -> None:
    """By no path, and by no descriptor of a directory, of any thread, but what is in *allowed*."""
    pid = here.pid()
    inodes = {(info.st_dev, info.st_ino) for info in map(os.stat, allowed)}
    for thread in os.listdir(f"/proc/{pid}/task"):
        top = Path(f"/proc/{pid}/task/{thread}/root")
        assert sorted(os.listdir(top)) == ["callers", "proc"] and os.listdir(top / "proc") == ["self"]
        assert os.path.samefile(top / "proc/self", f"/proc/{pid}")
        assert os.path.samefile(f"/proc/{pid}/task/{thread}/cwd", top)
        assert table(int(thread)) == {("/", "tmpfs"), ("/proc/self", "proc"), ("/callers", "proc")}
        with pytest.raises(OSError):
            (top / "new").touch()
    empty = os.stat(f"/proc/{pid}/root")
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{fd}"
        if stat.S_ISDIR(os.stat(link).st_mode) and not os.path.samestat(os.stat(link), empty):
            last = climbs_to(link)
            known = (last.st_dev, last.st_ino) in inodes
            assert known or _is_of_a_store(link), f"{fd} -> {os.readlink(link)}"


def _is_of_a_store(link: str) -> bool:
    """Whether it is in a filesystem that the kernel has mounted for the daemon alone."""
    number = os.stat(link).st_dev
    shown = Path("/proc/self/mountinfo").read_text()
    return f" {os.major(number)}:{os.minor(number)} " not in shown


KINDS = ["memory", "image", "directory", "image kernel", "memory kernel", "squashfs", "squashfs kernel"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_layers_is_in_reach(tmp_path: Path, lower: Path, kind: str) -> None:
    what, _, engine = kind.partition(" ")
    store: Path | str = tmp_path / "far/store"
    (tmp_path / "far").mkdir()
    image = lower
    if what == "image":
        cowfs("create", store, "16", check=True)
    elif what == "squashfs":
        image = tmp_path / "image"
        run("mksquashfs", lower, image, "-quiet")
    store = store if what in {"image", "directory"} else "memory"
    with mounted(image, tmp_path / "mnt", store, engine=engine or None) as here:
        (here.path / "dir/new").write_text("x")
        assert (here.path / "dir/deep/file").read_text() == "deep\n"
        nothing_is_in_reach(here, lower, Path("/run/cowfs"), *([Path(store)] if what == "directory" else []))
        use(here, what == "image" and not engine, str(store))
    assert not is_mounted(here.path)
    if store != "memory":
        with mounted(image, tmp_path / "mnt", store, engine=engine or None) as here:
            assert (here.path / "dir/new").read_text() == "x"


def use(here: Mounted, is_image: bool, store: str) -> None:
    """Have each command do its work."""
    shown = cowfs("info", here.path, check=True).stdout
    assert re.search(r"cowfs \d+\.\d+", shown), "the version is known"
    assert "dir/new" in cowfs("diff", here.path, check=True).stdout
    if is_image:
        assert cowfs("grow", here.path, "32", check=True).stdout.endswith("resized to 32 MiB\n")
        assert cowfs("grow", store, "48", check=True).stdout.endswith("resized to 48 MiB\n")
        assert os.stat(store).st_size == 48 << 20
    os.chmod(here.path / "file", 0o4711)
    os.mknod(here.path / "node", stat.S_IFBLK | 0o600, os.makedev(7, 1))
    os.setxattr(here.path / "file", "trusted.x", b"y")
    os.rename(here.path / "dir", here.path / "moved")
    os.rename(here.path / "moved", here.path / "dir")


def test_persist_from_in_there(tmp_path: Path, lower: Path) -> None:
    """After persist and grow, the confined daemon can no longer reach what it was given for them."""
    place = tmp_path / "far"
    place.mkdir()
    with mounted(lower, tmp_path / "mnt", log=tmp_path / "log") as here:
        (here.path / "new").write_bytes(b"x" * (3 << 20))
        cowfs("persist", here.path, place / "kept.bs", "144", check=True)
        cowfs("grow", here.path, "160", check=True)
        nothing_is_in_reach(here, lower, Path("/run/cowfs"))
    with mounted(lower, tmp_path / "mnt", place / "kept.bs") as here:
        assert (here.path / "new").stat().st_size == 3 << 20
    assert cowfs("check", "-n", place / "kept.bs").returncode == 0


def test_a_store_that_was_moved_is_not_grown(tmp_path: Path, lower: Path) -> None:
    cowfs("create", tmp_path / "store.bs", "16", check=True)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store.bs", quiet=False) as here:
        os.rename(tmp_path / "store.bs", tmp_path / "moved.bs")
        cowfs("create", tmp_path / "store.bs", "16", check=True)
        done = cowfs("grow", here.path, "32")
        assert done.returncode == 32 and "is not the file that was mounted" in done.stderr
        assert os.stat(tmp_path / "store.bs").st_size == os.stat(tmp_path / "moved.bs").st_size == 16 << 20


def test_a_store_in_memory_grows_in_there(tmp_path: Path, lower: Path) -> None:
    """Growing takes resize2fs, which the confined daemon cannot run itself."""
    with mounted(lower, tmp_path / "mnt", options=["size=300M"]) as here:
        (here.path / "large").write_bytes(bytes(1 << 20) * 150)
        assert (here.path / "large").stat().st_size == 150 << 20


REFUSED = """
import ctypes, encodings.ascii, errno, os, sys, threading
from cowfs.linux import confine, privileges
other = threading.Event()
result = []
privileges.drop()
confine.unshare()
thread = threading.Thread(target=lambda: (other.wait(), result.append(os.listdir("/"))))
thread.start()
confine.confine()
other.set()
thread.join()
assert sorted(result[0]) == ["callers", "proc"], result
assert "CapEff" in open(f"/callers/{os.getppid()}/status").read()
for name in ("root", "cwd", "exe", "fd/0", "ns/mnt"):
    for pid in (1, os.getppid(), os.getpid()):
        try:
            os.stat(f"/callers/{pid}/{name}")
        except (OSError, FileNotFoundError):
            continue
        raise SystemExit(f"followed {pid} {name}")
try:
    open("/callers/1/oom_score_adj", "w")
    raise SystemExit("written")
except OSError:
    pass
def refused(call):
    try:
        call()
    except PermissionError:
        return
    raise SystemExit(f"allowed: {call}")
libc = ctypes.CDLL(None, use_errno=True)
def number(*words):
    def call():
        if libc.syscall(*(ctypes.c_long(word) for word in words)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    return call
refused(lambda: os.execv("/proc/self/exe", ["x"]))
refused(lambda: os.chroot("/proc"))
if os.uname().machine == "x86_64":
    # mount umount2 pivot_root unshare setns open_by_handle_at
    # open_tree move_mount fsopen fsmount mount_setattr open_tree_attr
    for call in (165, 166, 155, 272, 308, 304, 428, 429, 430, 432, 442, 467):
        refused(number(call, -1, 0, 0, 0, 0))
    # clone: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        refused(number(56, flag, 0, 0, 0, 0))
for path in ("/etc/passwd", "/proc/1/root", "/proc/self/root/etc", "/proc/self/cwd/../etc", "/dev/null"):
    try:
        os.stat(path)
    except FileNotFoundError:
        continue
    raise SystemExit(path)
from cowfs.linux.callers import look_at
assert look_at(os.getppid()) is not None
"""


def test_there_is_no_way_back() -> None:
    run("unshare", "-m", sys.executable, "-c", REFUSED, env={**os.environ, "PYTHONPATH": project_root()})


def test_a_device_in_a_layer_is_not_opened(tmp_path: Path) -> None:
    """Even if the mount allows devices, a hijacked daemon cannot make one and read the disk."""
    from cowfs.linux import mounts

    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.close(os.open(tmp_path / "null", os.O_RDONLY))
    clone = mounts.private_clone_of(str(tmp_path))
    try:
        with pytest.raises(PermissionError):
            os.open("null", os.O_RDONLY, dir_fd=clone)
    finally:
        os.close(clone)


# --- who stays outside


def outside(here: Mounted) -> int:
    """The process that does errands for a daemon."""
    (pid,) = map(int, Path(f"/proc/{here.pid()}/task/{here.pid()}/children").read_text().split())
    return pid


def has_ended(pid: int) -> bool:
    """Whether nothing is left of a process, or its parent need only be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def test_who_stays_outside_ends_with_the_daemon(tmp_path: Path, lower: Path) -> None:
    with mounted(lower, tmp_path / "mnt", quiet=False) as here:
        helper, daemon = outside(here), here.pid()
        os.kill(helper, signal.SIGTERM)
        os.kill(helper, signal.SIGINT)
        here.umount()
        assert has_ended(helper) and has_ended(daemon)
    with mounted(lower, tmp_path / "mnt", quiet=False) as here:
        helper = outside(here)
        os.kill(here.pid(), signal.SIGKILL)
        eventually(lambda: has_ended(helper), "it has ended")
        force_umount(here.path)


def test_who_stays_outside_may_be_killed(tmp_path: Path, lower: Path) -> None:
    """The mount goes on, and can be unmounted."""
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", quiet=False) as here:
        os.kill(outside(here), signal.SIGKILL)
        (here.path / "new").write_text("x")
        cowfs("info", here.path, check=True)
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", log=tmp_path / "log") as here:
        assert (here.path / "new").read_text() == "x"


def test_it_has_no_more_privileges(tmp_path: Path, lower: Path) -> None:
    with mounted(lower, tmp_path / "mnt") as here:
        status = Path(f"/proc/{outside(here)}/status").read_text()
        both = Path(f"/proc/{here.pid()}/status").read_text()
        for field in ("CapPrm", "CapEff", "CapBnd", "NoNewPrivs"):
            (wanted,) = re.findall(rf"^{field}:\s+(\w+)$", both, re.M)
            assert re.findall(rf"^{field}:\s+(\w+)$", status, re.M) == [wanted]
        assert re.findall(r"^Seccomp:\s+(\w)$", status, re.M) == ["2"]


def test_what_it_does_for_the_daemon_is_a_fixed_list(tmp_path: Path) -> None:
    """Whatever is asked for: no second mount, no program but two, no option with a file."""
    from cowfs.cli.helper_requests import HelperRequests
    from cowfs.store.e2fsprogs import tools

    errands = HelperRequests(str(tmp_path), [])
    errands._dev = "0:1"
    with pytest.raises(PermissionError):
        errands.mount({"source": "x", "options": []}, [0])
    for command in (
        ["sh", "-c", "id", "image"],
        ["/bin/sh", "image"],
        ["e2fsck", "/etc/passwd"],
        ["e2fsck", "-z", "/etc/undo", "image"],
        ["e2fsck", "-z/etc/undo", "image"],
        ["e2fsck", "-E", "journal_only", "image"],
        ["resize2fs", "-f", "image", "10M"],
        ["resize2fs", "-z", "x", "image"],
        ["mke2fs", "-f", "image"],
    ):
        with pytest.raises(PermissionError):
            tools.run_errand({"command": command}, [0])


# --- how it is mounted


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory whose mounts are shared, as systemd has them all, and a namespace that gets them."""
    place = tmp_path / "shared"
    place.mkdir()
    run("mount", "--bind", place, place)
    run("mount", "--make-shared", place)
    yield place
    run("umount", "-l", place)


def test_a_mount_spreads_where_mounts_are_shared(tmp_path: Path, shared: Path, lower: Path) -> None:
    (shared / "mnt").mkdir()
    peer = subprocess.Popen(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", "echo; read x"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert peer.stdout is not None and peer.stdin is not None and peer.stdout.readline() == b"\n"
    there = Path(f"/proc/{peer.pid}/mountinfo")
    try:
        with mounted(lower, shared / "mnt", tmp_path / "store") as here:
            assert f" {here.path} " in there.read_text()
            nothing_is_in_reach(here, lower, tmp_path / "store", Path("/run/cowfs"))
        assert f" {here.path} " not in there.read_text()
    finally:
        peer.communicate(b"\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount_it(tmp_path: Path, lower: Path, number: int) -> None:
    with mounted(lower, tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "new").write_text("x")
        os.kill(here.pid(), number)
        eventually(lambda: not is_mounted(here.path), "it is unmounted")
    assert (tmp_path / "store/upper/new").read_text() == "x"


def test_a_second_signal_waits_for_nothing(tmp_path: Path, lower: Path) -> None:
    """The first has the kernel write back what it holds, for up to half a minute."""
    with mounted(lower, tmp_path / "mnt", tmp_path / "store", log=tmp_path / "log") as here:
        (here.path / "new").write_text("x")
        daemon, helper = here.pid(), outside(here)
        os.kill(helper, signal.SIGSTOP)  # who has it written back
        os.kill(daemon, signal.SIGTERM)
        eventually(lambda: "SIGTERM: unmounting" in here.log.read_text(), "it has begun")
        os.kill(daemon, signal.SIGTERM)
        eventually(lambda: "SIGTERM again" in here.log.read_text(), "it has given up to wait")
        os.kill(helper, signal.SIGCONT)
        eventually(lambda: has_ended(daemon) and not is_mounted(here.path), "it has ended")
    assert (tmp_path / "store/upper/new").read_text() == "x"


def test_the_filesystems_of_layers_stay_in_use(tmp_path: Path, lower: Path) -> None:
    """The daemon is in other mounts, and still nobody unmounts the disk that a layer is on, by mistake."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", disk)
    try:
        cowfs("create", disk / "store.bs", "16", check=True)
        with mounted(lower, tmp_path / "mnt", disk / "store.bs"):
            assert "busy" in run("umount", disk, check=False).stderr
    finally:
        run("umount", disk)


def test_other_filesystems_are_not_kept(tmp_path: Path, lower: Path) -> None:
    """The daemon does not use filesystems that were mounted when it started."""
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.mkdir()
    run("mksquashfs", lower, image, "-quiet")
    run("mount", "-o", "loop,ro", image, disk)
    with mounted(lower, tmp_path / "mnt"):
        run("umount", disk)
        eventually(lambda: not run("losetup", "-j", image).stdout, "the loop device is let go of")


def test_a_root_that_cannot_be_exchanged(tmp_path: Path, lower: Path) -> None:
    """In a chroot that is no mountpoint, the daemon is not confined, and the mount works."""
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "mnt").mkdir()
    tops = [
        f"/{name}" for name in os.listdir("/") if not os.path.islink(f"/{name}") and os.path.isdir(f"/{name}")
    ]
    for link in filter(os.path.islink, (f"/{name}" for name in os.listdir("/"))):
        os.symlink(os.readlink(link), f"{top}{link}")
    for directory in tops:
        os.mkdir(f"{top}{directory}")
        run("mount", "--rbind", directory, f"{top}{directory}")
    env = {**os.environ, "PYTHONPATH": project_root()}
    try:
        command = [*COWFS, *mount_arguments(lower, tmp_path / "mnt", options=[f"log={tmp_path}/log"])]
        run("chroot", top, *command, env=env)
        assert Path(f"{top}{tmp_path}/mnt/file").read_text() == "below\n"
        run("chroot", top, *COWFS, "umount", tmp_path / "mnt", env=env)
    finally:
        for directory in tops:
            run("umount", "-R", "-l", f"{top}{directory}")
