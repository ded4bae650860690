"""Count the FUSE requests per operation, and print the table of docs/benchmarks.md.

    python -m perf.counts              count and time, over io_uring (if the kernel has it) and /dev/fuse
    python -m perf.counts --write      also write the table to docs/benchmarks.md

``tests/mount/test_requests_counted.py`` compares the counts with the document. FORGET is not counted: the
kernel sends it at a time of its own, and no program waits for it. Needs root.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cowfs.cli.requests import Requests, requests_in
from cowfs.client import facts_of
from perf import machine
from perf.box import PROJECT
from perf.operations import OPERATIONS, Operation, Place, make_lower_tree, make_outside_tree, versions
from perf.report import DOCUMENT, replace_section

BEGIN, END = "<!-- requests per operation: made by perf.counts -->", "<!-- end of requests per operation -->"
COWFS = [machine.python(), "-m", "cowfs.cli.main"]
NOT_COUNTED = {"FORGET", "BATCH_FORGET", "INTERRUPT", "DESTROY", "INIT"}
TRANSPORTS = {"io_uring": "io_uring", "dev_fuse": "/dev/fuse"}
TIMEOUT = 10.0
"""Seconds to wait until all files are released."""


@dataclass(slots=True)
class Row:
    """A row of the table."""

    title: str
    kinds: dict[str, float]
    """Number of requests of each kind, for one operation."""
    us: dict[str, float] = field(default_factory=dict)
    """Microseconds that one operation takes, by transport."""

    def total(self) -> float:
        """Return the number of requests for one operation."""
        return sum(self.kinds.values())

    def kinds_text(self) -> str:
        """Return the kinds with their numbers, the most frequent first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(name if count == 1 else f"{count:g} {name}" for name, count in ordered)


class Counter:
    """Counts requests on one mount."""

    def __init__(self, merged: Path, outside: Path, times: int) -> None:
        """Count on the mount at *merged*; repeat operations *times* times, except those of programs."""
        self.merged = merged
        self.outside = outside
        self.times = times
        device = os.stat(merged).st_dev
        self._dev = f"{os.major(device)}:{os.minor(device)}"
        probe = merged / "probe"
        probe.touch()
        probe.read_bytes()  # at the first open the kernel learns whether it must send OPEN at all
        probe.unlink()

    def count(self, operation: Operation) -> Row:
        """Do *operation* and return its counts. Each operation can be counted only once per mount."""
        place = Place(self.merged, str(OPERATIONS.index(operation)), self.outside)
        os.mkdir(os.path.dirname(place.new(0)))
        numbers = range(2 if operation.program else self.times + 1)
        for number in numbers:
            operation.prepare(place, number)
        # The first time, the kernel also looks up the directories, and learns what the daemon does not
        # support.
        operation.do(place, 0)
        counted = numbers[1:]
        before = self._wait_until_released()
        begin = time.perf_counter()
        for number in counted:
            operation.do(place, number)
        seconds = time.perf_counter() - begin
        difference = self._wait_until_released() - before
        kinds = {
            name: counts.count / len(counted)
            for name, counts in difference.operations.items()
            if name not in NOT_COUNTED
        }
        return Row(operation.title, kinds, {"": seconds / len(counted) * 1e6})

    def _wait_until_released(self) -> Requests:
        """Wait until every file is released, as close(2) does not; return the daemon's counts."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            facts = facts_of(self._dev)
            requests = requests_in(facts)
            if requests is None:
                raise RuntimeError("this daemon counts no requests")
            open_files = open_file_count(requests, sends_open=facts["open_files"] is not None)
            if not requests.under_way and not open_files:
                return requests
            if time.monotonic() > deadline:
                raise RuntimeError(f"{open_files} files still open, {requests.under_way} requests pending")
            time.sleep(0.005)


def open_file_count(requests: Requests, *, sends_open: bool) -> int:
    """Return how many files and directories are open, as far as the daemon knows.

    *sends_open*: whether the kernel sends OPEN and RELEASE for files.
    """

    def successes(*names: str) -> int:
        operations = [requests.operations.get(name) for name in names]
        return sum(counts.count - counts.errors for counts in operations if counts)

    files = successes("OPEN", "CREATE", "TMPFILE") - successes("RELEASE") if sends_open else 0
    return files + successes("OPENDIR") - successes("RELEASEDIR")


def prepare(work: Path, times: int) -> Path:
    """Make the image of the lower in *work*, and the files that programs read; return the image."""
    lower, outside, image = work / "lower", work / "outside", work / "lower.squashfs"
    outside.mkdir()
    make_lower_tree(lower, times + 1)
    make_outside_tree(outside, lower)
    pack = ["mksquashfs", str(lower), str(image), "-noappend", "-no-progress", "-quiet"]
    subprocess.run(pack, check=True, capture_output=True)
    return image


@contextmanager
def mounted(work: Path, image: Path, transport: str) -> Iterator[Path]:
    """Mount *image* with a new store and the default options, with requests over *transport*."""
    store, merged = work / f"{transport}.store", work / transport
    merged.mkdir(exist_ok=True)
    options = ["-o", "io_uring=off"] if transport == "dev_fuse" else []
    run(["create", str(store), "4G"])
    run(["mount", str(image), str(merged), "--store", str(store), *options])
    try:
        yield merged
    finally:
        run(["umount", str(merged)])
        store.unlink()


def run(argv: list[str]) -> None:
    """Run cowfs; RuntimeError with its message if it fails."""
    done = subprocess.run(
        [*COWFS, *argv], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise RuntimeError(f"cowfs {argv[0]}: {done.stderr.strip()}")


def available_transports() -> list[str]:
    """Return the transports that this kernel has."""
    parameter = Path("/sys/module/fuse/parameters/enable_uring")
    return [*(["io_uring"] if parameter.exists() else []), "dev_fuse"]


def measure(times: int, rounds: int) -> list[Row]:
    """Count and time every operation; the times are the medians of the rounds."""
    rows = {operation.title: Row(operation.title, {}) for operation in OPERATIONS}
    us: dict[tuple[str, str], list[float]] = {}
    old = machine.set_io_uring("Y")
    try:
        with tempfile.TemporaryDirectory(prefix="cowfs-counts-") as directory:
            work = Path(directory)
            image = prepare(work, times)
            for transport in available_transports() * rounds:
                with mounted(work, image, transport) as merged:
                    counter = Counter(merged, work / "outside", times)
                    for operation in OPERATIONS:
                        row = counter.count(operation)
                        rows[row.title].kinds = row.kinds
                        us.setdefault((row.title, transport), []).append(row.us[""])
    finally:
        machine.set_io_uring(old)
    for (title, transport), values in us.items():
        rows[title].us[transport] = statistics.median(values)
    return list(rows.values())


def render_table(rows: list[Row]) -> str:
    """Return the section of the document, in Markdown."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"Counted with {known}.",
        "",
        "| operation | requests | kinds | us, io_uring | us, /dev/fuse |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = [f"{row.us[transport]:,.0f}" if transport in row.us else "-" for transport in TRANSPORTS]
        lines.append(f"| {row.title} | {row.total():g} | {row.kinds_text() or '-'} | {' | '.join(times)} |")
    return "\n".join(lines)


def read_table(text: str) -> tuple[dict[str, str], dict[str, Row]]:
    """Return the versions, and the rows by title, from the document's *text*; ValueError if malformed."""
    section = text.partition(BEGIN)[2].partition(END)[0]
    counted = re.search(r"^Counted with (.*)\.$", section, re.M)
    if not counted:
        raise ValueError("the document has no versions (Counted with ...)")
    known = dict(program.split(" ") for program in counted[1].split(", "))
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[0] in ("operation", "---"):
            continue
        kinds = {}
        for kind in cells[2].split(", ") if cells[2] != "-" else []:
            count, _, name = kind.rpartition(" ")
            kinds[name] = float(count or 1)
        row = Row(cells[0], kinds)
        if f"{row.total():g}" != cells[1]:
            raise ValueError(f"{cells[0]}: {cells[1]} requests, but its kinds add up to {row.total():g}")
        rows[row.title] = row
    return known, rows


def main(argv: list[str] | None = None) -> int:
    """Count and time all operations, and print the table."""
    parser = argparse.ArgumentParser(prog="perf.counts", description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=200, help="how often to do each operation (200)")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure each time (3)")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("perf.counts: needs root", file=sys.stderr)
        return 2
    table = render_table(measure(options.times, options.rounds))
    print(table)
    if options.write:
        replace_section(DOCUMENT, BEGIN, END, f"\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
