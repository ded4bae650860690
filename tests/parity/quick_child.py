"""Run all cases on a mounted system: ``python -m tests.parity.quick_child ROOT SYSTEM RESULT PATTERN LOOKS``.

It starts when its parent has mounted the system and writes a line to its stdin. It asks for a remount with a
line on stdout, and waits. It writes the pickled steps and failures of the cases to the file RESULT. Long
cases take a snapshot after each step if LOOKS contains "again".
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
from typing import Any

from tests.parity.quick import Brief, load
from tests.parity.script import Script, Step
from tests.parity.together import run


def main() -> None:
    root, system, result, pattern, looks = sys.argv[1:]

    def wait() -> None:
        answer = sys.stdin.readline()
        if answer != "mounted\n":
            raise SystemExit(f"the parent could not mount: {answer!r}")

    cases = {
        name: case
        for name, case in load().items()
        if any(map(partial(fnmatch.fnmatch, name), pattern.split(",")))
    }
    scripts = {
        name: (Script if case.long and "again" in looks else Brief)(f"{root}/{name}", system, lambda: None)
        for name, case in cases.items()
    }
    crashed: dict[str, str] = {}
    running: dict[str, Generator[None, None, Any]] = {}
    wait()

    def act(name: str) -> None:
        os.umask(0o022)
        try:
            if name not in running:
                long = cases[name].long
                started = run(long, scripts[name]) if long else cases[name].act(scripts[name])
                if started is None:
                    return
                running[name] = started
            next(running[name])
            scripts[name].steps.append(Step("remount"))
        except StopIteration as end:
            scripts[name].steps = end.value or scripts[name].steps
            del running[name]
        except Exception:
            crashed[name] = traceback.format_exc()
            running.pop(name, None)
        finally:
            os.chdir("/")
            for fd in map(int, os.listdir("/proc/self/fd")):  # they would keep the mount busy
                with suppress(OSError):
                    if fd > 2 and not os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
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
