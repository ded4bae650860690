"""Keep changes so that they can be read several times: in memory, in a temporary file, or compressed."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator

from cowfs.changes.render import from_json, json_line
from cowfs.types import Change

_IN_MEMORY = 4 << 20
"""Bytes."""


class Lines:
    """Lines in memory; if they take over 4 MiB, in an unnamed temporary file.

    Each iteration starts with the first line; several can run at the same time. Blocks; OSError. Close it at
    the end.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - close() closes it
        self.count = 0

    def add(self, line: bytes) -> None:
        """Add a line, which must not contain a newline. OSError of the temporary file."""
        self._file.write(line + b"\n")
        self.count += 1

    def __iter__(self) -> Iterator[bytes]:
        at = 0
        while True:
            self._file.seek(at)  # another iteration may have moved the position
            lines = self._file.readlines(1 << 16)
            if not lines:
                return
            at = self._file.tell()
            yield from lines

    def close(self) -> None:
        """Free the space."""
        self._file.close()


class Spool:
    """Changes, kept as :class:`Lines`. Close it at the end."""

    def __init__(self, changes: Iterable[Change]) -> None:
        """Read all *changes*. Blocks; OSError of *changes* or of the temporary file."""
        self._lines = Lines()
        try:
            for change in changes:
                self._lines.add(json_line(change).encode())
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """How many they are."""
        return self._lines.count

    def __iter__(self) -> Iterator[Change]:
        return (from_json(json.loads(line)) for line in self._lines)

    def close(self) -> None:
        """Free the space."""
        self._lines.close()


_PIECE = 64 << 10


class Packed:
    """Lines in memory, compressed. A path takes about 10 to 30 bytes.

    For a confined daemon, which cannot create a temporary file; the store may be full. Each iteration starts
    with the first line; several can run at the same time.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._last: list[bytes] = []
        self._size = 0
        self.count = 0

    def add(self, line: bytes) -> None:
        """Add a line, which must not contain a newline."""
        self._last.append(line)
        self._size += len(line)
        self.count += 1
        if self._size > _PIECE:
            self._pieces.append(zlib.compress(b"\n".join(self._last), 1))
            self._last, self._size = [], 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            yield from zlib.decompress(piece).split(b"\n")
        yield from self._last
