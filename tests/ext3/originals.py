"""Sound images with everything, for tests to damage."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.ext3 import images
from tests.ext3.images import Shape
from tests.ext3.makes import Make, without
from tests.support.system import run

SHAPES = [
    Shape(1024, 256, mib=3, journal=1, inodes=512),
    Shape(1024, 128, mib=3, journal=1, inodes=512),
    Shape(4096, 256, mib=9, journal=4, inodes=512),
]


def fill(top: Path) -> None:
    """Build a tree with everything."""
    chance = random.Random(1)
    (top / "many").mkdir(parents=True)
    for number in range(120):
        (top / "many" / f"{number:03}{'n' * 40}").write_bytes(b"%d" % number)
    (top / "one/two/three").mkdir(parents=True)
    (top / "one/large").write_bytes(chance.randbytes(330_000))
    os.link(top / "one/large", top / "one/two/link")
    with (top / "one/sparse").open("wb") as out:
        for position in (0, 100_000, 1_000_000, 70_000_000):
            out.seek(position)
            out.write(b"data")
    os.symlink("short", top / "symlink")
    os.symlink("long/" * 60, top / "one/slow")
    os.mkfifo(top / "one/two/fifo")
    for number, size in enumerate((10, 60, 600)):
        path = top / f"xattr{number}"
        path.write_bytes(b"x")
        os.setxattr(path, "user.test", b"v" * size)
        os.setxattr(path, "user.more", b"w" * (size // 4))


def make_originals(place: Path) -> list[Path]:
    """Make the images in *place*. e2fsck -D makes indexes for the directories."""
    fill(place / "tree")
    made = []
    for shape in SHAPES:
        path = images.make(place / str(shape), shape, place / "tree")
        assert run("e2fsck", "-fyD", path, check=False).returncode in (0, 1)
        assert images.unclean(path) is None
        made.append(path)
    options = ("-b", "1024", "-g", "256", "-N", "512", "-d", str(place / "tree"))
    meta = Make(without("resize_inode") + ",meta_bg", options, kib=4 << 10, journal=1)
    made.append(meta.make(place / "meta_bg"))
    return made
