"""Compare what the kernel and cowfs show of a squashfs image, including errors.

An observation is ``{path: {fact: value}}``; :class:`Failed` stands for a value that could not be read. The
kernel is the reference: cowfs must show the same, byte for byte. Where the kernel fails, cowfs may show more.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cowfs.layers.squashfs import SquashfsLayer
from tests.support.listing import names_of
from tests.support.squashfs import FIELDS, kernel_root

PAGE = 4096
ABSENT = (b"!", b"m-absent", b"~", b"\xff\xff")
"""Names that do not exist, sorted before, between and after all others."""
MOST = 5000
"""The maximum number of names to look at, because a tree may be endless."""


class Failed(NamedTuple):
    """A value that could not be read, and the errno."""

    code: int

    def __repr__(self) -> str:
        return errno.errorcode[self.code]


Seen = dict[bytes, dict[str, Any]]


def attempt(call: Callable[[], Any]) -> Any:
    """Return the result of *call*, or how it failed."""
    try:
        return call()
    except OSError as error:
        assert error.errno, error
        return Failed(error.errno)


def _fields(attr: Any) -> dict[str, Any]:
    return {field: getattr(attr, field) for field in FIELDS}


def seen_by_kernel(root: int) -> Seen:
    """Return what the kernel shows of the tree at the descriptor *root*."""
    top = b"/proc/self/fd/%d" % root
    seen: Seen = {}
    pending = [b""]
    while pending and len(seen) < MOST:
        path = pending.pop()
        full = top + path if path else top + b"/."
        status = attempt(lambda: os.lstat(full))  # noqa: B023
        if isinstance(status, Failed):
            seen[path] = {"lookup": status}
            continue
        here = seen[path] = {"lookup": "found", **_fields(status)}
        here["xattrs"] = attempt(lambda: os.listxattr(full, follow_symlinks=False))  # noqa: B023
        for name in [] if isinstance(here["xattrs"], Failed) else here["xattrs"]:
            get = lambda: os.getxattr(full, name, follow_symlinks=False)  # noqa: B023, E731
            here[f"xattr {name}"] = attempt(get)
        if stat.S_ISLNK(status.st_mode):
            here["target"] = attempt(lambda: os.readlink(full))  # noqa: B023
        elif stat.S_ISREG(status.st_mode):
            here["pages"] = attempt(lambda: _kernels_pages(full, status.st_size))  # noqa: B023
        elif stat.S_ISDIR(status.st_mode):
            names = attempt(lambda: os.listdir(full))  # noqa: B023
            here["names"] = names if isinstance(names, Failed) else sorted(set(names))
            for name in ABSENT:
                here[f"lookup {name!r}"] = attempt(lambda: os.lstat(full + b"/" + name).st_ino)  # noqa: B023
            if not isinstance(names, Failed):
                pending += [path + b"/" + name for name in here["names"]]
    return seen


def _kernels_pages(path: bytes, size: int) -> list[Any]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return [attempt(lambda: os.pread(fd, PAGE, at)) for at in _offsets(size)]  # noqa: B023
    finally:
        os.close(fd)


def _offsets(size: int) -> list[int]:
    """Return the offsets of all pages of a file of *size* bytes, or of both ends of a huge one."""
    pages = (size + PAGE - 1) // PAGE
    numbers = range(pages) if pages <= 1024 else [*range(512), *range(pages - 512, pages)]
    return [number * PAGE for number in numbers]


def seen_by_us(layer: SquashfsLayer) -> Seen:
    """Return what our layer shows."""
    seen: Seen = {}
    pending: list[tuple[bytes, Any]] = [(b"", lambda: (layer.root, layer.stat(layer.root)))]
    while pending and len(seen) < MOST:
        path, find = pending.pop()
        found = attempt(find)
        if found is None or isinstance(found, Failed):
            seen[path] = {"lookup": found or Failed(errno.ENOENT)}
            continue
        key, attr = found
        here = seen[path] = {"lookup": "found", **_fields(attr)}
        names = attempt(lambda: layer.listxattr(key))  # noqa: B023
        here["xattrs"] = names if isinstance(names, Failed) else [name.decode() for name in names]
        for name in [] if isinstance(names, Failed) else names:
            here[f"xattr {name.decode()}"] = attempt(lambda: layer.getxattr(key, name))  # noqa: B023
        form = stat.S_IFMT(attr.st_mode)
        if form == stat.S_IFLNK:
            here["target"] = attempt(lambda: layer.readlink(key))  # noqa: B023
        elif form == stat.S_IFREG:
            here["pages"] = attempt(lambda: _our_pages(layer, key, attr.st_size))  # noqa: B023
        elif form == stat.S_IFDIR:
            listed = attempt(lambda: sorted(names_of(layer, key)))  # noqa: B023
            here["names"] = listed
            for name in ABSENT:
                here[f"lookup {name!r}"] = attempt(lambda: _find(layer, key, name))  # noqa: B023
            for name in [] if isinstance(listed, Failed) else listed:
                pending.append((path + b"/" + name, lambda key=key, name=name: layer.lookup(key, name)))
    return seen


def _find(layer: SquashfsLayer, key: Any, name: bytes) -> int:
    found = layer.lookup(key, name)
    if found is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return found[1].st_ino


def _our_pages(layer: SquashfsLayer, key: Any, size: int) -> list[Any]:
    file = layer.open(key, os.O_RDONLY)
    try:
        return [attempt(lambda: file.pread(PAGE, at)) for at in _offsets(size)]  # noqa: B023
    finally:
        file.close()


def differences(ours: Seen, kernels: Seen) -> list[str]:
    """Return a line for each difference from what the kernel shows."""
    found = []
    for path, theirs in kernels.items():
        mine = ours.get(path)
        if mine is None:
            found.append(f"{path!r}: not shown by us")
            continue
        for what, value in theirs.items():
            if isinstance(value, Failed) and what != f"lookup {path!r}":
                if value.code == errno.ENOENT and mine.get(what) != value and what != "lookup":
                    found.append(f"{path!r}: {what}: {value!r}, ours {mine.get(what)!r}")
                continue
            if what == "xattrs" and set(value) == set(mine.get(what, ()) or ()):
                continue
            if what == "pages" and isinstance(mine.get(what), list):
                found += _pages(path, value, mine[what])
            elif mine.get(what, "nothing") != value:
                found.append(f"{path!r}: {what}: {value!r}, ours {mine.get(what, 'nothing')!r}")
    return found


def _pages(path: bytes, theirs: list[Any], mine: list[Any]) -> list[str]:
    if len(theirs) != len(mine):
        return [f"{path!r}: {len(theirs)} pages, ours {len(mine)}"]
    found = []
    for number, (one, two) in enumerate(zip(theirs, mine, strict=True)):
        if not isinstance(one, Failed) and one != two:
            shown = two if isinstance(two, Failed) else two[:16]
            found.append(f"{path!r}: page {number}: {one[:16]!r}, ours {shown!r}")
    return found


if __name__ == "__main__":
    image_ = Path(sys.argv[1])
    layer_ = SquashfsLayer(sys.argv[1])
    with kernel_root(image_) as root_:
        print("\n".join(differences(seen_by_us(layer_), seen_by_kernel(root_))))
