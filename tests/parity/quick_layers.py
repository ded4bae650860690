"""Several lowers with overlay attributes, and listings."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from tests.parity.quick import SMALL, quick
from tests.parity.script import Script
from tests.parity.shorthands import Steps
from tests.parity.trees import directory, link, opaque, symlink, whiteout
from tests.support.tree import Node

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long
_libc.opendir.argtypes = (ctypes.c_char_p,)
for _call in (_libc.readdir, _libc.telldir, _libc.rewinddir, _libc.closedir):
    _call.argtypes = (ctypes.c_void_p,)
_libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)


def marked(value: bytes = b"y", **more: Any) -> Node:
    return directory(xattrs={"trusted.overlay.opaque": value}, **more)


# --- layers


@quick({"a/top": b"t"}, {"a/middle": b"m"}, {"a/bottom": b"b"})
def layers_three_merged(s: Script) -> Steps:
    s.listdir("a")
    s.unlink("a/middle")
    yield
    s.rename("a", "b")
    s.listdir("b")


@quick({"a": b"file"}, {"a/x": b"x"}, {"a/y": b"y"})
def layers_file_hides_directories(s: Script) -> Steps:
    s.read("a")
    s.unlink("a")
    s.mkdir("a")
    yield
    s.listdir("a")


@quick({"a/x": b"x"}, {"a": b"file"}, {"a/y": b"y"})
def layers_file_between_directories(s: Script) -> Steps:
    s.listdir("a")
    s.unlink("a/x")
    yield
    s.listdir("a")
    s.rmdir("a")


@quick({"a": whiteout(), "b/x": b"x"}, {"a/x": b"x"}, {"a/y": b"y"})
def layers_whiteout_on_top(s: Script) -> Steps:
    s.listdir(".")
    s.mkdir("a")
    yield
    s.listdir("a")
    s.rmdir("a")


@quick({"a/x": b"x"}, {"a": whiteout(), "b": b"b"}, {"a/y": b"y"})
def layers_whiteout_between(s: Script) -> Steps:
    s.listdir("a")
    s.rename("a", "c")
    yield
    s.listdir("c")


@quick({"a/x": b"x"}, {"a/x": whiteout(), "a/y": b"y"}, {"a/x": b"old", "a/z": b"z"})
def layers_whiteout_of_what_is_above_again(s: Script) -> None:
    s.listdir("a")
    s.read("a/x")
    s.unlink("a/x")
    s.listdir("a")


@quick({"a": opaque(), "a/x": b"x"}, {"a/y": b"y"}, {"a/z": b"z"})
def layers_opaque_on_top(s: Script) -> Steps:
    s.listdir("a")
    s.create("a/y", b"new")
    yield
    s.rename("a", "b")
    s.listdir("b")


@quick({"a/x": b"x"}, {"a": opaque(), "a/y": b"y"}, {"a/z": b"z"})
def layers_opaque_between(s: Script) -> Steps:
    s.listdir("a")
    s.rename("a", "b")
    yield
    s.listdir("b")
    s.mkdir("a")
    s.listdir("a")


@quick({"a": marked(b"n"), "a/x": b"x"}, {"a/y": b"y"})
def layers_opaque_of_another_value(s: Script) -> None:
    s.listdir("a")


@quick(
    {"a": marked(b"x"), "a/f": Node(xattrs={"trusted.overlay.whiteout": b""}), "a/g": b"g"},
    {"a/f": b"below", "a/h": b"h"},
)
def layers_whiteout_by_attribute(s: Script) -> Steps:
    s.listdir("a")
    s.read("a/f")
    s.read("a/h")
    s.create("a/f", b"new")
    yield
    s.read("a/f")
    s.unlink("a/f")
    s.read("a/f")


@quick({"a/f": Node(xattrs={"trusted.overlay.whiteout": b""})}, {"a/f": b"below"})
def layers_whiteout_attribute_without_a_mark(s: Script) -> None:
    s.read("a/f")
    s.listdir("a")


@quick(
    {"new": Node("dir", mode=0o755, xattrs={"trusted.overlay.redirect": b"old"}), "old": whiteout()},
    {"old/x": b"x", "old/y": b"y"},
)
def layers_redirect_beside(s: Script) -> Steps:
    s.listdir("new")
    s.unlink("new/x")
    yield
    s.listdir("new")
    s.rename("new", "newer")
    s.listdir("newer")


@quick(
    {
        "a/new": Node(
            "dir", mode=0o755, xattrs={"trusted.overlay.redirect": b"/layers_redirect_from_the_root/b/old"}
        ),
        "b/old": whiteout(),
    },
    {"b/old/x": b"x"},
)
def layers_redirect_from_the_root(s: Script) -> Steps:
    s.listdir("a/new")
    s.append("a/new/x", b"more")
    yield
    s.read("a/new/x")


@quick(
    {"m": Node(mode=0o600, uid=7, size=6, xattrs={"trusted.overlay.metacopy": b""})},
    {"m": b"below\n"},
)
def layers_metacopy(s: Script) -> Steps:
    s.stat("m")
    s.step("whether it takes space", lambda: os.lstat(s.at("m")).st_blocks > 0)
    s.read("m")
    s.append("m", b"more")
    yield
    s.read("m")


@quick(
    {
        "m": Node(
            mode=0o600, size=6,
            xattrs={
                "trusted.overlay.metacopy": b"",
                "trusted.overlay.redirect": b"/layers_metacopy_of_another_name/d",
            },
        ),
        "d": whiteout(),
    },
    {"d": b"below\n"},
)  # fmt: skip
def layers_metacopy_of_another_name(s: Script) -> Steps:
    s.read("m")
    s.chmod("m", 0o640)
    yield
    s.read("m")
    s.link("m", "m2")
    s.append("m2", b"more")
    s.read("m")


@quick(
    {"m": Node(mode=0o600, size=6, xattrs={"trusted.overlay.metacopy": b"\0\4\0\0"})},
    {"m": b"below\n"},
)
def layers_metacopy_in_its_longer_form(s: Script) -> None:
    s.read("m")


@quick(
    {"m": Node(mode=0o600, size=6, xattrs={"trusted.overlay.metacopy": b"\0\x24\0\1" + bytes(32)})},
    {"m": b"below\n"},
)
def layers_metacopy_with_a_digest(s: Script) -> Steps:
    """Without the verity option, the digest is ignored and not copied up."""
    s.read("m")
    s.listxattr("m")
    s.append("m", b"more")
    yield
    s.read("m")


@quick({"m": Node(size=6, xattrs={"trusted.overlay.metacopy": b""})}, {"other": b"x"})
def layers_metacopy_of_nothing(s: Script) -> None:
    s.step("stat", lambda: os.stat(s.at("m")).st_size)
    s.step("list", lambda: sorted(os.listdir(s.at("."))))


@quick({"m": Node(size=6, xattrs={"trusted.overlay.metacopy": b""})}, {"m/x": b"x"})
def layers_metacopy_of_a_directory(s: Script) -> None:
    s.step("stat", lambda: os.stat(s.at("m")).st_size)


@quick(
    {"f": Node(data=b"f", xattrs={"trusted.overlay.overlay.opaque": b"y", "trusted.overlay.origin": b"o"}),
     "d": directory(xattrs={"trusted.overlay.overlay.redirect": b"r"})},
)  # fmt: skip
def layers_escaped_attributes(s: Script) -> Steps:
    s.listxattr("f")
    s.getxattr("f", "trusted.overlay.opaque")
    s.getxattr("d", "trusted.overlay.redirect")
    s.getxattr("f", "trusted.overlay.origin")
    s.chmod("f", 0o600)
    s.chmod("d", 0o700)
    yield
    s.listxattr("f")
    s.listxattr("d")


@quick({"one": b"x\n", "two": link("one")}, {"one": b"below\n"})
def layers_links_of_the_top_one(s: Script) -> Steps:
    s.append("one", b"more")
    s.read("two")
    yield
    s.unlink("one")
    s.listdir(".")


@quick({"a": symlink("b"), "b/x": b"x"}, {"a/y": b"y"})
def layers_symlink_hides_a_directory(s: Script) -> Steps:
    s.listdir("a")
    s.unlink("a")
    yield
    s.mkdir("a")
    s.listdir("a")


@quick(
    {"a": directory(0o700, uid=5, xattrs={"user.x": b"top"})},
    {"a": directory(0o777, xattrs={"user.y": b"low"})},
)
def layers_attributes_of_the_top_one(s: Script) -> Steps:
    s.stat("a")
    s.listxattr("a")
    s.create("a/new")
    yield
    s.stat("a")
    s.listxattr("a")


@quick({}, {"deep/er/est/f": b"f"}, {"deep/er/f": b"f"})
def layers_copy_up_of_parents(s: Script) -> Steps:
    s.append("deep/er/est/f", b"more")
    yield
    s.listdir("deep/er")


# --- listings


def _names(s: Script, path: str, act: Any = lambda stream, read: None) -> list[str]:
    """Return the names from readdir(3), after *act* has used the open directory."""
    stream = _libc.opendir(os.fsencode(s.at(path)))
    assert stream

    def read() -> str | None:
        entry = _libc.readdir(stream)
        return None if not entry else os.fsdecode(ctypes.string_at(entry + 19))

    try:
        act(stream, read)
        found = []
        while (name := read()) is not None:
            found.append(name)
        return sorted(found)
    finally:
        _libc.closedir(stream)


@quick()
def listing_has_dots(s: Script) -> None:
    s.step("merged", lambda: _names(s, "d"))
    s.create("d/new")
    s.step("with new", lambda: _names(s, "d"))
    s.mkdir("pure")
    s.step("of the upper", lambda: _names(s, "pure"))


@quick()
def listing_rewound(s: Script) -> None:
    def act(stream: int, read: Any) -> None:
        while read():
            pass
        s.create("d/new")
        s.unlink("d/a")
        _libc.rewinddir(stream)

    s.step("list", lambda: _names(s, "d", act))


@quick()
def listing_from_each_cookie(s: Script) -> None:
    """After seekdir(3), the listing continues with the same names as before."""
    s.create("d/new")

    def rests() -> bool:
        stream = _libc.opendir(os.fsencode(s.at("d")))
        try:
            cookies, names = [], []
            while True:
                cookies.append(_libc.telldir(stream))
                entry = _libc.readdir(stream)
                if not entry:
                    break
                names.append(ctypes.string_at(entry + 19))
            for number in reversed(range(len(cookies))):
                _libc.seekdir(stream, cookies[number])
                rest = []
                while entry := _libc.readdir(stream):
                    rest.append(ctypes.string_at(entry + 19))
                if rest != names[number:]:
                    return False
            return True
        finally:
            _libc.closedir(stream)

    s.step("rests", rests)


@quick({f"many/{number:04}": b"" for number in range(300)})
def listing_while_removing(s: Script) -> Steps:
    """A program that removes names while it lists them misses none (rm -r)."""

    def remove(stream: int, read: Any) -> None:
        while name := read():
            if name not in {".", ".."}:
                os.unlink(s.at(f"many/{name}"))

    s.step("removed", lambda: _names(s, "many", remove))
    s.step("left", lambda: os.listdir(s.at("many")))
    yield
    s.rmdir("many")


@quick()
def listing_of_types(s: Script) -> None:
    s.mknod("socket", 0o140000)
    s.symlink("x", "d/link")

    def types(path: str) -> list[tuple[str, bool, bool, bool]]:
        with os.scandir(s.at(path)) as found:
            return sorted(
                (e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False), e.is_symlink())
                for e in found
            )

    s.step("types", lambda: types("."))
    s.step("types in d", lambda: types("d"))


@quick()
def listing_by_who_may_not(s: Script) -> None:
    s.chmod("d", 0o711)
    s.as_user(1000, "list", lambda: os.listdir(s.at("d")))
    s.as_user(1000, "read in it", lambda: os.stat(s.at("d/a")).st_size)
    s.chmod("d", 0o744)
    s.as_user(1000, "list", lambda: sorted(os.listdir(s.at("d"))))
    s.as_user(1000, "read in it", lambda: os.stat(s.at("d/a")).st_size)


@quick(SMALL)
def listing_of_an_open_directory_that_changes(s: Script) -> None:
    fd = s.open("d", os.O_RDONLY | os.O_DIRECTORY)
    s.fd("list", lambda: sorted(os.listdir(fd)))
    s.create("d/new")
    s.unlink("d/b")
    s.fd("list again", lambda: sorted(os.listdir(fd)))
    s.close(fd)


@quick()
def listing_numbers_inodes_as_stat_does(s: Script) -> Steps:
    def wrong() -> list[str]:
        with os.scandir(s.at("d")) as found:
            return [entry.name for entry in found if entry.inode() != os.lstat(entry.path).st_ino]

    s.step("before", wrong)
    s.append("d/a", b"more")
    s.rename("d/b", "d/z")
    s.step("after", wrong)
    yield
    s.step("mounted again", wrong)
