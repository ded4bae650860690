"""Loop devices, detached mounts, and locks, with the kernel that runs the tests."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs.linux import locks, loop_devices, mount_table, mounts, pids, safe_paths
from tests.support.mounts import eventually, project_root
from tests.support.system import needs_root, run

HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    run("mke2fs", "-q", "-t", "ext3", path, "16M")
    return path


def test_mountinfo_decodes_escapes_and_skips_optional_fields() -> None:
    text = (
        rb"36 35 98:0 /mnt1 /mnt\0402\134x rw,noatime master:1 shared:2 - ext3 /dev/with\040space rw,errors=x"
        b"\n"
        rb"40 1 0:52 / / rw - fuse.cowfs src rw"
        b"\n"
    )
    first, second = mount_table.parse_mountinfo(text)
    assert (first.id, first.parent, first.dev, first.root) == (36, 35, "98:0", b"/mnt1")
    assert first.mountpoint == b"/mnt 2\\x"
    assert (first.options, first.fstype, first.source) == ("rw,noatime", "ext3", b"/dev/with space")
    assert first.super_options == "rw,errors=x"
    assert (second.mountpoint, second.fstype) == (b"/", "fuse.cowfs")


def test_mount_of_takes_the_mountpoint_itself_only() -> None:
    found = mount_table.mount_of("/proc")
    assert found is not None
    assert found.fstype == "proc"
    assert mount_table.mount_of("/proc/self") is None


@needs_root
def test_mount_of_gives_the_topmost(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "one", tmp_path)
    run("mount", "-t", "tmpfs", "two", tmp_path)
    found = mount_table.mount_of(tmp_path)
    mounts.umount2(str(tmp_path))
    mounts.umount2(str(tmp_path), mounts.MNT_DETACH)
    assert found is not None
    assert found.source == b"two"
    with pytest.raises(OSError) as caught:
        mounts.umount2(str(tmp_path))
    assert caught.value.errno == errno.EINVAL


@needs_root
def test_a_loop_device_lives_as_long_as_its_descriptor(image: Path) -> None:
    assert safe_paths.loop_users(image) == []
    fd, device = loop_devices.attach_loop(image)
    try:
        assert safe_paths.loop_users(image) == [device]
        assert loop_devices.loop_backing(device) == os.fsencode(image)
        other_name = image.with_name("link")
        os.link(image, other_name)
        assert safe_paths.loop_users(other_name) == [device]
        image.unlink()
        assert safe_paths.loop_users(other_name) == [device], "its name was removed, the file was not"
        image.write_bytes(b"another file of that name")
        assert safe_paths.loop_users(image) == []
        assert os.lseek(fd, 0, os.SEEK_END) == 16 << 20
    finally:
        os.close(fd)
    eventually(lambda: not safe_paths.loop_users(other_name), "the loop device is detached")


@needs_root
def test_a_loop_device_begins_at_its_offset_and_is_read_only_when_asked(image: Path) -> None:
    fd, _ = loop_devices.attach_loop(image, readonly=True, offset=4096)
    try:
        assert os.lseek(fd, 0, os.SEEK_END) == (16 << 20) - 4096
        with image.open("rb") as file:
            file.seek(4096)
            assert os.pread(fd, 4096, 0) == file.read(4096)
    finally:
        os.close(fd)
    eventually(lambda: not safe_paths.loop_users(image), "the loop device is detached")


@needs_root
def test_a_faster_one_only_costs_another_try(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, taken = loop_devices.attach_loop(image)
    free = loop_devices._free_loop
    answers = [taken]
    monkeypatch.setattr(loop_devices, "_free_loop", lambda: answers.pop() if answers else free())
    try:
        second, device = loop_devices.attach_loop(image)
        os.close(second)
        assert device != taken
    finally:
        os.close(fd)
    eventually(lambda: not safe_paths.loop_users(image), "the loop devices are detached")


@needs_root
def test_a_detached_mount_is_seen_by_nobody_and_ends_with_its_descriptor(image: Path) -> None:
    before = mount_table.mountinfo()
    loop, device = loop_devices.attach_loop(image)
    root = mounts.detached_mount("ext3", device, {"errors": "remount-ro"})
    os.close(loop)
    try:
        assert mount_table.mountinfo() == before
        file = os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=root)
        os.write(file, b"kept")
        os.close(file)
        assert os.fstatvfs(root).f_flag & os.ST_NOATIME
    finally:
        os.close(root)
    eventually(lambda: not safe_paths.loop_users(image), "the mount and its loop device are gone")
    assert run("debugfs", "-R", "cat file", image).stdout == "kept"


@needs_root
def test_a_read_only_mount_refuses_writes(image: Path) -> None:
    loop, device = loop_devices.attach_loop(image, readonly=True)
    root = mounts.detached_mount("ext3", device, {}, readonly=True, noatime=False)
    os.close(loop)
    try:
        with pytest.raises(OSError) as caught:
            os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=root)
        assert caught.value.errno == errno.EROFS
        assert not os.fstatvfs(root).f_flag & os.ST_NOATIME
    finally:
        os.close(root)
    eventually(lambda: not safe_paths.loop_users(image), "the mount and its loop device are gone")


@needs_root
def test_a_refused_mount_says_what_the_kernel_said(image: Path) -> None:
    image.write_bytes(bytes(1 << 20))
    loop, device = loop_devices.attach_loop(image, readonly=True)
    try:
        with pytest.raises(OSError) as caught:
            mounts.detached_mount("ext3", device, {}, readonly=True)
        assert caught.value.errno == errno.EINVAL  # ext4 writes the reason only to the kernel log
        with pytest.raises(OSError, match="no_such_option"):
            mounts.detached_mount("ext3", device, {"no_such_option": "1"})
        with pytest.raises(OSError) as caught:
            mounts.detached_mount("nosuchfs", device, {})
        assert caught.value.errno == errno.ENODEV
    finally:
        os.close(loop)
    eventually(lambda: not safe_paths.loop_users(image), "the loop device is detached")


@needs_root
def test_tmpfs_has_the_size_asked_for() -> None:
    root = mounts.tmpfs(1 << 20, mode=0o700)
    try:
        room = os.fstatvfs(root)
        assert room.f_blocks * room.f_frsize == 1 << 20
        assert os.fstat(root).st_mode & 0o7777 == 0o700
    finally:
        os.close(root)


def test_who_locks_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert locks.who_locks(path) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert locks.who_locks(path) == holder.pid
        assert not pids.wait_pid_gone(holder.pid, 0)
        holder.kill()
        assert pids.wait_pid_gone(holder.pid, 10)
    assert locks.who_locks(path) is None
    assert pids.wait_pid_gone(holder.pid, 0), "long gone"


def test_who_locks_finds_the_child_when_the_one_who_locked_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    script = HOLD.replace(
        'print("locked", flush=True)',
        "import os\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)",
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.wait()
        assert locks.who_locks(path) == child
    assert pids.wait_pid_gone(child, 10)


@needs_root
def test_who_locks_finds_that_child_in_a_container_too(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    script = """
import fcntl, os, sys
from cowfs.linux import locks, loop_devices, mount_table, mounts, pids
file = open(sys.argv[1])
reading, writing = os.pipe()
if os.fork() == 0:  # the parent holds the lock
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fork() == 0:
        os.write(writing, b"%d" % os.getpid())
        import signal
        signal.pause()
    os._exit(0)
os.wait()
file.close()
child = int(os.read(reading, 100))
print(locks.who_locks(sys.argv[1]) == child)
"""
    inside = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    assert run(*inside, sys.executable, "-c", script, path, cwd=project_root()).stdout == "True\n"


def test_a_lock_of_our_own_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert locks.who_locks(path) == os.getpid()


def test_a_process_that_ends_while_locks_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory in /proc disappears before it is read."""
    (tmp_path / "file").touch()
    scandir = os.scandir
    gone: list[str | os.PathLike[str]] = []

    def ended(path: str | os.PathLike[str] = ".") -> object:
        if os.fspath(path).endswith("/fdinfo") and not gone:
            gone.append(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", ended)
    with open(tmp_path / "file") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (
            locks._who_has_locked(os.fstat(file.fileno()).st_ino, locks._device_of(file.fileno()))
            == os.getpid()
        )
    assert gone
