"""Mounts with as many lowers as the kernel's overlayfs accepts (OVL_MAX_STACK): 500."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, make_store, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = needs_fuse
DEV_FUSE_AT_NIGHT = True


def test_500_lowers(tmp_path: Path) -> None:
    """The leftmost is on top; what is removed stays removed; a name with a colon is still found out."""
    lowers = [tmp_path / "lowers" / str(number) for number in range(500)]
    for number, lower in enumerate(lowers):
        (lower / "common").mkdir(parents=True)
        (lower / f"own{number}").write_text(f"{number}")
        (lower / "common" / f"in{number}").touch()
        (lower / "all").write_text(f"{number}")
    stack = ":".join(str(lower) for lower in lowers)
    names = {f"own{number}" for number in range(500)} | {"common", "all"}
    with mounted(stack, tmp_path / "mnt", tmp_path / "store") as mount:
        assert {path.name for path in mount.path.iterdir()} == names
        assert {path.name for path in (mount.path / "common").iterdir()} == {f"in{n}" for n in range(500)}
        assert (mount.path / "all").read_text() == "0"
        assert (mount.path / "own499").read_text() == "499"
        (mount.path / "all").unlink()
        (mount.path / "own250").unlink()
    with mounted(stack, tmp_path / "mnt", tmp_path / "store") as mount:
        assert {path.name for path in mount.path.iterdir()} == names - {"all", "own250"}
    (tmp_path / "co:lon").mkdir()
    refused = cowfs("mount", f"{stack}:{tmp_path}/co:lon", tmp_path / "mnt")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"cowfs: {tmp_path}/co:lon: a colon separates lowers")


@needs_root
@pytest.mark.parametrize("kind", ["image", "directory"])
def test_hard_links_of_several_images(nobody_path: Path, kind: str) -> None:
    """Inodes of different images have the same numbers; each keeps its own content, names and count."""
    top, lowers = nobody_path, []
    for name, make in {"a": "sqsh", "b": "sqsh", "c": "tar", "d": "tar", "alone": "sqsh"}.items():
        here = top / f"of {name}" / name
        here.mkdir(parents=True)
        here.chmod(0o777)
        (here / "one").write_text(name)
        os.symlink(name, here / "link")
        if name != "alone":
            os.link(here / "one", here / "two")
        if make == "tar":  # mksquashfs makes two of them
            os.link(here / "link", here / "other", follow_symlinks=False)
        image, owned = top / f"{name}.{make}", ["-quiet", "-no-progress", "-force-uid", str(NOBODY)]
        if make == "sqsh":
            run("mksquashfs", here.parent, image, *owned)
        else:
            run("tar", "-C", here.parent, f"--owner={NOBODY}", f"--group={NOBODY}", "-cf", image, ".")
        lowers.append(str(image))
    store, nobody = make_store(top, kind), kind == "directory"
    expected = {f"{name}/{file} 2 {name}, changed" for name in "abcd" for file in ("one", "two")}
    expected |= {f"{name}/{link} 2 1 {name}" for name in "cd" for link in ("link", "other")}
    expected |= {f"{name}/link 1 1 {name}" for name in "ab"}
    alone = {"alone/one 1 alone, changed", "alone/link 1 1 alone"}
    steps = {CHANGE: expected | alone, "rm -r alone": expected, "": expected}
    for change, wanted in steps.items():
        with mounted(":".join(lowers), top / "mnt", store, nobody=nobody) as mount:
            assert shown(change, mount.path, nobody) == wanted
    told = cowfs("diff", store, "--content", "--name-only", check=True).stdout.splitlines()
    assert set(told) == {"alone", *(f"{name}/{file}" for name in "abcd" for file in ("one", "two"))}


CHANGE = "for d in *; do printf ', changed' >>$d/one; touch -hd @1 $d/link; done"
SHOW = """
for p in */link */other; do [ ! -h $p ] || echo "$p $(stat -c '%h %Y' $p) $(readlink $p)"; done
for p in */one */two; do [ ! -f $p ] || echo "$p $(stat -c %h $p) $(cat $p)"; done
"""


def shown(change: str, place: Path, nobody: bool) -> set[str]:
    prefix = as_nobody_prefix() if nobody else []
    return set(run(*prefix, "sh", "-euc", f"cd {place}\n{change}\n{SHOW}").stdout.splitlines())
