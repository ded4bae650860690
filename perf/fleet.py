"""Simulate a fleet that boots from one server: ``python -m perf.fleet [-o DIR]``.

100 machines mount one image by its URL at the same time and read the files that a login reads. Then they do
it again with their disk caches, and then a third time by downloading the whole image first. One server on the
loopback interface serves them, with some latency, some failures, and a shared line. Each machine uses cowfs's
client code, with one difference: a thread fetches the blocks instead of a process, so that two CPUs suffice
for all machines.

Needs mksquashfs, and matplotlib to draw the charts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cowfs.formats.squashfs.image import image_in
from cowfs.url.disk_cache import DiskCache, open_directory
from cowfs.url.fetcher import Worker
from cowfs.url.link import Link
from cowfs.url.remote import BLOCK, RemoteFile
from cowfs.url.settings import DEFAULT_LIMIT
from perf.machine import describe
from tests.support.fileserver import Behaviour, FileServer, serving

CLIENTS, PROCESSES = 100, 4
LATENCY, FAILURES = 0.020, 0.01
LINE = 125e6
"""Bytes per second that all clients share: 1 Gbit/s."""
IMAGE_BYTES = 160 << 20
"""Bytes of /usr that are in the image, before compression."""
READ = 0.08
"""Share of these bytes that a login reads, in whole files."""
MODES = {"url": "by URL, first boot", "again": "by URL, second boot", "download": "download first"}
RESULTS = Path("perf/results")
COLOURS = {"url": "#1b7f5c", "again": "#33527a", "download": "#c8643c"}


@dataclass
class Boot:
    """What one machine needed until the login."""

    seconds: float
    fetched: int
    hits: int = 0
    misses: int = 0


class _Fetcher:
    """A fetcher that runs in a thread of this process."""

    pid = 0

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fd))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._socket:
            Worker(self._socket, lambda _: None).run()

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0


def make_image(place: Path) -> tuple[Path, list[str]]:
    """Make the image in *place*; return its path and the files that a login reads."""
    tree, files, size = place / "tree", [], 0
    for top in ("/usr/bin", "/usr/lib/python3.11", "/usr/lib/x86_64-linux-gnu", "/usr/share"):
        for directory, _, names in os.walk(top):
            for name in sorted(names):
                path = os.path.join(directory, name)
                if size < IMAGE_BYTES and os.path.isfile(path) and not os.path.islink(path):
                    (tree / directory[1:]).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, tree / path[1:])
                    files.append(path)
                    size += os.path.getsize(path)
    image = place / "root.sqsh"
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress", "-comp", "zstd"], check=True)
    shutil.rmtree(tree)
    chosen, read = [], 0
    for path in random.Random(1).sample(files, len(files)):
        if read < READ * size:
            chosen.append(path)
            read += os.path.getsize(path)
    return image, sorted(chosen)


def log_in(data: Any, url: str, wanted: list[str]) -> None:
    """Open the image as a mount does, and read the files *wanted*."""
    with closing(image_in(data, url)) as image:
        image.fingerprint()
        for path in wanted:
            ref = image.root
            for name in path.strip("/").split("/"):
                inode = image.lookup(ref, os.fsencode(name))
                assert inode is not None
                ref = inode.ref
            file = image.data(ref)
            for at in range(0, file.size, 128 << 10):
                file.pread(128 << 10, at)


def boot_by_url(url: str, wanted: list[str], cache: str) -> Boot:
    """Boot from the server, with the disk cache *cache*."""
    begun = time.monotonic()
    link = Link(url, 600, _Fetcher)
    version = link.open()
    disk = DiskCache(open_directory(cache), url, version, BLOCK, DEFAULT_LIMIT)
    file = RemoteFile(link, version, disk)
    log_in(file, url, wanted)
    return Boot(time.monotonic() - begun, file.fetched, file.hits, file.misses)


def download_first(url: str, wanted: list[str], cache: str) -> Boot:
    """Download the whole image, with retries. Nothing is written, and the login takes no time."""
    begun, at, size, fetched = time.monotonic(), 0, -1, 0
    parts = urlsplit(url)
    while at != size:
        connection = http.client.HTTPConnection(parts.netloc, timeout=120)
        try:
            connection.request("GET", parts.path, headers={"Range": f"bytes={at}-{1 << 40}"})
            answer = connection.getresponse()
            size = int((answer.getheader("Content-Range") or "/-1").rpartition("/")[2])
            while piece := answer.read(1 << 20):
                at += len(piece)
                fetched += len(piece)
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
        finally:
            connection.close()
    return Boot(time.monotonic() - begun, fetched)


def _boot_some(mode: str, url: str, wanted: list[str], caches: list[str]) -> list[Boot]:
    """Boot one machine for each of *caches* at the same time, in threads."""
    boot: Callable[[str, list[str], str], Boot] = download_first if mode == "download" else boot_by_url
    with ThreadPoolExecutor(len(caches)) as pool:
        return list(pool.map(lambda cache: boot(url, wanted, cache), caches))


def run_mode(mode: str, server: FileServer, wanted: list[str], caches: list[str]) -> dict[str, Any]:
    """Boot all machines at the same time; return their figures and the server's."""
    bytes_before, requests_before = server.served.bytes, server.served.requests
    shares = [caches[number::PROCESSES] for number in range(PROCESSES)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES) as pool:
        pool.starmap(_warm_up, [() for _ in shares])
        jobs = [(mode, server.url(), wanted, share) for share in shares]
        done = pool.starmap(_boot_some, jobs, chunksize=1)
    boots = [boot for share in done for boot in share]
    return {
        "boots": [asdict(boot) for boot in boots],
        "served": server.served.bytes - bytes_before,
        "requests": server.served.requests - requests_before,
    }


def _warm_up() -> None:
    """Keep a process of the pool busy until all of them have started."""
    time.sleep(0.2)


def run(place: Path) -> dict[str, Any]:
    """Run all modes; return the results."""
    image, wanted = make_image(place)
    caches = [str(place / f"cache-{number}") for number in range(CLIENTS)]
    behaviour = Behaviour(latency=LATENCY, failures=FAILURES, bandwidth=LINE)
    results: dict[str, Any] = {
        "machine": describe(),
        "clients": CLIENTS,
        "latency": LATENCY,
        "failures": FAILURES,
        "line": LINE,
        "image": image.stat().st_size,
        "files": len(wanted),
        "modes": {},
    }
    with serving(image, behaviour) as server:
        for mode, title in MODES.items():
            begun = time.monotonic()
            results["modes"][mode] = run_mode(mode, server, wanted, caches)
            print(f"{title}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return results


def table(results: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| | login: median | 95 of 100 | last | fetched by each | all together | cache hits |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, title in MODES.items():
        result = results["modes"][mode]
        boots = result["boots"]
        seconds = sorted(boot["seconds"] for boot in boots)
        fetched = statistics.mean(boot["fetched"] for boot in boots)
        hits = sum(boot["hits"] for boot in boots)
        lookups = hits + sum(boot["misses"] for boot in boots)
        rate = f"{100 * hits / lookups:.1f} %" if lookups else ""
        times = [statistics.median(seconds), seconds[int(len(seconds) * 0.95) - 1], seconds[-1]]
        lines.append(
            f"| {title} | {' | '.join(f'{value:.1f} s' for value in times)} | {fetched / 1e6:.1f} MB |"
            f" {result['served'] / 1e6:,.0f} MB | {rate} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], target: Path) -> None:
    """Draw two charts into *target*: logins over time, and MB fetched by each machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    for mode, title in MODES.items():
        boots = results["modes"][mode]["boots"]
        seconds = sorted(boot["seconds"] for boot in boots)
        count = len(seconds)
        left.step([0, *seconds], range(count + 1), where="post", label=title, color=COLOURS[mode])
        fetched = statistics.mean(boot["fetched"] for boot in boots) / 1e6
        right.barh(title, fetched, color=COLOURS[mode])
        right.annotate(f" {fetched:.1f}", (fetched, title), va="center", fontsize=8)
    left.set_xlabel("seconds (left is better)", fontsize=9)
    left.set_ylabel("machines that have logged in", fontsize=9)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    right.set_xlabel("MB fetched by each machine", fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the simulation, print a table, and write the results and the charts."""
    parser = argparse.ArgumentParser(prog="perf.fleet", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="directory for both files")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cowfs-fleet-") as place:
        results = run(Path(place))
    stem = time.strftime("%Y-%m-%d-fleet")
    (options.output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    try:
        draw(results, options.output / f"{stem}.png")
    except ImportError:
        print("perf.fleet: no charts without matplotlib (scripts/setup --perf)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
