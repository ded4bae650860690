"""Take the samples: with a box for each workload, or one for all workloads of a group that run together."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf import corpus, machine, requests
from perf.bench import Workload
from perf.box import Box, SampleFailed
from perf.groups import Group
from perf.peers import System
from perf.samples import Results, Sample, rotated

MORE_SECONDS = 20
"""Seconds added to the time limit of a box for each workload after the first."""


@dataclass(slots=True)
class Part:
    """A workload, its sample, and its data from set-up to verification."""

    workload: Workload
    sample: Sample
    state: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Takes the samples one after the other, and saves them to *path* after each."""

    def __init__(
        self, results: Results, groups: list[Group], corpora: dict[str, corpus.Corpus],
        work: Path, options: argparse.Namespace, path: Path,
    ) -> None:  # fmt: skip
        self.results = results
        self.groups = groups
        self.corpora = corpora
        self.work = work
        self.options = options
        self.path = path
        self._count = 0

    def run_rounds(self, rounds: int) -> None:
        """Run each workload on all systems in each round; another system is first in each round."""
        start = time.monotonic()
        for turn in range(rounds):
            elapsed = time.monotonic() - start
            if turn and self.options.minutes and elapsed * (turn + 1) / turn > self.options.minutes * 60:
                self.results.rounds = turn
                return
            for group in self.groups:
                for number, workloads in enumerate(batches(group)):
                    for position, peer in enumerate(rotated(list(group.systems), turn + number)):
                        for sample in self._samples(group, workloads, peer, turn, position):
                            good = sample.seconds and not sample.error
                            result = f"{sample.seconds:.3f} s" if good else sample.error
                            head = f"round {turn + 1}/{rounds}  {sample.workload:14} {peer:28}"
                            print(head, result, flush=True)

    def _samples(
        self, group: Group, workloads: list[Workload], peer: str, turn: int, position: int
    ) -> list[Sample]:
        busy, load = machine.wait_until_quiet(self.options.quiet_wait), machine.load()
        parts = [Part(workload, Sample(workload.name, peer, turn, position)) for workload in workloads]
        self.take_samples(parts, group)
        samples = [part.sample for part in parts]
        for sample in samples:
            sample.busy_before, sample.load = busy, load
        self.results.samples += samples
        self.results.save(self.path)
        return samples

    def count_requests(self) -> None:
        """Take one traced sample of each workload on each FUSE system, without counting its time."""
        try:
            with requests.tracefs(self.work / "trace") as instance:
                for group in self.groups:
                    for workloads in batches(group):
                        for peer, system in group.systems.items():
                            if system.fuse:
                                self._count_requests_of(group, workloads, peer, instance)
        except (requests.Unavailable, subprocess.CalledProcessError) as error:
            print(f"no requests counted: {error}", file=sys.stderr)

    def _count_requests_of(self, group: Group, workloads: list[Workload], peer: str, instance: Path) -> None:
        kinds: dict[str, dict[str, requests.Kind]] = {workload.name: {} for workload in workloads}

        def run_traced(part: Part, box: Box) -> float:
            with requests.recorded(instance, box.merged, kinds[part.workload.name]):
                return part.workload.run(box)

        parts = [Part(workload, Sample(workload.name, peer, -1, 0)) for workload in workloads]
        self.take_samples(parts, group, run_traced)
        for part in parts:
            self.results.requests[f"{part.workload.name}/{peer}"] = {
                "seconds": part.sample.seconds,
                "daemon_cpu_seconds": part.sample.daemon_cpu_seconds,
                "error": part.sample.error,
                "kinds": requests.as_json(kinds[part.workload.name]),
            }

    def take_samples(
        self, parts: list[Part], group: Group, run: Callable[[Part, Box], float] | None = None
    ) -> None:  # fmt: skip
        """Fill in the samples of *parts*: new store, set-up, timed parts, unmount, verification."""
        self._count += 1
        scratch = self.work / "scratch" / f"box-{self._count}"
        scratch.mkdir()
        limit = self.options.limit + MORE_SECONDS * (len(parts) - 1)
        prefix = shlex.split(self.options.daemon_prefix)
        box = Box(self.work / f"box-{self._count}", scratch, self.corpora[group.image], limit, prefix)
        with ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
            cleanup.callback(box.close)
            box.open()
            with recorded_failure(parts):
                measure(box, parts, group.systems[parts[0].sample.system], run or run_untraced)


def batches(group: Group) -> Iterator[list[Workload]]:
    """Yield the workloads to run in one mount."""
    if group.together:
        yield list(group.workloads.values())
    else:
        yield from ([workload] for workload in group.workloads.values())


def run_untraced(part: Part, box: Box) -> float:
    """Run the workload; return the seconds it took."""
    return part.workload.run(box)


@contextmanager
def recorded_failure(parts: list[Part]) -> Iterator[None]:
    """Record an error in the block as the error of each of *parts* that has none."""
    why = ""
    try:
        yield
    except SampleFailed as error:
        why = str(error)
    except OSError as error:
        why = f"{type(error).__name__}: {error.strerror} ({Path(str(error.filename)).name})"
    for part in parts if why else []:
        part.sample.error = part.sample.error or why


def measure(box: Box, parts: list[Part], system: System, run: Callable[[Part, Box], float]) -> None:
    """Take the samples of one box; SampleFailed if a step that they share fails."""
    system.create(box)
    machine.drop_caches()
    mount(box, parts, system)
    for part in parts:
        box.state = part.state
        part.workload.setup(box)
    if any(part.workload.cold for part in parts):
        system.unmount(box)
        mount(box, parts, system)
        machine.drop_caches()
        warm_cache(box)
    for part in parts:
        with recorded_failure([part]):
            measure_one(box, part, run)
    begin = time.perf_counter()
    system.unmount(box)
    if box.image.exists():
        with box.image.open("rb") as image:
            os.fsync(image.fileno())
    if len(parts) == 1:
        parts[0].sample.settle_seconds = round(time.perf_counter() - begin, 6)
    written = [part for part in parts if part.workload.writes and not part.sample.error]
    if written:
        system.mount(box)
    for part in written:
        box.state = part.state
        with recorded_failure([part]):
            part.workload.verify(box)


def measure_one(box: Box, part: Part, run: Callable[[Part, Box], float]) -> None:
    """Run one workload; verify its result now if it does not write."""
    sample, box.state = part.sample, part.state
    cpu, usage = machine.cpu_times(), box.usage()
    sample.seconds = round(run(part, box), 6)
    cpu_after, usage_after = machine.cpu_times(), box.usage()
    sample.busy_cpu_seconds = round(cpu_after.busy - cpu.busy, 2)
    sample.steal_seconds = round(cpu_after.steal - cpu.steal, 2)
    if usage and usage_after:
        sample.daemon_cpu_seconds = round(usage_after.cpu - usage.cpu, 2)
        sample.rss_start, sample.rss_end = usage.rss, usage_after.rss
    if not part.workload.writes:
        part.workload.verify(box)


def mount(box: Box, parts: list[Part], system: System) -> None:
    """Mount *system*, and record how long that took."""
    begin = time.perf_counter()
    system.mount(box)
    seconds = round(time.perf_counter() - begin, 6)
    for part in parts:
        part.sample.mount_seconds = seconds


def warm_cache(box: Box) -> None:
    """Read what a cold workload shall not measure into the page cache: programs, and some images."""
    for program in ("find", "tar", "grep", "rm", "dd", "git", "unshare", "mount", "setpriv"):
        box.output([program, "--version"], box.scratch)
    box.output([machine.python(), "-I", "-S", "-c", "import hashlib, subprocess, time, sys"], box.scratch)
    if box.corpus.in_cache:
        box.keep_in_cache(box.corpus.image)
