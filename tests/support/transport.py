"""The transports of FUSE requests: io_uring, if the kernel has it, and /dev/fuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.system import run

SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
IO_URING, DEV_FUSE = "io_uring", "dev_fuse"


def set_io_uring(value: str) -> str:
    """Set whether the kernel offers io_uring (Y or N), if root runs this; return the old value or ""."""
    if os.geteuid() != 0 or not SWITCH.exists():
        return ""
    old = SWITCH.read_text().strip()
    if value and value != old:
        SWITCH.write_text(value)
    return old


def available_transports() -> list[str]:
    """Return the transports that a daemon can use here."""
    if not SWITCH.exists():
        return [DEV_FUSE]
    if os.geteuid() != 0:
        return [IO_URING if SWITCH.read_text().strip() == "Y" else DEV_FUSE]
    return [IO_URING, DEV_FUSE]


@pytest.fixture(scope="module")
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Have daemons use this transport: for /dev/fuse, hide the kernel's parameter in this mount namespace."""
    if request.param == IO_URING or os.geteuid() != 0 or not SWITCH.exists():
        yield request.param
        return
    off = tmp_path_factory.mktemp("transport") / "enable_uring"
    off.write_text("N\n")
    run("mount", "--bind", off, SWITCH)
    yield request.param
    run("umount", SWITCH)


def parametrize_transport(metafunc: pytest.Metafunc) -> None:
    """Run each test once per transport; an implementation of the hook pytest_generate_tests.

    A module about one transport sets ``TRANSPORT``. A module about stores, images or the command line, which
    do not depend on the transport, sets ``DEV_FUSE_AT_NIGHT = True``.
    """
    if "transport" not in metafunc.fixturenames:
        metafunc.fixturenames.append("transport")
    only = getattr(metafunc.module, "TRANSPORT", None)
    transports = [only] if only else available_transports()
    at_night = len(transports) > 1 and getattr(metafunc.module, "DEV_FUSE_AT_NIGHT", False)
    marked = [
        pytest.param(name, marks=[pytest.mark.nightly] if at_night and name == DEV_FUSE else [])
        for name in transports
    ]
    metafunc.parametrize("transport", marked, indirect=True, scope="module")
