"""A root daemon and its directories, without a virtual machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cowfs.linux.mounts import umount2
from cowfs.linux.pids import wait_pid_gone
from tests.support.mounts import is_mounted, project_root
from tests.support.system import run


@dataclass
class Root:
    """A root daemon and its directories."""

    top: Path

    def __post_init__(self) -> None:
        for name in ("lower", "root", "shown"):
            (self.top / name).mkdir()
        (self.top / "lower/file").write_text("lower")
        (self.top / "lower/gone").write_text("lower")
        run("mksquashfs", self.top / "lower", self.image, "-quiet", "-no-progress")

    @property
    def image(self) -> Path:
        return self.top / "sysrcd.dat"

    @property
    def root(self) -> Path:
        return self.top / "root"

    @property
    def shown(self) -> Path:
        return self.top / "shown"

    def start(
        self,
        store: Path | str,
        mode: str = "rw",
        engine: str = "auto",
        below: Sequence[Path] = (),
        more: Sequence[str] = (),
    ) -> tuple[int, str]:
        """Start the daemon; return its exit code and error output."""
        # The script would run an isolated Python, in which coverage could not measure.
        done = run(
            sys.executable, "-m", "cowfs.cli.root_daemon", "--image", self.image, "--store", store,
            "--mode", mode, "--engine", engine, "--mountpoint", self.root, "--show-store", self.shown,
            "--show-below", self.top / "below", "--log", self.top / "log", "--pid-file", self.top / "pid",
            *(word for path in below for word in ("--below", path)), *more,
            check=False, env={**os.environ, "PYTHONPATH": project_root()},
        )  # fmt: skip
        return done.returncode, done.stderr

    def pid(self) -> int:
        return int((self.top / "pid").read_text())

    def stop(self) -> None:
        """Unmount like the shutdown, and wait until the daemon has exited."""
        if is_mounted(self.root):
            pid = self.pid()
            umount2(str(self.root))
            assert wait_pid_gone(pid, 20)
