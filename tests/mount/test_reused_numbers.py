"""A new file of a directory store may get the number that a file had whose layer was removed."""

from __future__ import annotations

from pathlib import Path

from tests.mount.test_diff_patch import script
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
TRANSPORT = "dev_fuse"


def test_names_of_a_hard_link_stay_together(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for place in (disk, tmp_path / "mnt"):
        place.mkdir()
    script("truncate -s 8M image; mkfs.ext4 -q image", tmp_path)
    run("mount", "-o", "loop", tmp_path / "image", disk)
    try:
        look(disk / "lower", disk / "store", tmp_path / "mnt")
    finally:
        run("umount", disk)


def look(lower: Path, store: Path, mnt: Path) -> None:
    lower.mkdir()
    with mounted(lower, mnt, store) as here:
        script("echo 1 >f; ln f g; echo 2 >h; ln h i", here.path)
        numbers = [(here.path / name).stat().st_ino for name in "fh"]
        cowfs("checkpoint", here.path, "one", check=True)
        for name in "fh":
            (here.path / name).chmod(0o600)
        cowfs("checkpoint", here.path, "two", check=True)
    cowfs("checkpoint", store, "--delete", "one", check=True)
    found: dict[int, str] = {}
    for attempt in range(5):
        if len(found) < 2:
            with mounted(lower, mnt, store) as here:
                for count in range(60):
                    (here.path / f"{attempt}-{count}").touch()
            inodes = {one.lstat().st_ino: one.name for one in (store / "upper").iterdir()}
            found = {number: inodes[number] for number in numbers if number in inodes}
    with mounted(lower, mnt, store) as here:
        assert (here.path / found[numbers[0]]).stat().st_ino == numbers[0]
        (here.path / "f").chmod(0o644)
        assert_one(here.path / "f", here.path / "g")
        # The number is free again when the second name is looked up.
        assert (here.path / found[numbers[1]]).stat().st_ino == numbers[1]
        assert (here.path / "h").stat().st_ino != numbers[1]
        (here.path / found[numbers[1]]).unlink()
        (here.path / "i").chmod(0o644)
        assert_one(here.path / "h", here.path / "i")
        (here.path / "h").chmod(0o640)
        assert_one(here.path / "h", here.path / "i")


def assert_one(*paths: Path) -> None:
    one, other = (path.stat() for path in paths)
    assert (one.st_ino, one.st_mode, one.st_nlink) == (other.st_ino, other.st_mode, 2)
