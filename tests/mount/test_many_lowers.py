"""As many lowers as the kernel's overlayfs takes (OVL_MAX_STACK): 500."""

from __future__ import annotations

from pathlib import Path

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse

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
