"""Fixtures: a union and its adapter."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.fuse.adapter import Adapter
from cowfs.fuse.loop import RequestLoop
from tests.fuse.kernel import Kernel, Slow, fake_readdir_reply
from tests.support import tree
from tests.support.direct import Direct
from tests.support.tree import Node, link

BIG = b"0123456789abcdef" * (1 << 16)


@pytest.fixture(params=[False, True], ids=["local", "slow"])
def fs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Direct]:
    """A union in memory. Its lower may be slow."""
    if os.geteuid() != 0:
        pytest.skip("needs root: whiteouts on tmpfs")
    place = Path(tempfile.mkdtemp(prefix="cowfs-fuse-", dir="/dev/shm"))
    tree.build(
        place / "lower",
        {
            "file": b"file\n",
            "big": Node(data=BIG, mode=0o640),
            "big2": Node(data=BIG[::-1]),
            "linked": Node(data=BIG),
            "alias": link("linked"),
            **{f"dir/{number:03}": b"%d" % number for number in range(100)},
        },
    )
    fake_readdir_reply(monkeypatch)
    direct = Direct(str(place / "store"), [str(place / "lower")], slow=request.param)
    yield direct
    direct.close()
    shutil.rmtree(place)


@pytest.fixture
def adapter(fs: Direct) -> Adapter:
    """The adapter of the union."""
    return Adapter(fs.union.overlay, RequestLoop())


@pytest.fixture
def kernel(adapter: Adapter) -> Kernel:
    """The credentials of the caller."""
    return Kernel(adapter)


@pytest.fixture
def slow(fs: Direct, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """A gate at which copy-ups wait."""
    return Slow(fs.union.overlay, monkeypatch)
