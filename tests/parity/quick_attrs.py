"""Modes, owners, times, and permissions."""

from __future__ import annotations

import os
import struct
from functools import partial
from typing import Any

from tests.parity.quick import errno_of, quick
from tests.parity.script import Script
from tests.parity.shorthands import OLD, Acts, Steps, is_new
from tests.parity.trees import directory
from tests.support.tree import Node

# --- modes and owners


@quick()
def chmod_each_kind(s: Script) -> Steps:
    for name in ("f", "d", "p", "n", "l", "h1", "x"):
        s.chmod(name, 0o1710)
        s.stat(name)
    yield
    for name in ("f", "d", "p", "n", "h2"):
        s.stat(name)


@quick()
def chmod_special_bits(s: Script) -> Steps:
    for mode in (0o7777, 0o4000, 0o2070, 0o1000, 0):
        s.chmod("f", mode)
        s.stat("f")
        s.chmod("d", mode)
        s.stat("d")
    yield
    s.stat("f")
    s.stat("d")


@quick()
def chmod_by_others(s: Script) -> None:
    s.as_user(1000, "own", lambda: os.chmod(s.at("theirs/f"), 0o2755))
    s.stat("theirs/f")
    s.as_user(1000, "root's", lambda: os.chmod(s.at("f"), 0o777))
    s.chown("theirs/f", 1000, 50)
    s.as_user(1000, "set-group-ID, of no member", lambda: os.chmod(s.at("theirs/f"), 0o2755))
    s.stat("theirs/f")
    s.as_user(1000, "set-group-ID, of a member", lambda: os.chmod(s.at("theirs/f"), 0o2755), gid=50)
    s.stat("theirs/f")
    s.as_user(1000, "sticky file", lambda: os.chmod(s.at("theirs/f"), 0o1644))
    s.stat("theirs/f")


@quick()
def chmod_by_descriptor(s: Script) -> Steps:
    s.open_do("f", os.O_RDONLY, lambda fd: os.fchmod(fd, 0o600))
    s.open_do("d", os.O_RDONLY, lambda fd: os.fchmod(fd, 0o700))
    yield
    s.stat("f")
    s.stat("d")


@quick()
def chown_each_kind(s: Script) -> Steps:
    for name in ("f", "d", "p", "n", "l", "h1", "dangling"):
        s.chown(name, 12, 34)
    s.chown("x", -1, 56)
    s.chown("w", 78, -1)
    s.chown("empty", 2**31, 2**32 - 2)
    yield
    for name in ("f", "d", "p", "l", "d/h3", "x", "w", "empty"):
        s.stat(name)


@quick()
def chown_by_others(s: Script) -> None:
    for said, uid, gid in (
        ("to another", 1001, -1),
        ("to itself", 1000, -1),
        ("group not its own", -1, 50),
        ("nothing", -1, -1),
    ):
        s.as_user(1000, said, lambda uid=uid, gid=gid: os.chown(s.at("theirs/f"), uid, gid))  # type: ignore[misc]
        s.as_user(1000, f"{said}, root's", lambda uid=uid, gid=gid: os.chown(s.at("f"), uid, gid))  # type: ignore[misc]
    s.as_user(1000, "its own group", lambda: os.chown(s.at("theirs/f"), -1, 60), gid=60)
    s.stat("theirs/f")


@quick({"suid": Node(data=b"s", mode=0o6755), "lock": Node(data=b"s", mode=0o2644), "d": directory(0o6755)})
def chown_takes_set_id_bits(s: Script) -> Steps:
    for name in ("suid", "lock", "d"):
        s.chown(name, 5, -1)
        s.stat(name)
    yield
    s.chmod("suid", 0o4711)
    s.chown("suid", -1, 6)
    s.stat("suid")


# --- times


@quick()
def utime_each_kind(s: Script) -> Steps:
    for number, name in enumerate(("f", "d", "p", "n", "l", "h1", "dangling")):
        s.utime(name, OLD + number * 10**9)
    yield
    for name in ("f", "d", "p", "n", "l", "h2", "dangling"):
        s.step(f"mtime {name}", lambda name=name: os.lstat(s.at(name)).st_mtime_ns)  # type: ignore[misc]


@quick()
def utime_that_a_change_leaves(s: Script) -> Steps:
    """Set the atime of a directory that contains directories."""

    def atime(path: str) -> int:
        return os.stat(s.at(path)).st_atime_ns

    s.utime("d/s", OLD)
    s.step("of d/s", lambda: atime("d/s"))
    for name in ("d", "x"):
        s.chmod(name, 0o711)
        s.step(name, lambda name=name: atime(name))  # type: ignore[misc]
    s.utime("d/a", OLD)
    s.step("d again", lambda: atime("d"))
    yield
    for name in ("d", "x", "d/s"):
        s.step(name, lambda name=name: atime(name))  # type: ignore[misc]


@quick()
def utime_of_one_and_not_the_other(s: Script) -> None:
    now, omit = (1 << 30) - 1, (1 << 30) - 2

    def set_to(access: int, change: int) -> Any:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        times = struct.pack("=qqqq", 1_000_000_001, access, 1_000_000_002, change)
        if libc.utimensat(-100, os.fsencode(s.at("f")), times, 0):
            raise OSError(ctypes.get_errno(), "utimensat")
        info = os.stat(s.at("f"))
        return [
            at if at < 1_500_000_000_000_000_000 else "now" for at in (info.st_atime_ns, info.st_mtime_ns)
        ]

    s.step("omit both", lambda: set_to(omit, omit)[1])
    s.step("omit atime", lambda: set_to(omit, 0)[1])
    s.step("omit mtime", lambda: set_to(0, omit))
    s.step("now and not", lambda: set_to(now, 0))
    s.step("not and now", lambda: set_to(0, now))
    s.step("too many ns", lambda: set_to(10**9, 0))


@quick()
def utime_before_1970_and_after_2038(s: Script) -> Steps:
    for number, seconds in enumerate((-1, -(2**31), 2**31 - 1)):
        s.create(f"t{number}")
        s.utime(f"t{number}", seconds * 10**9)
    yield
    for number in range(3):
        s.step(f"t{number}", lambda number=number: os.stat(s.at(f"t{number}")).st_mtime_ns)  # type: ignore[misc]


@quick()
def utime_by_others(s: Script) -> None:
    s.as_user(1000, "own", lambda: os.utime(s.at("theirs/f"), (1, 2)))
    s.as_user(1000, "a writable one, to now", lambda: os.utime(s.at("w")))
    s.as_user(1000, "a writable one, to then", lambda: os.utime(s.at("w"), (1, 2)))
    s.as_user(1000, "root's, to now", lambda: os.utime(s.at("f")))
    s.as_user(1000, "root's, to then", lambda: os.utime(s.at("f"), (1, 2)))


@quick()
def times_of_directories(s: Script) -> None:
    acts: Acts = (
        ("create", lambda: s.create("d/new")),
        ("write", lambda: s.append("d/new", b"x")),
        ("chmod", lambda: s.chmod("d/new", 0o600)),
        ("link", lambda: s.link("f", "d/f")),
        ("rename", lambda: s.rename("d/f", "d/g")),
        ("unlink", lambda: s.unlink("d/g")),
        ("mkdir", lambda: s.mkdir("d/m")),
        ("rmdir", lambda: s.rmdir("d/m")),
        ("symlink", lambda: s.symlink("x", "d/sym")),
        ("failing unlink", lambda: s.unlink("d/missing")),
    )
    for said, act in acts:
        s.utime("d", OLD)
        act()
        s.step(f"{said} touched d", lambda: is_new(s, "d"))


@quick()
def times_of_files(s: Script) -> Steps:
    acts: Acts = (
        ("chmod", lambda: s.chmod("f", 0o600)),
        ("setxattr", lambda: s.setxattr("f", "user.a", b"1")),
        ("chown", lambda: s.chown("f", 1, 1)),
        ("link", lambda: s.link("f", "f2")),
        ("rename", lambda: s.rename("f2", "f3")),
        ("open to write", lambda: s.open_do("f", os.O_WRONLY)),
        ("write nothing", lambda: s.open_do("f", os.O_WRONLY, lambda fd: os.write(fd, b""))),
        ("truncate to its size", lambda: s.truncate("f", 6)),
        ("write", lambda: s.write("f", b"x")),
        ("truncate", lambda: s.truncate("f", 1)),
    )
    for said, act in acts:
        s.utime("f", OLD)
        act()
        if said == "open to write":
            why = "the kernel copies the data of a metacopy then, and sets no times"
            s.differs(why, f"{said} touched f", lambda: is_new(s, "f"), kernel=True, cowfs=False)
        else:
            s.step(f"{said} touched f", lambda: is_new(s, "f"))
    s.utime("f", OLD)
    yield
    s.step("kept", lambda: os.stat(s.at("f")).st_mtime_ns)


@quick()
def times_of_change(s: Script) -> None:
    def after(act: Any, path: str = "f") -> bool:
        before = os.lstat(s.at(path)).st_ctime_ns
        act()
        return os.lstat(s.at(path)).st_ctime_ns > before

    def chown_as_it_is(path: str) -> None:
        st = os.lstat(s.at(path))
        os.chown(s.at(path), st.st_uid, st.st_gid, follow_symlinks=False)

    s.append("f", b"up")
    import time

    for said, act in (
        ("chmod", lambda: os.chmod(s.at("f"), 0o600)),
        ("chown", lambda: os.chown(s.at("f"), 0, 0)),
        ("setxattr", lambda: os.setxattr(s.at("f"), "user.a", b"1")),
        ("setxattr as it is", lambda: os.setxattr(s.at("f"), "user.a", b"1")),
        ("link", lambda: os.link(s.at("f"), s.at("f2"))),
        ("unlink of another name", lambda: os.unlink(s.at("f2"))),
        ("utime", lambda: os.utime(s.at("f"), (1, 2))),
        ("read", lambda: open(s.at("f"), "rb").read()),
    ):
        time.sleep(0.008)  # the kernel's coarse clock
        s.step(said, lambda act=act: after(act))  # type: ignore[misc]
    for path in ("f", "d", "l", "p", "dressed"):
        time.sleep(0.008)
        s.step(f"chown {path} as it is", partial(after, partial(chown_as_it_is, path), path))


# --- permissions


@quick()
def sticky_directories(s: Script) -> None:
    s.as_user(1000, "create", lambda: os.close(os.open(s.at("sticky/mine"), os.O_CREAT | os.O_WRONLY, 0o666)))
    s.as_user(1000, "unlink another's", lambda: os.unlink(s.at("sticky/f")))
    s.as_user(1000, "rename another's", lambda: os.rename(s.at("sticky/f"), s.at("sticky/g")))
    s.as_user(1000, "over another's", lambda: os.rename(s.at("sticky/mine"), s.at("sticky/f")))
    s.as_user(1000, "mkdir", lambda: os.mkdir(s.at("sticky/dir")))
    s.as_user(1001, "rmdir another's", lambda: os.rmdir(s.at("sticky/dir")))
    s.as_user(1001, "link another's", lambda: os.link(s.at("sticky/mine"), s.at("sticky/link")))
    s.as_user(1001, "unlink own", lambda: os.unlink(s.at("sticky/f")))
    s.as_user(1000, "rename own", lambda: os.rename(s.at("sticky/mine"), s.at("sticky/yours")))
    s.chown("sticky", 1001, 1001)
    s.as_user(1001, "unlink in its own", lambda: os.unlink(s.at("sticky/yours")))


@quick()
def directories_that_cannot_be_entered(s: Script) -> None:
    s.chmod("theirs", 0o600)
    s.as_user(1000, "owner lists", lambda: os.listdir(s.at("theirs")))
    s.as_user(1000, "owner stats", lambda: os.stat(s.at("theirs/f")).st_size)
    s.as_user(1000, "owner creates", lambda: os.mkdir(s.at("theirs/x")))
    s.as_user(1001, "other lists", lambda: os.listdir(s.at("theirs")))
    s.chmod("theirs", 0o100)
    s.as_user(1000, "owner lists", lambda: os.listdir(s.at("theirs")))
    s.as_user(1000, "owner stats", lambda: os.stat(s.at("theirs/f")).st_size)
    s.as_user(1000, "owner enters", lambda: os.chdir(s.at("theirs")))


@quick()
def access_of_each(s: Script) -> None:
    for path in ("f", "prog", "d", "theirs", "theirs/f", "w", "l", "dangling", "p", "sticky"):
        for who in (1000, 1001):
            s.as_user(
                who, f"access {path}",
                lambda path=path: [os.access(s.at(path), how) for how in (0, 1, 2, 4, 6)],  # type: ignore[misc]
            )  # fmt: skip


@quick()
def group_permissions(s: Script) -> None:
    s.chown("f", 5, 50)
    s.chmod("f", 0o604)
    s.as_user(1000, "a member has less", lambda: errno_of(lambda: os.open(s.at("f"), os.O_RDONLY)), gid=50)
    s.as_user(1000, "than others", lambda: errno_of(lambda: os.open(s.at("f"), os.O_RDONLY)))
    s.as_user(5, "and the owner", lambda: errno_of(lambda: os.open(s.at("f"), os.O_WRONLY)))
    s.chmod("f", 0o070)
    s.as_user(5, "has least", lambda: errno_of(lambda: os.open(s.at("f"), os.O_RDONLY)), gid=50)


@quick()
def new_files_belong_to_who_makes_them(s: Script) -> Steps:
    s.chmod("x", 0o777)
    s.as_user(1000, "file", lambda: os.close(os.open(s.at("x/f"), os.O_CREAT | os.O_WRONLY, 0o666)), gid=60)
    s.as_user(1000, "directory", lambda: os.mkdir(s.at("x/d")), gid=60)
    s.as_user(1000, "symlink", lambda: os.symlink("t", s.at("x/l")), gid=60)
    s.as_user(1000, "fifo", lambda: os.mkfifo(s.at("x/p")), gid=60)
    yield
    for name in ("f", "d", "l", "p"):
        s.stat(f"x/{name}")


@quick()
def statfs_and_pathconf(s: Script) -> None:
    s.step("name", lambda: os.statvfs(s.at("f")).f_namemax)
    for name in ("PC_NAME_MAX", "PC_PATH_MAX", "PC_PIPE_BUF", "PC_LINK_MAX"):
        s.step(name, lambda name=name: os.pathconf(s.at("f"), name) if name != "PC_LINK_MAX" else None)  # type: ignore[misc]
