"""A directory layer closes all its descriptors, so that a store's filesystem can be unmounted."""

from __future__ import annotations

import os
from pathlib import Path

from cowfs.layers.directory import open_directory


def test_close_lets_go_of_inodes_whose_names_are_gone(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    layer = open_directory(str(tmp_path))
    for name in (b"unlinked", b"replaced", b"new"):
        (tmp_path / os.fsdecode(name)).write_text("text")
    (tmp_path / "folder").mkdir()
    keys = {}
    for name in (b"unlinked", b"replaced", b"new", b"folder"):
        found = layer.lookup(layer.root, name)
        assert found
        keys[name] = found[0]
    layer.unlink(layer.root, b"unlinked", keys[b"unlinked"])
    layer.rename((layer.root, b"new"), (layer.root, b"replaced"), 0, keys[b"new"], keys[b"replaced"])
    layer.rmdir(layer.root, b"folder", keys[b"folder"])
    assert layer.stat(keys[b"unlinked"]).st_nlink == 0
    assert layer.stat(keys[b"replaced"]).st_nlink == 0
    layer.close()
    assert os.listdir("/proc/self/fd") == before
