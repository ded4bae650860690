"""Both ways that requests come by: io_uring, where the kernel has it, and /dev/fuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.system import run

SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
IO_URING, DEV_FUSE = "io_uring", "dev_fuse"


def turn(way: str) -> str:
    """Have the kernel offer io_uring (Y), or not (N), if it can and we may; return what it did before."""
    if os.geteuid() != 0 or not SWITCH.exists():
        return ""
    before = SWITCH.read_text().strip()
    if way and way != before:
        SWITCH.write_text(way)
    return before


def ways() -> list[str]:
    """What a daemon can be made to use here."""
    if not SWITCH.exists():
        return [DEV_FUSE]
    if os.geteuid() != 0:
        return [IO_URING if SWITCH.read_text().strip() == "Y" else DEV_FUSE]
    return [IO_URING, DEV_FUSE]


@pytest.fixture(scope="module")
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Have the daemons that are started use this one: what the kernel says is hidden in our namespace."""
    if request.param == IO_URING or os.geteuid() != 0 or not SWITCH.exists():
        yield request.param
        return
    off = tmp_path_factory.mktemp("transport") / "enable_uring"
    off.write_text("N\n")
    run("mount", "--bind", off, SWITCH)
    yield request.param
    run("umount", SWITCH)


def with_each(metafunc: pytest.Metafunc) -> None:
    """For the hook pytest_generate_tests: make of each test one for each way.

    ``TRANSPORT = …`` in a module that is about one of them says so; ``DEV_FUSE_AT_NIGHT = True`` in one that
    is about stores, images or the command line, to which it should not matter.
    """
    if "transport" not in metafunc.fixturenames:
        metafunc.fixturenames.append("transport")
    only = getattr(metafunc.module, "TRANSPORT", None)
    all_ = [only] if only else ways()
    at_night = len(all_) > 1 and getattr(metafunc.module, "DEV_FUSE_AT_NIGHT", False)
    marked = [
        pytest.param(way, marks=[pytest.mark.nightly] if at_night and way == DEV_FUSE else []) for way in all_
    ]
    metafunc.parametrize("transport", marked, indirect=True, scope="module")
