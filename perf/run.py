"""Run the workloads on cowfs and its peers, interleaved, and write the figures to ``perf/results/``.

    python -m perf.run                        everything, 5 rounds (about half an hour)
    python -m perf.run --quick                the main workloads, 2 rounds
    python -m perf.run -w untar,append -s cowfs,overlayfs -r 9
    python -m perf.run --requests -s cowfs    once more with every FUSE request counted
    python -m perf.run -w squash              the squashfs reader, beside squashfuse and the kernel
    python -m perf.run -w targets -r 3        what the targets are about: files, data, programs, users

Needs root: it mounts. It works in mount and process namespaces of its own, so that every mount, loop
device and daemon is gone when it ends, however it ends.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from perf import corpus, debian, images, machine, report
from perf.box import PROJECT
from perf.groups import Group, groups, select
from perf.peers import System, newest, systems
from perf.samples import Results
from perf.sampling import Runner

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
    made.add_argument(
        "--minutes", type=float, default=0, metavar="N", help="begin no round that would not end within these"
    )
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
        return outside(sys.argv[1:] if argv is None else argv, chosen)
    return inside(options, chosen, Path(os.environ[INSIDE]))


def outside(argv: list[str], chosen: list[Group]) -> int:
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
        if any(group.image == debian.NAME for group in chosen):
            if not debian.path(CACHE).exists():
                print("making the small Debian, once (some minutes) ...", flush=True)
            debian.make(CACHE)
        if why := newest.make():
            print(f"without the newest peers: {why}", flush=True)
        work = CACHE / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        before, shown = machine.offer_io_uring("Y"), machine.let_root_look("Y")
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
            machine.let_root_look(shown)
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
        (scratch, ["-t", "tmpfs", "-o", "mode=755", "tmpfs"]),
        (reference, ["-t", "squashfs", "-o", "loop,ro", str(CACHE / "lower.squashfs")]),
    ):
        directory.mkdir()
        subprocess.run(["mount", *how, str(directory)], check=True)
    made = {"": corpus.prepare(CACHE / "lower.squashfs", reference, scratch)}
    for compressor in sorted({group.image for group in chosen} - {""}):
        if compressor in (debian.NAME, images.USER):
            made[compressor] = prepare_small(compressor, work / f"reference-{compressor}", made[""], scratch)
            continue
        if not images.path(CACHE, compressor).exists():
            print(f"making the {compressor} image, once (some minutes) ...", flush=True)
        made[compressor] = images.prepare(CACHE, made[""], compressor, work / f"reference-{compressor}")
    return made


def prepare_small(name: str, reference: Path, lower: corpus.Corpus, scratch: Path) -> corpus.Corpus:
    """Mount the small Debian, or the image of a user's files, at *reference*, and return its corpus."""
    image = debian.path(CACHE) if name == debian.NAME else images.make_user(CACHE, lower)
    reference.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(image), str(reference)], check=True)
    entries = corpus.scan(reference)
    archived = corpus.for_archive(entries, 2_000) if name == images.USER else []
    archive = corpus.make_archive(scratch / f"{name}.tar", reference, archived)
    facts = {"image_bytes": image.stat().st_size, "entries": len(entries)}
    facts["fingerprint"] = corpus.fingerprint(entries)
    return replace(
        lower,
        image=image,
        reference=reference,
        entries=entries,
        archive=archive,
        archived=archived,
        facts=facts,
    )


def facts(system: System) -> dict[str, str | bool]:
    """What the results say about a system."""
    return {"version": system.version(), "mounted": system.options(), "fuse": system.fuse}


if __name__ == "__main__":
    sys.exit(main())
