"""The log of reverted changes, which its owner may have written, undone on a small union."""

from __future__ import annotations

import base64
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from cowfs.changes import revert, undo
from cowfs.changes.select import Selection
from cowfs.changes.trash import new_batch
from cowfs.errors import StoreError
from cowfs.layers.base import UpperLayer
from cowfs.store.format import layout
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.fuzz.targets.union import Place

_MOST_TOLD = 10_000
_PATHS = (
    b"", b"/", b".", b"..", b"d", b"d/", b"/d", b"d//n2", b"../upper", b"d/../d", b"file", b"file/made",
    b"renamed/in/y", b"d/new", b"link", b"a\0b", b"n" * 256, b"/".join([b"d"] * 200),
    b".cowfs-aside-0", b"d/.cowfs-aside-1/x", b"\xff\n\x1b[2J",
)  # fmt: skip
_KINDS = ("moved", "whiteout", "copied", "attributes", "renamed", "shown", "")
_NUMBERS: list[Any] = [0, 1, 2, 3, -1, 1 << 40, 1 << 70, True, None, 1.5, "1", []]
_ATTRIBUTES = {"mode": 0o100640, "uid": 1, "gid": 2, "atime_ns": 5, "mtime_ns": 6, "xattrs": []}


def _undone(place: Place, log: bytes) -> None:
    with place.directory() as layer:
        layout.ensure_directory(layer, layer.root, layout.PRIVATE, 0o755)
        fs = place.union(layer)
        batch = new_batch(fs.upper)
        _, file = layer.create(batch.key, b"log", 0o600, 0, 0)
        with closing(file):
            file.pwrite(log, 0)
        for number in range(3):
            _, file = layer.create(batch.key, b"%d" % number, 0o600, 0, 0)
            file.close()
        with suppress(OSError, StoreError):
            for told, step in enumerate(undo.undo(fs, lambda _: None)):
                assert told < _MOST_TOLD, "it does not end"
                if callable(step):
                    step()
        for each in (b"upper", b"work", b"cowfs"):
            assert layout.find(layer, each) is not None, "what is not in the union was touched"


@contextmanager
def _run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = Place(Path(name), stack)
        yield lambda log: _undone(place, log)


def _line(**facts: Any) -> bytes:
    return json.dumps({"number": 0, "kind": "moved", "path": _text(b"d/n2"), **facts}).encode() + b"\n"


def _text(path: bytes) -> str:
    return base64.b64encode(path).decode()


def _real() -> bytes:
    """Return the log that reverting all changes has written."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = Place(Path(name), stack)
        layer: UpperLayer
        with place.directory() as layer:
            layout.ensure_directory(layer, layer.root, layout.PRIVATE, 0o755)
            fs = place.union(layer)
            for step in revert.revert(fs, Selection(()), lambda _: None, lambda _: iter(())):
                if callable(step):
                    step()
            key = place.find(layer, layout.PRIVATE, b"trash", b"1", b"log")
            with closing(layer.open(key, 0)) as file:
                return file.pread(1 << 20, 0)


def _seeds() -> list[bytes]:
    return [
        _real(),
        _line() + _line(number=1, kind="whiteout", path=_text(b"d/n1")) + b'{"undone": 1}\n',
        _line(kind="attributes", attributes=_ATTRIBUTES),
        _line(kind="renamed", path=_text(b"moved"), source=_text(b"renamed")),
        _line(kind="renamed", path=_text(b".cowfs-aside-0"), source=_text(b"d"))
        + _line(number=1, path=_text(b".cowfs-aside-0/n2")),
        _line(kind="copied", path=_text(b"two"))[:-9],
        _line(kind="attributes", attributes={**_ATTRIBUTES, "xattrs": [[[]] * 2] * (1 << 17)}),
    ]


def _mutate(log: bytes, choose: random.Random) -> bytes:
    """Change a fact in a line, whole lines, or bytes; usually, renumber the lines at the end."""
    lines = log.split(b"\n")
    at = choose.randrange(len(lines))
    how = choose.randrange(6)
    if how == 0:
        return plain.mutate(log, choose)
    if how == 1:
        lines[at:at] = [choose.choice((b'{"undone": %d}' % choose.randrange(5), *lines))]
    elif how == 2:
        del lines[at]
    else:
        with suppress(ValueError, RecursionError):
            entry = json.loads(lines[at])
            if isinstance(entry, dict):
                lines[at] = json.dumps(_changed(entry, choose)).encode()
    return _numbered(lines) if choose.randrange(4) else b"\n".join(lines)


def _changed(entry: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    what = choose.choice(("kind", "path", "source", "attributes", "number", "undone"))
    if what in {"path", "source"}:
        entry[what] = choose.choice((_text(choose.choice(_PATHS)), *_NUMBERS))
    elif what == "kind":
        entry[what] = choose.choice(_KINDS)
    elif what == "attributes":
        odd = [[_text(b"trusted.overlay.opaque"), _text(b"y")], [_text(b"user.a"), 1], []]
        value = choose.choice((*_NUMBERS, [choose.choice(odd)]))
        entry[what] = {**_ATTRIBUTES, choose.choice(list(_ATTRIBUTES)): value}
    else:
        entry[what] = choose.choice(_NUMBERS)
    return entry


def _numbered(lines: list[bytes]) -> bytes:
    """Move the steps to the beginning, and number them in order."""
    steps, others = list[bytes](), list[bytes]()
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "number" in entry:
                steps.append(json.dumps({**entry, "number": len(steps)}).encode())
                continue
        others.append(line)
    return b"\n".join([*steps, *others])


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.changes.trash", "cowfs.changes.undo", "cowfs.overlay.uncover"),
    _mutate,
    largest=2 << 20,
)
