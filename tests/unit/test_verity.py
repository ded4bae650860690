"""Data that is checked with a dm-verity hash tree."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.errors import LayerError
from cowfs.formats.squashfs.source import FileBytes
from cowfs.formats.verity import BLOCK, VerifiedBytes
from tests.support.system import run
from tests.support.verity import make_tree


def memory(content: bytes) -> FileBytes:
    fd = os.memfd_create("content")
    os.write(fd, content)
    return FileBytes(fd)


def verified(data: bytes, tree: bytes, root_hash: bytes) -> VerifiedBytes:
    return VerifiedBytes(memory(data), memory(tree), root_hash, "image")


def read_all(data: bytes, tree: bytes, root_hash: bytes) -> bytes:
    with closing(verified(data, tree, root_hash)) as image:
        return image.pread(len(data), 0)


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 300])
def test_what_is_right_is_read_and_one_changed_byte_is_found(blocks: int) -> None:
    chance = random.Random(blocks)
    data = chance.randbytes(blocks * BLOCK)
    tree, root_hash = make_tree(data)
    with closing(verified(data, tree, root_hash)) as image:
        assert image.size == len(data)
        for _ in range(30):
            at, size = chance.randrange(len(data) + 9), chance.choice([1, 5000, 9 * BLOCK])
            assert image.pread(size, at) == data[at : at + size]
    bad = chance.randrange(1, blocks) if blocks > 1 else 0
    changed = bytearray(data)
    changed[bad * BLOCK + chance.randrange(BLOCK)] ^= 1
    if not bad:
        with pytest.raises(OSError):
            verified(bytes(changed), tree, root_hash)
        return
    with closing(verified(bytes(changed), tree, root_hash)) as image:
        for number in range(blocks):
            if number != bad:
                assert image.pread(BLOCK, number * BLOCK) == data[number * BLOCK :][:BLOCK]
        with pytest.raises(OSError) as caught:
            image.pread(1, bad * BLOCK)
        assert caught.value.errno == errno.EIO


def test_a_tree_that_was_changed_is_found() -> None:
    data = random.Random(1).randbytes(300 * BLOCK)
    tree, root_hash = make_tree(data)
    for at in range(BLOCK, len(tree) - BLOCK, BLOCK):  # the last is of the data's end
        changed = bytearray(tree)
        changed[at + 5] ^= 1
        with pytest.raises(OSError, match="does not match the root hash"):
            read_all(data, bytes(changed), root_hash)
    with pytest.raises(OSError, match="does not match the root hash"):
        verified(data, tree, bytes(32))
    with pytest.raises(OSError, match="the end of the file"):
        read_all(data, tree[:-1], root_hash)


def test_trees_that_are_not_read_are_named() -> None:
    data = bytes(3 * BLOCK)
    for tree, why in [
        (make_tree(data, b"sha512")[0], "unsupported hash tree"),
        (make_tree(data, blocks=4)[0], "its hash tree covers 16384 bytes, but it has 12288"),
        (make_tree(data, blocks=(1 << 64) - 1)[0], "its hash tree covers"),
        (b"", "not a dm-verity hash tree"),
        (bytes(BLOCK), "not a dm-verity hash tree"),
    ]:
        with pytest.raises(LayerError, match=why):
            verified(data, tree, bytes(32))


def test_veritysetup_makes_the_same_tree(tmp_path: Path) -> None:
    program = shutil.which("veritysetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip("needs veritysetup (cryptsetup-bin)")
    data = random.Random(2).randbytes(150 * BLOCK)
    (tmp_path / "data").write_bytes(data)
    said = run(program, "format", tmp_path / "data", tmp_path / "tree").stdout
    match = re.search(r"Root hash:\s*([0-9a-f]{64})", said)
    assert match
    with closing(verified(data, (tmp_path / "tree").read_bytes(), bytes.fromhex(match[1]))) as image:
        assert image.pread(len(data), 0) == data
