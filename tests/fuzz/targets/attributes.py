"""Values of attributes that others may have written. The first byte of an input selects the attribute."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cowfs.layers import acl, owner_notes
from cowfs.overlay import xattr_format
from cowfs.types import FileHandle
from tests.fuzz.driver import Run, Target


def _origin(value: bytes) -> None:
    handle = xattr_format.parse_origin(value)
    assert handle is None or len(xattr_format.make_origin(handle)) == len(value)
    assert bytes.fromhex(xattr_format.index_name(value).decode()) == value


def _redirect(value: bytes) -> None:
    for name in xattr_format.names_of_redirect(xattr_format.parse_redirect(value)):
        if xattr_format.may_exist(name):
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
    number = xattr_format.parse_count(value)
    assert number is None or 0 <= number < 1 << 32
    nlink = xattr_format.parse_nlink(value)
    assert nlink is None or xattr_format.parse_nlink(xattr_format.make_nlink(*nlink)) == nlink


def _partial(value: bytes) -> None:
    partial = xattr_format.parse_partial(value)
    assert partial.end >= 0
    assert xattr_format.parse_partial(xattr_format.make_partial(partial)) == partial


_PARSERS: list[Callable[[bytes], None]] = [_origin, _redirect, _note, _acl, _count, _partial]


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
        b"\0" + xattr_format.make_origin(FileHandle(1, b"\1\0\0\0\2\0\0\0", b"u" * 16)),
        b"\1/one/two", b"\1name", b"\1/..", b"\1a/b",
        b"\x020:0", b"\x021000:1000:100644", b"\x020:0:20644:1:3", b"\x020:0:40755",
        b"\3" + acl.build(entries), b"\4" + b"17", b"\4U-1", b"\x054096:-17:/one/two",
    ]  # fmt: skip


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.layers.acl", "cowfs.layers.owner_notes", "cowfs.overlay.xattr_format"),
    largest=70_000,
)
