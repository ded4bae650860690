"""The values of attributes that others may have written: the first byte of an input says of which."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cowfs.layers import acl, owner_notes
from cowfs.overlay import origin, redirect
from cowfs.overlay.state import count_in
from cowfs.types import FileHandle
from tests.fuzz.driver import Run, Target


def _origin(value: bytes) -> None:
    handle = origin.decode(value)
    assert handle is None or len(origin.encode(handle)) == len(value)
    assert bytes.fromhex(origin.index_name(value).decode()) == value


def _redirect(value: bytes) -> None:
    for name in redirect.names(redirect.parse(value)):
        if redirect.may_exist(name):
            assert (
                0 < len(name) <= 255 and b"/" not in name and b"\0" not in name and name not in {b".", b".."}
            )


def _note(value: bytes) -> None:
    for real in (stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755):
        try:
            note = owner_notes.parse(value, real)
        except ValueError:
            continue
        assert 0 <= note.uid < (1 << 32) - 1 and 0 <= note.gid < (1 << 32) - 1
        assert owner_notes.parse(owner_notes.to_bytes(note), real) == note
        assert note.mode is None or not (stat.S_ISCHR(note.mode) and note.rdev == 0)


def _acl(value: bytes) -> None:
    entries = acl.parse(value)
    assert not entries or acl.build(entries) == value
    mode, _ = acl.mode_of(entries)
    assert 0 <= mode <= 0o777
    for changed in (acl.with_mode(entries, 0o640), acl.masked(entries, 0o604)):
        assert not changed or acl.parse(acl.build(changed)) == changed


def _count(value: bytes) -> None:
    number = count_in(value)
    assert number is None or 0 <= number < 1 << 32


_PARSERS: list[Callable[[bytes], None]] = [_origin, _redirect, _note, _acl, _count]


def _one(data: bytes) -> None:
    try:
        _PARSERS[data[0] % len(_PARSERS)](data[1:])
    except OSError:
        pass


@contextmanager
def _run() -> Iterator[Run]:
    yield lambda data: _one(data) if data else None


def _seeds() -> list[bytes]:
    entries = [(1, 6, 0xFFFFFFFF), (2, 4, 1), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
    return [
        b"\0" + origin.encode(FileHandle(1, b"\1\0\0\0\2\0\0\0", b"u" * 16)),
        b"\1/one/two", b"\1name", b"\1/..", b"\1a/b",
        b"\x020:0", b"\x021000:1000:100644", b"\x020:0:20644:1:3", b"\x020:0:40755",
        b"\3" + acl.build(entries), b"\4" + b"17",
    ]  # fmt: skip


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.layers.acl", "cowfs.layers.owner_notes", "cowfs.overlay.origin", "cowfs.overlay.redirect"),
    largest=70_000,
)
