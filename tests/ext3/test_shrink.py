"""The engine's cache frees only blocks that it can read again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import ext3
from tests.support.mounts import eventually

_NEEDS = "needs the engine: libext2fs-dev to build it"
engine = pytest.importorskip("cowfs.formats.ext3._engine", reason=_NEEDS)
ffi, lib = engine.ffi, engine.lib


def test_a_cache_that_shrinks_at_any_time_loses_nothing(tmp_path: Path) -> None:
    image = ext3.make(tmp_path / "image")
    chance = random.Random(4)
    names = [b"name-%d" % number for number in range(600)]
    with ext3.opened(image) as layer:
        for step, name in enumerate(names):
            key, file = layer.create(layer.root, name, 0o600, 1, 2)
            file.pwrite(name, 0)
            file.close()
            layer.setxattr(key, b"user.name", name)
            if chance.random() < 0.1:
                layer.shrink()
            if step % 200 == 199:
                layer.sync()
        layer.image.checkpoint()  # blocks that are only in the journal stay cached
        layer.shrink()
        assert layer.image.known(layer.root) is None, "the names can be read again"
        misses = layer.caches()["ext3 metadata"][1]
        for name in names:
            found = layer.lookup(layer.root, name)
            assert found
            assert layer.getxattr(found[0], b"user.name") == name
        assert layer.caches()["ext3 metadata"][1] > misses, "it was read again"


def test_blocks_that_only_the_journal_has_are_freed_soon(tmp_path: Path) -> None:
    with ext3.opened(ext3.make(tmp_path / "image"), commit_seconds=0.02) as layer:
        for number in range(300):
            layer.create(layer.root, b"name-%d" % number, 0o600, 1, 2)[1].close()
        layer.sync()
        facts = ffi.new("struct x3_facts *")

        def cached() -> int:
            lib.x3_facts(layer.image.handle, facts)
            return int(facts.cached)

        before = cached()
        assert before > 20, "there is something to free"
        layer.shrink()
        eventually(lambda: cached() < before // 4, f"most of {before} blocks are freed", 30)
        assert layer.lookup(layer.root, b"name-299")
