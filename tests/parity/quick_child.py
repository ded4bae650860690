"""Runs all small cases on one mounted system.

``python -m tests.parity.quick_child ROOT SYSTEM RESULT PATTERN`` starts when its parent has mounted and says
so on stdin; it asks for a remount with a line on stdout and waits. The steps of each case, and what it failed
with, go into the file RESULT, pickled.
"""

from __future__ import annotations

import fnmatch
import os
import pickle
import sys
import traceback
from collections.abc import Generator
from contextlib import suppress
from functools import partial

from tests.parity.quick import Brief, load
from tests.parity.script import Step


def main() -> None:
    root, system, result, pattern = sys.argv[1:]

    def wait() -> None:
        answer = sys.stdin.readline()
        if answer != "mounted\n":
            raise SystemExit(f"the parent could not mount: {answer!r}")

    cases = {
        name: case
        for name, case in load().items()
        if any(map(partial(fnmatch.fnmatch, name), pattern.split(",")))
    }
    scripts = {name: Brief(f"{root}/{name}", system, lambda: None) for name in cases}
    crashed: dict[str, str] = {}
    running: dict[str, Generator[None, None, None]] = {}
    wait()

    def act(name: str) -> None:
        os.umask(0o022)
        try:
            if name not in running:
                started = cases[name].act(scripts[name])
                if started is None:
                    return
                running[name] = started
            next(running[name])
            scripts[name].steps.append(Step("remount"))
        except StopIteration:
            del running[name]
        except Exception:
            crashed[name] = traceback.format_exc()
            running.pop(name, None)
        finally:
            os.chdir("/")
            for fd in map(int, os.listdir("/proc/self/fd")):  # they would keep the mount busy
                with suppress(OSError):
                    if fd > 2:
                        os.close(fd)

    for name in cases:
        act(name)
    while running:
        print("remount", flush=True)
        wait()
        for name in list(running):
            act(name)
    with open(result, "wb") as out:
        pickle.dump(({name: script.steps for name, script in scripts.items()}, crashed), out)


if __name__ == "__main__":
    main()
