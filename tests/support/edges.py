"""Situations at the edges of POSIX, to compare filesystems: each has a few files and one call.

``python -m tests.support.edges build DIRECTORY`` creates a directory with the files of each situation. ``...
run DIRECTORY`` makes the calls as root and as other users, and prints JSON: the result of each call, and the
content of its directory afterwards. In between, the directory can become a lower. Standard library only.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from tests.support.call_things import KINDS, libc_call, make, rename, try_open
from tests.support.calls import answer
from tests.support.edges_open import ON_OPEN_FILES

EVERY = (*KINDS, "full directory", "link to a file", "link to a directory", "loop", "nothing")
USERS = {"root": (0, ()), "owner": (1000, (2000,)), "member": (1001, (2000, 2001)), "other": (1002, ())}
"""Users by name: the ID of the user and of its group, and other groups."""
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2


class Thing(NamedTuple):
    """A file that exists before the call."""

    name: str
    kind: str = "file"
    mode: int = -1
    uid: int = 0
    gid: int = 0


class Situation(NamedTuple):
    """Some files, a call, and its user. The call runs in the directory of the files."""

    title: str
    things: tuple[Thing, ...]
    call: Callable[[], Any]
    user: str = "root"
    directory: tuple[int, int, int] = (0o755, 0, 0)
    """Mode, owner and group of the directory."""


def build(thing: Thing) -> None:
    """Create a file in the working directory."""
    name, kind = thing.name, thing.kind
    if kind == "nothing":
        return
    if kind == "full directory":
        os.mkdir(name)
        make("file", f"{name}/f")
    elif kind.startswith("link to"):
        make("directory" if kind.endswith("directory") else "file", f"{name}.target")
        os.symlink(f"{name}.target", name)
    elif kind == "loop":
        os.symlink(name, name)
    else:
        make(kind, name)
    os.lchown(name, thing.uid, thing.gid)
    if thing.mode >= 0:
        os.chmod(name, thing.mode)


def situations() -> Iterator[Situation]:
    """Yield all situations, always in the same order."""
    for part in (_renames, _paths, _owners, _directories, _names, _open_files):
        yield from part()


# --- the situations


def _renames() -> Iterator[Situation]:
    for flags, old, new in product((0, 1, 2, 4, 5, 3, 6, 8), EVERY, EVERY):
        if flags in {3, 6, 8} and (old, new) != ("file", "file"):
            continue  # refused at once
        yield Situation(
            f"rename {flags}: {old} to {new}",
            (Thing("old", old), Thing("new", new)),
            partial(rename, "old", "new", flags),
        )
    odd = (
        ("d", "d"), ("d", "d/x"), ("d/f", "d"), ("d", "d/f/x"), ("d/.", "x"), ("d/..", "x"), (".", "x"),
        ("d", "."), ("d", ".."), ("d/", "x"), ("d/", "x/"), ("f", "x/"), ("f/", "x"), ("f", "d/"),
        ("d", "f/"),
        ("d/f", "d/f"), ("f", "g"), ("", "x"), ("f", ""), ("no/f", "x"), ("f", "no/x"), ("f/x", "x"),
    )  # fmt: skip
    for (old, new), flags in product(odd, (0, 1, 2, 4)):
        things = (Thing("d", "full directory"), Thing("f"), Thing("g"))
        yield Situation(f"rename {flags}: {old!r} to {new!r}", things, partial(rename, old, new, flags))
    for flags in (0, 1, 2):
        call = partial(_linked_and_renamed, flags)
        yield Situation(f"rename {flags}: to another name of it", (Thing("a"),), call)


def _linked_and_renamed(flags: int) -> None:
    os.link("a", "b")
    rename("a", "b", flags)


def _paths() -> Iterator[Situation]:
    flags = {
        "to read": os.O_RDONLY, "to write": os.O_WRONLY, "to cut": os.O_RDONLY | os.O_TRUNC,
        "to make": os.O_CREAT | os.O_WRONLY, "to make alone": os.O_CREAT | os.O_EXCL | os.O_WRONLY,
        "as a directory": os.O_DIRECTORY, "as no link": os.O_NOFOLLOW,
        "as a place": os.O_PATH | os.O_NOFOLLOW,
        "to make a directory": os.O_CREAT | os.O_DIRECTORY, "without a name": os.O_TMPFILE | os.O_RDWR,
        "without a name, to read": os.O_TMPFILE,
        "without a name for ever": os.O_TMPFILE | os.O_RDWR | os.O_EXCL,
        "directly": os.O_DIRECT, "not touching it": os.O_NOATIME,
        "as a directory to write": os.O_DIRECTORY | 1,
    }  # fmt: skip
    calls: dict[str, Callable[[str], Any]] = {
        **{f"open {said}": partial(_open, how) for said, how in flags.items()},
        "mkdir": os.mkdir, "rmdir": os.rmdir, "unlink": os.unlink, "mkfifo": os.mkfifo,
        "symlink": partial(os.symlink, "x"), "readlink": os.readlink,
        "stat": lambda path: oct(os.stat(path).st_mode),
        "lstat": lambda path: oct(os.lstat(path).st_mode),
        "link of": lambda path: os.link(path, "l", follow_symlinks=False),
        "link to": lambda path: os.link("../../linked", path),
        "truncate": lambda path: os.truncate(path, 3),
        "truncate to less": lambda path: os.truncate(path, -1),
        "truncate far": lambda path: os.truncate(path, 1 << 46),
        "chmod": lambda path: os.chmod(path, 0o711),
        "chown": lambda path: os.chown(path, 7, 8), "lchown": lambda path: os.lchown(path, 7, 8),
        "utime": lambda path: os.utime(path, (1, 1)), "list": lambda path: len(os.listdir(path)),
        "setxattr": lambda path: os.setxattr(path, "user.a", b"1", follow_symlinks=False),
        "setxattr of no class": lambda path: os.setxattr(path, "nothing", b"1", follow_symlinks=False),
        "setxattr without a name": lambda path: os.setxattr(path, "user.", b"1", follow_symlinks=False),
        "setxattr, long name": lambda path: os.setxattr(path, "user." + "n" * 251, b""),
        "setxattr, large": lambda path: os.setxattr(path, "user.a", b"1" * 65537, follow_symlinks=False),
        "setxattr, replace": lambda path: os.setxattr(path, "user.a", b"1", 2, follow_symlinks=False),
        "removexattr": lambda path: os.removexattr(path, "user.a", follow_symlinks=False),
        "a large acl": lambda path: os.setxattr(path, "system.posix_acl_access", b"\2\0\0\0" + b"1" * 80),
        "chdir": lambda path: os.close(os.open(path, os.O_DIRECTORY | os.O_PATH)),
        "chroot-like lookup": lambda path: os.stat(f"{path}/../a", follow_symlinks=False).st_mode,
    }  # fmt: skip
    for (said, call), kind, more in product(calls.items(), EVERY, ("", "/", "/.", "/..", "/x", "//")):
        if more in {"", "/"} or kind in {"file", "directory", "link to a directory", "nothing"}:
            yield Situation(f"{said}: {kind}{more}", (Thing("a", kind),), partial(call, f"a{more}"))


def _open(flags: int, path: str) -> str:
    return try_open(path, flags)


_ON_ONE: dict[str, Callable[[str], Any]] = {
    "read": partial(_open, os.O_RDONLY), "write": partial(_open, os.O_WRONLY),
    "both": partial(_open, os.O_RDWR),
    "cut": partial(_open, os.O_RDONLY | os.O_TRUNC), "not touch": partial(_open, os.O_NOATIME),
    "make": partial(_open, os.O_CREAT | os.O_WRONLY),
    "truncate": lambda path: os.truncate(path, 3), "chmod 755": lambda path: os.chmod(path, 0o755),
    "chmod 4755": lambda path: os.chmod(path, 0o4755), "chmod 2755": lambda path: os.chmod(path, 0o2755),
    "chmod 7777": lambda path: os.chmod(path, 0o7777), "give away": lambda path: os.chown(path, 1001, -1),
    "keep": lambda path: os.chown(path, 1000, -1), "give to 2000": lambda path: os.chown(path, -1, 2000),
    "give to 2001": lambda path: os.chown(path, -1, 2001),
    "give to 1000": lambda path: os.chown(path, -1, 1000),
    "give to both": lambda path: os.chown(path, 1000, 2000),
    "chown nothing": lambda path: os.chown(path, -1, -1),
    "touch": os.utime, "times": lambda path: os.utime(path, ns=(10**18, 10**18)),
    "now, omit": lambda path: _utimensat(path, NOW, OMIT),
    "omit, now": lambda path: _utimensat(path, OMIT, NOW),
    "omit, omit": lambda path: _utimensat(path, OMIT, OMIT),
    "now, now": lambda path: _utimensat(path, NOW, NOW),
    "5, omit": lambda path: _utimensat(path, 5, OMIT), "5, now": lambda path: _utimensat(path, 5, NOW),
    "bad times": lambda path: _utimensat(path, 10**9, 0),
    "xattr": lambda path: os.setxattr(path, "user.a", b"1"),
    "read xattr": lambda path: os.getxattr(path, "user.a"),
    "trusted": lambda path: os.setxattr(path, "trusted.a", b"1"),
    "list xattrs": lambda path: len(os.listxattr(path)),
    "capability": lambda path: os.setxattr(path, "security.capability", b"\1\0\0\2" + bytes(16)),
    "link": lambda path: os.link(path, "linked"), "rename": lambda path: rename(path, "renamed"),
    "unlink": os.unlink, "execute": lambda path: libc_call("faccessat", -100, os.fsencode(path), 1, 0x200),
    "write one": lambda path: _written(path, os.O_WRONLY),
    "append one": lambda path: _written(path, os.O_WRONLY | os.O_APPEND),
}  # fmt: skip


def _utimensat(path: str, atime: int, mtime: int) -> None:
    import ctypes
    import struct

    times = ctypes.create_string_buffer(struct.pack("4q", 77, atime, 77, mtime))
    libc_call("utimensat", -100, os.fsencode(path), times, 0)


def _written(path: str, flags: int) -> list[str]:
    """Write a byte; return the modes before the file is closed."""
    fd = os.open(path, flags)
    try:
        os.write(fd, b"x")
        return [oct(os.fstat(fd).st_mode), oct(os.stat(path).st_mode)]
    finally:
        os.close(fd)


def _owners() -> Iterator[Situation]:
    """Yield what users may do to a file with an owner and a group of two."""
    modes = (0o644, 0o666, 0o040, 0o002, 0o6777, 0o2745, 0o4711, 0)
    for (said, call), mode, user in product(_ON_ONE.items(), modes, USERS):
        thing = Thing("f", "file", mode, 1000, 2000)
        about = f"{user}, {said}: {mode:o}"
        yield Situation(about, (thing,), partial(call, "f"), user, (0o777, 0, 0))


def _directories() -> Iterator[Situation]:
    """Yield what users may do in a directory, for each mode and owner."""
    calls: dict[str, Callable[[], Any]] = {
        "make": partial(try_open, "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o2775),
        "mkdir": partial(os.mkdir, "new", 0o2775),
        "unlink": partial(os.unlink, "f"), "rmdir": partial(os.rmdir, "d"),
        "rename": partial(rename, "f", "new"),
        "rename a directory": partial(rename, "d", "new"), "rename over": partial(rename, "g", "f"),
        "exchange": partial(rename, "f", "g", 2), "whiteout": partial(rename, "f", "new", 4),
        "rename into": partial(rename, "f", "d/f"), "link": partial(os.link, "f", "new"),
        "list": lambda: len(os.listdir(".")),
        "symlink": partial(os.symlink, "x", "new"), "read in": partial(try_open, "f", os.O_RDONLY),
        "make there again": partial(try_open, "f", os.O_CREAT | os.O_WRONLY),
        "no name": partial(try_open, ".", os.O_TMPFILE | os.O_RDWR),
        "chmod it": partial(os.chmod, ".", 0o3770),
        "touch it": partial(os.utime, "."), "xattr on it": partial(os.setxattr, ".", "user.a", b"1"),
        "chgrp it": partial(os.chown, ".", -1, 2001), "mkfifo": partial(os.mkfifo, "new"),
        "fifo again": partial(try_open, "p", os.O_CREAT | os.O_RDWR),
    }  # fmt: skip
    modes = (0o755, 0o777, 0o1777, 0o3777, 0o1770, 0o711, 0o733, 0o444, 0o2775)
    for (said, call), mode, owner, user in product(calls.items(), modes, (0, 1001), USERS):
        things = (
            Thing("f", "file", 0o666, 1000, 2000),
            Thing("g", "file", 0o666, 1001, 1001),
            Thing("d", "directory", 0o777, 1000, 1000),
            Thing("p", "fifo", 0o666, 1000, 1000),
        )
        yield Situation(f"{user}, {said} in {mode:o} of {owner}", things, call, user, (mode, owner, 2000))


def _names() -> Iterator[Situation]:
    names: dict[str, str | bytes] = {
        "254": "n" * 254, "255": "n" * 255, "256": "n" * 256, "255 in UTF-8": "ü" * 127 + "x",
        "256 in UTF-8": "ü" * 128,
        "no UTF-8": b"\xff\xfe\x80", "all bytes": bytes(set(range(1, 256)) - {47}), "a newline": "a\nb",
        "dots": "...",
        "a space": " ", "control": b"\x01\x7f", "a colon": "a:b", "whiteout of aufs": ".wh.x",
    }  # fmt: skip
    calls: dict[str, Callable[[Any], Any]] = {
        "make": lambda name: try_open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "mkdir": os.mkdir,
        "symlink": lambda name: os.symlink("x", name), "link": lambda name: os.link("f", name),
        "rename": lambda name: os.rename("f", name), "lstat": os.lstat,
        "whiteout": lambda name: rename("f", name, 4),
    }  # fmt: skip
    for (said, name), (what, call) in product(names.items(), calls.items()):
        yield Situation(f"{what}, name of {said}", (Thing("f"),), partial(_none, call, name))
    for size in (0, 1, 59, 60, 61, 255, 4094, 4095, 4096):
        yield Situation(f"symlink to {size} bytes", (), partial(_long_link, size))
    for size in (4094, 4095, 4096, 5000):
        path = ("./" * size)[: size - 1] + "f"
        yield Situation(f"path of {size} bytes", (Thing("f"),), partial(try_open, path, os.O_RDONLY))
    for depth in (39, 40, 41):
        yield Situation(f"{depth} links in a row", (Thing("f"),), partial(_chain, depth))


def _none(call: Callable[[Any], Any], name: Any) -> None:
    call(name)


def _long_link(size: int) -> list[int]:
    os.symlink("x" * size, "l")
    return [len(os.readlink("l")), os.lstat("l").st_size]


def _chain(depth: int) -> str:
    os.symlink("f", "l1")
    for number in range(2, depth + 1):
        os.symlink(f"l{number - 1}", f"l{number}")
    return try_open(f"l{depth}", os.O_RDONLY)


def _open_files() -> Iterator[Situation]:
    things = (Thing("f"), Thing("d", "full directory"), Thing("x", "file", 0o755), Thing("s", "file", 0o6777))
    for said, call in ON_OPEN_FILES.items():
        yield Situation(said, things, call)


# --- running them


def _place(number: int) -> str:
    return f"{number // 200}/{number}"


def build_all(wanted: Iterable[Situation]) -> None:
    """Create the files of each situation in the working directory."""
    make("file", "linked")
    above = os.open(".", os.O_PATH)
    for number, situation in enumerate(wanted):
        os.makedirs(_place(number))
        os.chdir(_place(number))
        for thing in situation.things:
            build(thing)
        mode, uid, gid = situation.directory
        os.chown(".", uid, gid)
        os.chmod(".", mode)
        os.fchdir(above)
    os.close(above)


def run_all(wanted: Iterable[Situation]) -> dict[str, Any]:
    """Make each call; return its result and the content of its directory by description."""
    found: dict[str, Any] = {}
    above = os.open(".", os.O_PATH)
    for number, situation in enumerate(wanted):
        assert situation.title not in found, situation.title
        os.chdir(_place(number))
        uid, groups = USERS[situation.user]
        _become(uid, groups)
        try:
            gave = answer(situation.call)
        finally:
            _become(0, ())
        os.fchdir(above)
        found[situation.title] = [gave, _look(_place(number))]
    os.close(above)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _become(uid: int, groups: tuple[int, ...]) -> None:
    """Change the effective user and groups. Only root can."""
    os.seteuid(0)
    os.setgroups(groups)
    os.setegid(uid)
    os.seteuid(uid)


def _look(path: str) -> list[str]:
    """Describe a directory: names, modes, owners, links, sizes and the first bytes."""
    top = os.lstat(path)
    told = [f"{top.st_mode:o} {top.st_uid}:{top.st_gid} {top.st_nlink}"]
    for name in sorted(os.listdir(os.fsencode(path))):
        here = os.fsencode(path) + b"/" + name
        info = os.lstat(here)
        size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
        inside = ""
        if stat.S_ISREG(info.st_mode):
            with open(here, "rb") as file:
                inside = repr(file.read(30))
        elif stat.S_ISDIR(info.st_mode):
            inside = repr(sorted(os.listdir(here)))
        with suppress(OSError):
            inside += repr(
                [key for key in os.listxattr(here, follow_symlinks=False) if key != "security.selinux"]
            )
        of_it = f"{info.st_mode:o} {info.st_uid}:{info.st_gid} {info.st_nlink} {size} {info.st_rdev}"
        told.append(f"{name[:20]!r} {of_it} {inside}")
    return told


if __name__ == "__main__":
    os.umask(0o022)
    os.chdir(sys.argv[2])
    if sys.argv[1] == "build":
        build_all(situations())
    else:
        print(json.dumps(run_all(situations())))
