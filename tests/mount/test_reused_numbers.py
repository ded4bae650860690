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
        script("echo 1 >f; ln f g", here.path)
        number = (here.path / "f").stat().st_ino
        cowfs("checkpoint", here.path, "one", check=True)
        (here.path / "f").chmod(0o600)
        cowfs("checkpoint", here.path, "two", check=True)
    cowfs("checkpoint", store, "--delete", "one", check=True)
    found: list[str] = []
    for attempt in range(5):
        if not found:
            with mounted(lower, mnt, store) as here:
                for count in range(60):
                    (here.path / f"{attempt}-{count}").touch()
            found = [one.name for one in (store / "upper").iterdir() if one.lstat().st_ino == number]
    with mounted(lower, mnt, store) as here:
        assert (here.path / found[0]).stat().st_ino == number
        (here.path / "f").chmod(0o644)
        one, other = (here.path / "f").stat(), (here.path / "g").stat()
        assert (one.st_ino, one.st_mode, one.st_nlink) == (other.st_ino, other.st_mode, 2)
