"""Changes that are kept so that they can be read again: a few in memory, many in a temporary file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator

from cowfs.changes.render import from_json, json_line
from cowfs.types import Change

_IN_MEMORY = 4 << 20
"""Bytes."""


class Spool:
    """The changes that were found. Each iteration starts with the first. Close it at the end."""

    def __init__(self, changes: Iterable[Change]) -> None:
        """Find them all. Blocks; OSError of the temporary file, which has no name."""
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - close() closes it
        self.count = 0
        try:
            for change in changes:
                self._file.write(json_line(change).encode() + b"\n")
                self.count += 1
        except BaseException:
            self._file.close()
            raise

    def __iter__(self) -> Iterator[Change]:
        at = 0
        while True:
            self._file.seek(at)  # another iteration may run at the same time
            lines = self._file.readlines(1 << 16)
            if not lines:
                return
            at = self._file.tell()
            for line in lines:
                yield from_json(json.loads(line))

    def close(self) -> None:
        """Free the space."""
        self._file.close()
