"""The protocol between the fetching process and the process that it fetches for.

They share a socket that keeps messages separate (SOCK_SEQPACKET), so a process that dies leaves no partial
message. A message is a head and its data.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple

HEAD = struct.Struct("<IQQI")  # kind, number, and for data its offset and length
BEGINNING = "beginning"
"""The mark of a file of which the server says nothing that tells one state from another: how it begins."""
PIECE = 64 << 10
"""How many bytes of data a message has."""
LONGEST = HEAD.size + PIECE
SIZES = 10**18
"""A file has fewer bytes: places in it fit into messages, and into files of the cache."""


class Kind(IntEnum):
    """The kind of a message."""

    OPEN = 1
    """To the fetcher: the file, and what it is known to be; JSON."""
    FETCH = 2
    """To the fetcher: which bytes; a number, by which the answer is known, and seconds in place of data."""
    READY = 3
    """From the fetcher, each time it starts: repeat all requests."""
    OPENED = 4
    """What the file is: JSON."""
    DATA = 5
    """Some of the bytes, at a place from the beginning of what was asked for."""
    DONE = 6
    """All bytes have been sent."""
    FAILED = 7
    """There are no bytes: a JSON message says why."""
    SAID = 8
    """A line for the log: JSON."""


class Message(NamedTuple):
    """An unpacked message."""

    kind: Kind
    number: int
    place: int
    length: int
    rest: bytes

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.rest))


def pack(kind: Kind, number: int = 0, place: int = 0, length: int = 0, rest: bytes = b"") -> bytes:
    """Return a message."""
    return HEAD.pack(kind, number, place, length) + rest


def pack_json(kind: Kind, number: int, what: dict[str, Any]) -> bytes:
    """Return a message with JSON."""
    return pack(kind, number, rest=json.dumps(what).encode())


def unpack(raw: bytes) -> Message:
    """Unpack a message. ValueError if it is invalid."""
    try:
        kind, number, place, length = HEAD.unpack_from(raw)
    except struct.error as error:
        raise ValueError(str(error)) from None
    return Message(Kind(kind), number, place, length, raw[HEAD.size :])


class Version(NamedTuple):
    """What distinguishes a state of a file on a server from other states."""

    size: int
    marks: tuple[tuple[str, str], ...]
    """What the server says of it besides: (name, value), as ETag and Last-Modified. None: only its size."""

    def to_json(self) -> dict[str, Any]:
        """Return the version as an object for JSON."""
        return {"size": self.size, "marks": [list(mark) for mark in self.marks]}

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Version:
        """Return the version from which :meth:`to_json` made *said*.

        ValueError, KeyError or TypeError if it is none.
        """
        size = said["size"]
        if not isinstance(size, int) or not 0 <= size < SIZES:
            raise ValueError(f"a file of {size!r} bytes")
        return cls(size, tuple((str(name), str(value)) for name, value in said["marks"]))

    def __str__(self) -> str:
        return ", ".join([f"{self.size} bytes", *(f"{name} {value}" for name, value in self.marks)])


class Refused(Exception):
    """The server refuses a request for good; the texts are for people."""

    def __init__(self, why: str, hint: str = "", *, changed: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint
        self.changed = changed
        """Return whether it now has another file."""


class Unreachable(Exception):
    """A request failed this time; the text says why, for people."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.why = why
        self.wait = wait
        """Seconds that the server wants us to wait."""
