"""Hard links and symbolic links."""

from __future__ import annotations

import os

from tests.parity.script import Script, case
from tests.parity.trees import BASE, link
from tests.support.tree import Node

ALIASES = (
    "what the index shows needs no name in the upper, the kernel makes one on each change through a name"
)


@case(BASE, upper_differs=ALIASES)
def lower_hard_links_stay_links(s: Script) -> None:
    s.append("one", b"more\n")
    s.read("two")
    s.read("dir/three")
    s.append("dir/three", b"and more\n")
    s.chmod("two", 0o600)
    s.remounted()
    s.append("two", b"after\n")


@case(BASE)
def lower_hard_links_unlinked(s: Script) -> None:
    s.unlink("one")
    s.append("two", b"more\n")
    s.unlink("two")
    s.read("dir/three")
    s.remounted()
    s.unlink("dir/three")
    s.create("one", b"new")
    s.remounted()


@case(BASE)
def unlink_a_link_after_copy_up(s: Script) -> None:
    s.append("one", b"more\n")
    s.unlink("one")
    s.read("two")
    s.unlink("dir/three")
    s.append("two", b"last\n")
    s.remounted()
    s.unlink("two")


@case(BASE, upper_differs="link copies the data up, the kernel leaves a metacopy with two names")
def new_links_to_lower_files(s: Script) -> None:
    s.link("file", "dir/file")
    s.link("one", "four")
    s.link("dir/three", "five")
    s.append("four", b"more\n")
    s.append("file", b"more\n")
    s.link("big", "big2")
    s.unlink("big")
    s.read("big2")
    s.remounted()
    s.link("big2", "big")
    s.unlink("four")
    s.unlink("one")


@case(BASE)
def links_to_upper_files(s: Script) -> None:
    s.create("a", b"a")
    s.link("a", "b")
    s.link("b", "dir/c")
    s.append("dir/c", b"more")
    s.unlink("a")
    s.rename("b", "dir/b2")
    s.link("a", "x")
    s.link("dir/b2", "dir/c")
    s.remounted()
    s.append("dir/b2", b"again")


@case(BASE, upper_differs=ALIASES)
def link_over_whiteouts(s: Script) -> None:
    s.unlink("file")
    s.link("dir/a", "file")
    s.rmdir("emptydir")
    s.link("one", "emptydir")
    s.unlink("two")
    s.link("one", "two")
    s.remounted()
    s.append("two", b"x")


@case(BASE)
def special_files_linked(s: Script) -> None:
    for name in ("sym", "dangling", "fifo", "socket", "null", "disk"):
        s.link(name, f"dir/{name}")
    s.unlink("sym")
    s.read("dir/sym")
    s.chmod("null", 0o600)
    s.remounted()


@case(BASE, upper_differs=ALIASES)
def attributes_through_links(s: Script) -> None:
    """Attributes belong to the inode: all its names show a change."""
    s.chmod("one", 0o600)
    s.chown("two", 3, 4)
    s.setxattr("dir/three", "user.x", b"y")
    s.utime("one", 1_300_000_000_000_000_001)
    s.truncate("two", 3)
    s.remounted()
    s.rename("dir", "moved")
    s.append("moved/three", b"more")
    s.remounted()


@case({"a": b"x", "b": link("a"), "c": link("a"), "d/e": link("a"), "solo": Node(data=b"s")})
def many_links_copied_up_one_by_one(s: Script) -> None:
    fds = [s.open(name, os.O_RDWR) for name in ("a", "b", "d/e")]
    for fd in fds:
        s.fd("append", lambda fd=fd: os.pwrite(fd, b"!", os.fstat(fd).st_size))  # type: ignore[misc]
    s.unlink("a")
    s.unlink("b")
    for fd in fds:
        s.fd("nlink", lambda fd=fd: os.fstat(fd).st_nlink)  # type: ignore[misc]
        s.close(fd)
    s.unlink("c")
    s.unlink("d/e")
    s.remounted()


@case(BASE)
def symbolic_links(s: Script) -> None:
    s.symlink("file", "new")
    s.symlink("../file", "dir/new")
    s.symlink("a" * 1000, "long")
    s.symlink("b" * 59, "inline")
    s.symlink(b"\xff\n", b"odd")
    s.read("new")
    s.chown("sym", 9, 9)
    s.utime("dangling", 1_250_000_000_000_000_009)
    s.unlink("sym")
    s.symlink("dir", "sym")
    s.listdir("sym")
    s.step("readlink of a file", lambda: os.readlink(s.at("file")))
    s.setxattr("dangling", "user.no", b"x")
    s.setxattr("dangling", "trusted.yes", b"x")
    s.remounted()


@case(BASE)
def write_through_symbolic_links(s: Script) -> None:
    s.append("sym", b"through\n")
    s.chmod("sym", 0o600)
    s.create("symdir/new", b"n")
    s.unlink("symdir/a")
    s.rename("symdir/b", "symdir/b2")
    s.truncate("sym", 3)
    s.rename("dir", "moved")
    s.read("symdir/b2")
    s.remounted()
