"""Renames of files and directories of the lower, the upper and both, over each other and back."""

from __future__ import annotations

import os

from tests.parity.cases_dirs import remove_tree
from tests.parity.script import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, Script, case, renameat2
from tests.parity.trees import BASE, BOTTOM, MIDDLE


@case(BASE)
def rename_lower_files(s: Script) -> None:
    s.rename("file", "renamed")
    s.rename("dir/a", "dir/z")
    s.rename("big", "emptydir/big")
    s.rename("dir/sub/c", "c")
    s.rename("missing", "x")
    s.rename("renamed", "renamed")
    s.rename("suid", "dir/suid")
    s.rename("capable", "dir/capable")
    s.rename("dressed", "dir/dressed")
    s.remounted()
    s.rename("renamed", "file")
    s.rename("emptydir/big", "big")
    s.append("big", b"more")


@case(BASE)
def rename_over_files(s: Script) -> None:
    s.rename("file", "dir/a")
    s.create("upper", b"upper")
    s.rename("upper", "empty")
    s.rename("dir/b", "script")
    s.create("upper", b"upper again")
    s.rename("dir/a", "upper")
    s.rename("upper", "sym")
    s.rename("dangling", "fifo")
    s.rename("null", "socket")
    s.remounted()


@case(BASE)
def rename_to_whiteout(s: Script) -> None:
    s.unlink("empty")
    s.rename("file", "empty")
    s.rename("empty", "file")
    s.create("upper", b"u")
    s.rename("upper", "empty")
    s.rmdir("emptydir")
    s.rename("dir", "emptydir")
    s.listdir("emptydir")
    s.mkdir("d")
    s.rename("d", "dir")
    s.listdir("dir")
    s.remounted()


@case(BASE)
def rename_upper_files(s: Script) -> None:
    s.create("a", b"a")
    s.rename("a", "b")
    s.rename("b", "dir/b2")
    s.rename("dir/b2", "dir/b")
    s.rename("dir/b", "b3")
    s.create("dir/b", b"another")
    s.write("file", b"F")
    s.rename("file", "dir/sub/file")
    s.rename("dir/sub/file", "file")
    s.remounted()


@case(BASE, upper_differs="the kernel copies a directory up before it finds that it may not be renamed")
def rename_wrong(s: Script) -> None:
    s.rename("file", "dir")
    s.rename("dir", "file")
    s.rename("dir", "dir/sub/x")
    s.rename("dir", "dir/sub")
    s.rename("emptydir", "dir")
    s.rename("dir/sub", "dir")
    s.rename("dir", "missing/x")
    s.rename("file", "file/x")
    s.rename("file/x", "y")
    s.rename("dir", "sym")
    s.rename("dir/.", "x")
    s.mkdir("upper")
    s.create("upper/x")
    s.rename("dir", "upper")
    s.rename("upper", "dir")
    s.rename("file", "upper")


@case(BASE)
def rename_lower_directory(s: Script) -> None:
    s.rename("dir", "moved")
    s.listdir("moved")
    s.listdir("moved/sub/deep")
    s.write("moved/a", b"A")
    s.create("moved/sub/new", b"n")
    s.unlink("moved/b")
    s.remounted()
    s.write("moved/sub/deep/d", b"D")
    s.rename("moved/sub", "sub")
    s.remounted()
    s.listdir("sub")


@case(BASE)
def rename_directory_back(s: Script) -> None:
    s.rename("dir", "away")
    s.rename("away", "dir")
    s.listdir("dir")
    s.write("dir/a", b"A")
    s.rename("dir/sub", "sub")
    s.rename("sub", "dir/sub")
    s.remounted()
    s.rename("dir/sub/deep", "deep")
    s.rename("dir", "other")
    s.rename("deep", "other/sub/deep")
    s.rename("other", "dir")
    s.remounted()


@case(BASE)
def rename_directory_and_make_anew(s: Script) -> None:
    """A new directory with the old name has nothing to do with the renamed one."""
    s.rename("dir", "moved")
    s.mkdir("dir")
    s.listdir("dir")
    s.create("dir/a", b"new a")
    s.mkdir("dir/sub")
    s.listdir("dir/sub")
    s.remounted()
    remove_tree(s, "moved")
    s.listdir("dir")
    s.rename("dir", "moved")
    s.listdir("moved")
    s.remounted()


@case(BASE)
def rename_then_remove(s: Script) -> None:
    s.rename("dir", "moved")
    remove_tree(s, "moved")
    s.create("moved", b"file")
    s.rename("emptydir", "e2")
    s.rmdir("e2")
    s.mkdir("e2")
    s.mkdir("emptydir")
    s.rename("file", "f2")
    s.unlink("f2")
    s.create("file", b"new")
    s.remounted()


@case(BASE)
def nested_redirects(s: Script) -> None:
    s.rename("dir", "m1")
    s.rename("m1/sub", "m1/m2")
    s.rename("m1/m2/deep", "m1/m2/m3")
    s.append("m1/m2/m3/d", b"more\n")
    s.append("m1/m2/c", b"more\n")
    s.remounted()
    s.rename("m1/m2/m3", "m3")
    s.rename("m1", "m3/m1")
    s.append("m3/m1/a", b"more\n")
    s.append("m3/m1/m2/c", b"more\n")
    s.remounted()
    s.rename("m3/m1/m2", "dir")
    s.listdir("dir")
    s.remounted()


@case(BASE)
def directories_change_places(s: Script) -> None:
    """Exchange two directories through a third name, as programs do."""
    s.rename("dir", "t")
    s.rename("emptydir", "dir")
    s.rename("t", "emptydir")
    s.listdir("dir")
    s.listdir("emptydir")
    s.create("dir/x", b"x")
    s.rename("emptydir/sub", "dir/sub")
    s.remounted()
    s.append("dir/sub/c", b"more")
    s.append("emptydir/a", b"more")


@case(BASE)
def rename_over_empty_directories(s: Script) -> None:
    s.rename("dir", "emptydir")
    s.listdir("emptydir")
    s.mkdir("upper")
    s.rename("emptydir", "upper")
    s.listdir("upper")
    s.mkdir("other")
    s.rename("other", "dresseddir")
    s.listdir("dresseddir")
    s.remounted()


@case(BASE)
def rename_over_a_directory_of_whiteouts(s: Script) -> None:
    for name in ("a", "b", "three"):
        s.unlink(f"dir/{name}")
    remove_tree(s, "dir/sub")
    s.mkdir("new")
    s.create("new/x", b"x")
    s.rename("new", "dir")
    s.listdir("dir")
    s.remounted()
    s.rename("world", "w2")
    s.mkdir("world")
    s.rename("w2", "world")
    s.listdir("world")


@case(BASE)
def rename_noreplace(s: Script) -> None:
    s.rename("file", "dir", RENAME_NOREPLACE)
    s.rename("file", "empty", RENAME_NOREPLACE)
    s.rename("file", "new", RENAME_NOREPLACE)
    s.unlink("empty")
    s.rename("new", "empty", RENAME_NOREPLACE)
    s.rename("dir", "emptydir", RENAME_NOREPLACE)
    s.rename("dir", "newdir", RENAME_NOREPLACE)
    s.rename("missing", "x", RENAME_NOREPLACE)
    s.remounted()


@case(BASE)
def exchange_files(s: Script) -> None:
    s.rename("file", "dir/a", RENAME_EXCHANGE)
    s.create("upper", b"u")
    s.rename("upper", "big", RENAME_EXCHANGE)
    s.rename("upper", "missing", RENAME_EXCHANGE)
    s.rename("missing", "upper", RENAME_EXCHANGE)
    s.rename("sym", "fifo", RENAME_EXCHANGE)
    s.rename("script", "script", RENAME_EXCHANGE)
    s.remounted()


@case(BASE)
def exchange_directories(s: Script) -> None:
    s.rename("dir", "emptydir", RENAME_EXCHANGE)
    s.listdir("dir")
    s.listdir("emptydir")
    s.mkdir("upper")
    s.create("upper/x", b"x")
    s.rename("upper", "emptydir", RENAME_EXCHANGE)
    s.rename("upper/sub", "emptydir", RENAME_EXCHANGE)
    s.rename("upper", "upper/sub", RENAME_EXCHANGE)
    s.remounted()
    s.append("upper/a", b"more")


@case(BASE)
def exchange_file_with_directory(s: Script) -> None:
    s.rename("file", "dir", RENAME_EXCHANGE)
    s.listdir("file")
    s.read("dir")
    s.append("file/a", b"more")
    s.remounted()
    s.rename("file", "dir", RENAME_EXCHANGE)
    s.listdir("dir")
    s.create("up", b"u")
    s.rename("up", "emptydir", RENAME_EXCHANGE)
    s.remounted()


@case(BASE)
def rename_flags_that_are_wrong(s: Script) -> None:
    """The kernel refuses all but the last; tests/fuse sends the others to the adapter."""
    s.rename("file", "x", RENAME_NOREPLACE | RENAME_EXCHANGE)
    s.rename("file", "x", 64)
    s.rename("file", "x", RENAME_WHITEOUT | RENAME_EXCHANGE)
    s.create("there")
    s.unlink("there")
    s.create("new", b"new")

    def there_and_back() -> None:
        renameat2(s.at("new"), s.at("x"), RENAME_WHITEOUT)
        os.rename(s.at("x"), s.at("new"))

    s.differs(
        "an overlayfs needs it above", "RENAME_WHITEOUT", there_and_back, kernel="errno EINVAL", cowfs=None
    )


@case(BASE)
def rename_into_a_new_directory(s: Script) -> None:
    s.mkdir("new")
    s.rename("dir", "new/dir")
    s.rename("file", "new/file")
    s.rename("new", "newer")
    s.append("newer/dir/sub/c", b"more")
    s.append("newer/file", b"more")
    s.remounted()
    s.rename("newer/dir/sub", "dir")
    s.rename("newer", "dir/newer")
    s.listdir("dir/newer/dir")
    s.remounted()


@case(MIDDLE, BOTTOM)
def rename_merged_directories(s: Script) -> None:
    s.create("both/upper", b"u")
    s.rename("both", "merged")
    s.listdir("merged")
    s.rename("middle", "merged/middle")
    s.listdir("merged/middle")
    s.rename("merged/same", "same")
    s.mkdir("both")
    s.listdir("both")
    s.rename("only_bottom", "both/only")
    s.remounted()
    s.unlink("merged/middle/bottom")
    s.rename("merged/middle", "middle")
    s.remounted()


@case(BASE)
def rename_hard_links(s: Script) -> None:
    """rename(2) does nothing if both names are the same inode."""
    s.rename("one", "two")
    s.listdir(".")
    s.link("file", "file2")
    s.rename("file", "file2")
    s.rename("one", "dir/one")
    s.rename("dir/three", "three")
    s.append("three", b"more")
    s.rename("two", "file")
    s.remounted()


@case(BASE)
def special_files_renamed(s: Script) -> None:
    for name in ("sym", "dangling", "fifo", "socket", "null", "disk", "symdir"):
        s.rename(name, f"dir/{name}")
    s.read("dir/sym")
    s.rename("dir/null", "null")
    s.remounted()


@case(BASE)
def rename_metacopies(s: Script) -> None:
    """A metacopy keeps its data when it is renamed."""
    s.chmod("big", 0o600)
    s.rename("big", "dir/big")
    s.rename("dir", "moved")
    s.remounted()
    s.rename("moved/big", "big2")
    s.chown("moved/a", 7, 7)
    s.rename("moved/a", "a")
    s.remounted()
    s.append("big2", b"tail")
    s.append("a", b"tail")
    s.remounted()
