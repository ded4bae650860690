"""Small cases about renames."""

from __future__ import annotations

import os

from tests.parity.quick import LONGEST, clear, quick
from tests.parity.script import RENAME_EXCHANGE, RENAME_NOREPLACE, Script
from tests.parity.shorthands import Steps

# --- rename


@quick()
def rename_noreplace_onto_whiteout(s: Script) -> Steps:
    s.unlink("f")
    s.rename("h1", "f", RENAME_NOREPLACE)
    yield
    s.rename("f", "h1", RENAME_NOREPLACE)


@quick()
def rename_noreplace_onto_lower(s: Script) -> None:
    s.rename("h1", "f", RENAME_NOREPLACE)
    s.rename("d", "x", RENAME_NOREPLACE)


@quick()
def rename_noreplace_onto_upper(s: Script) -> None:
    s.create("new")
    s.rename("f", "new", RENAME_NOREPLACE)


@quick()
def rename_noreplace_onto_itself(s: Script) -> None:
    s.rename("f", "f", RENAME_NOREPLACE)
    s.rename("h1", "h2", RENAME_NOREPLACE)


@quick()
def rename_exchange_lower_files(s: Script) -> Steps:
    s.rename("f", "d/a", RENAME_EXCHANGE)
    yield
    s.append("f", b"more")
    s.rename("f", "d/a", RENAME_EXCHANGE)


@quick()
def rename_exchange_with_upper(s: Script) -> None:
    s.create("new", b"new")
    s.rename("new", "d/b", RENAME_EXCHANGE)
    s.unlink("new")


@quick()
def rename_exchange_with_whiteout(s: Script) -> None:
    s.unlink("f")
    s.rename("h1", "f", RENAME_EXCHANGE)
    s.rename("f", "h1", RENAME_EXCHANGE)


@quick()
def rename_exchange_file_and_directory(s: Script) -> Steps:
    s.rename("f", "d", RENAME_EXCHANGE)
    yield
    s.listdir("f")
    s.read("d")


@quick()
def rename_exchange_names_of_one_inode(s: Script) -> None:
    s.rename("h1", "d/h3", RENAME_EXCHANGE)


@quick()
def rename_exchange_lower_with_upper_directory(s: Script) -> Steps:
    s.mkdir("u")
    s.create("u/only", b"u")
    s.rename("u", "d", RENAME_EXCHANGE)
    yield
    s.listdir("d")
    s.listdir("u/s")
    s.unlink("u/a")


@quick()
def rename_exchange_with_its_own_child(s: Script) -> None:
    s.rename("d", "d/s", RENAME_EXCHANGE)
    s.rename("d/s", "d", RENAME_EXCHANGE)


@quick()
def rename_exchange_symlink_with_fifo(s: Script) -> Steps:
    s.rename("l", "p", RENAME_EXCHANGE)
    yield
    s.read("p")


@quick()
def rename_unknown_flag(s: Script) -> None:
    s.rename("f", "g", 1 << 5)
    s.rename("f", "g", RENAME_EXCHANGE | RENAME_NOREPLACE)


@quick()
def rename_onto_a_link_of_itself(s: Script) -> None:
    s.rename("h1", "h2")
    s.link("f", "f2")
    s.rename("f", "f2")


@quick(upper_differs="the kernel copies the directory up before it finds that it is not empty")
def rename_onto_a_merged_directory_with_names(s: Script) -> None:
    s.mkdir("u")
    s.rename("u", "d")
    s.create("u/x")
    s.rename("d", "u")


@quick()
def rename_onto_a_directory_of_whiteouts(s: Script) -> Steps:
    clear(s, "d/s")
    for name in ("a", "b", "h3"):
        s.unlink(f"d/{name}")
    s.mkdir("u")
    s.create("u/only", b"u")
    s.rename("u", "d")
    yield
    s.listdir("d")


@quick()
def rename_onto_an_opaque_empty_directory(s: Script) -> Steps:
    clear(s, "d")
    s.mkdir("d")
    s.rename("x", "d")
    yield
    s.stat("d")


@quick()
def rename_directory_onto_file(s: Script) -> None:
    s.rename("d", "f")
    s.rename("x", "l")
    s.rename("x", "p")


@quick()
def rename_file_onto_directory(s: Script) -> None:
    s.rename("f", "d")
    s.rename("f", "x")
    s.rename("l", "x")


@quick(upper_differs="the kernel copies the directory up before it finds that it may not be moved")
def rename_into_itself(s: Script) -> None:
    s.rename("d", "d/new")
    s.rename("d", "d/s/new")
    s.rename("d", "d/s")


@quick()
def rename_onto_what_is_above(s: Script) -> None:
    s.rename("d/s", "d")
    s.rename("d/s/c", "d/s")


@quick()
def rename_symlink_to_directory(s: Script) -> Steps:
    s.rename("ld", "d/ld")
    s.listdir("d")
    yield
    s.rename("d/ld", "ld")
    s.listdir("ld")


@quick()
def rename_over_symlink_to_directory(s: Script) -> None:
    s.rename("f", "ld")
    s.read("ld")
    s.listdir("d")


@quick()
def rename_with_a_slash_behind(s: Script) -> None:
    s.rename("f/", "g")
    s.rename("f", "g/")
    s.rename("x/", "y/")
    s.rename("ld/", "z")


@quick()
def rename_dot_and_dots(s: Script) -> None:
    s.rename("d/.", "g")
    s.rename("d/..", "g")
    s.rename("d", "x/.")
    s.rename("d", "x/..")


@quick()
def rename_what_is_not_there(s: Script) -> None:
    s.rename("missing", "g")
    s.rename("dangling", "missing/g")
    s.rename("f/x", "g")
    s.rename("f", "f/x")
    s.rename("f", "")


@quick()
def rename_to_names_that_are_too_long(s: Script) -> Steps:
    s.rename("f", LONGEST)
    s.rename(LONGEST, LONGEST + "n")
    s.rename("d", LONGEST)
    s.rename(LONGEST, "f")
    s.rename("d", LONGEST)
    yield
    s.listdir(LONGEST)


@quick()
def rename_special_files(s: Script) -> Steps:
    for name in ("p", "n", "dangling"):
        s.rename(name, f"d/s/{name}")
    yield
    for name in ("p", "n", "dangling"):
        s.rename(f"d/s/{name}", name)


@quick()
def rename_twice_and_remount(s: Script) -> Steps:
    s.rename("d", "e1")
    yield
    s.rename("e1", "e2")
    s.rename("e2/s", "s")
    yield
    s.listdir("e2")
    s.append("s/c", b"more")


@quick()
def rename_and_back(s: Script) -> Steps:
    s.rename("d", "e")
    s.rename("e", "d")
    yield
    s.unlink("d/a")
    s.listdir("d")


@quick()
def rename_then_make_anew(s: Script) -> Steps:
    s.rename("d", "e")
    s.mkdir("d")
    s.create("d/a", b"new")
    yield
    s.listdir("d")
    s.rename("d", "g")
    s.listdir("e")


@quick()
def rename_then_remove_and_make_anew(s: Script) -> Steps:
    s.rename("d", "e")
    clear(s, "e")
    s.mkdir("e")
    s.mkdir("d")
    yield
    s.listdir("e")
    s.listdir("d")


@quick()
def rename_a_child_out_of_a_renamed_directory(s: Script) -> Steps:
    s.rename("d", "e")
    s.rename("e/s", "x/s")
    s.rename("e/a", "a")
    yield
    s.listdir("e")
    s.append("x/s/c", b"more")
    s.rename("x/s", "e/s")


@quick()
def rename_a_directory_into_a_renamed_one(s: Script) -> Steps:
    s.rename("d", "e")
    s.rename("x", "e/s/x")
    yield
    s.stat("e/s/x")
    s.rename("e/s", "s")


@quick()
def rename_within_a_renamed_directory(s: Script) -> Steps:
    s.rename("d", "e")
    s.rename("e/a", "e/z")
    s.rename("e/s", "e/t")
    yield
    s.append("e/z", b"more")
    s.append("e/t/c", b"more")


@quick()
def rename_swaps_by_a_third_name(s: Script) -> Steps:
    s.rename("d", "t")
    s.rename("x", "d")
    s.rename("t", "x")
    yield
    s.listdir("d")
    s.listdir("x/s")


@quick()
def rename_of_an_open_file(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.rename("f", "d/g")
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.read("d/g")
    s.fd("size", lambda: os.fstat(fd).st_size)
    s.close(fd)


@quick()
def rename_over_an_open_file(s: Script) -> None:
    fd = s.open("f")
    s.rename("h1", "f")
    s.fd("read", lambda: os.pread(fd, 100, 0))
    why = "the kernel tells the count of the lower"
    s.differs(why, "links", lambda: os.fstat(fd).st_nlink, kernel=1, cowfs=0)
    s.close(fd)
    s.read("f")


@quick()
def rename_of_an_open_directory(s: Script) -> None:
    fd = s.open("d", os.O_RDONLY | os.O_DIRECTORY)
    s.rename("d", "e")
    s.fd("list", lambda: sorted(os.listdir(fd)))
    s.fd("make", lambda: os.mkdir("new", dir_fd=fd))
    s.fd("above", lambda: sorted(os.listdir(os.open("..", os.O_RDONLY, dir_fd=fd))))
    s.close(fd)


@quick()
def rename_of_where_one_is(s: Script) -> None:
    os.chdir(s.at("d/s"))
    s.rename("d", "e")
    s.step("where", lambda: os.getcwd()[len(s.root) :])
    s.step("read", lambda: open("c", "rb").read())
    s.step("make", lambda: os.mkdir("../here"))


@quick()
def rename_touches_both_directories(s: Script) -> None:
    def old() -> list[bool]:
        return [
            os.stat(s.at(path)).st_mtime_ns < 1_500_000_000_000_000_000 for path in ("d", "x", "f", "d/s")
        ]

    s.step("before", old)
    s.rename("d/a", "x/a")
    s.step("after", old)


@quick()
def rename_by_another_user(s: Script) -> None:
    s.as_user(1000, "in theirs", lambda: os.rename(s.at("theirs/f"), s.at("theirs/g")))
    s.as_user(1000, "out of theirs", lambda: os.rename(s.at("theirs/g"), s.at("g")))
    s.as_user(1000, "into theirs", lambda: os.rename(s.at("f"), s.at("theirs/f")))
    s.as_user(1001, "of others", lambda: os.rename(s.at("theirs/g"), s.at("theirs/f")))


@quick()
def rename_of_anothers_directory(s: Script) -> None:
    """A user without write permission for a directory may rename it, but not move it, because .. changes."""
    s.mkdir("all", 0o777)
    s.chmod("all", 0o777)
    s.mkdir("all/roots", 0o755)
    s.mkdir("all/to", 0o777)
    s.chmod("all/to", 0o777)
    s.as_user(1000, "rename", lambda: os.rename(s.at("all/roots"), s.at("all/r2")))
    s.as_user(1000, "move", lambda: os.rename(s.at("all/r2"), s.at("all/to/r2")))
