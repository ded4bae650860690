"""Names: unusual bytes, long names, deep paths, and the errors of wrong paths."""

from __future__ import annotations

import os
import stat

from tests.parity.script import RENAME_NOREPLACE, Script, attempt, case
from tests.parity.trees import BASE, directory, symlink
from tests.support.tree import Node, Tree

LONG = "n" * 255
ODD: Tree = {
    LONG: b"long\n",
    "new\nline": b"n\n",
    "back\\slash": b"b\n",
    "tab\there": b"t\n",
    os.fsdecode(b"not \xff\xfe utf-8"): b"u\n",
    os.fsdecode(b"dir \xe9/inside \xe8"): b"i\n",
    " ": b"space\n",
    "...": b"dots\n",
    ".hidden": b"h\n",
    "-rf": b"dash\n",
    "umläut ☃": b"utf-8\n",
    ".wh.file": b"an aufs whiteout is a plain name here\n",
    "colon:comma,equals=": b"c\n",
}


@case(ODD)
def odd_names_in_the_lower(s: Script) -> None:
    s.listdir(".")
    for name in list(ODD):
        s.write(name, b"X")
    s.listdir(".")


@case(ODD)
def odd_names_are_removed_and_renamed(s: Script) -> None:
    for number, name in enumerate(ODD):
        if number % 2:
            s.unlink(name)
        else:
            s.rename(name, f"renamed {number}\n")
    s.rename(b"dir \xe9", b"dir\xff\n" + b"x" * 200)
    s.listdir(b"dir\xff\n" + b"x" * 200)
    s.remounted()


@case(BASE)
def odd_names_are_created(s: Script) -> None:
    for name in (b"\xff\xfe", b"new\nline", b"n" * 255, b"\x01", "☃".encode(), b".wh.x", b"..."):
        s.create(name, name)
        s.mkdir(name + b"d" if len(name) < 255 else b"d" * 255)
        s.symlink(name, b"link " + name[:200])
        s.create(b"emptydir/" + name, name)
    s.remounted()


@case(BASE)
def names_too_long(s: Script) -> None:
    long = "n" * 256
    s.create(long)
    s.mkdir(long)
    s.stat(long)
    s.unlink(long)
    s.rename("file", long)
    s.rename(long, "file")
    s.link("file", long)
    s.symlink("x", long)
    s.symlink("y" * 4095, "long link")
    s.symlink("y" * 4096, "too long link")
    s.stat("a/" * 2100)


@case({"top/" + "/".join(["d" * 100] * 8) + "/file": b"deep\n", "file": b"x"})
def paths_beyond_path_max(s: Script) -> None:
    """Reach directories that are nested deeper than PATH_MAX step by step."""

    def deep() -> tuple[int, str]:
        fd = os.open(s.at("top"), os.O_RDONLY)
        for _level in range(45):
            name = "e" * 100
            attempt(lambda: os.mkdir(name, dir_fd=fd))  # noqa: B023
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        out = os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.write(out, b"leaf\n")
        os.close(out)
        os.rename("leaf", "renamed", src_dir_fd=fd, dst_dir_fd=fd)
        size = os.stat("renamed", dir_fd=fd).st_size
        os.close(fd)
        return size, "deep"

    s.step("deep tree", deep)
    s.rename("top", "moved")
    s.write("moved/" + "/".join(["d" * 100] * 8) + "/file", b"DEEP")
    s.remounted()


@case(BASE)
def wrong_paths(s: Script) -> None:
    s.unlink("missing")
    s.unlink("dir")
    s.unlink("file/x")
    s.unlink("missing/x")
    s.rmdir("missing")
    s.rmdir("file")
    s.rmdir("sym")
    s.rmdir("symdir")
    s.rmdir("dir")
    s.rmdir("dir/.")
    s.rmdir("dir/sub/..")
    s.mkdir("dir")
    s.mkdir("file")
    s.mkdir("file/x")
    s.mkdir("dangling")
    s.mkdir("missing/x")
    s.symlink("x", "file")
    s.symlink("", "empty target")
    s.link("missing", "x")
    s.link("dir", "x")
    s.link("file", "dir")
    s.link("file", "missing/x")
    s.mknod("file", stat.S_IFREG)
    s.mknod("missing/x", stat.S_IFIFO)
    s.stat("file/")
    s.listdir("file")


@case({"loop": symlink("loop"), "a": symlink("b"), "b": symlink("a"), "dir/x": b"x"})
def loops_of_symlinks(s: Script) -> None:
    s.read("loop")
    s.read("a/x")
    s.write("loop", b"")
    s.create("loop/x")
    s.rename("loop", "dir/loop")
    s.read("dir/loop")
    s.unlink("a")
    s.read("b")


@case(BASE, alone=True)
def across_filesystems(s: Script) -> None:
    s.step("rename out", lambda: os.rename(s.at("file"), f"{os.path.dirname(s.root)}/out"))
    s.step("link out", lambda: os.link(s.at("file"), f"{os.path.dirname(s.root)}/out"))
    s.step("link in", lambda: os.link("/proc/self/status", s.at("in")))


@case(BASE, alone=True)
def the_root_itself(s: Script) -> None:
    s.rename("dir", ".")
    s.rename(".", "dir/x")
    s.chmod(".", 0o700)
    s.chown(".", 1000, 1000)
    s.utime(".", 1_100_000_000_000_000_000)
    s.setxattr(".", "user.root", b"yes")
    s.step("rmdir of the mount", lambda: os.rmdir(s.root))
    s.stat("..")
    s.remounted()


@case({f"many/{number:04d} {'x' * (number % 50)}": b"" for number in range(300)} | {"many/sub/x": b"x"})
def directory_positions(s: Script) -> None:
    """Deleting during a listing skips and repeats no name; after rewinding, the listing is current."""

    def delete_while_listing() -> tuple[int, int]:
        seen: list[str] = []
        with os.scandir(s.at("many")) as listing:
            for entry in listing:
                seen.append(entry.name)
                if entry.is_file():
                    os.unlink(entry.path)
        return len(seen), len(set(seen))

    for number in range(0, 300, 3):
        attempt(lambda number=number: os.unlink(s.at(f"many/{number:04d} {'x' * (number % 50)}")))  # type: ignore[misc]
    s.step("delete while listing", delete_while_listing)
    s.listdir("many")
    s.rename("many", "fewer")
    s.unlink("fewer/sub/x")
    s.rmdir("fewer/sub")
    s.rmdir("fewer")


@case({"d/" + name: b"" for name in "abcdefgh"} | {"gone": directory()})
def directories_stay_open(s: Script) -> None:
    """List, open and enter a directory that is changed and removed."""
    fd = s.open("d", os.O_RDONLY | os.O_DIRECTORY)
    s.fd("list", lambda: sorted(os.listdir(fd)))
    s.create("d/new")
    s.unlink("d/a")
    s.rename("d/b", "d/z")
    s.fd("list again", lambda: sorted(os.listdir(fd)))
    s.rename("d", "moved")
    s.fd("list after rename", lambda: sorted(os.listdir(fd)))
    s.fd("create through it", lambda: os.close(os.open("through", os.O_CREAT | os.O_WRONLY, dir_fd=fd)))
    s.close(fd)
    gone = s.open("gone", os.O_RDONLY | os.O_DIRECTORY)
    s.rmdir("gone")
    s.fd("list the removed", lambda: os.listdir(gone))
    s.fd("create in the removed", lambda: os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=gone))
    s.fd("mkdir in the removed", lambda: os.mkdir("x", dir_fd=gone))
    s.differs(
        "POSIX: no name is left", "nlink of the removed", lambda: os.fstat(gone).st_nlink, kernel=2, cowfs=0
    )  # fmt: skip
    s.close(gone)
    s.rename("moved", "gone", RENAME_NOREPLACE)


@case({"x": Node(data=b"x")}, alone=True)
def an_almost_empty_lower(s: Script) -> None:
    s.unlink("x")
    s.listdir(".")
    s.create("x", b"y")
    s.mkdir("d")
    s.remounted()
    s.unlink("x")
    s.rmdir("d")
    s.listdir(".")


@case({}, alone=True)
def an_empty_lower(s: Script) -> None:
    s.create("x", b"y")
    s.mkdir("d")
    s.rename("x", "d/x")
    s.remounted()
    s.unlink("d/x")
    s.rmdir("d")


@case(BASE, alone=True)
def statfs(s: Script) -> None:
    """statfs returns the numbers of the upper, with the type of FUSE."""

    def numbers() -> tuple[int, ...]:
        st = os.statvfs(s.root)
        return st.f_bsize, st.f_frsize, st.f_blocks, st.f_files, st.f_namemax

    s.step("statfs", numbers)
    s.step("space is used", lambda: os.statvfs(s.root).f_bavail <= os.statvfs(s.root).f_bfree)
