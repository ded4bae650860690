"""Run the workloads on cowfs and its peers, interleaved, and write the figures to ``perf/results/``.

    python -m perf.run                        all workloads of a union, 5 rounds (about half an hour)
    python -m perf.run --quick                the main workloads, 2 rounds
    python -m perf.run -w untar,append -s cowfs,overlayfs -r 9
    python -m perf.run --requests -s cowfs    also count every FUSE request, in a further round
    python -m perf.run -w squash              the squashfs reader, squashfuse and the kernel
    python -m perf.run -w targets -r 3        the workloads of the targets: files, data, programs, users

Needs root, because it mounts. It runs in its own mount and process namespaces, so no mount, loop device or
daemon remains after it ends, even if it is killed.
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
WORK_VARIABLE = "COWFS_PERF_WORK"
"""The environment variable with the working directory, set inside the namespaces."""
PROGRAMS = {"mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs", "unshare": "util-linux", "tar": "tar"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="perf.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for group in groups().values() for name in (group.name, *group.workloads)]
    made.add_argument("-w", "--workloads", metavar="A,B", help="only these: " + ", ".join(names))
    made.add_argument("-s", "--systems", metavar="A,B", help="only these: " + ", ".join(systems()))
    made.add_argument("-r", "--rounds", type=int, help="rounds (5; 2 with --quick; 0 for --requests alone)")
    made.add_argument(
        "--minutes", type=float, default=0, metavar="N", help="start no round that would end after N minutes"
    )
    made.add_argument("--quick", action="store_true", help="only the main workloads, 2 rounds")
    made.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="limit for a sample (180)")
    made.add_argument(
        "--quiet-wait", type=float, default=10, metavar="SECONDS",
        help="how long to wait before a sample until other processes are idle (10)",
    )  # fmt: skip
    made.add_argument(
        "--nice", type=int, default=0, metavar="N",
        help="priority of clients and daemons (-20..19; 0), for a machine with other users",
    )  # fmt: skip
    made.add_argument("--requests", action="store_true", help="also count FUSE requests, in a further round")
    made.add_argument(
        "--daemon-prefix",
        default="",
        metavar="CMD",
        help="start FUSE daemons with it, for example a profiler",
    )
    made.add_argument("-o", "--output", type=Path, help="results file (perf/results/DATE.json)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 if every sample succeeded, 1 if some failed, 2 if it cannot run."""
    options = parser().parse_args(argv)
    try:
        selected = select(options.workloads, options.systems)
    except KeyError as error:
        print(f"perf.run: {error.args[0]}", file=sys.stderr)
        return 2
    if not selected:
        print("perf.run: none of these systems can run any of these workloads", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("perf.run: needs root, because it mounts (sudo make perf)", file=sys.stderr)
        return 2
    if missing := machine.missing_programs(*PROGRAMS.items()):
        print(f"perf.run: {missing}", file=sys.stderr)
        return 2
    if WORK_VARIABLE not in os.environ:
        return run_in_namespaces(sys.argv[1:] if argv is None else argv, selected)
    return run_suite(options, selected, Path(os.environ[WORK_VARIABLE]))


def run_in_namespaces(argv: list[str], selected: list[Group]) -> int:
    """Run the suite in new namespaces; return its exit status. Remove its working directory afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("perf.run: another run is in progress, and each would disturb the other", file=sys.stderr)
            return 2
        if not (CACHE / "lower.squashfs").exists():
            print("making the lower image for this and later runs (some minutes) ...", flush=True)
        corpus.make_image(CACHE)
        if any(group.image == debian.NAME for group in selected):
            if not debian.path(CACHE).exists():
                print("making the small Debian for this and later runs (some minutes) ...", flush=True)
            debian.make(CACHE)
        if error := newest.download():
            print(f"without the peers of Debian 13: {error}", flush=True)
        work = CACHE / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        old_io_uring, old_root_access = machine.set_io_uring("Y"), machine.set_root_access("Y")
        # If this process dies, the kernel kills unshare, and with unshare everything in the namespaces.
        prefix = "setpriv --pdeathsig KILL --"
        prefix += " unshare --mount --propagation=private --pid --fork --mount-proc --kill-child"
        command = [*prefix.split(), machine.python(), "-m", "perf.run", *argv]
        environment = {**os.environ, WORK_VARIABLE: str(work)}
        try:
            with subprocess.Popen(command, cwd=PROJECT, env=environment) as process:
                signal.signal(signal.SIGTERM, lambda *_: process.kill())
                return process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            machine.set_io_uring(old_io_uring)
            machine.set_root_access(old_root_access)
            # The mounts have disappeared with the namespaces: only plain files are left below.
            shutil.rmtree(work, ignore_errors=True)


def run_suite(options: argparse.Namespace, selected: list[Group], work: Path) -> int:
    """Run the suite inside the namespaces; return the exit status."""
    if options.quick and not options.workloads:
        selected = [replace(g, workloads={n: w for n, w in g.workloads.items() if w.main}) for g in selected]
    os.setpriority(os.PRIO_PROCESS, 0, options.nice)
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    selected = [without_missing(group) for group in selected]
    corpora = prepare(selected, work)
    started = datetime.datetime.now().astimezone()
    results = Results(
        started=started.isoformat(timespec="seconds"),
        machine={**machine.describe(), "nice": options.nice},
        versions=machine.versions(PROJECT),
        corpus=corpora[""].facts | {"images": {name: data.facts for name, data in corpora.items() if name}},
        systems={name: facts(system) for group in selected for name, system in group.systems.items()},
        workloads={
            n: {"title": w.title, "cold": w.cold, "main": w.main}
            for group in selected
            for n, w in group.workloads.items()
        },
        rounds=rounds,
    )
    path = options.output or RESULTS / f"{started:%Y-%m-%d-%H%M}.json"
    runner = Runner(results, selected, corpora, work, options, path)
    try:
        runner.run_rounds(rounds)
        if options.requests:
            runner.count_requests()
    except KeyboardInterrupt:
        print("interrupted: the samples so far are saved", file=sys.stderr)
    results.save(path)
    print(report.text(results))
    print(f"results saved to {os.path.relpath(path)}")
    return 1 if results.errors() else 0


def without_missing(group: Group) -> Group:
    """Return *group* without the systems that cannot run here; print which, and why."""
    missing = {name: system.missing_requirements() for name, system in group.systems.items()}
    for name in filter(missing.get, missing):
        print(f"without {name}: {missing[name]}", flush=True)
    return replace(group, systems={name: s for name, s in group.systems.items() if not missing[name]})


def prepare(selected: list[Group], work: Path) -> dict[str, corpus.Corpus]:
    """Mount what the groups need; return the corpora by the name of the image, which is "" for the unions."""
    scratch, reference = work / "scratch", work / "reference"
    for directory, arguments in (
        (work / "fusectl", ["-t", "fusectl", "fusectl"]),
        (scratch, ["-t", "tmpfs", "-o", "mode=755", "tmpfs"]),
        (reference, ["-t", "squashfs", "-o", "loop,ro", str(CACHE / "lower.squashfs")]),
    ):
        directory.mkdir()
        subprocess.run(["mount", *arguments, str(directory)], check=True)
    lower = corpus.prepare(CACHE / "lower.squashfs", reference, scratch)
    corpora = {"": lower}
    for name in sorted({group.image for group in selected} - {""}):
        reference = work / f"reference-{name}"
        if name in (debian.NAME, images.USER):
            corpora[name] = prepare_small(name, reference, lower, scratch)
            continue
        if not images.path(CACHE, name).exists():
            print(f"making the {name} image for this and later runs (some minutes) ...", flush=True)
        corpora[name] = images.prepare(CACHE, lower, name, reference)
    return corpora


def prepare_small(name: str, reference: Path, lower: corpus.Corpus, scratch: Path) -> corpus.Corpus:
    """Mount the small Debian or the image of a user's files at *reference*, and return its corpus."""
    image = debian.path(CACHE) if name == debian.NAME else images.make_user(CACHE, lower)
    reference.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(image), str(reference)], check=True)
    entries = corpus.scan(reference)
    archived = corpus.choose_archived(entries, 2_000) if name == images.USER else []
    archive = corpus.make_archive(scratch / f"{name}.tar", reference, archived)
    facts = {"image_bytes": image.stat().st_size, "entries": len(entries)}
    facts["fingerprint"] = corpus.fingerprint(entries)
    return replace(
        lower, image=image, reference=reference, entries=entries,
        archive=archive, archived=archived, facts=facts,
    )  # fmt: skip


def facts(system: System) -> dict[str, str | bool]:
    """Return what a results file records about a system."""
    return {"version": system.version(), "mounted": system.options(), "fuse": system.fuse}


if __name__ == "__main__":
    sys.exit(main())
