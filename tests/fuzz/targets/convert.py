"""Convert stores to aufs and back, with marks of aufs that others may have made.

An input consists of the kind of the store, edits of it, and names with a meaning for aufs.
"""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cowfs.errors import CowfsError, LayerError
from cowfs.layers.base import Key, UpperLayer
from cowfs.overlay.aufs import AufsStore
from cowfs.store.format import layout
from cowfs.store.format.header import AUFS, OVERLAYFS, new_header
from cowfs.store.offline import convert
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.fuzz.exercise import walk
from tests.fuzz.targets.union import Place, Source, _edit, _keys

_NAMES = (
    b".wh.file", b".wh.d", b".wh..wh..opq", b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph",
    b".wh..wh.cowfs", b".wh.", b".wh..",
    b".wh..wh.", b".wh.upper", b".wh." + b"n" * 251, b"n" * 255, b"converting-aufs-1",
    b"converting-overlayfs-2",
    b"converting-overlayfs-0", b"converting-x-\xff", b"converting-aufs-" + b"9" * 200, b"upper", b"work",
    b"cowfs", b"lost+found",
)  # fmt: skip
_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFLNK, stat.S_IFIFO)


def _mark(layer: UpperLayer, source: Source) -> None:
    """Create a name that aufs or a conversion treats specially, anywhere in the store."""
    places: list[Key] = [layer.root, *(key for _, _, key in _keys(layer, layer.root))]
    directories = [key for key in places if stat.S_ISDIR(layer.stat(key).st_mode)]
    directory, name, kind = source.pick(directories), source.pick(_NAMES), source.pick(_KINDS)
    if kind == stat.S_IFDIR:
        layer.mkdir(directory, name, 0o755, 0, 0)
    elif kind == stat.S_IFLNK:
        layer.symlink(directory, name, source.pick((b"/etc", b"../..", b"upper")), 0, 0)
    else:
        layer.mknod(directory, name, kind | 0o644, source.number(2), 0, 0)


def _one(place: Place, data: bytes) -> None:
    source = Source(data)
    image, first = source.number(2), source.number(3)
    edits, marks, more = source.number(4), source.number(6), source.number(4)
    with suppress(OSError, LayerError), place.opened() if image else place.directory() as layer:
        if first:
            layout.save_header(layer, new_header())
        for _ in range(edits):
            with suppress(OSError):
                _edit(layer, source)
        for _ in range(marks):
            with suppress(OSError):
                _mark(layer, source)
        _turned(layer, AUFS if first != 2 else OVERLAYFS)
        for _ in range(more):
            with suppress(OSError):
                _mark(layer, source)
        _turned(layer, OVERLAYFS)


def _turned(layer: UpperLayer, target: str) -> None:
    calls = 0

    def tick(_: bytes) -> None:
        nonlocal calls
        calls += 1
        assert calls < 100_000, "it does not end"

    with suppress(OSError, CowfsError):
        convert.needs_lowers(layer)
    with suppress(OSError, CowfsError):
        convert.convert(layer, target, tick)
    with suppress(OSError, CowfsError):
        store = layout.as_store(layer)
        layout.recognise(store)
        if isinstance(store, AufsStore):
            walk(store, store.branch)
            store.clear_leftovers()


@contextmanager
def _run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name, ExitStack() as stack:
        place = Place(Path(name), stack)
        yield lambda data: _one(place, data)


def _seeds() -> list[bytes]:
    choose = random.Random(0)
    return [
        b"",
        b"\0\1",
        b"\1\1",
        *(bytes((n % 2, n % 3, n % 4, n % 6, 2)) + choose.randbytes(60) for n in range(20)),
    ]


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(6) == 0:
        return choose.randbytes(80)
    return plain.mutate(data, choose)


TARGET = Target(
    _run,
    _seeds,
    (
        "cowfs.overlay.aufs",
        "cowfs.overlay.named_whiteouts",
        "cowfs.store.offline.convert",
        "cowfs.store.format.conversion",
    ),
    _mutate,
    largest=300,
)
