"""Small cases about extended attributes and ACLs."""

from __future__ import annotations

import os
from functools import partial

from tests.parity.quick import quick
from tests.parity.script import Script
from tests.parity.shorthands import ACCESS, DEFAULT, Steps, acl, full
from tests.parity.trees import directory
from tests.support.tree import Node

# --- extended attributes


@quick()
def xattr_on_each_kind(s: Script) -> Steps:
    for name in ("f", "d", "p", "n", "l", "h1"):
        for attribute in ("user.a", "trusted.a", "security.a"):
            s.setxattr(name, attribute, b"value")
    yield
    for name in ("f", "d", "p", "n", "l", "h2"):
        s.listxattr(name)


@quick(upper_differs="the kernel copies up before it finds that an attribute is there")
def xattr_create_and_replace(s: Script) -> None:
    s.setxattr("f", "user.a", b"1", os.XATTR_REPLACE)
    s.setxattr("f", "user.a", b"1", os.XATTR_CREATE)
    s.setxattr("f", "user.a", b"2", os.XATTR_CREATE)
    s.setxattr("f", "user.a", b"3", os.XATTR_REPLACE)
    s.setxattr("dressed", "user.color", b"blue", os.XATTR_CREATE)
    s.setxattr("f", "user.a", b"4", 3)
    s.setxattr("f", "user.a", b"4", 8)
    s.getxattr("f", "user.a")


@quick()
def xattr_of_odd_names(s: Script) -> None:
    for name in (
        "user.",
        "user",
        "",
        "nosuch.a",
        "system.a",
        "trusted.",
        "user." + "n" * 250,
        "user." + "n" * 251,
        "user.é",
        "user.a b",
    ):
        s.setxattr("f", name, b"1")
        s.getxattr("f", name)
    s.listxattr("f")


@quick()
def xattr_sizes(s: Script) -> Steps:
    s.setxattr("f", "user.empty", b"")
    s.setxattr("f", "user.some", b"v" * 1000)
    s.setxattr("f", "user.too much", b"v" * 65_537)
    s.getxattr("f", "user.empty")
    yield
    s.getxattr("f", "user.some")
    s.removexattr("f", "user.some")
    s.listxattr("f")


@quick()
def xattr_of_a_capability_that_is_none(s: Script) -> None:
    s.setxattr("f", "security.capability", b"", os.XATTR_REPLACE)
    s.setxattr("f", "security.capability", b"")
    s.getxattr("f", "security.capability")
    s.setxattr("f", "security.capability", b"", os.XATTR_CREATE)
    s.setxattr("f", "security.capability", b"", os.XATTR_REPLACE)
    s.removexattr("f", "security.capability")
    s.listxattr("f")


@quick()
def xattr_that_fills_the_block(s: Script) -> Steps:
    for name in ("d", "x"):
        for size in (4041, 4040, 4005, 4004):
            s.setxattr(name, "user.a", b"v" * size)
    s.create("d/new")
    yield
    for name in ("d", "x"):
        s.step(f"size on {name}", lambda name=name: len(os.getxattr(s.at(name), "user.a")))  # type: ignore[misc]


@quick()
def xattr_that_are_not_there(s: Script) -> None:
    for name in ("f", "d", "l"):
        s.getxattr(name, "user.none")
        s.removexattr(name, "user.none")
        s.removexattr(name, "trusted.none")
    s.removexattr("dressed", "user.color")
    s.removexattr("dressed", "user.color")
    s.listxattr("dressed")


@quick()
def xattr_of_overlays(s: Script) -> Steps:
    """The overlay's own xattrs are hidden and cannot be forged; a user's with its prefix are escaped."""
    for name in ("trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.whiteout"):
        s.setxattr("d", name, b"y")
        s.getxattr("d", name)
    s.setxattr("f", "trusted.overlay.metacopy", b"")
    s.setxattr("f", "trusted.overlay.overlay.opaque", b"y")
    s.listxattr("d")
    yield
    s.listdir("d")
    s.listxattr("f")
    s.removexattr("d", "trusted.overlay.opaque")


@quick()
def xattr_by_others(s: Script) -> None:
    s.as_user(1000, "own", lambda: os.setxattr(s.at("theirs/f"), "user.a", b"1"))
    s.as_user(1000, "root's", lambda: os.setxattr(s.at("f"), "user.a", b"1"))
    s.as_user(1000, "writable", lambda: os.setxattr(s.at("w"), "user.a", b"1"))
    s.as_user(1000, "trusted", lambda: os.setxattr(s.at("theirs/f"), "trusted.a", b"1"))
    s.as_user(1000, "security", lambda: os.setxattr(s.at("theirs/f"), "security.a", b"1"))
    s.as_user(1000, "read trusted", lambda: os.getxattr(s.at("dressed"), "trusted.t"))
    s.as_user(1000, "list", lambda: sorted(os.listxattr(s.at("dressed"))))
    s.as_user(1000, "sticky directory", lambda: os.setxattr(s.at("sticky"), "user.a", b"1"))
    s.chmod("w", 0o222)
    s.as_user(1000, "unreadable", lambda: os.getxattr(s.at("w"), "user.a"))


@quick()
def xattr_kept_by_copy_up(s: Script) -> Steps:
    s.append("dressed", b"more")
    s.listxattr("dressed")
    yield
    s.rename("dressed", "d/dressed")
    s.getxattr("d/dressed", "trusted.t")


@quick()
def xattr_by_descriptor(s: Script) -> None:
    s.open_do("f", os.O_RDONLY, lambda fd: os.setxattr(fd, "user.a", b"1"))
    s.open_do("d", os.O_RDONLY, lambda fd: os.setxattr(fd, "user.a", b"1"))
    s.open_do("f", os.O_RDONLY, lambda fd: (os.listxattr(fd), os.getxattr(fd, "user.a")))
    s.open_do("f", os.O_RDONLY, lambda fd: os.removexattr(fd, "user.a"))
    s.listxattr("f")


# --- ACLs


@quick()
def acl_gives_and_takes(s: Script) -> Steps:
    s.setxattr("f", ACCESS, full(7, 7, 0, 7, 0))
    s.stat("f")
    s.as_user(1000, "named", lambda: os.close(os.open(s.at("f"), os.O_RDWR)))
    s.as_user(1001, "another", lambda: os.close(os.open(s.at("f"), os.O_RDONLY)))
    s.chmod("f", 0o640)
    s.getxattr("f", ACCESS)
    s.as_user(1000, "masked", lambda: os.close(os.open(s.at("f"), os.O_RDWR)))
    yield
    s.getxattr("f", ACCESS)
    s.removexattr("f", ACCESS)
    s.stat("f")


@quick()
def acl_that_is_a_mode(s: Script) -> None:
    s.setxattr("f", ACCESS, acl((1, 6, -1), (4, 4, -1), (0x20, 0, -1)))
    s.stat("f")
    s.listxattr("f")


@quick()
def acl_of_an_owner_who_may_do_nothing(s: Script) -> None:
    s.create("new", mode=0o640)
    for path in ("new", "d"):
        s.setxattr(path, ACCESS, full(6, 6, 5, 7, 0))
        s.chmod(path, 0o027)
        s.stat(path)
        s.getxattr(path, ACCESS)
        s.setxattr(path, ACCESS, full(0, 6, 5, 7, 0))
        s.stat(path)
        s.getxattr(path, ACCESS)
        s.chmod(path, 0o750)  # a user's store must itself be able to read it


@quick()
def acl_that_is_wrong(s: Script) -> None:
    for value in (b"", b"\2\0\0\0"):
        for name in (ACCESS, DEFAULT):
            why = "to remove none is no error on ext3"
            said = f"{name} of {len(value)} bytes"
            act = partial(os.setxattr, s.at("d"), name, value)
            s.differs(why, said, act, kernel="errno ENODATA", cowfs=None)
    for value in (
        b"\1\0\0\0",
        b"\2\0\0\0\1",
        acl((1, 7, -1)),
        acl((1, 7, -1), (4, 7, -1), (0x20, 8, -1)),
        full(7, 7, 7, 7, 7, -1),
    ):
        s.setxattr("d", ACCESS, value)
        s.setxattr("d", DEFAULT, value)
    s.setxattr("l", ACCESS, full(7, 7, 7, 7, 7))
    s.setxattr("f", DEFAULT, full(7, 7, 7, 7, 7))
    s.stat("d")


@quick()
def acl_default_is_inherited(s: Script) -> Steps:
    s.setxattr("x", DEFAULT, full(7, 6, 5, 7, 0))
    os.umask(0o077)
    s.create("x/file", mode=0o666)
    s.mkdir("x/dir", 0o777)
    s.mknod("x/fifo", 0o010000, mode=0o666)
    s.symlink("y", "x/link")
    os.umask(0o022)
    for name in ("file", "dir", "fifo", "link"):
        s.stat(f"x/{name}")
        s.getxattr(f"x/{name}", ACCESS)
        s.getxattr(f"x/{name}", DEFAULT)
    yield
    s.create("x/dir/deeper", mode=0o600)
    s.getxattr("x/dir/deeper", ACCESS)


@quick()
def acl_default_and_what_comes_in(s: Script) -> None:
    """Renamed and linked files inherit no ACL."""
    s.setxattr("x", DEFAULT, full(7, 6, 5, 7, 0))
    s.rename("f", "x/f")
    s.link("h1", "x/h")
    s.listxattr("x/f")
    s.listxattr("x/h")


@quick(
    {
        "f": Node(data=b"f", mode=0o640, xattrs={ACCESS: full(6, 4, 0, 4, 0)}),
        "d": directory(0o750, xattrs={DEFAULT: full(7, 7, 5, 7, 0)}),
    }
)
def acl_kept_by_copy_up(s: Script) -> Steps:
    s.append("f", b"more")
    s.getxattr("f", ACCESS)
    s.create("d/new")
    s.getxattr("d/new", ACCESS)
    yield
    s.getxattr("f", ACCESS)
    s.getxattr("d", DEFAULT)


@quick()
def acl_by_others(s: Script) -> None:
    s.as_user(1000, "own", lambda: os.setxattr(s.at("theirs/f"), ACCESS, full(6, 4, 0, 4, 0, 1001)))
    s.as_user(1000, "root's", lambda: os.setxattr(s.at("w"), ACCESS, full(6, 4, 0, 4, 0)))
    s.as_user(1001, "read", lambda: open(s.at("theirs/f"), "rb").read())
    s.as_user(1002, "read", lambda: open(s.at("theirs/f"), "rb").read())
