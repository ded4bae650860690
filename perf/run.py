"""Run the workloads on cowfs and its peers, interleaved, and write the figures to ``perf/results/``.

    python -m perf.run                        everything, 5 rounds (about half an hour)
    python -m perf.run --quick                the main workloads, 2 rounds
    python -m perf.run -w untar,append -s cowfs,overlayfs -r 9
    python -m perf.run --requests -s cowfs    once more with every FUSE request counted
    python -m perf.run -w squash              the squashfs reader, beside squashfuse and the kernel

Needs root: it mounts. It works in mount and process namespaces of its own, so that every mount, loop
device and daemon is gone when it ends, however it ends.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from perf import corpus, images, machine, report, requests
from perf.bench import Workload
from perf.box import PROJECT, Box, SampleFailed
from perf.groups import Group, groups, select
from perf.peers import System, systems
from perf.samples import Results, Sample, rotated

RESULTS = PROJECT / "perf" / "results"
CACHE = PROJECT / ".cache" / "perf"
INSIDE = "COWFS_PERF_WORK"
PROGRAMS = {"mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs", "unshare": "util-linux", "tar": "tar"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="perf.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for group in groups().values() for name in (group.name, *group.workloads)]
    made.add_argument("-w", "--workloads", metavar="A,B", help="only these: " + ", ".join(names))
    made.add_argument("-s", "--systems", metavar="A,B", help="only these: " + ", ".join(systems()))
    made.add_argument("-r", "--rounds", type=int, help="rounds (5; 2 with --quick; 0 for --requests alone)")
    made.add_argument("--quick", action="store_true", help="only the main workloads, 2 rounds")
    made.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="for one sample (180)")
    made.add_argument(
        "--quiet-wait", type=float, default=10, metavar="SECONDS",
        help="how long to wait before a sample for other processes to calm down (10)",
    )  # fmt: skip
    made.add_argument(
        "--nice", type=int, default=0, metavar="N",
        help="run clients and daemons at this priority (-20..19; 0): on a machine that others use too",
    )  # fmt: skip
    made.add_argument("--requests", action="store_true", help="also count FUSE requests, in a further round")
    made.add_argument(
        "--daemon-prefix", default="", metavar="CMD", help="start FUSE daemons by it: a profiler"
    )
    made.add_argument("-o", "--output", type=Path, help="the results file (perf/results/DATE.json)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 if every sample succeeded, 1 if some failed, 2 if it cannot run."""
    options = parser().parse_args(argv)
    try:
        chosen = select(options.workloads, options.systems)
    except KeyError as error:
        print(f"perf.run: {error.args[0]}", file=sys.stderr)
        return 2
    if not chosen:
        print("perf.run: none of these systems can do any of these workloads", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("perf.run: needs root, because it mounts (sudo make perf)", file=sys.stderr)
        return 2
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            print(f"perf.run: {program} is not installed (Debian package {package})", file=sys.stderr)
            return 2
    if INSIDE not in os.environ:
        return outside(sys.argv[1:] if argv is None else argv)
    return inside(options, chosen, Path(os.environ[INSIDE]))


def outside(argv: list[str]) -> int:
    """Run the suite in new namespaces, and remove its working directory afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("perf.run: another run is going on here, and both would be wrong", file=sys.stderr)
            return 2
        if not (CACHE / "lower.squashfs").exists():
            print("making the lower image, once (some minutes) ...", flush=True)
        corpus.make_image(CACHE)
        work = CACHE / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        before = machine.offer_io_uring("Y")
        # The end of this process ends that of unshare, and the end of unshare all that it holds.
        tied = ["setpriv", "--pdeathsig", "KILL", "--"]
        namespaces = [*tied, "unshare", "--mount", "--propagation=private", "--pid", "--fork", "--mount-proc"]
        command = [*namespaces, "--kill-child", machine.python(), "-m", "perf.run", *argv]
        try:
            with subprocess.Popen(command, cwd=PROJECT, env={**os.environ, INSIDE: str(work)}) as process:
                signal.signal(signal.SIGTERM, lambda *_: process.kill())
                return process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            machine.offer_io_uring(before)
            # The namespaces are gone, and the mounts with them: nothing below is anything but plain files.
            shutil.rmtree(work, ignore_errors=True)


def inside(options: argparse.Namespace, chosen: list[Group], work: Path) -> int:
    """The run itself, within the namespaces."""
    if options.quick and not options.workloads:
        chosen = [replace(g, workloads={n: w for n, w in g.workloads.items() if w.main}) for g in chosen]
    os.setpriority(os.PRIO_PROCESS, 0, options.nice)
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    chosen = [without_missing(group) for group in chosen]
    made = prepare(chosen, work)
    started = datetime.datetime.now().astimezone()
    results = Results(
        started=started.isoformat(timespec="seconds"),
        machine={**machine.describe(), "nice": options.nice},
        versions=machine.versions(PROJECT),
        corpus=made[""].facts | {"images": {name: of.facts for name, of in made.items() if name}},
        systems={name: facts(system) for group in chosen for name, system in group.systems.items()},
        workloads={
            n: {"title": w.title, "cold": w.cold, "main": w.main}
            for group in chosen
            for n, w in group.workloads.items()
        },
        rounds=rounds,
    )
    path = options.output or RESULTS / f"{started:%Y-%m-%d-%H%M}.json"
    runner = Runner(results, chosen, made, work, options, path)
    try:
        runner.rounds(rounds)
        if options.requests:
            runner.count_requests()
    except KeyboardInterrupt:
        print("interrupted: the samples so far are kept", file=sys.stderr)
    results.save(path)
    print(report.text(results))
    print(f"written to {os.path.relpath(path)}")
    return 1 if results.errors() else 0


def without_missing(group: Group) -> Group:
    """*group* without the systems that cannot run here; says which, and why."""
    why = {name: system.missing() for name, system in group.systems.items()}
    for name in filter(why.get, why):
        print(f"without {name}: {why[name]}", flush=True)
    return replace(group, systems={name: s for name, s in group.systems.items() if not why[name]})


def prepare(chosen: list[Group], work: Path) -> dict[str, corpus.Corpus]:
    """Mount what is needed, and return the corpora by compressor; that of the unions is under ""."""
    scratch, reference = work / "scratch", work / "reference"
    for directory, how in (
        (work / "fusectl", ["-t", "fusectl", "fusectl"]),
        (scratch, ["-t", "tmpfs", "-o", "mode=700", "tmpfs"]),
        (reference, ["-t", "squashfs", "-o", "loop,ro", str(CACHE / "lower.squashfs")]),
    ):
        directory.mkdir()
        subprocess.run(["mount", *how, str(directory)], check=True)
    made = {"": corpus.prepare(CACHE / "lower.squashfs", reference, scratch)}
    for compressor in filter(None, (group.compressor for group in chosen)):
        if not images.path(CACHE, compressor).exists():
            print(f"making the {compressor} image, once (some minutes) ...", flush=True)
        made[compressor] = images.prepare(CACHE, made[""], compressor, work / f"reference-{compressor}")
    return made


def facts(system: System) -> dict[str, str | bool]:
    """What the results say about a system."""
    return {"version": system.version(), "mounted": system.options(), "fuse": system.fuse}


class Runner:
    """Takes the samples, one after the other."""

    def __init__(
        self, results: Results, chosen: list[Group], made: dict[str, corpus.Corpus],
        work: Path, options: argparse.Namespace, path: Path,
    ) -> None:  # fmt: skip
        self.results = results
        self.groups = chosen
        self.corpora = made
        self.work = work
        self.options = options
        self.path = path
        self._count = 0

    def rounds(self, rounds: int) -> None:
        """Each round: each workload on all systems, one after the other, the first one changing."""
        for turn in range(rounds):
            for group in self.groups:
                for number, workload in enumerate(group.workloads.values()):
                    for position, peer in enumerate(rotated(list(group.systems), turn + number)):
                        sample = self._sample(group, workload, peer, turn, position)
                        good = sample.seconds and not sample.error
                        took = f"{sample.seconds:.3f} s" if good else sample.error
                        print(f"round {turn + 1}/{rounds}  {workload.name:12} {peer:28} {took}", flush=True)

    def _sample(self, group: Group, workload: Workload, peer: str, turn: int, position: int) -> Sample:
        sample = Sample(workload.name, peer, turn, position)
        sample.busy_before = machine.wait_until_quiet(self.options.quiet_wait)
        sample.load = machine.load()
        self.take(sample, group, workload)
        self.results.samples.append(sample)
        self.results.save(self.path)
        return sample

    def count_requests(self) -> None:
        """One traced sample of each workload on each FUSE system; its time does not count."""
        try:
            with requests.tracefs(self.work / "trace") as instance:
                for group in self.groups:
                    for workload in group.workloads.values():
                        for peer, system in group.systems.items():
                            if system.fuse:
                                self._count_requests_of(group, workload, peer, instance)
        except (requests.Unavailable, subprocess.CalledProcessError) as error:
            print(f"no requests counted: {error}", file=sys.stderr)

    def _count_requests_of(self, group: Group, workload: Workload, peer: str, instance: Path) -> None:
        kinds: dict[str, requests.Kind] = {}

        def traced(box: Box) -> float:
            with requests.recorded(instance, box.merged, kinds):
                return workload.run(box)

        sample = Sample(workload.name, peer, -1, 0)
        self.take(sample, group, workload, traced)
        self.results.requests[f"{workload.name}/{peer}"] = {
            "seconds": sample.seconds,
            "daemon_cpu_seconds": sample.daemon_cpu_seconds,
            "error": sample.error,
            "kinds": requests.as_json(kinds),
        }

    def take(
        self, sample: Sample, group: Group, workload: Workload, run: Callable[[Box], float] | None = None
    ) -> None:
        """Fill in *sample*: a fresh store, set-up, the timed part, unmount, verification."""
        self._count += 1
        scratch = self.work / "scratch" / f"box-{self._count}"
        scratch.mkdir()
        prefix = shlex.split(self.options.daemon_prefix)
        corpus = self.corpora[group.compressor]
        box = Box(self.work / f"box-{self._count}", scratch, corpus, self.options.limit, prefix)
        with ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
            cleanup.callback(box.close)
            box.open()
            try:
                measure(box, sample, workload, group.systems[sample.system], run or workload.run)
            except SampleFailed as error:
                sample.error = str(error)
            except OSError as error:
                sample.error = f"{type(error).__name__}: {error.strerror} ({Path(str(error.filename)).name})"


def measure(
    box: Box, sample: Sample, workload: Workload, system: System, run: Callable[[Box], float]
) -> None:
    """The course of one sample; SampleFailed when a step does."""
    system.create(box)
    machine.drop_caches()
    mount(box, sample, system)
    workload.setup(box)
    if workload.cold:
        system.unmount(box)
        mount(box, sample, system)
        machine.drop_caches()
        warm(box)
    cpu, usage = machine.cpu_times(), box.usage()
    sample.seconds = round(run(box), 6)
    cpu_after, usage_after = machine.cpu_times(), box.usage()
    sample.busy_cpu_seconds = round(cpu_after.busy - cpu.busy, 2)
    sample.steal_seconds = round(cpu_after.steal - cpu.steal, 2)
    if usage and usage_after:
        sample.daemon_cpu_seconds = round(usage_after.cpu - usage.cpu, 2)
        sample.rss_start, sample.rss_end = usage.rss, usage_after.rss
    if not workload.writes:
        workload.verify(box)
    begin = time.perf_counter()
    system.unmount(box)
    if box.image.exists():
        with box.image.open("rb") as image:
            os.fsync(image.fileno())
    sample.settle_seconds = round(time.perf_counter() - begin, 6)
    if workload.writes:
        system.mount(box)
        workload.verify(box)


def mount(box: Box, sample: Sample, system: System) -> None:
    """Mount *system* and note how long that took."""
    begin = time.perf_counter()
    system.mount(box)
    sample.mount_seconds = round(time.perf_counter() - begin, 6)


def warm(box: Box) -> None:
    """Read into the page cache again what a cold start is not about: programs, and some images."""
    for program in ("find", "tar", "grep", "rm", "dd", "git"):
        box.output([program, "--version"], box.scratch)
    box.output([machine.python(), "-I", "-S", "-c", "import hashlib, time, sys"], box.scratch)
    if box.corpus.in_cache:
        box.keep_in_cache(box.corpus.image)


if __name__ == "__main__":
    sys.exit(main())
