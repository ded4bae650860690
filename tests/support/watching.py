"""Run ``cowfs watch`` during a test."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.mounts import COWFS, eventually, project_root
from tests.support.system import as_nobody_prefix


class Watch:
    """A running ``cowfs watch``, which prints every change from now on."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self.out = out
        self.err = err

    def lines(self) -> list[dict[str, Any]]:
        """Return the output of ``--json`` so far, without an incomplete last line."""
        return [json.loads(line) for line in self.out.read_bytes().split(b"\n")[:-1]]

    def changes(self) -> list[tuple[str, ...]]:
        """Return operation, path, and the new path if there is one, of each change."""
        return [
            tuple(str(line[name]) for name in ("operation", "path", "to") if name in line)
            for line in self.lines()
            if "operation" in line
        ]

    def wait_for(self, *change: str) -> list[tuple[str, ...]]:
        """Wait for this change; return all changes so far."""
        eventually(lambda: change in self.changes(), f"{change} is printed")
        return self.changes()

    def end(self, seconds: float = 30.0) -> tuple[int, str]:
        """Wait until it exits; return its exit code and error output."""
        return self.process.wait(seconds), self.err.read_text()


@contextmanager
def watching(
    mountpoint: Path, place: Path, *arguments: str, nobody: bool = False, json_lines: bool = True
) -> Iterator[Watch]:
    """Run ``cowfs watch``; it has started when this yields. Kill it at the end if it still runs."""
    number = len(list(place.glob("watch.*.out")))
    out, err = place / f"watch.{number}.out", place / f"watch.{number}.err"
    prefix: Sequence[str] = as_nobody_prefix() if nobody else []
    as_json = ["--json"] if json_lines else []
    command = [*prefix, *COWFS, "watch", os.fspath(mountpoint), *arguments, *as_json]
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env={**os.environ, "PYTHONPATH": project_root()}
        )
    try:
        eventually(lambda: "watching" in err.read_text() or process.poll() is not None, "it watches")
        yield Watch(process, out, err)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
