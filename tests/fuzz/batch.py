"""Exercise damaged copies of images, with limits on time and memory: ``python -m tests.fuzz.batch``.

    python -m tests.fuzz.batch [--start N] [--count N] [--seconds S] [--memory MIB] IMAGE...

Exit status 0 means no finding. Any other message begins with the image and the number of the mutation.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
import time
from pathlib import Path

from tests.fuzz.exercise import exercise
from tests.fuzz.mutate import mutate

SLOW = 10.0
"""Seconds of processor time for one image."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--start", type=int, default=0, help="the first mutation")
    parser.add_argument("--count", type=int, default=1000, help="mutations, spread over the images")
    parser.add_argument("--seconds", type=float, default=3600, help="end earlier after this time")
    parser.add_argument("--memory", type=int, default=256, help="MiB of memory to allocate at most")
    options = parser.parse_args(arguments)
    # Not RLIMIT_AS: malloc reserves address space for each thread without using memory.
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory << 20, options.memory << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    originals = [(path.name, path.read_bytes()) for path in options.images]
    for name, original in originals:
        if exercise(original) <= 0:
            print(f"{name}: cannot be read undamaged", file=sys.stderr)
            return 2
    deadline = time.monotonic() + options.seconds
    done = refused = 0
    for seed in range(options.start, options.start + options.count):
        if time.monotonic() > deadline:
            break
        name, original = originals[seed % len(originals)]
        faulthandler.dump_traceback_later(10 * SLOW, exit=True)
        begin = time.process_time()
        try:
            refused += exercise(mutate(original, seed)) < 0
        except BaseException:
            print(f"{name}: mutation {seed}:", file=sys.stderr)
            raise
        took = time.process_time() - begin
        if took > SLOW:
            print(f"{name}: mutation {seed}: took {took:.1f} s", file=sys.stderr)
            return 1
        done += 1
    faulthandler.cancel_dump_traceback_later()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{done} damaged images, {refused} of them refused when opened, at most {used} MiB used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
