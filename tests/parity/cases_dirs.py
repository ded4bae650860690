"""Directories and whiteouts: removed, created again, opaque, merged and empty."""

from __future__ import annotations

import os
import stat

from tests.parity.script import Script, case
from tests.parity.trees import BASE, BOTTOM, MIDDLE, TOP, directory, opaque, whiteout


@case(BASE)
def remove_files(s: Script) -> None:
    for name in ("file", "empty", "big", "sym", "dangling", "fifo", "socket", "null", "disk", "suid"):
        s.unlink(name)
    s.unlink("file")
    s.unlink("dir/a")
    s.unlink("dir/sub/deep/d")
    s.create("upper", b"x")
    s.unlink("upper")
    s.unlink("upper")
    s.remounted()


@case(BASE)
def remove_directories(s: Script) -> None:
    s.rmdir("emptydir")
    s.rmdir("dir")
    s.rmdir("dir/sub/deep")
    s.unlink("dir/sub/deep/d")
    s.rmdir("dir/sub/deep")
    s.unlink("dir/sub/c")
    s.rmdir("dir/sub")
    s.mkdir("upper")
    s.create("upper/x")
    s.rmdir("upper")
    s.unlink("upper/x")
    s.rmdir("upper")
    s.rmdir("emptydir")
    s.remounted()


@case(BASE)
def remove_a_merged_directory_of_whiteouts(s: Script) -> None:
    """The upper directory contains only whiteouts: it is empty for users, but not in the layer."""
    for name in ("a", "b", "three", "sub/c", "sub/deep/d"):
        s.unlink(f"dir/{name}")
    s.rmdir("dir/sub/deep")
    s.rmdir("dir/sub")
    s.create("dir/new")
    s.rmdir("dir")
    s.unlink("dir/new")
    s.rmdir("dir")
    s.mkdir("dir")
    s.listdir("dir")
    s.create("dir/a", b"another")
    s.remounted()


@case(BASE)
def directory_over_whiteout(s: Script) -> None:
    s.unlink("file")
    s.mkdir("file", 0o700)
    s.create("file/x", b"x")
    s.rmdir("emptydir")
    s.mkdir("emptydir")
    s.rmdir("emptydir")
    s.mkdir("emptydir", 0o711)
    s.remounted()
    s.rmdir("emptydir")
    s.unlink("file/x")
    s.rmdir("file")
    s.create("file", b"a file again")


@case(BASE)
def file_over_removed_directory(s: Script) -> None:
    s.rmdir("emptydir")
    s.create("emptydir", b"a file now")
    s.unlink("emptydir")
    s.symlink("dir", "emptydir")
    s.unlink("emptydir")
    s.mknod("emptydir", stat.S_IFIFO)
    s.remounted()
    s.unlink("emptydir")
    s.mkdir("emptydir")


@case(BASE)
def removed_tree_made_again(s: Script) -> None:
    """The new directory is opaque and shows nothing of the old one."""
    remove_tree(s, "dir")
    s.mkdir("dir")
    s.listdir("dir")
    s.mkdir("dir/sub")
    s.listdir("dir/sub")
    s.create("dir/sub/c", b"new c")
    s.create("dir/b", b"new b")
    s.remounted()
    s.unlink("dir/b")
    s.create("dir/b", b"newer b")
    remove_tree(s, "dir")
    s.remounted()


@case(BASE)
def remove_everything(s: Script) -> None:
    remove_tree(s, ".")
    s.listdir(".")
    s.remounted()
    s.create("file", b"alone")


@case(BASE)
def make_directories(s: Script) -> None:
    s.mkdir("new", 0o700)
    s.mkdir("new/below", 0o777)
    s.mkdir("dir/new", 0o1777)
    s.mkdir("dir/sub/deep/new", 0o2755)
    s.mkdir("emptydir/new")
    s.mkdir("symdir/through")
    s.mkdir("sgiddir/child")
    s.create("sgiddir/file")
    s.step("umask", lambda: os.umask(0) and None)
    s.mkdir("wide", 0o777)
    s.create("wide/file", b"", 0o666)
    s.step("umask", lambda: os.umask(0o022) and None)


@case(BASE)
def unlink_create_cycles(s: Script) -> None:
    for number in range(4):
        s.unlink("dir/a")
        s.create("dir/a", b"%d" % number)
    s.unlink("dir/a")
    for number in range(3):
        s.create("cycle", b"%d" % number)
        s.unlink("cycle")
    s.remounted()


@case(TOP, MIDDLE, BOTTOM)
def three_lowers(s: Script) -> None:
    s.listdir(".")
    for name in ("both", "fresh", "middle"):
        s.listdir(name)
    s.write("both/bottom", b"B")
    s.write("both/middle", b"M")
    s.unlink("both/same")
    s.create("both/same", b"mine")
    s.create("hidden", b"not hidden")
    s.mkdir("reborn")
    s.listdir("reborn")
    s.create("middle/gone", b"back")
    s.create("fresh/old", b"mine")
    s.unlink("mixed")
    s.mkdir("mixed")
    s.listdir("mixed")
    s.remounted()


@case(TOP, MIDDLE, BOTTOM)
def three_lowers_removed(s: Script) -> None:
    for name in ("both", "fresh", "middle", "only_bottom", "only_middle"):
        remove_tree(s, name)
    s.unlink("mixed")
    s.listdir(".")
    s.remounted()
    for name in ("both", "fresh", "middle", "only_bottom"):
        s.mkdir(name)
        s.listdir(name)


@case(TOP, MIDDLE, BOTTOM)
def three_lowers_renamed(s: Script) -> None:
    s.rename("both", "moved")
    s.listdir("moved")
    s.rename("fresh", "stale")
    s.listdir("stale")
    s.rename("only_bottom/deep", "moved/deep")
    s.rename("middle", "moved/middle")
    s.mkdir("both")
    s.mkdir("fresh")
    s.create("moved/bottom.new", b"x")
    s.append("moved/bottom", b"more")
    s.append("moved/middle/bottom", b"more")
    s.append("moved/deep/z", b"more")
    s.remounted()
    s.rename("moved", "both")
    s.remounted()


@case(
    {"d": opaque(), "d/x": b"x", "gone": whiteout(), "plain/y": b"y"},
    {"d/below": b"never", "gone/below": b"never", "plain/z": b"z"},
    {"d/below": b"never", "gone": b"never", "plain/z": b"never", "plain/w": b"w"},
)
def opaque_lowers(s: Script) -> None:
    s.create("d/below", b"mine")
    s.unlink("d/below")
    s.mkdir("gone")
    s.unlink("plain/z")
    s.rename("plain", "d/plain")
    s.rmdir("gone")
    remove_tree(s, "d")
    s.mkdir("d")
    s.listdir("d")


@case(
    BASE,
    upper={
        "dir": directory(),
        "dir/a": whiteout(),
        "dir/upper": b"upper\n",
        "emptydir": opaque(),
        "emptydir/x": b"x\n",
        "file": whiteout(),
        "own/sub/y": b"y\n",
        "one": b"no longer linked\n",
    },
)
def upper_that_was_there_before(s: Script) -> None:
    s.listdir("dir")
    s.create("dir/a", b"again")
    s.unlink("dir/upper")
    s.create("file", b"again")
    s.unlink("emptydir/x")
    s.rmdir("emptydir")
    s.rename("own", "dir/own")
    s.append("two", b"only its other names\n")


@case(BASE)
def devices_and_special_files(s: Script) -> None:
    s.mknod("c", stat.S_IFCHR, os.makedev(1, 3), 0o644)
    s.mknod("b", stat.S_IFBLK, os.makedev(259, 65536))
    s.mknod("p", stat.S_IFIFO)
    s.mknod("s", stat.S_IFSOCK)
    s.mknod("r", stat.S_IFREG, mode=0o640)
    s.open_do("c", os.O_WRONLY, lambda fd: os.write(fd, b"to /dev/null"))
    s.open_do("null", os.O_RDWR, lambda fd: os.read(fd, 5))
    s.chmod("null", 0o600)
    s.chown("fifo", 5, 6)
    s.rename("disk", "dir/disk")
    s.link("socket", "dir/socket")
    s.utime("socket", 1_200_000_000_000_000_000)
    s.unlink("p")
    s.setxattr("fifo", "trusted.x", b"1")
    s.remounted()


@case(BASE)
def whiteout_devices(s: Script) -> None:
    """The kernel's overlayfs refuses to create a device 0:0, which would be a whiteout in the upper."""
    for name in ("w", "dir/w"):

        def come_and_go(name: str = name) -> None:
            os.mknod(s.at(name), stat.S_IFCHR | 0o600, 0)
            os.unlink(s.at(name))

        s.create(f"{name}2")
        s.unlink(f"{name}2")
        s.differs("an overlayfs needs it above", name, come_and_go, kernel="errno EPERM", cowfs=None)
    s.mknod("blk", stat.S_IFBLK, 0)
    s.listdir(".")


@case(BASE)
def fifos_carry_data(s: Script) -> None:
    def through(path: str) -> bytes:
        reading = os.open(s.at(path), os.O_RDONLY | os.O_NONBLOCK)
        writing = os.open(s.at(path), os.O_WRONLY | os.O_NONBLOCK)
        os.write(writing, b"through the pipe")
        answer = os.read(reading, 100)
        os.close(reading)
        os.close(writing)
        return answer

    s.step("lower fifo", lambda: through("fifo"))
    s.mknod("new", stat.S_IFIFO)
    s.step("upper fifo", lambda: through("new"))


@case(BASE)
def sockets_connect(s: Script) -> None:
    import socket

    def talk(path: str) -> bytes:
        os.chdir(s.root)
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(path)
            server.listen(1)
            client.connect(path)
            peer, _ = server.accept()
            with peer:
                client.sendall(b"hello")
                answer = peer.recv(10)
        os.chdir("/")
        return answer

    s.step("a new socket", lambda: talk("new.socket"))
    s.step("in a lower directory", lambda: talk("dir/new.socket"))
    s.step("bound twice", lambda: talk("new.socket"))


def remove_tree(s: Script, path: str) -> None:
    """Run rm -rf, recorded as one step."""

    def remove(place: str) -> int:
        count = 0
        with os.scandir(place) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    count += remove(entry.path)
                    os.rmdir(entry.path)
                else:
                    os.unlink(entry.path)
                count += 1
        return count

    s.step(f"rm -rf {path}", lambda: remove(s.at(path)))
    if path != ".":
        s.rmdir(path)
