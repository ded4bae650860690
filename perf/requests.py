"""Count and time every request to a FUSE daemon, with the kernel's tracepoints.

A separate trace instance records ``fuse:fuse_request_send`` and ``fuse:fuse_request_end``
(fs/fuse/fuse_trace.h, Linux 6.11 or newer). The time of a request is how long the kernel waits for it: the
daemon's work and the wake-ups on both sides, without the work of the client.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

BUFFER_KIB = 96 << 10
_EVENT = re.compile(
    r"\s(?P<time>\d+\.\d+): fuse_request_(?P<which>send|end): connection (?P<dev>\d+) req (?P<id>\d+)"
    r"(?: opcode \d+ \(FUSE_(?P<name>\w+)\))?"
)


@dataclass(slots=True)
class Kind:
    """The requests of one kind."""

    count: int = 0
    seconds: float = 0.0
    """Total time from the request to the reply; 0 for kinds without a reply (FORGET)."""


class Unavailable(Exception):
    """This kernel cannot trace FUSE requests. The message says why."""


@contextlib.contextmanager
def tracefs(mountpoint: Path) -> Iterator[Path]:
    """Mount tracefs, and create a trace instance with the FUSE events off; yield the path of the instance."""
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tracefs", "tracefs", str(mountpoint)], check=True, capture_output=True)
    instance = mountpoint / "instances" / f"cowfs-perf-{os.getpid()}"
    try:
        if not (mountpoint / "events/fuse/fuse_request_send").is_dir():
            raise Unavailable("the kernel has no fuse tracepoints (Linux 6.11 has)")
        instance.mkdir()
        (instance / "buffer_size_kb").write_text(str(BUFFER_KIB))
        (instance / "trace_clock").write_text("mono")
        yield instance
    finally:
        with contextlib.suppress(OSError):
            instance.rmdir()
        subprocess.run(["umount", str(mountpoint)], check=False, capture_output=True)


@contextlib.contextmanager
def recorded(instance: Path, mountpoint: Path, kinds: dict[str, Kind]) -> Iterator[None]:
    """Add to *kinds* the requests that the FUSE filesystem at *mountpoint* receives within the block."""
    events = instance / "events/fuse"
    # The number of a connection is the minor device number of its filesystem.
    connection = os.minor(mountpoint.stat().st_dev)
    (instance / "trace").write_text("")
    for event in ("fuse_request_send", "fuse_request_end"):
        (events / event / "filter").write_text(f"connection == {connection}")
        (events / event / "enable").write_text("1")
    try:
        yield
    finally:
        (events / "enable").write_text("0")
    with (instance / "trace").open() as lines:
        kinds.update(parse(lines))


def parse(lines: Iterator[str]) -> dict[str, Kind]:
    """Add up the events of a trace in the format of tracefs."""
    kinds: dict[str, Kind] = defaultdict(Kind)
    sent: dict[tuple[str, str], tuple[float, Kind]] = {}
    for line in lines:
        event = _EVENT.search(line)
        if not event:
            continue
        key = (event["dev"], event["id"])
        if event["which"] == "send":
            kind = kinds[event["name"] or "?"]
            kind.count += 1
            sent[key] = (float(event["time"]), kind)
        elif key in sent:
            begin, kind = sent.pop(key)
            kind.seconds += float(event["time"]) - begin
    return dict(kinds)


def as_json(kinds: dict[str, Kind]) -> dict[str, dict[str, float]]:
    """Return *kinds* as plain data, the most expensive first."""
    ordered = sorted(kinds.items(), key=lambda item: -item[1].seconds)
    return {name: {k: round(v, 6) for k, v in asdict(kind).items()} for name, kind in ordered}
