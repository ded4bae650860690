"""Metacopies in lowers, which other programs made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.system import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


def test_one_in_the_lowest_lower(tmp_path: Path) -> None:
    """A metacopy without data gives EIO, as from the kernel's overlayfs, not zeros; hiding it does too."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for layer, names in ((upper, ["covered"]), (lower, ["bare", "covered", "whole"])):
        layer.mkdir()
        for name in names:
            (layer / name).write_text(f"{name} in {layer.name}")
    for name in ("bare", "covered"):
        os.truncate(lower / name, 100_000)
        os.setxattr(lower / name, "trusted.overlay.metacopy", b"")
    with mounted([upper, lower], tmp_path / "mnt", "memory", quiet=False) as here:
        bare = here.path / "bare"
        calls: list[Callable[[], object]] = [
            bare.stat,
            bare.read_bytes,
            lambda: bare.write_text("new"),
            bare.unlink,
            lambda: bare.rename(here.path / "other"),
        ]
        for call in calls:
            with pytest.raises(OSError) as raised:
                call()
            assert raised.value.errno == errno.EIO
        assert (here.path / "covered").read_text() == "covered in upper"
        assert (here.path / "whole").read_text() == "whole in lower"
        (here.path / "covered").unlink()
        assert not (here.path / "covered").exists()
