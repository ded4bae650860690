"""Make small Debian trees with debootstrap, with this machine's mirror and network settings."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from perf.debian import mirror, release
from tests.support.system import run

__all__ = ["bootstrap", "environment", "mirror", "release", "surroundings"]


def bootstrap(suite: str, tree: Path, packages: Iterable[str], *options: str) -> None:
    """Install a small Debian with these packages in *tree*. Needs root, and takes minutes."""
    partial = tree.with_name(f"{tree.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    run(
        "debootstrap", "--variant=minbase", f"--include={','.join(packages)}", *options,
        suite, partial, mirror(), timeout=2400,
    )  # fmt: skip
    partial.rename(tree)


def surroundings(tree: Path) -> list[Path]:
    """Copy this machine's settings for Debian mirrors and Python packages to a tree.

    Return local directories with packages, which the tree needs too.
    """
    shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
    shutil.copy("/etc/hosts", tree / "etc/hosts")
    mine = Path("/usr/local/share/ca-certificates")
    if mine.is_dir():  # ca-certificates adds them when it is installed
        shutil.copytree(mine, tree / mine.relative_to("/"), dirs_exist_ok=True)
    proxies = [line for line in run("apt-config", "dump", "Acquire").stdout.splitlines() if "Proxy" in line]
    (tree / "etc/apt/apt.conf.d/00of-the-machine").write_text("\n".join([*proxies, ""]))
    words = list(environment().values())
    for name in ("/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "~/.pip"):
        path = Path(name).expanduser()
        target = tree / name.replace("~", "root", 1).lstrip("/")
        if path.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-rT", path, target)
            words += [file.read_text() for file in [path, *path.rglob("*")] if file.is_file()]
    named = re.findall(r"(?:file://|(?<![^\s=]))(/[^\s:]+)", "\n".join(words))
    found = set()
    for path in map(Path, named):
        # Take the topmost new directory: an index refers to files beside it.
        unknown = [above for above in (*reversed(path.parents), path) if not (tree / f".{above}").exists()]
        if unknown and path.is_dir():
            found.add(unknown[0])
    return sorted(found)


def environment() -> dict[str, str]:
    """Return the environment variables that programs in the tree need."""
    wanted = re.compile(r"PIP_\w+|(?:https?|ftp|no)_proxy", re.I)
    return {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
