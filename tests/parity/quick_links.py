"""Small cases about hard links."""

from __future__ import annotations

import os

from tests.parity.quick import LONGEST, quick
from tests.parity.script import Script
from tests.parity.shorthands import Steps
from tests.support.call_things import link_followed

OTHER_NAME = "which names of one inode are in the upper differs; the index has it, so the rest follows"


# --- hard links


@quick()
def link_a_lower_file(s: Script) -> Steps:
    s.link("f", "d/g")
    s.append("d/g", b"more")
    s.read("f")
    yield
    s.append("f", b"again")
    s.read("d/g")


@quick()
def link_where_a_whiteout_is(s: Script) -> Steps:
    s.unlink("f")
    s.link("h1", "f")
    yield
    s.append("f", b"more")
    s.read("d/h3")


@quick()
def link_onto_what_is_there(s: Script) -> None:
    s.link("f", "empty")
    s.link("f", "f")
    s.link("f", "d")
    s.link("f", "dangling")


@quick()
def link_a_directory(s: Script) -> None:
    s.link("d", "e")
    s.link("x", "d/x")


@quick()
def link_into_nowhere(s: Script) -> None:
    s.link("f", "missing/g")
    s.link("missing", "g")
    s.link("f", "f/g")
    s.link("f", LONGEST + "n")


@quick()
def link_a_symlink(s: Script) -> Steps:
    s.link("l", "l2")
    s.link("dangling", "x/dangling")
    yield
    s.read("l2")
    s.unlink("l")
    s.read("l2")


@quick()
def link_special_files(s: Script) -> Steps:
    s.link("p", "p2")
    s.link("n", "n2")
    yield
    s.chmod("p2", 0o640)
    s.stat("p")
    s.unlink("n")


@quick()
def link_through_a_symlink(s: Script) -> None:
    s.step("followed", lambda: link_followed(s.at("l"), s.at("g")))
    s.step("same", lambda: os.path.samefile(s.at("g"), s.at("f")))


@quick()
def link_by_descriptor(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.fd("link", lambda: link_followed(f"/proc/self/fd/{fd}", s.at("g")))
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.close(fd)
    s.read("g")


@quick()
def link_an_unlinked_file(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.unlink("f")
    s.fd("link", lambda: link_followed(f"/proc/self/fd/{fd}", s.at("g")))
    s.close(fd)


@quick(upper_differs=OTHER_NAME)
def link_counts(s: Script) -> Steps:
    def counts() -> list[int]:
        return [os.lstat(s.at(path)).st_nlink for path in ("h1", "h2", "d/h3") if os.path.lexists(s.at(path))]

    s.step("at first", counts)
    s.append("h2", b"more")
    s.step("copied up", counts)
    s.unlink("h1")
    s.step("one less", counts)
    yield
    s.step("mounted again", counts)
    s.link("h2", "h4")
    s.step("one more", counts)


@quick(upper_differs=OTHER_NAME)
def link_chmod_by_another_name(s: Script) -> Steps:
    s.chmod("h1", 0o600)
    s.stat("d/h3")
    yield
    s.chown("d/h3", 7, 8)
    s.stat("h2")


@quick()
def link_xattr_by_another_name(s: Script) -> Steps:
    s.setxattr("h1", "user.a", b"1")
    s.getxattr("d/h3", "user.a")
    yield
    s.removexattr("h2", "user.a")
    s.listxattr("h1")


@quick(upper_differs=OTHER_NAME)
def link_truncated_by_another_name(s: Script) -> None:
    s.truncate("h1", 2)
    s.read("d/h3")
    s.replace("d/h3", b"anew")
    s.read("h2")


@quick()
def link_renamed_over_another_file(s: Script) -> Steps:
    s.rename("d/h3", "f")
    yield
    s.append("f", b"more")
    s.read("h1")


@quick()
def link_all_names_removed(s: Script) -> Steps:
    for name in ("h1", "h2", "d/h3"):
        s.unlink(name)
    yield
    s.create("h1", b"new")
    s.step("links", lambda: os.stat(s.at("h1")).st_nlink)


@quick()
def link_written_while_another_name_is_open(s: Script) -> None:
    fd = s.open("h1")
    s.append("h2", b"more")
    s.fd("read", lambda: os.pread(fd, 100, 0))
    s.close(fd)


@quick()
def link_to_a_directory_that_was_renamed(s: Script) -> Steps:
    s.rename("d", "e")
    s.link("f", "e/g")
    s.append("e/h3", b"more")
    yield
    s.read("h1")
    s.read("e/g")
