"""Read the facts that the figures depend on: processor, memory, kernel, versions, load."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PROC = Path("/proc")
TICK = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, Any]:
    """The machine, as a results file records it. No host name and no paths."""
    cpuinfo = (PROC / "cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    meminfo = (PROC / "meminfo").read_text()
    total = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.M)
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "hypervisor": " hypervisor" in cpuinfo,
        "kernel": platform.release(),
        "memory_mib": int(total.group(1)) // 1024 if total else None,
        "os": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
    }


def versions(project: Path) -> dict[str, str]:
    """Versions of cowfs and of what it runs on."""
    found = {"cowfs": revision(project), "python": platform.python_version()}
    for package in ("pyfuse3", "trio", "cffi"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    libfuse = first_line(["pkg-config", "--modversion", "fuse3"])
    if libfuse:
        found["libfuse"] = libfuse
    found["fusermount3"] = last_word(["fusermount3", "--version"])
    found["mke2fs"] = version_in(["mke2fs", "-V"])
    found["mksquashfs"] = version_in(["mksquashfs", "-version"])
    return {k: v for k, v in found.items() if v}


def revision(project: Path) -> str:
    """The git revision of *project*, with ``+changes`` when files differ from it; "" without git."""
    git = ["git", "-c", f"safe.directory={project}", "-C", str(project)]
    head = first_line([*git, "rev-parse", "--short=12", "HEAD"])
    if not re.fullmatch("[0-9a-f]+", head):
        return ""
    dirty = first_line([*git, "status", "--porcelain", "--untracked-files=no", "--", "cowfs"])
    return f"{head}+changes" if dirty else head


def first_line(argv: list[str]) -> str:
    """The first line of what *argv* prints."""
    lines = output(argv).splitlines()
    return lines[0] if lines else ""


def output(argv: list[str]) -> str:
    """What *argv* prints on stdout, else on stderr; "" when it cannot be run."""
    if shutil.which(argv[0]) is None:
        return ""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
    )
    return done.stdout.strip() or done.stderr.strip()


def version_in(argv: list[str]) -> str:
    """The first thing that looks like a version number in what *argv* prints."""
    found = re.search(r"\d+(?:\.\d+)+", output(argv))
    return found.group() if found else ""


def last_word(argv: list[str]) -> str:
    """The last word of the first line that *argv* prints."""
    words = first_line(argv).split()
    return words[-1] if words else ""


def offer_io_uring(wanted: str) -> str:
    """Have the kernel give FUSE requests by io_uring (Y), or not (N); return what it did, "" if it cannot."""
    return switch("enable_uring", wanted)


def let_root_look(wanted: str) -> str:
    """Have the kernel let root into the FUSE mounts of others (Y), or not (N); return as the above."""
    return switch("allow_sys_admin_access", wanted)


def switch(parameter: str, wanted: str) -> str:
    """Give a parameter of the kernel's fuse a value, if there is one; return what it was, "" without it."""
    path = Path("/sys/module/fuse/parameters", parameter)
    if not path.exists():
        return ""
    before = path.read_text().strip()
    if wanted:
        path.write_text(wanted)
    return before


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Processor seconds of the whole machine since boot."""

    busy: float
    idle: float
    steal: float


def cpu_times() -> CpuTimes:
    """Read /proc/stat (proc(5))."""
    numbers = [int(n) / TICK for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = numbers
    return CpuTimes(user + nice + system + irq + softirq, idle + iowait, steal)


def busy_share(window: float) -> float:
    """Share of the processors in use during the next *window* seconds, 0 to 1. Blocks that long."""
    before = cpu_times()
    time.sleep(window)
    after = cpu_times()
    busy, idle = after.busy - before.busy, after.idle - before.idle
    return busy / (busy + idle) if busy + idle else 0.0


def wait_until_quiet(limit: float, share: float = 0.1) -> float:
    """Wait until others use less than *share* of the processors, at most *limit* seconds.

    Returns the share in use at last: the sample is taken in any case, and says so.
    """
    deadline = time.monotonic() + limit
    busy = busy_share(0.2)
    while busy > share and time.monotonic() < deadline:
        busy = busy_share(0.5)
    return round(busy, 3)


def load() -> float:
    """The one-minute load average."""
    return os.getloadavg()[0]


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that the processes of one session use together."""

    rss: int
    """Resident bytes."""
    cpu: float
    """Processor seconds, user and system, of the living ones and their waited-for children."""


def session_usage(session: int) -> Usage | None:
    """Memory and processor time of every process whose session id is *session*; None when none lives."""
    rss, cpu, seen = 0, 0.0, False
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # comm may hold spaces and parentheses: the fields start after its last ')'.
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) != session or stat[0] == "Z":
                continue
            status = (entry / "status").read_text()
        except OSError:
            continue
        seen = True
        cpu += sum(int(n) for n in stat[11:15]) / TICK
        found = re.search(r"^VmRSS:\s*(\d+) kB", status, re.M)
        rss += int(found.group(1)) * 1024 if found else 0
    return Usage(rss, cpu) if seen else None


def drop_caches() -> None:
    """Write everything out, then empty the page, dentry and inode caches (proc(5), drop_caches)."""
    os.sync()
    (PROC / "sys/vm/drop_caches").write_text("3\n")


def python() -> str:
    """The interpreter that clients and cowfs run with."""
    return sys.executable
