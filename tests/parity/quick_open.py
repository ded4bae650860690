"""Small cases about open(2)."""

from __future__ import annotations

import fcntl
import os
from functools import partial

from tests.parity.quick import errno_of, quick
from tests.parity.script import Script
from tests.parity.shorthands import Steps, fails
from tests.support.call_things import link_followed

# --- open


@quick()
def open_exclusively(s: Script) -> None:
    for path in ("f", "d", "l", "dangling", "p", "missing/x"):
        fails(s, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    s.unlink("f")
    fails(s, "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@quick()
def open_directories(s: Script) -> None:
    for flags in (
        os.O_WRONLY,
        os.O_RDWR,
        os.O_CREAT,
        os.O_TRUNC,
        os.O_DIRECTORY | os.O_CREAT,
        os.O_APPEND,
        os.O_PATH,
    ):
        fails(s, "d", flags)
    fails(s, "f", os.O_DIRECTORY)
    fails(s, "ld", os.O_DIRECTORY)
    fails(s, "l", os.O_DIRECTORY)


@quick()
def open_without_following(s: Script) -> None:
    for path in ("l", "ld", "dangling", "f", "ld/a"):
        fails(s, path, os.O_NOFOLLOW)
    fails(s, "l", os.O_NOFOLLOW | os.O_PATH)
    fails(s, "ld", os.O_NOFOLLOW | os.O_DIRECTORY)
    fails(s, "l", os.O_NOFOLLOW | os.O_CREAT | os.O_WRONLY)


@quick()
def open_special_files(s: Script) -> None:
    fails(s, "p", os.O_WRONLY | os.O_NONBLOCK)
    fails(s, "p", os.O_RDONLY | os.O_NONBLOCK)
    s.mknod("socket", 0o140000)
    fails(s, "socket", os.O_RDONLY)
    fails(s, "p/", os.O_RDONLY)


@quick()
def open_truncates(s: Script) -> Steps:
    s.open_do("f", os.O_WRONLY | os.O_TRUNC)
    s.open_do("w", os.O_RDWR | os.O_TRUNC, lambda fd: os.write(fd, b"new"))
    s.open_do("d/a", os.O_RDONLY | os.O_TRUNC)
    s.open_do("l", os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    yield
    s.read("f")
    s.read("d/a")


@quick(upper_differs="the kernel copies up at the open, cowfs at the first write")
def open_to_write_and_do_not(s: Script) -> None:
    s.open_do("f", os.O_RDWR)
    s.open_do("d/a", os.O_WRONLY | os.O_APPEND)
    s.read("f")


@quick()
def open_appends(s: Script) -> None:
    def twice(fd: int) -> tuple[int, int, int]:
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        return os.write(fd, b"two"), os.pwrite(fd, b"three", 0), os.lseek(fd, 0, os.SEEK_CUR)

    s.open_do("f", os.O_WRONLY | os.O_APPEND, twice)
    s.read("f")


@quick()
def open_and_set_flags(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.fd("append", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND))
    s.fd("flags", lambda: fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)
    s.fd("write", lambda: os.write(fd, b"end"))
    s.fd("no more", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, 0))
    s.fd("write at 0", lambda: (os.lseek(fd, 0, os.SEEK_SET), os.write(fd, b"START"))[1])
    s.close(fd)
    s.read("f")


@quick()
def open_for_a_place_only(s: Script) -> None:
    fd = s.open("f", os.O_PATH)
    s.fd("read", lambda: os.read(fd, 1))
    s.fd("chmod", lambda: os.fchmod(fd, 0o600))
    s.fd("stat", lambda: os.fstat(fd).st_size)
    s.fd("reopen", lambda: errno_of(lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))))
    s.close(fd)


@quick()
def open_with_a_name_to_come(s: Script) -> Steps:
    fd = s.open("d", os.O_TMPFILE | os.O_RDWR, 0o640)
    s.fd("write", lambda: os.write(fd, b"no name yet"))
    s.fd("links", lambda: os.fstat(fd).st_nlink)
    s.fd("name", lambda: link_followed(f"/proc/self/fd/{fd}", s.at("d/named")))
    s.fd("another", lambda: link_followed(f"/proc/self/fd/{fd}", s.at("d/a")))
    s.fd("links", lambda: os.fstat(fd).st_nlink)
    s.close(fd)
    yield
    s.read("d/named")
    s.stat("d/named")


@quick()
def open_with_no_name_ever(s: Script) -> None:
    fd = s.open("d", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    s.fd("name", lambda: link_followed(f"/proc/self/fd/{fd}", s.at("d/named")))
    s.fd("xattr", lambda: os.setxattr(f"/proc/self/fd/{fd}", "user.a", b"1"))
    s.close(fd)
    fails(s, "f", os.O_TMPFILE | os.O_RDWR, "tmpfile")
    fails(s, "d", os.O_TMPFILE | os.O_RDONLY, "tmpfile")
    fails(s, "missing", os.O_TMPFILE | os.O_RDWR, "tmpfile")
    s.listdir("d")


@quick()
def open_in_a_directory_that_is_gone(s: Script) -> None:
    s.mkdir("new")
    fd = s.open("new", os.O_RDONLY | os.O_DIRECTORY)
    s.rmdir("new")
    for flags in (os.O_TMPFILE | os.O_RDWR, os.O_CREAT | os.O_RDWR, os.O_RDONLY):
        path = "name" if flags & os.O_TMPFILE != os.O_TMPFILE else "."
        at_fd = partial(os.open, path, flags, 0o600, dir_fd=fd)
        s.fd(f"open {path} {flags:#o}", partial(errno_of, at_fd))
    s.close(fd)


@quick()
def open_noatime_of_another(s: Script) -> None:
    s.as_user(1000, "theirs", lambda: errno_of(lambda: os.open(s.at("theirs/f"), os.O_RDONLY | os.O_NOATIME)))
    s.as_user(1000, "root's", lambda: errno_of(lambda: os.open(s.at("f"), os.O_RDONLY | os.O_NOATIME)))


@quick()
def open_modes_and_umask(s: Script) -> Steps:
    for number, (mask, mode) in enumerate([(0, 0o666), (0o27, 0o777), (0o777, 0o777), (0, 0o6755), (0, 0)]):
        os.umask(mask)
        s.create(f"m{number}", b"x", mode)
        s.stat(f"m{number}")
    os.umask(0o022)
    yield
    s.stat("m3")


@quick()
def open_by_others(s: Script) -> None:
    for path in ("f", "w", "theirs/f", "sticky/f", "d", "missing"):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_CREAT | os.O_RDONLY):
            opened = partial(os.open, s.at(path), flags)
            s.as_user(1000, f"{path} {flags:o}", partial(errno_of, opened))
