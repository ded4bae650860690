"""Modes, owners, times, xattrs, ACLs, and permissions."""

from __future__ import annotations

import os
import struct
from functools import partial
from pathlib import Path

from tests.parity.script import Script, case
from tests.parity.trees import BASE, BIG, CAPABILITY
from tests.support.tree import Node, directory


def _create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))


@case(BASE)
def change_modes(s: Script) -> None:
    s.chmod("file", 0o600)
    s.chmod("dir", 0o700)
    s.chmod("dir/sub/deep", 0o1777)
    s.chmod("big", 0o4755)
    s.chmod("fifo", 0o666)
    s.chmod("missing", 0o600)
    s.chmod("sym", 0o640)
    s.create("new", b"n")
    s.chmod("new", 0)
    s.chmod("emptydir", 0o7777)
    s.remounted()
    s.append("big", b"tail")


@case(BASE)
def change_owners(s: Script) -> None:
    s.chown("file", 1000, 1000)
    s.chown("dir/a", -1, 5)
    s.chown("dir/b", 6, -1)
    s.chown("big", -1, -1)
    s.chown("sym", 8, 8)
    s.chown("dir", 70000, 80000)
    s.chown("suid", 0, 0)
    s.chown("sgid", 1, 1)
    s.chown("capable", 1, 1)
    s.chown("sgiddir", 1, 1)
    s.remounted()
    s.read("big")


@case(BASE)
def change_times(s: Script) -> None:
    for number, name in enumerate(("file", "dir", "big", "sym", "fifo", "dir/sub/c", ".")):
        s.utime(name, 1_111_111_111_000_000_000 + number * 1_000_000_007)
    s.create("new")
    s.utime("new", 1)
    s.utime("dir/a", 0)
    s.utime("dir/b", 2_000_000_000_123_456_789)
    s.step("now", lambda: os.utime(s.at("script")))
    s.remounted()
    s.append("big", b"x")


@case(BASE)
def metacopy_then_data(s: Script) -> None:
    """Changing attributes of a big file copies no data. A later write copies the data."""
    s.chmod("big", 0o600)
    s.open_do("big", os.O_RDONLY, lambda fd: os.pread(fd, 10, 1000))
    s.remounted()
    s.utime("big", 1_222_222_222_000_000_000)
    s.chown("big", 10, 10)
    s.read("big")
    s.write("big", b"data", 4096)
    s.remounted()
    s.chmod("sparse", 0o600)
    s.truncate("sparse", 100)
    s.chmod("empty", 0o600)
    s.append("empty", b"x")
    s.setxattr("dir/b", "user.x", b"1")
    s.link("dir/b", "b2")
    s.replace("b2", b"new")
    s.remounted()


@case(BASE)
def metacopy_descriptors(s: Script) -> None:
    fd = s.open("big")
    s.fd("fchmod on a reader", lambda: os.fchmod(fd, 0o611))
    s.fd("fchown on a reader", lambda: os.fchown(fd, 3, 3))
    s.fd("futimens", lambda: os.utime(fd, ns=(1_300_000_000_000_000_000, 1_300_000_000_000_000_000)))
    s.fd("read", lambda: os.pread(fd, 20, 256))
    s.fd("fsetxattr", lambda: os.setxattr(fd, "user.n", b"v"))
    s.close(fd)
    s.unlink("big")
    s.create("big", b"new")


@case(BASE)
def user_xattrs(s: Script) -> None:
    s.listxattr("dressed")
    s.getxattr("dressed", "user.color")
    s.getxattr("dressed", "user.empty")
    s.getxattr("dressed", "user.none")
    s.setxattr("dressed", "user.color", b"blue")
    s.setxattr("dressed", "user.color", b"x", os.XATTR_CREATE)
    s.setxattr("dressed", "user.none", b"x", os.XATTR_REPLACE)
    s.setxattr("dressed", "user.new", b"x" * 1000, os.XATTR_CREATE)
    s.removexattr("dressed", "user.empty")
    s.removexattr("dressed", "user.empty")
    s.setxattr("file", "user.first", b"\0\xff\n")
    s.removexattr("dir/a", "user.none")
    s.setxattr("dresseddir", "user.place", b"there")
    s.removexattr("dresseddir", "user.place")
    s.setxattr("dir", "user.new", b"")
    s.listxattr("dressed")
    s.remounted()


@case(BASE)
def xattrs_of_all_kinds(s: Script) -> None:
    s.setxattr("sym", "user.x", b"x")
    s.setxattr("sym", "trusted.x", b"x")
    s.setxattr("fifo", "user.x", b"x")
    s.setxattr("null", "trusted.x", b"x")
    s.setxattr("file", "bogus.x", b"x")
    s.getxattr("file", "bogus.x")
    s.setxattr("file", "user.", b"x")
    s.setxattr("file", "user." + "n" * 250, b"x")
    s.setxattr("file", "user." + "n" * 251, b"x")
    s.setxattr("missing", "user.x", b"x")
    s.getxattr("missing", "user.x")
    s.listxattr("missing")
    s.setxattr("file", "security.test", b"x")
    s.setxattr("file", "trusted.test", b"x")
    s.listxattr("file")
    s.getxattr("file", "user.none")
    s.remounted()


@case(BASE)
def private_xattrs_are_hidden(s: Script) -> None:
    """The overlay's own xattrs are neither visible nor changeable."""
    s.chmod("big", 0o600)
    s.rename("dir", "moved")
    s.rmdir("emptydir")
    s.mkdir("emptydir")
    for path, name in (("big", "metacopy"), ("moved", "redirect"), ("emptydir", "opaque"), ("big", "origin")):
        s.listxattr(path)
        s.getxattr(path, f"trusted.overlay.{name}")
    s.removexattr("moved", "trusted.overlay.redirect")
    s.remounted()


@case(BASE)
def xattrs_named_like_private_ones(s: Script) -> None:
    """xattrs with the overlay's prefix that a user sets, as a nested overlay does, are stored separately."""
    for name in ("opaque", "redirect", "anything"):
        s.setxattr("dir", f"trusted.overlay.{name}", b"y")
        s.getxattr("dir", f"trusted.overlay.{name}")
        s.setxattr("file", f"trusted.overlay.{name}", b"y")
    s.listxattr("dir")
    s.setxattr("dir", "trusted.overlay.opaque", b"z", os.XATTR_CREATE)
    s.removexattr("dir", "trusted.overlay.opaque")
    s.listdir("dir")
    s.remounted()
    s.listxattr("dir")
    s.listxattr("file")
    s.rename("dir", "moved")
    s.getxattr("moved", "trusted.overlay.redirect")
    s.removexattr("moved", "trusted.overlay.redirect")
    s.listdir("moved")


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """Return an ACL in the kernel's format, from (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NOBODY_ID = 0xFFFFFFFF
ACCESS = _acl((USER_OBJ, 6, NOBODY_ID), (USER, 6, 1000), (GROUP_OBJ, 4, NOBODY_ID), (MASK, 6, NOBODY_ID),
              (OTHER, 0, NOBODY_ID))  # fmt: skip
DEFAULT = _acl((USER_OBJ, 7, NOBODY_ID), (USER, 7, 1000), (GROUP_OBJ, 5, NOBODY_ID), (MASK, 7, NOBODY_ID),
               (OTHER, 0, NOBODY_ID))  # fmt: skip


@case({**BASE, "acl": Node(data=b"a", xattrs={"system.posix_acl_access": ACCESS}),
              "acldir": directory(xattrs={"system.posix_acl_default": DEFAULT})})  # fmt: skip
def posix_acls(s: Script) -> None:
    s.listxattr("acl")
    s.getxattr("acl", "system.posix_acl_access")
    s.as_user(1000, "read by the ACL", lambda: Path(s.at("acl")).read_bytes())
    s.as_user(1001, "not by the ACL", lambda: Path(s.at("acl")).read_bytes())
    s.as_user(
        1000, "write by the ACL", lambda: os.write(os.open(s.at("acl"), os.O_WRONLY | os.O_APPEND), b"more")
    )
    s.setxattr("file", "system.posix_acl_access", ACCESS)
    s.stat("file")
    s.chmod("file", 0o644)
    s.getxattr("file", "system.posix_acl_access")
    s.removexattr("acl", "system.posix_acl_access")
    s.setxattr("file", "system.posix_acl_access", b"nonsense")
    s.setxattr("file", "system.posix_acl_default", DEFAULT)
    s.remounted()


@case({**BASE, "acldir": directory(xattrs={"system.posix_acl_default": DEFAULT})})
def default_acls_and_the_umask(s: Script) -> None:
    """The umask does not apply in a directory with a default ACL; elsewhere it does."""
    before = os.umask(0o027)
    try:
        for place in ("acldir", "dir", "made"):
            if place == "made":
                s.step("mkdir made", lambda: os.mkdir(s.at("made"), 0o777))
                s.setxattr("made", "system.posix_acl_default", DEFAULT)
            s.step(
                f"create in {place}",
                partial(_create, s.at(place + "/f")),
            )
            s.step(f"mkdir in {place}", partial(os.mkdir, s.at(place + "/d"), 0o777))
            s.step(f"mkfifo in {place}", partial(os.mkfifo, s.at(place + "/p"), 0o666))
        s.removexattr("made", "system.posix_acl_default")
        s.step("and without", lambda: os.mkdir(s.at("made/after"), 0o777))
    finally:
        os.umask(before)


@case(BASE)
def writing_drops_suid(s: Script) -> None:
    """A write by a user without CAP_FSETID drops the bits; root keeps them."""
    s.chmod("suid", 0o6777)
    s.chmod("sgid", 0o6777)
    s.as_user(1001, "write", lambda: os.write(os.open(s.at("suid"), os.O_WRONLY), b"x"))
    s.as_user(1001, "truncate", lambda: os.truncate(s.at("sgid"), 1))
    s.chmod("suid", 0o6777)
    s.append("suid", b"by root")
    s.remounted()


@case(BASE)
def writing_drops_capabilities(s: Script) -> None:
    s.getxattr("capable", "security.capability")
    s.append("capable", b"x")
    s.getxattr("capable", "security.capability")
    s.setxattr("script", "security.capability", CAPABILITY)
    s.getxattr("script", "security.capability")
    s.truncate("script", 1)
    s.getxattr("script", "security.capability")
    s.create("new", b"x", 0o755)
    s.setxattr("new", "security.capability", CAPABILITY)
    s.chown("new", 5, 5)
    s.getxattr("new", "security.capability")
    s.remounted()


@case(BASE)
def capabilities_survive_copy_up(s: Script) -> None:
    s.chmod("capable", 0o711)
    s.getxattr("capable", "security.capability")
    s.link("capable", "dir/capable")
    s.rename("capable", "renamed")
    s.remounted()
    s.getxattr("renamed", "security.capability")


@case(BASE)
def unprivileged_users(s: Script) -> None:
    """The permissions of the merged tree apply to every user."""
    user = 1000
    s.as_user(user, "create in /", lambda: os.close(os.open(s.at("x"), os.O_CREAT | os.O_WRONLY)))
    s.as_user(user, "write", lambda: os.close(os.open(s.at("file"), os.O_WRONLY)))
    s.as_user(user, "own secret", lambda: Path(s.at("private/secret")).read_bytes())
    s.as_user(1001, "another's secret", lambda: Path(s.at("private/secret")).read_bytes())
    s.as_user(1001, "another's directory", lambda: os.listdir(s.at("private")))
    s.as_user(user, "write open", lambda: os.write(os.open(s.at("open"), os.O_WRONLY), b"W"))
    s.as_user(user, "chmod another's", lambda: os.chmod(s.at("open"), 0o600))
    s.as_user(user, "chmod own", lambda: os.chmod(s.at("private/secret"), 0o640))
    s.as_user(user, "chown", lambda: os.chown(s.at("private/secret"), 1001, 1001))
    s.as_user(
        user, "create in world", lambda: os.close(os.open(s.at("world/w"), os.O_CREAT | os.O_WRONLY, 0o640))
    )
    s.as_user(user, "mkdir in world", lambda: os.mkdir(s.at("world/d")))
    s.as_user(user, "unlink in /", lambda: os.unlink(s.at("file")))
    s.as_user(user, "rename in world", lambda: os.rename(s.at("world/w"), s.at("world/v")))
    s.as_user(user, "rename out of world", lambda: os.rename(s.at("world/v"), s.at("v")))
    s.as_user(user, "utime another's", lambda: os.utime(s.at("open"), ns=(1, 1)))
    s.as_user(user, "trusted xattr", lambda: os.setxattr(s.at("private"), "trusted.x", b""))
    s.as_user(user, "list trusted", lambda: sorted(os.listxattr(s.at("dressed"))))
    s.as_user(user, "link", lambda: os.link(s.at("private/secret"), s.at("world/secret")))
    s.as_user(user, "mknod", lambda: os.mknod(s.at("world/dev"), 0o020600, 0x103))


@case(BASE)
def sticky_for_two_users(s: Script) -> None:
    s.as_user(1000, "unlink another's", lambda: os.unlink(s.at("sticky/theirs")))
    s.as_user(1000, "rename another's", lambda: os.rename(s.at("sticky/theirs"), s.at("sticky/mine")))
    s.as_user(1000, "create", lambda: os.close(os.open(s.at("sticky/mine"), os.O_CREAT | os.O_WRONLY)))
    s.as_user(1001, "unlink another's", lambda: os.unlink(s.at("sticky/mine")))
    s.as_user(1001, "unlink own", lambda: os.unlink(s.at("sticky/theirs")))
    s.as_user(1000, "over own", lambda: os.rename(s.at("sticky/mine"), s.at("sticky/again")))


@case(BASE)
def sgid_directories(s: Script) -> None:
    s.create("sgiddir/file", b"")
    s.mkdir("sgiddir/dir", 0o700)
    s.symlink("x", "sgiddir/link")
    s.mknod("sgiddir/fifo", 0o010000)
    s.chmod("sgiddir", 0o2777)
    s.as_user(1000, "create", lambda: os.close(os.open(s.at("sgiddir/u"), os.O_CREAT | os.O_WRONLY, 0o2775)))
    s.as_user(1000, "mkdir", lambda: os.mkdir(s.at("sgiddir/ud"), 0o755))
    s.mkdir("sgiddir/dir/deeper")
    s.remounted()


@case(BASE)
def access_checks(s: Script) -> None:
    for name in ("file", "script", "private", "private/secret", "world", "sym", "missing"):
        s.as_user(
            1001, f"access {name}",
            lambda name=name: [os.access(s.at(name), how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],  # type: ignore[misc]
        )  # fmt: skip


@case({"prog": Node(data=b"#!/bin/sh\necho ran $1\n", mode=0o755), "big": BIG})
def running_programs(s: Script) -> None:
    import shutil
    import subprocess

    def out(*command: str) -> bytes:
        return subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout

    s.step("lower script", lambda: out(s.at("prog"), "lower"))
    s.append("prog", b"echo changed\n")
    s.step("changed script", lambda: out(s.at("prog"), "upper"))
    s.step("copy a binary", lambda: shutil.copy("/bin/true", s.at("true")) and None, look=False)
    s.step("run it", lambda: subprocess.run([s.at("true")], check=False).returncode, look=False)
    s.unlink("true")
