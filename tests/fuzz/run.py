"""Run the fuzzers one after the other: ``make fuzz``.

    python -m tests.fuzz.run [--seconds S] [--seed N] [--corpus-only] [--place DIR] [TARGET...]

Findings are in .cache/fuzz/TARGET/findings, and the fuzzer's output is in .cache/fuzz/TARGET/log. Inputs that
reach new lines are kept in .cache/fuzz/TARGET/inputs for the next run. Exit status 1 means that there are
findings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ext3 import images
from tests.fuzz.ext3 import build
from tests.support.mounts import project_root

TARGETS = (
    "ext3", "squashfs", "tar", "zip", "iso9660", "union", "attributes", "header", "trash", "records",
    "checkpoints", "convert", "control", "options",
)  # fmt: skip
CORPUS = Path(__file__).parent / "corpus"
_STATUS_INTERVAL = 10.0
"""Seconds between status lines."""


@dataclass(frozen=True)
class Wanted:
    """How to fuzz a target."""

    place: Path
    """The directory for findings, inputs and programs."""
    seconds: float
    """Seconds to fuzz; 0 to run only the corpus."""
    seed: int
    fsck_every: int = 50
    """Check one of this number of sound ext3 images with e2fsck."""


@dataclass(frozen=True)
class Result:
    """The result of fuzzing a target."""

    target: str
    runs: int
    said: str
    """The last line of the fuzzer's output."""
    findings: list[Path]
    log: Path


def fuzz(target: str, wanted: Wanted) -> Result:
    """Fuzz a target; return the result. Blocks until the time is over."""
    here = wanted.place / target
    findings, inputs, log = here / "findings", here / "inputs", here / "log"
    shutil.rmtree(findings, ignore_errors=True)
    for directory in (findings, inputs):
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cowfs-fuzz-", dir=images.scratch()) as scratch:
        corpus = [*_corpus(target, Path(scratch)), inputs]
        environment = {**os.environ, "COWFS_FUZZ_IMAGES": scratch, "COWFS_FUZZ_FSCK": str(wanted.fsck_every)}
        environment["ASAN_OPTIONS"] = "quarantine_size_mb=64"
        environment["TMPDIR"] = scratch  # atheris exits without cleaning up
        environment.pop("COVERAGE_PROCESS_CONFIG", None)  # coverage makes the runs ten times slower
        command = (
            _engine(wanted, here, Path(scratch), corpus)
            if target == "ext3"
            else _python(target, wanted, here, corpus)
        )
        code = _run(command, environment, log, target, wanted)
    last = findings / "last"
    if last.exists():  # the input killed the process
        last.rename(findings / f"end-{hashlib.sha1(last.read_bytes()).hexdigest()[:16]}")
    said = log.read_text(errors="replace")
    numbers = re.findall(r"#(\d+)\s+DONE|^\w+: (\d+) runs in|^#(\d+)\s", said, re.MULTILINE)
    runs = max((int(number) for numbers_ in numbers for number in numbers_ if number), default=0)
    found = sorted(findings.iterdir())
    if code and not found:
        found = [log]  # the fuzzer itself failed
    lines = said.strip().splitlines()
    return Result(target, runs, lines[-1] if lines else "", found, log)


def _corpus(target: str, scratch: Path) -> Iterator[Path]:
    """Yield the directories of the corpus: former findings, and unpacked inputs that reach many lines."""
    if (CORPUS / target).is_dir():
        yield CORPUS / target
    archive = CORPUS / f"{target}.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as seeds:
            seeds.extractall(scratch / "seeds")
        yield scratch / "seeds"


def _engine(wanted: Wanted, here: Path, scratch: Path, corpus: list[Path]) -> list[str]:
    build.make_images(scratch)
    fuzzer = build.up_to_date(wanted.place / "engine" / "fuzzer")
    # The limits allow for a busy machine, and for the memory that AddressSanitizer keeps in quarantine.
    limits = ["-timeout=60", "-rss_limit_mb=2048", "-malloc_limit_mb=256", "-max_len=3200", "-len_control=20"]
    how = [
        f"-seed={wanted.seed % 0xFFFFFFFF or 1}",
        f"-artifact_prefix={here / 'findings'}/",
        "-print_final_stats=1",
    ]
    if not wanted.seconds:
        return [str(fuzzer), *limits, *how, "-runs=0", *map(str, corpus)]
    # libFuzzer writes new inputs to the first directory.
    return [str(fuzzer), *limits, *how, f"-max_total_time={wanted.seconds:.0f}", *map(str, reversed(corpus))]


def _python(target: str, wanted: Wanted, here: Path, corpus: list[Path]) -> list[str]:
    if importlib.util.find_spec("atheris") and wanted.seconds:
        limits = [f"-max_total_time={wanted.seconds:.0f}", f"-seed={wanted.seed % 0xFFFFFFFF or 1}"]
        command = [sys.executable, "-m", "tests.fuzz.by_atheris", target, str(here / "findings"), *limits]
        return [*command, *map(str, reversed(corpus))]
    return [
        *(sys.executable, "-m", "tests.fuzz.driver", "--seconds", str(wanted.seconds)),
        *("--seed", str(wanted.seed), "--findings", str(here / "findings"), "--keep", str(here / "inputs")),
        *(target, *map(str, corpus)),
    ]


def _run(command: list[str], environment: dict[str, str], log: Path, target: str, wanted: Wanted) -> int:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=project_root(), env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    begin = time.monotonic()
    try:
        while True:
            try:
                return process.wait(_STATUS_INTERVAL)
            except subprocess.TimeoutExpired:
                took = time.monotonic() - begin
                if took > 3 * wanted.seconds + 180:
                    raise
                if sys.stderr.isatty():
                    print(f"{target}: {took:.0f} of {wanted.seconds:.0f} s", file=sys.stderr, flush=True)
    finally:
        process.kill()
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--corpus-only", action="store_true", help="make no new inputs")
    parser.add_argument("--place", type=Path, default=Path(project_root()) / ".cache/fuzz")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"the seed is {seed}", flush=True)
    wanted = Wanted(options.place.absolute(), 0 if options.corpus_only else options.seconds, seed)
    found = 0
    for target in options.targets or TARGETS:
        if target == "ext3" and not build.has_clang():
            print("ext3: skipped: there is no clang with libFuzzer (scripts/setup --test)")
            continue
        result = fuzz(target, wanted)
        print(
            f"{target}: {result.runs} runs, {len(result.findings)} findings; the log is {result.log}",
            flush=True,
        )
        for path in result.findings:
            print(f"  {path}", flush=True)
        found += len(result.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
