"""Programs that fail or wait, in place of those of the system."""

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
    """Let these programs be the given shell scripts, in which ``$real`` is the true one.

    Root's cowfs looks at no PATH: for root they are mounted over those of the system.
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
