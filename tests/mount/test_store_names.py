"""Stores whose names mean something to a program or library that is asked about them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from cowfs.store.offline.create import create_store
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_root, run

DEV_FUSE_AT_NIGHT = True

NAMES = (
    "a?.bs",
    "a?offset=1048576",
    "-n",
    "LABEL=cowfs",
    "50%s of it.bs",
    "two\nlines.bs",
    "caf\udce9.bs",
    "$(false) `false` 'a\" \\ ;&.bs",
)
"""libext2fs reads options behind a question mark; e2fsck looks for labels."""


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/old").write_text("old\n")
    return tmp_path / "lower"


def said(*arguments: str | Path, code: int = 0) -> str:
    """What a command says, as it should: of the store by its name, never of our descriptors."""
    done = cowfs(*arguments, env={"PYTHONIOENCODING": "utf-8:strict"})
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "/fd/" not in output
    assert "Traceback" not in output
    return output


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_the_name_as_it_is(tmp_path: Path, lower: Path, name: str) -> None:
    place = tmp_path / "stores"
    place.mkdir()
    store = place / name
    said("create", store, "16")
    with mounted(lower, tmp_path / "mnt", store=store, engine="kernel") as union:
        (union.path / "new").write_text("new\n")
    with mounted(lower, tmp_path / "mnt", store=store) as union:
        assert (union.path / "new").read_text() == "new\n"
        said("grow", store, "20")
    assert re.search(r"^size: +20 MiB$", said("info", store), re.MULTILINE)
    assert "new" in said("diff", store)
    assert "inodes" in said("check", "-n", store)
    said("grow", store, "24")
    said("check", store)
    assert os.listdir(place) == [name]
    said("persist", tmp_path / "mnt", store, code=32)


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_with_it_is_told_with_its_name(tmp_path: Path, lower: Path, name: str) -> None:
    plain, store = tmp_path / "plain", tmp_path / name
    create_store(str(plain), 16 << 20)
    run("debugfs", "-w", "-R", "set_super_value state 0", plain)
    shutil.copyfile(plain, store)
    with mounted(lower, tmp_path / "mnt", store=store) as union:
        assert "recovered" in union.said
    run("debugfs", "-w", "-R", "clri <2>", plain)
    shutil.copyfile(plain, store)
    run("tune2fs", "-L", "", plain)  # e2fsck begins its lines with the label, or the name
    shutil.copyfile(plain, store)
    assert "damaged" in said("check", "-n", store, code=12)
    assert "damaged" in said("check", store, code=4)
    assert "damage" in said("grow", store, "32", code=32)
