"""The header of a store: JSON that anyone may have written."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cowfs.errors import CowfsError, printable
from cowfs.store.format.header import bound, check_lowers, from_json, new_header, to_json
from cowfs.types import Identity
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target

_LOWER = Identity("squashfs", "0" * 64, "squashfs, 1 MiB", "/lower")


def _one(data: bytes) -> None:
    try:
        header = from_json(data, "store")
        again = from_json(to_json(header), "store")  # a header that is written and read is the same
        assert to_json(again) == to_json(header)
        to_json(bound(header, [_LOWER]))
        check_lowers(header, [_LOWER], "store")
    except CowfsError as error:
        assert len(error.message) < 1 << 21
        printable(str(error)).encode()


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    header = new_header()
    bare = json.loads(to_json(header))
    return [
        to_json(header),
        to_json(bound(header, [_LOWER, _LOWER])),
        json.dumps({**bare, "mark": {"name": "mark.0123456789abcdef", "keeps": ["xattrs", "acls"]}}).encode(),
        json.dumps({**bare, "version": 2, "more": {"a": [1, None]}}).encode(),
        b"[" * 5000,
    ]


_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1 << 70, 1.5, float("inf"), float("nan"), "", "x", "\0", "\ud800",
    "\x1b[2J", [], {},
    [[]], {"": {}}, "trusted.overlay.", "user.overlay.", "overlayfs", "mark.0123456789abcdef", "A" * 10_000,
]  # fmt: skip


def _nested(choose: random.Random) -> Any:
    value: Any = choose.choice(_ODD)
    depth = choose.choice((3, 50, 200, 330, 480, 600, 900, 950, 990))
    for _ in range(depth):
        value = [value] if choose.random() < 0.7 else {"a": value}
    return value


def _mutate(data: bytes, choose: random.Random) -> bytes:
    """Change a value in the header, or bytes of the text."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return plain.mutate(data, choose)
    if choose.randrange(4) == 0 or not isinstance(content, dict):
        return plain.mutate(data, choose)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return plain.mutate(data, choose)
        key = choose.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or choose.random() < 0.4:
            break
        place = place[key]
    if choose.randrange(5) == 0:
        del place[key]
    elif choose.randrange(6) == 0 and isinstance(place, dict):
        place[choose.choice(("mark", "lowers", "adopted", "else"))] = _nested(choose)
    else:
        place[key] = _nested(choose) if choose.randrange(4) == 0 else choose.choice(_ODD)
    try:
        return json.dumps(content).encode()
    except (ValueError, RecursionError):
        return plain.mutate(data, choose)


TARGET = Target(
    _run, _seeds, ("cowfs.store.format.header", "cowfs.store.format.mark"), _mutate, largest=1 << 20
)
