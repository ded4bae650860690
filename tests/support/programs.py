"""Replace programs of the system with scripts that fail or wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.system import run

SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"


@contextmanager
def replaced(place: Path, **scripts: str) -> Iterator[None]:
    """Replace programs with shell scripts, in which ``$real`` is the original program.

    For root, the scripts are mounted over the programs, because cowfs ignores PATH when root runs it.
    """
    place.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for name, script in scripts.items():
            found = shutil.which(name, path=SBIN)
            assert found is not None, name
            shutil.copy2(found, place / f"real-{name}")
            (place / name).write_text(f"#!/bin/sh\nreal={place}/real-{name}\n{script}\n")
            (place / name).chmod(0o755)
            if os.geteuid() == 0:
                run("mount", "--bind", place / name, found)
                stack.callback(run, "umount", found)
        path = os.environ["PATH"]
        if os.geteuid() != 0:
            os.environ["PATH"] = f"{place}:{path}"
            stack.callback(os.environ.__setitem__, "PATH", path)
        yield
