"""``cowfs/blame`` in a store: which processes made changes. docs/store-format.md describes the bytes.

Batches of records are in frames, and the frames are in a ring: a new one replaces the oldest. The batch that
is not full yet is a *draft*. It is rewritten whenever it has grown, to two places in turn, so that a crash
during the write only loses new records.

The process that makes a change decides what is in a record. So that remains of a record can never be taken
for a frame, each frame has a digest with a key. The key is in the file, which only the store's owner can
read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cowfs.errors import StoreError
from cowfs.layers.base import File, Key, UpperLayer
from cowfs.store.format import layout

VERSION = 1
MAKING = ("create", "mkdir", "symlink", "mknod", "link")
OPERATIONS = (
    *MAKING,
    *("write", "truncate", "chmod", "chown", "utimes", "setxattr", "removexattr"),
    *("remove", "rmdir", "rename", "exchange"),
)
"""What a change can be. In a record each is a bit, the first one bit 0."""

_BLOCK = 4096
_DRAFT = 192 << 10
"""The size of each of the two drafts, in bytes: more than any frame."""
_SMALLEST, _LARGEST = 1 << 20, 8 << 20
"""Bytes of the whole file."""
_PART = 32
"""At most this fraction of its store, if that leaves the smallest size."""
_NEW = layout.NEW_BLAME
_MAGIC, _FRAME_MAGIC = b"cowfsblm", b"blmf"
_HEADER = struct.Struct("<8sIIQ16s")  # magic, version, 0, bytes of the ring, key
_FRAME = struct.Struct(
    "<4sIQI"
)  # magic, bytes of content, sequence number, revision; then the digest, the content
_DIGEST = 16
_LARGEST_CONTENT = 1 << 20
"""Bytes of a batch, as JSON: a recorder begins another long before that."""
MOST_RECORDS = 2000
"""The most records in one batch."""
_MOST_BATCHES = _LARGEST // _BLOCK
_MOST_TEXT = 256 << 20
"""The most bytes of all batches as JSON: thirty times the size of the largest file."""
HINT = "mount with -o blame to begin a new one"


class _Frame(NamedTuple):
    sequence: int
    revision: int
    offset: int
    size: int
    """Bytes of content."""

    @property
    def room(self) -> int:
        """The bytes that the frame takes: whole blocks."""
        return -(-(_FRAME.size + _DIGEST + self.size) // _BLOCK) * _BLOCK


class Records:
    """The records of a store."""

    def __init__(self, file: File, name: str) -> None:
        """Take over an open file; *name* is the store's. Raises OSError, StoreError."""
        self._file = file
        self._name = name
        size = file.stat().st_size
        head = file.pread(_BLOCK, 0)
        if len(head) < _BLOCK or not head.startswith(_MAGIC):
            raise damaged(name)
        _, version, _, ring, self._key = _HEADER.unpack_from(head)
        if version > VERSION:
            raise StoreError(
                f"{name}: its record of changes has format version {version}, this cowfs knows {VERSION}",
                "use the cowfs that made it, or a newer one",
            )
        self._begin = _BLOCK + 2 * _DRAFT
        if version < 1 or not _SMALLEST <= ring + self._begin <= min(size, _LARGEST) or ring % _BLOCK:
            raise damaged(name)
        self._end = self._begin + ring
        drafts = [self._frame_at(_BLOCK + number * _DRAFT) for number in range(2)]
        self._frames = sorted(self._scan())
        """The oldest first."""
        newest = self._frames[-1].sequence if self._frames else -1
        fresh = [draft for draft in drafts if draft is not None and draft.sequence > newest]
        self._draft = max(fresh, default=None)

    def close(self) -> None:
        self._file.close()

    # --- reading

    def contents(self) -> Iterator[bytes]:
        """Yield the content of all frames, the newest first. Skip frames that are replaced meanwhile."""
        for frame in [*([self._draft] if self._draft else []), *reversed(self._frames)]:
            content = self._content(frame)
            if content is not None:
                yield content

    @property
    def gaps(self) -> int:
        """Return how many frames are damaged: those missing between the oldest and the newest."""
        known = self._frames
        return known[-1].sequence - known[0].sequence + 1 - len(known) if known else 0

    def _scan(self) -> Iterator[_Frame]:
        offset = self._begin
        while offset < self._end:
            frame = self._frame_at(offset)
            if frame is not None:
                yield frame
            offset += frame.room if frame is not None else _BLOCK

    def _frame_at(self, offset: int) -> _Frame | None:
        magic, size, sequence, revision = _FRAME.unpack(self._file.pread(_FRAME.size, offset))
        frame = _Frame(sequence, revision, offset, size)
        if magic != _FRAME_MAGIC or frame.room > _DRAFT:
            return None
        return frame if self._content(frame) is not None else None

    def _content(self, frame: _Frame) -> bytes | None:
        """Return the content of a frame; None if it is missing or incomplete."""
        data = self._file.pread(_FRAME.size + _DIGEST + frame.size, frame.offset)
        head, digest, content = (
            data[: _FRAME.size],
            data[_FRAME.size :][:_DIGEST],
            data[_FRAME.size + _DIGEST :],
        )
        if len(content) != frame.size or not hmac.compare_digest(digest, self._digest(head, content)):
            return None
        _, size, sequence, revision = _FRAME.unpack(head)
        return content if (size, sequence, revision) == (frame.size, frame.sequence, frame.revision) else None

    def _digest(self, head: bytes, content: bytes) -> bytes:
        return hashlib.blake2b(head + content, digest_size=_DIGEST, key=self._key).digest()

    # --- writing

    def keep_draft(self, content: bytes) -> bool:
        """Write a batch that is not full yet, replacing its former draft. OSError.

        Return False if it is too large.
        """
        before = self._draft
        sequence, revision = self._next(), before.revision + 1 if before else 0
        frame = _Frame(sequence, revision, _BLOCK + revision % 2 * _DRAFT, len(content))
        if frame.room > _DRAFT:
            return False
        self._write(frame, content)
        self._draft = frame
        return True

    def end_draft(self, content: bytes | None = None) -> None:
        """Put a batch into the ring; without *content*, the last draft. OSError."""
        draft = self._draft
        if content is None:
            content = self._content(draft) if draft is not None else None
        if content is not None:
            place = self._frames[-1].offset + self._frames[-1].room if self._frames else self._begin
            frame = _Frame(self._next(), draft.revision + 1 if draft else 0, place, len(content))
            if frame.room > _DRAFT:
                return
            if place + frame.room > self._end:
                frame = frame._replace(offset=self._begin)
                self._drop(
                    [other for other in self._frames if other.offset >= place]
                )  # older than those here
            self._frames = [other for other in self._frames if not _overlap(other, frame)]
            self._write(frame, content)
            self._frames.append(frame)
        self._draft = None

    def _drop(self, frames: list[_Frame]) -> None:
        for frame in frames:
            self._file.pwrite(bytes(_FRAME.size), frame.offset)
            self._frames.remove(frame)

    def _next(self) -> int:
        if self._draft is not None:
            return self._draft.sequence
        return self._frames[-1].sequence + 1 if self._frames else 0

    def _write(self, frame: _Frame, content: bytes) -> None:
        head = _FRAME.pack(_FRAME_MAGIC, frame.size, frame.sequence, frame.revision)
        self._file.pwrite(head + self._digest(head, content) + content, frame.offset)


def _overlap(one: _Frame, other: _Frame) -> bool:
    return one.offset < other.offset + other.room and other.offset < one.offset + one.room


def batches(contents: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """Yield the batches in frames. StoreError if one is invalid, or if there are more than a file can have.

    Memory and time are limited, whoever made the frames.
    """
    size = 0
    for number, content in enumerate(contents):
        try:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(content, _LARGEST_CONTENT)
            size += len(text)
            if not unpacker.eof or size > _MOST_TEXT or number >= _MOST_BATCHES:
                raise damaged(name)
            batch = json.loads(text)
        except (zlib.error, ValueError, RecursionError):
            raise damaged(name) from None
        rows = batch.get("records", []) if isinstance(batch, dict) else None
        if not isinstance(rows, list) or len(rows) > MOST_RECORDS:
            raise damaged(name)
        yield batch


def pack(batch: dict[str, Any]) -> bytes:
    """Return the frame content for a batch. Names that are not UTF-8 are strings from os.fsdecode()."""
    return zlib.compress(json.dumps(batch, separators=(",", ":")).encode(), 1)


def damaged(name: str) -> StoreError:
    """Return the error for a store whose records are damaged."""
    return StoreError(f"{name}: the record of changes is damaged", HINT)


def read(layer: UpperLayer) -> Records:
    """Open the records of a store for reading. StoreError if there are none, or they are damaged."""
    key = layout.find(layer, layout.PRIVATE, layout.BLAME)
    if key is None:
        raise no_records(layer.name)
    if not stat.S_ISREG(layer.stat(key).st_mode):
        raise damaged(layer.name)
    try:
        return _opened(layer.open(key, os.O_RDONLY), layer.name)
    except PermissionError:
        raise StoreError(
            f"{layer.name}: only the store's owner can read the record of changes",
            "ask as that user, or as root",
        ) from None


def no_records(name: str) -> StoreError:
    """Return the error for a store without records."""
    return StoreError(f"{name}: there is no record of who changed what", "mount with -o blame to record it")


def open_or_make(layer: UpperLayer, size: int) -> tuple[Records, str]:
    """Open the records of a store of *size* bytes to continue them, or create them.

    OSError. Damaged records are replaced by new ones; the second value says so. StoreError for records of a
    newer cowfs.
    """
    private = layout.find(layer, layout.PRIVATE)
    found = layer.lookup(private, layout.BLAME)
    said = ""
    if found is not None:
        try:
            if not stat.S_ISREG(found[1].st_mode):
                raise damaged(layer.name)
            opened = _opened(layer.open(found[0], os.O_RDWR), layer.name)
            opened.end_draft()  # the state of an old draft is not known
            return opened, ""
        except StoreError as error:
            if "version" in error.message:
                raise
            said = error.message
        layer.unlink(private, layout.BLAME, None)
    return _make(layer, private, size), said


def _opened(file: File, name: str) -> Records:
    try:
        return Records(file, name)
    except BaseException:
        file.close()
        raise


def _make(layer: UpperLayer, private: Key, size: int) -> Records:
    whole = max(min(_LARGEST, size // _PART), _SMALLEST) & ~(_BLOCK - 1)
    if layer.lookup(private, _NEW) is not None:
        layer.unlink(private, _NEW, None)
    key, file = layer.create(private, _NEW, 0o600, *layout.owner(layer))
    try:
        ring = whole - _BLOCK - 2 * _DRAFT
        for offset in range(_BLOCK, whole, _DRAFT):  # allocate all space now: later there may be none
            file.pwrite(bytes(min(_DRAFT, whole - offset)), offset)
        head = _HEADER.pack(_MAGIC, VERSION, 0, ring, os.urandom(16))
        file.pwrite(head + bytes(_BLOCK - len(head)), 0)
        layer.rename((private, _NEW), (private, layout.BLAME), moved=key)
        return Records(file, layer.name)
    except BaseException:
        file.close()
        for name in (_NEW, layout.BLAME):
            if layer.lookup(private, name) is not None:
                layer.unlink(private, name, None)
        raise
