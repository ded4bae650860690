"""Requests per operation: ``python -m perf.counts`` counts them and prints the table of docs/benchmarks.md.

    python -m perf.counts              count, and time, over io_uring (where the kernel has it) and /dev/fuse
    python -m perf.counts --write      and put the table into docs/benchmarks.md

``tests/mount/test_requests_counted.py`` compares what is counted with the document. FORGET is left out:
when the kernel forgets is its own affair, and nobody waits for it. Needs root.
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
from perf.operations import OPERATIONS, Operation, Place, lower_tree, outside_tree, versions
from perf.report import DOCUMENT, between

BEGIN, END = "<!-- requests per operation: made by perf.counts -->", "<!-- end of requests per operation -->"
COWFS = [machine.python(), "-m", "cowfs.cli.main"]
UNTOLD = {"FORGET", "BATCH_FORGET", "INTERRUPT", "DESTROY", "INIT"}
WAYS = {"io_uring": "io_uring", "dev_fuse": "/dev/fuse"}
PATIENCE = 10.0


@dataclass(slots=True)
class Row:
    """A row of the table."""

    title: str
    kinds: dict[str, float]
    """Requests of each kind for one operation."""
    us: dict[str, float] = field(default_factory=dict)
    """Microseconds that its caller waits for one, by transport."""

    def total(self) -> float:
        """How many requests there are for one."""
        return sum(self.kinds.values())

    def which(self) -> str:
        """The kinds in words, the most frequent first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(name if count == 1 else f"{count:g} {name}" for name, count in ordered)


class Counter:
    """What is counted on one mount."""

    def __init__(self, merged: Path, outside: Path, times: int) -> None:
        """*times*: how often each operation is counted that is not of a program."""
        self.merged = merged
        self.outside = outside
        self.times = times
        device = os.stat(merged).st_dev
        self._dev = f"{os.major(device)}:{os.minor(device)}"
        known = merged / "known"
        known.touch()
        known.read_bytes()  # with the first open the kernel learns whether it has to ask for one
        known.unlink()

    def count(self, operation: Operation) -> Row:
        """Do *operation*, which no other may have done here before, and count."""
        place = Place(self.merged, str(OPERATIONS.index(operation)), self.outside)
        os.mkdir(os.path.dirname(place.new(0)))
        numbers = range(2 if operation.program else self.times + 1)
        for number in numbers:
            operation.before(place, number)
        # With the first the kernel learns of the directories on the way, and of what the daemon cannot do.
        operation.do(place, 0)
        counted = numbers[1:]
        before = self._settled()
        begin = time.perf_counter()
        for number in counted:
            operation.do(place, number)
        seconds = time.perf_counter() - begin
        since = self._settled() - before
        kinds = {
            name: found.count / len(counted) for name, found in since.operations.items() if name not in UNTOLD
        }
        return Row(operation.title, kinds, {"": seconds / len(counted) * 1e6})

    def _settled(self) -> Requests:
        """What the daemon has counted once every file is released, which nobody waits for."""
        deadline = time.monotonic() + PATIENCE
        while True:
            facts = facts_of(self._dev)
            found = requests_in(facts)
            if found is None:
                raise RuntimeError("this daemon counts no requests")
            left = left_open(found, opened=facts["open_files"] is not None)
            if not found.under_way and not left:
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"{left} files are still open, {found.under_way} under way")
            time.sleep(0.005)


def left_open(requests: Requests, *, opened: bool) -> int:
    """How many files and directories are open of which we know; *opened*: files of the kernel's are."""

    def times(*names: str) -> int:
        operations = [requests.operations.get(name) for name in names]
        return sum(found.count - found.errors for found in operations if found)

    files = times("OPEN", "CREATE", "TMPFILE") - times("RELEASE") if opened else 0
    return files + times("OPENDIR") - times("RELEASEDIR")


def prepare(work: Path, times: int) -> Path:
    """Make the lower's image in *work*, and what programs need; return the image."""
    lower, outside, image = work / "lower", work / "outside", work / "lower.squashfs"
    outside.mkdir()
    lower_tree(lower, times + 1)
    outside_tree(outside, lower)
    pack = ["mksquashfs", str(lower), str(image), "-noappend", "-no-progress", "-quiet"]
    subprocess.run(pack, check=True, capture_output=True)
    return image


@contextmanager
def mounted(work: Path, image: Path, way: str) -> Iterator[Path]:
    """Mount *image* with a new store, as cowfs comes, and requests by *way*."""
    store, merged = work / f"{way}.store", work / way
    merged.mkdir(exist_ok=True)
    options = ["-o", "io_uring=off"] if way == "dev_fuse" else []
    run(["create", str(store), "4G"])
    run(["mount", str(image), str(merged), "--store", str(store), *options])
    try:
        yield merged
    finally:
        run(["umount", str(merged)])
        store.unlink()


def run(argv: list[str]) -> None:
    """Run cowfs."""
    done = subprocess.run(
        [*COWFS, *argv], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise RuntimeError(f"cowfs {argv[0]}: {done.stderr.strip()}")


def ways() -> list[str]:
    """How requests can come here."""
    switch = Path("/sys/module/fuse/parameters/enable_uring")
    return [*(["io_uring"] if switch.exists() else []), "dev_fuse"]


def measured(times: int, rounds: int) -> list[Row]:
    """Count and time every operation; the median of the rounds for the times."""
    rows = {operation.title: Row(operation.title, {}) for operation in OPERATIONS}
    taken: dict[tuple[str, str], list[float]] = {}
    before = machine.offer_io_uring("Y")
    try:
        with tempfile.TemporaryDirectory(prefix="cowfs-counts-") as made:
            work = Path(made)
            image = prepare(work, times)
            for way in [way for _ in range(rounds) for way in ways()]:
                with mounted(work, image, way) as merged:
                    counter = Counter(merged, work / "outside", times)
                    for operation in OPERATIONS:
                        found = counter.count(operation)
                        rows[found.title].kinds = found.kinds
                        taken.setdefault((found.title, way), []).append(found.us[""])
    finally:
        machine.offer_io_uring(before)
    for (title, way), values in taken.items():
        rows[title].us[way] = statistics.median(values)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The section of the document."""
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"Counted with {known}.",
        "",
        "| operation | requests | which | us, io_uring | us, /dev/fuse |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = [f"{row.us[way]:,.0f}" if way in row.us else "-" for way in WAYS]
        lines.append(f"| {row.title} | {row.total():g} | {row.which() or '-'} | {' | '.join(times)} |")
    return "\n".join(lines)


def read_table(text: str) -> tuple[dict[str, str], dict[str, Row]]:
    """The versions and the rows by title that the *text* of the document has; ValueError for nonsense."""
    section = text.partition(BEGIN)[2].partition(END)[0]
    counted = re.search(r"^Counted with (.*)\.$", section, re.M)
    if not counted:
        raise ValueError("the document does not say with what its requests were counted")
    known = dict(each.split(" ") for each in counted[1].split(", "))
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[0] in ("operation", "---"):
            continue
        kinds = {}
        for each in cells[2].split(", ") if cells[2] != "-" else []:
            count, _, name = each.rpartition(" ")
            kinds[name] = float(count or 1)
        row = Row(cells[0], kinds)
        if f"{row.total():g}" != cells[1]:
            raise ValueError(f"{cells[0]}: {cells[1]} requests, but those named are {row.total():g}")
        rows[row.title] = row
    return known, rows


def write(rows: list[Row]) -> None:
    """Put the table into the document."""
    between(DOCUMENT, BEGIN, END, f"\n{table(rows)}\n")


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="perf.counts", description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=200, help="how often to do each operation (200)")
    parser.add_argument("--rounds", type=int, default=3, help="for the times: their median is told (3)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("perf.counts: needs root", file=sys.stderr)
        return 2
    rows = measured(options.times, options.rounds)
    print(table(rows))
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
