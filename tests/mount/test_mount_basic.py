"""Mounting, changing, unmounting, mounting again: what the command line promises, for root and for nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tree
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
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node, link, symlink

pytestmark = [needs_fuse, pytest.mark.matrix]

LOWER: tree.Tree = {
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/passwd": Node(data=b"root:x:0:0::/root:/bin/sh\n", mode=0o644),
    "usr/bin/tool": Node(data=b"#!/bin/sh\necho tool\n", mode=0o755),
    "usr/lib/big": Node(data=b"library" * 30_000),
    "usr/lib/alias": link("usr/lib/big"),
    "usr/lib/link": symlink("big"),
    "odd \xff\n name": b"odd\n",
}
CHANGE = r"""
echo more >> etc/hosts
rm etc/passwd
mkdir -p new/deeper
echo new > new/deeper/file
mv usr user
chmod 700 user/bin/tool
ln -s ../user new/link
printf x > "$(printf 'odd \377')"
"""
LOOK = r"""
test "$(tail -n 1 etc/hosts)" = more
test ! -e etc/passwd
test "$(cat new/deeper/file)" = new
test ! -e usr
test "$(user/bin/tool)" = tool
test "$(stat -c %a user/bin/tool)" = 700
test "$(stat -c %i user/lib/big)" = "$(stat -c %i user/lib/alias)"
test "$(readlink new/link)" = ../user
test "$(cat "$(printf 'odd \377')")" = x
ls -lR > /dev/null
"""


def script(text: str, mount: Mounted) -> str:
    """Run shell commands in the root of a mount, as whoever mounted it; each of them must succeed."""
    prefix = as_nobody_prefix() if mount.nobody else []
    return run(*prefix, "sh", "-euc", f'cd "$1"\n{text}', "sh", mount.path).stdout


@pytest.fixture(params=["root", "nobody"])
def who(request: pytest.FixtureRequest) -> str:
    """Both kinds of users."""
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    return str(request.param)


@pytest.fixture
def base(who: str, tmp_path: Path, nobody_path: Path) -> Path:
    """A place of this user's, with a lower in it."""
    place = tmp_path if who == "root" else nobody_path
    tree.build(place / "lower", LOWER)
    if who == "nobody" and os.geteuid() == 0:
        run("chown", "-R", "nobody:nogroup", place)
    return place


def test_changes_are_there_again(base: Path, who: str) -> None:
    before = tree.snapshot(base / "lower")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script(CHANGE + LOOK, mount)
    assert not is_mounted(mount.path)
    for _again in range(2):
        with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
            script(LOOK, mount)
    assert tree.snapshot(base / "lower") == before
    assert os.listdir(mount.path) == []


def test_inode_numbers_stay(base: Path, who: str) -> None:
    ask = "find . -printf '%i %P\\0'"

    def numbers(mount: Mounted) -> dict[str, str]:
        lines = script(ask, mount).split("\0")[:-1]
        return {path: number for number, _, path in (line.partition(" ") for line in lines)}

    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        before = numbers(mount)
        script("echo x >> etc/hosts; chmod 600 usr/lib/big; mv usr/bin usr/sbin", mount)
        after = numbers(mount)
        assert {path.replace("usr/sbin", "usr/bin"): number for path, number in after.items()} == before
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        assert numbers(mount) == after


def test_memory_is_the_default_and_says_so(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", nobody=who == "nobody") as mount:
        assert "memory" in mount.said
        script(CHANGE + LOOK, mount)
    with mounted(base / "lower", base / "mnt", "memory", nobody=who == "nobody") as mount:
        script("test -e etc/passwd; test ! -e new", mount)


def test_several_lowers_the_leftmost_on_top(base: Path, who: str) -> None:
    nobody = who == "nobody"
    tree.build(base / "a:b", {"etc/hosts": b"on top\n", "only": b"x\n"})
    if nobody and os.geteuid() == 0:
        run("chown", "-R", "nobody:nogroup", base / "a:b")
    lowers = [str(base / "a:b").replace(":", "\\:"), str(base / "lower")]
    with mounted(lowers, base / "mnt", base / "store", nobody=nobody) as mount:
        script('test "$(cat etc/hosts)" = "on top"; test -e only; test -e etc/passwd', mount)
        script("rm etc/hosts; test ! -e etc/hosts", mount)


def test_info(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        text = cowfs("info", mount.path, nobody=who == "nobody", check=True).stdout
        facts = json.loads(cowfs("info", mount.path, "--json", nobody=who == "nobody", check=True).stdout)
        for said in (str(base / "lower"), str(base / "store"), str(mount.path)):
            assert said in text
        assert facts["mountpoint"] == str(mount.path)
        assert facts["store"]["path"] == str(base / "store")
        assert 0 < facts["store"]["free"] <= facts["store"]["size"]
        assert [lower["path"] for lower in facts["lowers"]] == [str(base / "lower")]
        assert Path(f"/proc/{facts['pid']}").exists()


def test_as_mount_fuse_calls_it(base: Path, who: str) -> None:
    """``cowfs LOWER MOUNTPOINT -o store=...``, without a subcommand."""
    (base / "mnt").mkdir()
    if who == "nobody" and os.geteuid() == 0:
        os.chown(base / "mnt", 65534, 65534)
    options = f"store={base / 'store'},log={base / 'log'},nofail,_netdev,x-systemd.automount"
    done = cowfs(base / "lower", base / "mnt", "-o", options, nobody=who == "nobody")
    assert done.returncode == 0, done.stderr
    mount = Mounted(base / "mnt", base / "log", who == "nobody")
    script(CHANGE + LOOK, mount)
    mount.umount()
    assert mount.trouble() == []


def test_the_source_and_type_that_programs_see(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        shown = run("findmnt", "-n", "-o", "SOURCE,FSTYPE", "-M", mount.path).stdout.split()
        assert shown == [str(base / "lower"), "fuse.cowfs"]


def test_read_only(base: Path, who: str) -> None:
    with mounted(
        base / "lower", base / "mnt", base / "store", options=["ro"], nobody=who == "nobody"
    ) as mount:
        script("cat etc/hosts; ! touch new 2>/dev/null; ! rm etc/hosts 2>/dev/null; test -e etc/hosts", mount)


def test_a_mountpoint_that_is_not_empty_is_covered(base: Path, who: str) -> None:
    (base / "mnt").mkdir()
    (base / "mnt" / "covered").write_text("x")
    if who == "nobody" and os.geteuid() == 0:
        run("chown", "-R", "nobody:nogroup", base / "mnt")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script("test ! -e covered", mount)
    assert os.listdir(base / "mnt") == ["covered"]


def test_the_memory_that_it_takes_at_the_start(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script("ls -lR", mount)
        status = Path(f"/proc/{mount.pid()}/status").read_text()
        resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        assert resident < 60 * 1024, f"{resident} KiB"


# -- the daemon's life ---------------------------------------------------------------------------


@pytest.fixture
def foreground(base: Path, who: str) -> Iterator[subprocess.Popen[str]]:
    """``cowfs mount -f``, mounted at base/mnt."""
    (base / "mnt").mkdir()
    if who == "nobody" and os.geteuid() == 0:
        os.chown(base / "mnt", 65534, 65534)
    prefix = as_nobody_prefix() if who == "nobody" else []
    command = [*prefix, *COWFS, *mount_arguments(base / "lower", base / "mnt", base / "store"), "-f"]
    env = {**os.environ, "PYTHONPATH": project_root()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as daemon:
        eventually(lambda: is_mounted(base / "mnt") or daemon.poll() is not None, "it is mounted")
        yield daemon
        if daemon.poll() is None:
            daemon.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount_cleanly(
    base: Path, who: str, foreground: subprocess.Popen[str], number: signal.Signals
) -> None:
    mount = Mounted(base / "mnt", base / "log", who == "nobody")
    script(CHANGE, mount)
    foreground.send_signal(number)
    _out, said = foreground.communicate(timeout=20)
    assert foreground.returncode == 0, said
    assert "Traceback" not in said
    assert not is_mounted(base / "mnt")
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script(LOOK, mount)


def test_the_foreground_ends_with_the_unmount(
    base: Path, who: str, foreground: subprocess.Popen[str]
) -> None:
    done = cowfs("umount", base / "mnt", nobody=who == "nobody")
    assert done.returncode == 0, done.stderr
    foreground.communicate(timeout=20)
    assert foreground.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_do_not_stop_it_halfway(
    base: Path, who: str, foreground: subprocess.Popen[str], number: signal.Signals
) -> None:
    """systemd signals again when an unmount takes long: the store must still be released first."""
    mount = Mounted(base / "mnt", base / "log", who == "nobody")
    script(CHANGE, mount)
    deadline = time.monotonic() + 20
    while foreground.poll() is None and time.monotonic() < deadline:
        foreground.send_signal(number)
    _out, said = foreground.communicate(timeout=20)
    assert foreground.returncode == 0, said
    assert not is_mounted(base / "mnt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_background_daemon(base: Path, who: str, number: signal.Signals) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script(CHANGE, mount)
        pid = mount.pid()
        os.kill(pid, number)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the daemon ends")
        assert not is_mounted(mount.path)
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        script(LOOK, mount)


def test_the_terminal_may_close(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        pid = mount.pid()
        assert os.getsid(pid) == pid, "it is in the session of the terminal"
        os.kill(pid, signal.SIGHUP)
        script(CHANGE + LOOK, mount)
        assert mount.pid() == pid
        for fd in ("0", "1", "2"):
            if who == "root":
                assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null", f"descriptor {fd} is kept open"


def test_systemd_is_told(base: Path, who: str) -> None:
    """READY=1 when the mount answers (Type=notify)."""
    where = base / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(where))
        os.chmod(where, 0o777)
        listener.settimeout(20)
        (base / "mnt").mkdir()
        if who == "nobody" and os.geteuid() == 0:
            os.chown(base / "mnt", 65534, 65534)
        prefix = as_nobody_prefix() if who == "nobody" else []
        command = [*prefix, *COWFS, *mount_arguments(base / "lower", base / "mnt", base / "store"), "-f"]
        env = {**os.environ, "PYTHONPATH": project_root(), "NOTIFY_SOCKET": str(where)}
        with subprocess.Popen(command, env=env) as daemon:
            said = listener.recv(4096).decode()
            assert "READY=1" in said.splitlines()
            assert is_mounted(base / "mnt")
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)


# -- unmounting ----------------------------------------------------------------------------------


def test_umount_of_a_mount_in_use(base: Path, who: str) -> None:
    with mounted(base / "lower", base / "mnt", base / "store", nobody=who == "nobody") as mount:
        prefix = as_nobody_prefix() if who == "nobody" else []
        with subprocess.Popen(
            [*prefix, "sh", "-c", 'cd "$1" && echo there && read wait', "sh", str(mount.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as user:  # fmt: skip
            assert user.stdout and user.stdin
            assert user.stdout.readline() == "there\n"
            done = cowfs("umount", mount.path, nobody=who == "nobody")
            assert done.returncode == 32
            assert done.stderr.count("\n") == 1 and str(mount.path) in done.stderr
            assert is_mounted(mount.path)
            script("cat etc/hosts", mount)
            user.stdin.close()
        done = cowfs("umount", mount.path, nobody=who == "nobody")
        assert done.returncode == 0, done.stderr


def test_umount_of_what_is_not_mounted(base: Path, who: str) -> None:
    for path in (base, base / "missing"):
        done = cowfs("umount", path, nobody=who == "nobody")
        assert done.returncode == 32
        assert done.stderr.count("\n") == 1 and str(path) in done.stderr


@needs_root
def test_plain_umount_releases_the_store(tmp_path: Path) -> None:
    """umount(8) returns before the daemon is done; the next mount must work all the same."""
    tree.build(tmp_path / "lower", LOWER)
    for _again in range(3):
        with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
            pid = mount.pid()
            script("date >> etc/hosts", mount)
            run("umount", mount.path)
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the daemon ends")


# -- who may --------------------------------------------------------------------------------------


@needs_root
def test_roots_mounts_are_for_everybody(tmp_path: Path, nobody_path: Path) -> None:
    tree.build(
        nobody_path / "lower",
        {"open": Node(data=b"o\n", mode=0o666), "closed": Node(data=b"c\n", mode=0o600)},
    )
    with mounted(nobody_path / "lower", nobody_path / "mnt", tmp_path / "store", options=["dev"]) as mount:
        run(*as_nobody_prefix(), "sh", "-euc", f"cd {mount.path}; echo x >> open; ! cat closed 2>/dev/null")
        run("mknod", mount.path / "null", "c", "1", "3")
        run("sh", "-c", f"echo x > {mount.path}/null")
    with mounted(nobody_path / "lower", nobody_path / "mnt", options=["noallow_other"]) as mount:
        done = run(*as_nobody_prefix(), "ls", mount.path, check=False)
        assert done.returncode != 0


@needs_root
def test_a_mount_of_nobodys_is_for_nobody_else(nobody_path: Path) -> None:
    """Not even root can use it, and set-ID bits and devices have no effect."""
    tree.build(nobody_path / "lower", LOWER)
    run("chown", "-R", "nobody:nogroup", nobody_path)
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "store", nobody=True) as mount:
        with pytest.raises(PermissionError):
            os.listdir(mount.path)
        options = run("findmnt", "-n", "-o", "OPTIONS", "-M", mount.path).stdout
        assert "nosuid" in options and "nodev" in options


@needs_root
def test_nobody_sees_roots_files_as_roots(nobody_path: Path) -> None:
    """A lower of root's, merged by nobody: what is copied up goes on belonging to root."""
    tree.build(nobody_path / "lower", {"etc/hosts": Node(data=b"h\n", mode=0o666), "dir/x": b"x"})
    os.chmod(nobody_path / "lower/etc", 0o777)
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "store", nobody=True) as mount:
        script("echo more >> etc/hosts; touch etc/mine", mount)
        owners = script("stat -c '%u %n' etc etc/hosts etc/mine dir", mount)
        assert owners == "0 etc\n0 etc/hosts\n65534 etc/mine\n0 dir\n"


# -- images ---------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("engine", ["auto", "kernel"])
def test_squashfs_and_image(tmp_path: Path, engine: str) -> None:
    """Mount a squashfs root with a store in a file, as root: the main job of cowfs."""
    tree.build(tmp_path / "tree", {**LOWER, "dev/null": Node("char", rdev=os.makedev(1, 3), mode=0o666)})
    run("mksquashfs", tmp_path / "tree", tmp_path / "root.squashfs", "-quiet", "-no-progress")
    assert cowfs("create", tmp_path / "sysrcd.bs", "32").returncode == 0
    image = (tmp_path / "root.squashfs").read_bytes()
    for again in (False, True):
        with mounted(
            tmp_path / "root.squashfs", tmp_path / "mnt", tmp_path / "sysrcd.bs", engine=engine
        ) as mount:
            if not again:
                script(CHANGE, mount)
            script(LOOK + "test -c dev/null; echo x > dev/null", mount)
            assert os.statvfs(mount.path).f_blocks * os.statvfs(mount.path).f_frsize > 16 << 20
    assert (tmp_path / "root.squashfs").read_bytes() == image
    done = run("e2fsck", "-fn", tmp_path / "sysrcd.bs", check=False)
    assert done.returncode == 0, done.stdout


@needs_root
def test_a_full_store_says_so(tmp_path: Path) -> None:
    """ENOSPC at the write, at the latest at close or fsync; what was there before is whole."""
    tree.build(tmp_path / "lower", LOWER)
    assert cowfs("create", tmp_path / "store.bs", "16").returncode == 0
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs") as mount:
        script("echo kept > kept; echo more >> etc/hosts", mount)
        done = run(
            "dd", "if=/dev/zero", f"of={mount.path}/huge", "bs=1M", "count=40", "conv=fsync", check=False
        )
        assert done.returncode != 0
        assert "No space left" in done.stderr
        script("cat kept; tail -n1 etc/hosts", mount)
        script("rm huge; echo again > again", mount)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs") as mount:
        script('test "$(cat kept again)" = "kept\nagain"; test ! -e huge', mount)


@needs_root
def test_link_counts_of_directories(tmp_path: Path) -> None:
    """Link counts are those of ext3, also of merged directories."""
    tree.build(tmp_path / "lower", {"a/b/c/x": b"", "a/d/x": b""})
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
        assert os.stat(mount.path / "a").st_nlink == 4
        os.mkdir(mount.path / "new")
        os.mkdir(mount.path / "new" / "sub")
        assert os.stat(mount.path / "new").st_nlink == 3
        os.rmdir(mount.path / "new" / "sub")
        assert os.stat(mount.path / "new").st_nlink == 2
        (mount.path / "a" / "y").write_text("merged now")
        assert os.stat(mount.path / "a").st_nlink == 4
        os.rmdir(mount.path / "new")
        os.mkdir(mount.path / "a" / "e")
        assert os.stat(mount.path / "a").st_nlink == 5
        assert stat.S_ISDIR(os.stat(mount.path / "a").st_mode)
