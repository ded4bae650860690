"""The newest releases of peers that Debian 12 has in older ones: those of Debian 13, beside the system's own.

Their packages, with all libraries down to libc, are unpacked into the cache and run from there by their own
loader; nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from perf import debian

SUITE = "trixie"
PACKAGES = ("fuse-overlayfs", "squashfuse", "fuse2fs")
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
TREE = Path(__file__).parents[2] / ".cache" / "perf" / "newest"


def command(program: str) -> list[str]:
    """What runs *program*."""
    return [str(TREE / LOADER), "--library-path", str(TREE / "usr/lib/x86_64-linux-gnu"), found(program)]


def found(program: str) -> str:
    """Where it is."""
    return str(TREE / "usr/bin" / program)


def missing(*programs: str) -> str:
    """Which of *programs* are not there, and what gets them; "" when all are."""
    lacking = [program for program in programs if not os.path.exists(found(program))]
    return (
        f"{', '.join(lacking)} of Debian 13 not in the cache (python -m perf.peers.newest)" if lacking else ""
    )


def make() -> str:
    """Get them, if they are not there; return why that was not possible, or ""."""
    if TREE.exists():
        return ""
    if os.uname().machine != "x86_64" or shutil.which("apt-get") is None:
        return "they are got on Debian for amd64 only"
    work, new = TREE.with_name("newest.apt"), TREE.with_name("newest.new")
    for directory in (work, new):
        shutil.rmtree(directory, ignore_errors=True)
    try:
        settings(work)
        environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf")}
        for arguments in (["update"], ["-y", "--download-only", "install", *PACKAGES]):
            argv = ["apt-get", "-q", *arguments]
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"apt-get {arguments[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        for package in sorted((work / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(new)], check=True)
        new.rename(TREE)
    finally:
        for directory in (work, new):
            shutil.rmtree(directory, ignore_errors=True)
    return ""


def settings(work: Path) -> None:
    """Make a state of apt of its own in *work*, which knows of SUITE alone, and of no package installed."""
    for directory in ("state/lists/partial", "cache/archives/partial"):
        (work / directory).mkdir(parents=True)
    (work / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(f"deb [signed-by={keys}] {debian.mirror()} {SUITE} main\n")
    (work / "apt.conf").write_text(
        f'Dir::State "{work}/state";\n'
        f'Dir::State::status "{work}/status";\n'
        f'Dir::Cache "{work}/cache";\n'
        f'Dir::Etc::sourcelist "{work}/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        'Dir::Etc::preferencesparts "/dev/null";\n'
        'APT::Install-Recommends "false";\n'
        'APT::Sandbox::User "root";\n'
    )


if __name__ == "__main__":
    print(make() or f"they are in {TREE}")
