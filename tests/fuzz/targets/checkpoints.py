"""The records of checkpoints and of a rebase: attributes that the owner of a store may have written.

An input has a line for each attribute: the directory, the attribute, and the value.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from cowfs.errors import CowfsError, printable
from cowfs.layers.directory import DirectoryLayer
from cowfs.store.format import layout, rebased
from cowfs.store.format.checkpoints import Layers, between, listed
from cowfs.store.format.header import new_header, to_json
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target

_PREFIX = b"trusted.overlay."
_PLACES = (b"upper", b"1", b"2", b"3", b"07", b"0", b"9" * 12, b"x")
_NOTES = (b"checkpoint", b"below", b"fresh", b"rebased", b"becomes")
_VALUES = (
    b"", b"0", b"1", b"2", b"3", b"-1", b"01", b"9" * 5000, b"y", b"\xff", b"null", b"[]", b"[" * 5000,
    b"\xd9\xa1",
    b'{"number": 1, "name": "a", "taken": "t"}', b'{"number": 2, "name": "\\ud800\\u001b[2J", "taken": []}',
    b'{"number": 3, "name": {"a": 1}, "taken": 1e999}', b'{"name": "../../x", "taken": ""}',
    b'{"number": true, "name": "b", "taken": "t"}',
)  # fmt: skip


def _one(top: Path, data: bytes) -> None:
    shutil.rmtree(top, ignore_errors=True)
    for name in (b"upper", *(b"cowfs/layers/" + name for name in _PLACES[1:])):
        (top / os.fsdecode(name)).mkdir(parents=True)
    (top / "cowfs/header.json").write_bytes(to_json(new_header()))
    for line in data.split(b"\n")[:40]:
        place, _, rest = line.partition(b" ")
        note, _, value = rest.partition(b" ")
        if place in _PLACES and note in _NOTES:
            where = top / os.fsdecode(place if place == b"upper" else b"cowfs/layers/" + place)
            with suppress(OSError):
                os.setxattr(where, _PREFIX + b"cowfs." + note, value)
        elif place == b"header.rebased":
            (top / "cowfs/header.rebased").write_bytes(rest)
    with closing(DirectoryLayer(os.open(top, os.O_PATH | os.O_DIRECTORY), "store")) as layer:
        _use(layer)


def _use(layer: DirectoryLayer) -> None:
    layers, upper = Layers(layer, _PREFIX), layout.find(layer, b"upper")
    assert upper is not None
    known = layers.all()
    for number, one in known.items():
        assert len(set(one.below)) == len(one.below)
        layers.directly_above(number, upper)
    for told in listed(layers, upper):
        assert printable(told["name"]).isprintable() or not told["name"]
    for since in (None, "a", "b"):
        for until in (None, "a", "b"):
            with suppress(CowfsError):
                between(layers, upper, since, until)
    with suppress(CowfsError):
        header = layout.find_header(layer)
        assert header is not None
        layers.settle(upper, None, None)
        rebased.exchange_names(layer, layers, upper, _PREFIX)
        rebased.settle(layer, upper, header, [one.key for one in layers.frozen(upper)])
    for number in layers.rubbish(upper):
        for _ in layers.remove(number):
            pass
    made = layers.prepare(upper, layers.below(upper))
    layers.exchange(upper, made, "new")
    assert stat.S_ISDIR(layer.stat(layer.root).st_mode) and layers.named("new").number == made.number


@contextmanager
def _run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as name:
        yield lambda data: _one(Path(name) / "store", data)


def _seeds() -> list[bytes]:
    sound = (
        b'1 checkpoint {"number": 1, "name": "a", "taken": "t"}\n'
        b'2 checkpoint {"number": 2, "name": "b", "taken": ""}\n'
    )
    header = to_json(new_header()).replace(b"\n", b"")
    becomes = b'2 becomes {"name": "c", "taken": ""}\n'
    return [
        sound + b"2 below 1\nupper below 2",
        sound + b"1 below 2\n2 below 1\nupper below 1\nupper fresh y",
        sound + b"upper rebased 2\n" + becomes + b"header.rebased " + header,
    ]


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(3) == 0:
        return plain.mutate(data, choose)
    lines = data.split(b"\n")
    line = b" ".join((choose.choice(_PLACES), choose.choice(_NOTES), choose.choice(_VALUES)))
    lines[choose.randrange(len(lines)) :][: choose.randrange(2)] = [line]
    lines.insert(choose.randrange(len(lines) + 1), line)
    return b"\n".join(lines[-40:])


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.store.format.checkpoints", "cowfs.store.format.rebased"),
    _mutate,
    largest=60_000,
)
