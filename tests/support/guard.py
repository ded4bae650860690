"""Find mounts, loop devices and processes that tests have left behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

MARK = "COWFS_TEST_RUN"


def mark_run() -> str:
    """Set and return a mark in the environment that every process started from here inherits."""
    value = f"{os.getpid()}-{uuid.uuid4().hex}"
    os.environ[MARK] = value
    return value


def processes(mark: str) -> dict[int, str]:
    """Return the command lines of the running processes with *mark*, by process ID."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            if wanted not in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                continue
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        found[int(entry)] = os.fsdecode(line).strip()
    return found


def mounts() -> dict[int, str]:
    """Return every mount of this namespace by its mount ID."""
    found = {}
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        fields = line.split(" ")
        after = fields.index("-")
        found[int(fields[0])] = f"{fields[4]} ({fields[after + 1]} of {fields[after + 2]})"
    return found


def loops(below: Path) -> dict[str, str]:
    """Return the loop devices on files below *below*, even deleted ones, by device."""
    found = {}
    for device in Path("/sys/block").glob("loop*"):
        try:
            name = (device / "loop" / "backing_file").read_text(errors="surrogateescape").strip()
        except OSError:
            continue
        if name.startswith(f"{below}/"):
            found[device.name] = name
    return found


class Guard:
    """Compares the current state with an earlier one, and cleans up."""

    def __init__(self, mark: str, below: Path) -> None:
        self.mark = mark
        self.below = below
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            "mount": mounts(),
            "loop device": loops(self.below),
            "process": processes(self.mark),
        }

    def left_behind(self, timeout: float = 5.0) -> list[str]:
        """Return what is new, after *timeout* seconds in which daemons can exit; remove it."""
        deadline = time.monotonic() + timeout
        while True:
            left = [
                (kind, key, text)
                for kind, things in self._now().items()
                for key, text in things.items()
                if key not in self.before[kind]
            ]
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for kind, key, text in left:
            self._remove(kind, key, text)
        return [f"{kind} {key}: {text}" for kind, key, text in left]

    def _remove(self, kind: str, key: object, text: str) -> None:
        """Remove a leftover, so that it does not make every later test fail too."""
        if kind == "process" and isinstance(key, int):
            try:
                os.kill(key, signal.SIGKILL)
            except ProcessLookupError:
                pass
        elif kind == "mount":
            target = text.rpartition(" (")[0].encode().decode("unicode_escape")
            os.spawnlp(os.P_WAIT, "umount", "umount", "-l", target)
        elif kind == "loop device":
            os.spawnlp(os.P_WAIT, "losetup", "losetup", "-d", f"/dev/{key}")
