"""Names: removal, directories, symbolic links, and valid names."""

from __future__ import annotations

import os
from functools import partial

from tests.parity.quick import LONGEST, clear, errno_of, quick
from tests.parity.script import Script
from tests.parity.shorthands import Steps

# --- unlink, directories


@quick()
def unlink_directories(s: Script) -> None:
    s.unlink("d")
    s.unlink("x")
    s.unlink("ld/")


@quick()
def unlink_and_make_anew(s: Script) -> Steps:
    s.unlink("f")
    s.unlink("f")
    s.create("f", b"new")
    yield
    s.unlink("f")
    yield
    s.listdir(".")


@quick()
def unlink_then_another_kind(s: Script) -> Steps:
    s.unlink("f")
    s.mkdir("f")
    s.unlink("l")
    s.mknod("l", 0o010000)
    s.unlink("p")
    s.symlink("d", "p")
    yield
    s.listdir("p")
    s.rmdir("f")
    s.symlink("h1", "f")
    s.read("f")


@quick()
def rmdir_what_is_none(s: Script) -> None:
    s.rmdir("f")
    s.rmdir("l")
    s.rmdir("ld")
    s.rmdir("missing")
    s.rmdir("f/x")


@quick()
def rmdir_dot_and_dots(s: Script) -> None:
    s.rmdir("x/.")
    s.rmdir("x/..")
    s.rmdir(".")


@quick()
def rmdir_with_names_in_the_lower(s: Script) -> None:
    s.rmdir("d")
    s.unlink("d/a")
    s.rmdir("d")
    s.rmdir("d/s")


@quick()
def rmdir_of_whiteouts(s: Script) -> Steps:
    s.unlink("d/s/c")
    s.rmdir("d/s")
    yield
    s.mkdir("d/s")
    s.listdir("d/s")


@quick()
def rmdir_and_make_a_file(s: Script) -> Steps:
    s.rmdir("x")
    s.create("x", b"file")
    yield
    s.read("x")
    s.unlink("x")
    s.mkdir("x")
    s.stat("x")


@quick()
def mkdir_errors(s: Script) -> None:
    s.mkdir("d")
    s.mkdir("f")
    s.mkdir("dangling")
    s.mkdir("missing/x")
    s.mkdir("f/x")
    s.mkdir(LONGEST + "n")
    s.mkdir("")


@quick()
def mkdir_is_opaque(s: Script) -> Steps:
    clear(s, "d")
    s.mkdir("d")
    s.mkdir("d/s")
    yield
    s.listdir("d")
    s.listdir("d/s")
    s.rename("d", "e")
    s.listdir("e")


@quick()
def mkdir_modes(s: Script) -> None:
    for number, (mask, mode) in enumerate(
        [(0, 0o777), (0o77, 0o777), (0o22, 0o1777), (0, 0o2755), (0o777, 0o777)]
    ):
        os.umask(mask)
        s.mkdir(f"m{number}", mode)
        s.stat(f"m{number}")
    os.umask(0o022)


@quick()
def mkdir_in_a_group_directory(s: Script) -> Steps:
    s.chown("x", 0, 50)
    s.chmod("x", 0o2770)
    s.mkdir("x/new")
    s.create("x/file", mode=0o2755)
    s.stat("x/new")
    s.stat("x/file")
    yield
    s.mkdir("x/new/newer")
    s.stat("x/new/newer")


@quick()
def what_is_in_a_removed_directory(s: Script) -> None:
    fd = s.open("x", os.O_RDONLY | os.O_DIRECTORY)
    s.rmdir("x")
    s.fd("list", lambda: os.listdir(fd))
    s.fd("make a file", lambda: errno_of(lambda: os.open("a", os.O_CREAT | os.O_WRONLY, dir_fd=fd)))
    s.fd("make a directory", lambda: os.mkdir("a", dir_fd=fd))
    s.fd("make a link", lambda: os.symlink("a", "b", dir_fd=fd))
    s.fd("move into", lambda: os.rename(s.at("f"), "f", dst_dir_fd=fd))
    s.fd("look up", lambda: os.stat("a", dir_fd=fd))
    why = "the kernel would copy it up, to where it is not any more"
    s.differs(why, "chmod", lambda: os.fchmod(fd, 0o700), kernel="errno ENOTDIR", cowfs=None)
    s.close(fd)


@quick()
def where_one_is_removed(s: Script) -> None:
    os.chdir(s.at("x"))
    s.rmdir("x")
    s.step("where", os.getcwd)
    s.step("list", lambda: os.listdir("."))
    s.step("open", lambda: errno_of(lambda: os.open("a", os.O_CREAT | os.O_WRONLY)))
    s.step("above", lambda: "f" in os.listdir(".."))


@quick()
def a_whole_tree_removed_and_made_anew(s: Script) -> Steps:
    clear(s, "d")
    yield
    s.mkdir("d")
    s.mkdir("d/s")
    s.create("d/s/c", b"new")
    yield
    clear(s, "d")


# --- symbolic links, names


@quick()
def symlink_errors(s: Script) -> None:
    s.symlink("x", "f")
    s.symlink("x", "dangling")
    s.symlink("", "empty target")
    s.symlink("x", "missing/l")
    s.symlink("x", LONGEST + "n")
    s.symlink("t" * 4096, "too long")


@quick()
def symlink_of_4095_bytes(s: Script) -> Steps:
    s.symlink("t" * 4095, "long")
    s.symlink("t" * 60, "short")
    yield
    s.step("read", lambda: len(os.readlink(s.at("long"))))
    s.read("long")


@quick()
def symlink_loops(s: Script) -> None:
    s.symlink("two", "one")
    s.symlink("one", "two")
    s.symlink("three", "three")
    s.read("one")
    s.step("stat", lambda: os.stat(s.at("three")).st_mode)

    def chain() -> None:
        for number in range(42):
            os.symlink(f"c{number + 1}", s.at(f"c{number}"))

    s.step("chain", chain)
    s.create("c42", b"end")
    s.read("c1")
    s.read("c2")
    s.read("c3")


@quick()
def symlink_relative_and_absolute(s: Script) -> None:
    s.symlink("../f", "d/up")
    s.read("d/up")
    s.symlink("s/../a", "d/around")
    s.read("d/around")
    s.symlink("./", "here")
    s.listdir("here/here/d")


@quick()
def symlink_mode_and_owner(s: Script) -> Steps:
    s.chown("l", 5, 6)
    s.stat("l")
    s.stat("f")
    s.step("chmod", lambda: os.chmod(s.at("l"), 0o600))
    s.stat("f")
    yield
    s.stat("l")


@quick()
def readlink_of_others(s: Script) -> None:
    for name in ("f", "d", "p", "missing", "l/x"):
        s.step(f"readlink {name}", lambda name=name: os.readlink(s.at(name)))  # type: ignore[misc]


@quick()
def create_through_a_dangling_symlink(s: Script) -> Steps:
    s.open_do("dangling", os.O_CREAT | os.O_WRONLY, lambda fd: os.write(fd, b"made"))
    s.read("nowhere")
    yield
    s.open_do("dangling", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@quick()
def names_of_all_bytes(s: Script) -> Steps:
    odd = [bytes([number]) for number in range(1, 256) if number not in b"/."]

    def make() -> None:
        for name in odd:
            os.close(os.open(s.at(b"x/" + name), os.O_CREAT | os.O_WRONLY))

    def remove() -> None:
        for name in odd[::2]:
            os.unlink(s.at(b"x/" + name))

    s.step("make", make)
    yield
    s.step("list", lambda: sorted(os.listdir(s.at(b"x"))) == sorted(odd))
    s.step("remove", remove)


@quick()
def names_of_255_bytes(s: Script) -> Steps:
    s.create(LONGEST, b"long")
    s.create(LONGEST + "n")
    s.mkdir("é" * 127)
    s.mkdir("é" * 128)
    yield
    s.unlink(LONGEST)
    s.create(f"{'é' * 127}/{LONGEST}")


@quick()
def names_like_whiteouts(s: Script) -> Steps:
    for name in (".wh.f", ".wh..wh..opq", "#1", "work", "upper", "index"):
        s.create(f"x/{name}", b"mine")
    yield
    s.listdir("x")
    s.unlink("x/.wh.f")
    s.read("x/.wh..wh..opq")


@quick()
def paths_that_are_too_long(s: Script) -> None:
    s.step("open", lambda: errno_of(lambda: os.open(s.at("d/" + "s/../" * 1000), os.O_RDONLY)))
    s.step("stat", lambda: errno_of(lambda: os.stat(s.at("x" * 300))))
    s.step("in a file", lambda: errno_of(lambda: os.stat(s.at("f/" + "x" * 300))))


@quick()
def paths_with_slashes_and_dots(s: Script) -> None:
    for path in (
        "f/",
        "f/.",
        "f/..",
        "d/",
        "d//a",
        "d/./a",
        "d/../f",
        "l/",
        "ld/",
        "ld/a",
        "missing/..",
        "./d/s/../../f",
    ):
        s.step(f"stat {path}", lambda path=path: oct(os.stat(s.at(path)).st_mode))  # type: ignore[misc]


@quick()
def mknod_of_each_kind(s: Script) -> Steps:
    s.mknod("regular", 0o100000)
    s.mknod("kindless", 0)
    s.mknod("fifo", 0o010000, mode=0o640)
    s.mknod("socket", 0o140000)
    s.mknod("char", 0o020000, os.makedev(5, 7))
    s.mknod("block", 0o060000, os.makedev(300, 70_000))
    s.mknod("directory", 0o040000)
    s.mknod("f", 0o010000)
    yield
    s.chmod("char", 0o666)
    s.rename("block", "d/block")


@quick()
def mknod_by_others(s: Script) -> None:
    for kind in (0o100000, 0o010000, 0o140000, 0o020000):
        for who in (1000, 1001):
            make = partial(os.mknod, s.at(f"theirs/{kind:o} of {who}"), kind | 0o644, 0x103)
            s.as_user(who, f"{kind:o}", make)


@quick()
def mknod_where_a_whiteout_is(s: Script) -> Steps:
    for name in ("f", "p", "h1"):
        s.unlink(name)
        s.mknod(name, 0o010000)
    yield
    s.unlink("f")
    s.listdir(".")
