"""Fuzz a Python target: mutate its inputs, and keep the inputs that reach new lines.

    python -m tests.fuzz.driver TARGET [--seconds S] [--seed N] [--findings DIR] [--keep DIR] INPUT...

It first runs the inputs in the files and directories INPUT, then mutations of them. It writes each finding to
DIR and prints its traceback. Exit status 1 means that there are findings. If an input kills the process or
takes too long, it is in the file ``last`` in DIR.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import logging
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.fuzz.bytes import mutate as mutate_bytes

Run = Callable[[bytes], object]
MEMORY = 768 << 20
"""The limit of memory, in bytes."""
INPUT_TIMEOUT = 20.0
"""Seconds that one input may take."""
_DISTINCT = 10
"""Stop after this number of findings at different places."""


@dataclass(frozen=True)
class Target:
    """A fuzz target. Each module in tests.fuzz.targets has one, called ``TARGET``."""

    run: Callable[[], AbstractContextManager[Run]]
    """Returns the function that runs an input. An exception from that function is a finding."""
    seeds: Callable[[], list[bytes]]
    """Returns the initial inputs."""
    measured: tuple[str, ...]
    """The prefixes of the modules whose lines are measured."""
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes
    largest: int = 1 << 17
    """The maximum size of an input in bytes."""


class Lines:
    """The lines of some modules that have run."""

    def __init__(self, measured: tuple[str, ...]) -> None:
        base = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._paths = tuple(os.path.join(base, *name.split(".")) for name in measured)
        self._ours: dict[CodeType, bool] = {}
        self._left: dict[CodeType, set[int]] = {}
        self.seen: set[tuple[str, int]] = set()
        self.start()

    def start(self) -> None:
        """Start to record lines, with sys.monitoring or sys.settrace."""
        if sys.version_info >= (3, 12):
            monitoring = sys.monitoring
            monitoring.use_tool_id(4, "fuzz")
            monitoring.register_callback(4, monitoring.events.LINE, self._line)
            monitoring.set_events(4, monitoring.events.LINE)
        else:
            sys.settrace(self._call)

    def _is_ours(self, code: CodeType) -> bool:
        known = self._ours.get(code)
        if known is None:
            known = self._ours[code] = code.co_filename.startswith(self._paths)
        return known

    def _line(self, code: CodeType, line: int) -> Any:
        if self._is_ours(code):
            self.seen.add((code.co_filename, line))
        return sys.monitoring.DISABLE  # type: ignore[attr-defined,unused-ignore] # report each line once

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        left = self._left.get(code)
        if left is None:
            lines = {line for _, _, line in code.co_lines() if line} if self._is_ours(code) else set()
            left = self._left[code] = lines
        return self._trace if left else None  # no new lines are left in it

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lineno in self._left[frame.f_code]:
            self._left[frame.f_code].discard(frame.f_lineno)
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace


@dataclass
class Fuzzer:
    """A run of the fuzzer."""

    target: Target
    run: Run
    findings: Path
    lines: Lines | None
    keep: Path | None = None
    pool: list[bytes] = field(default_factory=list)
    done: int = 0
    places: set[str] = field(default_factory=set)

    def one(self, data: bytes) -> bool:
        """Run an input; return whether it reached new lines."""
        before = len(self.lines.seen) if self.lines else 0
        os.pwrite(self._last, data, 0)
        os.ftruncate(self._last, len(data))
        faulthandler.dump_traceback_later(INPUT_TIMEOUT, exit=True)
        try:
            self.run(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:
            self._found(data, failure)
        self.done += 1
        return self.lines is not None and len(self.lines.seen) > before

    def begin(self, inputs: list[bytes]) -> None:
        """Run the initial inputs."""
        self.findings.mkdir(parents=True, exist_ok=True)
        self._last = os.open(self.findings / "last", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        for data in inputs:
            self.one(data)
        self.pool = list(inputs)

    def fuzz(self, choose: random.Random, deadline: float, runs: int) -> None:
        """Run mutations until the time or the number of runs is over."""
        end = self.done + runs
        while time.monotonic() < deadline and self.done < end and len(self.places) < _DISTINCT:
            data = self.target.mutate(choose.choice(self.pool), choose)[: self.target.largest]
            if self.one(data):
                self.pool.append(data)
                if self.keep is not None:
                    (self.keep / _name(data)).write_bytes(data)

    def end(self) -> None:
        """End the run: the last input was no finding."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._last)
        (self.findings / "last").unlink()

    def _found(self, data: bytes, failure: BaseException) -> None:
        place = f"{type(failure).__name__} {traceback.extract_tb(failure.__traceback__)[-1][:2]}"
        if place in self.places:
            return
        self.places.add(place)
        path = self.findings / _name(data)
        path.write_bytes(data)
        print(f"FINDING: {path}", flush=True)
        traceback.print_exception(failure, limit=-12, file=sys.stdout)
        sys.stdout.flush()


def _name(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()[:16]


def _inputs(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            yield file.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("inputs", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--runs", type=int, default=1 << 60, help="maximum number of new inputs")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz/findings"))
    parser.add_argument("--keep", type=Path, help="directory for inputs that reach new lines")
    options = parser.parse_args(arguments)
    target: Target = importlib.import_module(f"tests.fuzz.targets.{options.target}").TARGET
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    with target.run() as run:
        fuzzer = Fuzzer(target, run, options.findings, Lines(target.measured), options.keep)
        begin = time.monotonic()
        fuzzer.begin([*target.seeds(), *_inputs(options.inputs)])
        if options.runs and options.seconds:
            print(f"{options.target}: {fuzzer.done} initial inputs; the seed is {seed}", flush=True)
            fuzzer.fuzz(random.Random(seed), begin + options.seconds, options.runs)
        fuzzer.end()
    seen = len(fuzzer.lines.seen) if fuzzer.lines else 0
    seconds = max(time.monotonic() - begin, 0.001)
    print(
        f"{options.target}: {fuzzer.done} runs in {seconds:.0f} s ({fuzzer.done / seconds:.0f}/s),"
        f" {seen} lines reached, {len(fuzzer.pool)} inputs, {len(fuzzer.places)} findings"
    )
    return 1 if fuzzer.places else 0


if __name__ == "__main__":
    sys.exit(main())
