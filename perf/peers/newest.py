"""Newer releases of peers than Debian 12 has: those of Debian 13, beside the system's own.

Their packages, with all libraries including libc, are unpacked into the cache and run from there by their own
dynamic loader. Nothing is installed.
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


def program(name: str, use_newest: bool = True) -> list[str]:
    """Return the words that run the program *name*: Debian 13's, or the system's own unless *use_newest*."""
    if not use_newest:
        return [name]
    return [str(TREE / LOADER), "--library-path", str(TREE / "usr/lib/x86_64-linux-gnu"), path(name)]


def path(name: str) -> str:
    """Return the path of Debian 13's program *name*, which need not exist."""
    return str(TREE / "usr/bin" / name)


def missing(*programs: str) -> str:
    """Return which of *programs* are not in the cache, and the command that downloads them; "" if all are."""
    lacking = ", ".join(name for name in programs if not os.path.exists(path(name)))
    return f"{lacking} of Debian 13 not in the cache (python -m perf.peers.newest)" if lacking else ""


def download() -> str:
    """Download and unpack the packages unless they are in the cache; return why it failed, or ""."""
    if TREE.exists():
        return ""
    if os.uname().machine != "x86_64" or shutil.which("apt-get") is None:
        return "this works on Debian for amd64 only"
    work, new = TREE.with_name("newest.apt"), TREE.with_name("newest.new")
    for directory in (work, new):
        shutil.rmtree(directory, ignore_errors=True)
    try:
        configure_apt(work)
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


def configure_apt(work: Path) -> None:
    """Create a separate apt state in *work* that knows only SUITE, and no installed package."""
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
    print(download() or f"the programs of Debian 13 are in {TREE}")
