"""Tar archives as lowers, used in every way. Mutations end with correct checksums of headers."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.layers.tar import TarLayer
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.fuzz.exercise import exercise_as

_BLOCK = tarfile.BLOCKSIZE
_FIELDS = (
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (329, 16),
    (345, 155),
)
"""(offset, size) of the fields of a header, except its checksum."""
_ODD = (
    b"", b"\0", b"..", b"../x", b"/etc/passwd", b"a/../../x", b"./", b"//", b"a", b"a/b", b"b", b"7" * 11,
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12, b"-1", b"0000000", b"1", b"2", b"5", b"6", b"3", b"x", b"g", b"L", b"K", b"S",
    b"ustar\0" + b"00", b"n" * 155,
)  # fmt: skip
_PAX = {
    "path": ("../x", "a/" * 3000, "", "a\0b", "/x"), "linkpath": ("..", "a", "/etc", "x" * 5000),
    "size": ("-1", "1", "9" * 30),
    "mtime": ("1e9", "-1.5", "nan", "9" * 20), "GNU.sparse.map": ("0,1,2", "5,1,0,9", "x"),
    "GNU.sparse.size": ("1", "9" * 20),
    "GNU.sparse.major": ("1", "0"), "GNU.sparse.minor": ("0",), "SCHILY.xattr.user.a": ("v", "v" * 70_000),
    "SCHILY.xattr.": ("x",), "SCHILY.acl.access": ("user::rwx,group::r--,other::r--", "user:" * 50),
    "hdrcharset": ("BINARY", "x"),
}  # fmt: skip


def _one(data: bytes) -> None:
    exercise_as(TarLayer, data)


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    return [_archive(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def _archive(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, target in (
            ("d", tarfile.DIRTYPE, ""), ("d/f", tarfile.REGTYPE, ""), ("d/h", tarfile.LNKTYPE, "d/f"),
            ("l", tarfile.SYMTYPE, "d/f"),
            ("null", tarfile.CHRTYPE, ""), ("pipe", tarfile.FIFOTYPE, ""), ("e" * 90 + "/x",
            tarfile.REGTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o644
            member.size = 700 if kind == tarfile.REGTYPE else 0
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"SCHILY.xattr.user.a": "value", "mtime": "1.5"}
            archive.addfile(member, io.BytesIO(bytes(range(100)) * 7))
    return out.getvalue()


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(5) == 0 or len(data) < _BLOCK:
        return plain.mutate(data, choose)
    blocks = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        at = choose.randrange(len(blocks) // _BLOCK) * _BLOCK
        how = choose.randrange(4)
        if how == 0:
            other = choose.randrange(len(blocks) // _BLOCK) * _BLOCK
            blocks[at:at] = blocks[other : other + _BLOCK * choose.choice((1, 2, 3))]
        elif how == 1:
            blocks[at:at] = _extended(choose)
        elif blocks[at + 257 : at + 262] == b"ustar":
            start, size = choose.choice(_FIELDS)
            blocks[at + start : at + start + size] = choose.choice(_ODD)[:size].ljust(size, b"\0")
    return _summed(blocks)


def _extended(choose: random.Random) -> bytes:
    """Return a pax header with an unusual field, for the next member or for all."""
    name = choose.choice(list(_PAX))
    value = f" {name}={choose.choice(_PAX[name])}\n".encode()
    text = b"%d" % choose.choice((len(value) + 2, len(value) + 3, 5, 1 << 40)) + value
    header = tarfile.TarInfo("pax")
    header.type = choose.choice((tarfile.XHDTYPE, tarfile.XGLTYPE))
    header.size = len(text)
    return header.tobuf(tarfile.USTAR_FORMAT) + text.ljust(-(-len(text) // _BLOCK) * _BLOCK, b"\0")


def _summed(blocks: bytearray) -> bytes:
    for at in range(0, len(blocks) - _BLOCK + 1, _BLOCK):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + _BLOCK])
    return bytes(blocks)


TARGET = Target(
    _run,
    _seeds,
    (
        "cowfs.formats.tar",
        "cowfs.formats.archive",
        "cowfs.layers.archive",
        "cowfs.formats.acl_text",
    ),
    _mutate,
)
