"""Run one case on one mounted system: ``python -m tests.parity.child ROOT SYSTEM CASE RESULT``.

It starts when its parent has mounted the system and writes a line to its stdin. It asks for a remount with a
line on stdout, and waits for the reply on stdin. It writes the pickled steps to the file RESULT.
"""

from __future__ import annotations

import os
import pickle
import sys

from tests.parity.script import Script, load_cases


def main() -> None:
    root, system, name, result = sys.argv[1:]

    def wait() -> None:
        answer = sys.stdin.readline()
        if answer != "mounted\n":
            raise SystemExit(f"the parent could not mount: {answer!r}")

    def remount() -> None:
        print("remount", flush=True)
        wait()

    cases = load_cases()
    os.umask(0o022)
    wait()
    script = Script(root, system, remount)
    try:
        cases[name].act(script)
    finally:
        with open(result, "wb") as out:
            pickle.dump(script.steps, out)


if __name__ == "__main__":
    main()
