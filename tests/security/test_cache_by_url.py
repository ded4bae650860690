"""The cache of what is read by URL: of hostile servers, and where others can lead it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowfs.url import disk_cache
from cowfs.url.disk_cache import DiskCache, open_directory
from cowfs.url.protocol import Version
from tests.support.system import NOBODY, needs_root

BLOCK = 128 << 10


@pytest.mark.parametrize("size", [1 << 30, 1 << 55, 10**18 - 1])
def test_room_is_made_for_a_file_of_any_size(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may say that its file has more blocks than anybody could list."""
    monkeypatch.setattr(disk_cache, "_LOOK", BLOCK)
    count = -(-size // BLOCK)
    numbers = [*range(8), *range(count // 2, count // 2 + 8), *range(count - 9, count - 1)]
    cache = DiskCache(
        open_directory(str(tmp_path / "cache")),
        "http://x/",
        Version(size, (("ETag", "1"),)),
        BLOCK,
        4 * BLOCK,
    )
    try:
        for number in numbers:
            cache.put(number, os.urandom(BLOCK))
        there = [number for number in numbers if cache.has(number)]
        assert len(there) < 8 or size > 1 << 60, "there was room for four"
        assert cache.get(numbers[-1]) is not None or size > 1 << 54, "no file is that large here"
    finally:
        cache.close()
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_blocks * 512 < 9 * BLOCK


@needs_root
def test_a_cache_that_another_leads_elsewhere(nobody_path: Path, tmp_path: Path) -> None:
    (nobody_path / "link").symlink_to(tmp_path)
    os.chown(nobody_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    for path in ("link", "link/new", "link/new/new"):
        with pytest.raises(PermissionError):
            open_directory(str(nobody_path / path))
    assert os.listdir(tmp_path) == []
    os.mkdir(nobody_path / "theirs")
    os.chown(nobody_path / "theirs", NOBODY, NOBODY)
    with pytest.raises(PermissionError):
        open_directory(str(nobody_path / "theirs"))


def test_a_cache_is_made_with_all_that_is_above(tmp_path: Path) -> None:
    os.close(open_directory(str(tmp_path / "a/b/c")))
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700
