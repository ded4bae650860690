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
    """Return the facts that a results file records about this machine, without host name and paths."""
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
    """Return the versions of cowfs and of the programs and libraries it uses."""
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
    """Return the git revision of *project*, with ``+changes`` if its files differ; "" without git."""
    git = ["git", "-c", f"safe.directory={project}", "-C", str(project)]
    head = first_line([*git, "rev-parse", "--short=12", "HEAD"])
    if not re.fullmatch("[0-9a-f]+", head):
        return ""
    dirty = first_line([*git, "status", "--porcelain", "--untracked-files=no", "--", "cowfs"])
    return f"{head}+changes" if dirty else head


def first_line(argv: list[str]) -> str:
    """Return the first line that *argv* prints, or ""."""
    lines = output(argv).splitlines()
    return lines[0] if lines else ""


def output(argv: list[str]) -> str:
    """Return what *argv* prints on stdout, or else on stderr; "" if the program is not installed."""
    if shutil.which(argv[0]) is None:
        return ""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
    )
    return done.stdout.strip() or done.stderr.strip()


def version_in(argv: list[str]) -> str:
    """Return the first version number in the output of *argv*, or ""."""
    found = re.search(r"\d+(?:\.\d+)+", output(argv))
    return found.group() if found else ""


def last_word(argv: list[str]) -> str:
    """Return the last word of the first line that *argv* prints, or ""."""
    words = first_line(argv).split()
    return words[-1] if words else ""


def missing_programs(*programs: tuple[str, str]) -> str:
    """Return a message about each (program, Debian package) that is not installed; "" if all are."""
    return "; ".join(
        f"{program} is not installed (Debian package {package})"
        for program, package in programs
        if shutil.which(program) is None
    )


def kernel() -> str:
    """Return the kernel's name and version."""
    return f"Linux {platform.release()}"


def set_io_uring(value: str) -> str:
    """Set whether the kernel offers FUSE over io_uring (Y or N); return the old value."""
    return set_fuse_parameter("enable_uring", value)


def set_root_access(value: str) -> str:
    """Set whether root may access FUSE mounts of other users (Y or N); return the old value."""
    return set_fuse_parameter("allow_sys_admin_access", value)


def set_fuse_parameter(name: str, value: str) -> str:
    """Set a parameter of the kernel's fuse module; return its old value, or "" if it does not exist.

    Change nothing if *value* is "".
    """
    path = Path("/sys/module/fuse/parameters", name)
    if not path.exists():
        return ""
    old = path.read_text().strip()
    if value:
        path.write_text(value)
    return old


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Processor seconds of all processors since boot."""

    busy: float
    idle: float
    steal: float


def cpu_times() -> CpuTimes:
    """Read /proc/stat (proc(5))."""
    numbers = [int(n) / TICK for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = numbers
    return CpuTimes(user + nice + system + irq + softirq, idle + iowait, steal)


def busy_share(window: float) -> float:
    """Block for *window* seconds; return the share of processor time in use, 0 to 1."""
    before = cpu_times()
    time.sleep(window)
    after = cpu_times()
    busy, idle = after.busy - before.busy, after.idle - before.idle
    return busy / (busy + idle) if busy + idle else 0.0


def wait_until_quiet(limit: float, share: float = 0.1) -> float:
    """Wait until less than *share* of the processor time is in use, at most *limit* seconds.

    Return the share in use at the end, which may be more than *share*. Samples record it.
    """
    deadline = time.monotonic() + limit
    busy = busy_share(0.2)
    while busy > share and time.monotonic() < deadline:
        busy = busy_share(0.5)
    return round(busy, 3)


def load() -> float:
    """Return the one-minute load average."""
    return os.getloadavg()[0]


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that the processes of a session use together."""

    rss: int
    """Resident bytes."""
    cpu: float
    """Processor seconds, user and system, of running processes and of the children they have waited for."""


def session_usage(session: int) -> Usage | None:
    """Return the memory and processor time of all processes of *session*; None if there are none."""
    rss, cpu, seen = 0, 0.0, False
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # comm may contain spaces and parentheses: the other fields start after its last ')'.
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
    """Sync all filesystems, then drop the page, dentry and inode caches (proc(5), drop_caches)."""
    os.sync()
    (PROC / "sys/vm/drop_caches").write_text("3\n")


def python() -> str:
    """Return the interpreter that runs clients and cowfs."""
    return sys.executable
