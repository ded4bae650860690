"""Make the stores that tests/release/stores keeps of a version; as root, before a release.

    .venv/bin/python -m tests.release.make_stores

Each has one change of every kind: a later version must read them all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cowfs
from tests.support.mounts import cowfs as command
from tests.support.mounts import project_root
from tests.support.system import run
from tests.support.tree import snapshot, stable

STORES = Path(project_root()) / "tests/release/stores"
_CHANGES = """
set -e
echo new > new; ln -s new link; mkfifo fifo; mknod device c 1 3
echo more >> text                                # copied up
chmod 600 bare                                   # its attributes alone
rm gone; rm -r gone-directory                    # whiteouts
rm -r replaced; mkdir replaced; echo in > replaced/in    # opaque
mv moved moved-away                              # a redirect
echo linked >> first                             # one of two names
setfattr -n user.told -v yes text
setfacl -m u:7:rw text
touch -d 1999-12-31T23:59:59.123456789Z times
"""


def make_lower(tree: Path) -> None:
    for name in ("gone-directory", "replaced/old", "moved/below"):
        (tree / name).mkdir(parents=True)
    for name in (
        "text",
        "bare",
        "gone",
        "first",
        "times",
        "moved/below/deep",
        "gone-directory/in",
        "replaced/old/f",
    ):
        (tree / name).write_text(f"{name} of the lower\n")
    os.link(tree / "first", tree / "second")


def main() -> int:
    version = cowfs.__version__
    here = Path(tempfile.mkdtemp(prefix="cowfs-stores-"))
    try:
        (here / "merged").mkdir()
        make_lower(here / "lower")
        kept = STORES / version
        kept.mkdir(parents=True, exist_ok=True)
        lower = kept / "lower.sqsh"
        lower.unlink(missing_ok=True)
        run(
            "mksquashfs",
            here / "lower",
            lower,
            "-quiet",
            "-no-progress",
            "-all-time",
            "1000000000",
            "-all-root",
        )
        command("create", here / "image", "16", check=True)
        (here / "directory").mkdir()
        for kind in ("image", "directory"):
            command("mount", lower, here / "merged", "--store", here / kind, check=True)
            try:
                run("sh", "-c", _CHANGES, cwd=here / "merged")
                shown = stable(snapshot(here / "merged"))
            finally:
                command("umount", here / "merged", check=True)
            (kept / f"{kind}.json").write_text(json.dumps(shown, indent=1, sort_keys=True) + "\n")
        run("tar", "-C", here, "--sparse", "-cJf", kept / "image.tar.xz", "image")
        run(
            "tar",
            "-C",
            here,
            "--xattrs",
            "--xattrs-include=*",
            "-cJf",
            kept / "directory.tar.xz",
            "directory",
        )
    finally:
        shutil.rmtree(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
