"""The engine replays logs of jbd2 like e2fsck."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ext3 import engine, images, recovery
from tests.ext3.engine import make_file
from tests.ext3.images import MODERN, SMALL, Shape
from tests.ext3.reader import Image
from tests.support.listing import find
from tests.support.system import run

MAGIC, DESCRIPTOR, COMMIT, REVOKE = 0xC03B3998, 1, 2, 5
ESCAPED, SAME_UUID, LAST = 1, 2, 8
BLOCKS = 60
"""The inode of the file whose data the logs change, so that the filesystem stays sound."""


@dataclass
class Log:
    """A writer of a log into the journal of an image in memory."""

    data: bytearray
    at: int = 0
    """Return the block of the journal for the next block of the log."""
    sequence: int = 0
    start: int = 0
    journal: list[int] = field(default_factory=list)

    def begin(self, start: int) -> None:
        """Start the log at a block of the journal; set the superblock."""
        image = Image(self.data)
        self.size = image.block_size
        self.journal = [nr for _, nr in image.mapping(image.inode(8))]
        head = self.journal[0] * self.size
        (self.sequence,) = struct.unpack_from(">I", self.data, head + 24)
        self.at = self.start = start % len(self.journal)
        struct.pack_into(">II", self.data, head + 24, self.sequence, self.start)
        struct.pack_into(">I", self.data, head + 40, 1)  # revoke blocks are possible
        (flags,) = struct.unpack_from("<I", self.data, 1024 + 96)
        struct.pack_into("<I", self.data, 1024 + 96, flags | 4)

    def put(self, block: bytes) -> None:
        """Write the next block of the log."""
        at = self.journal[self.at] * self.size
        self.data[at : at + self.size] = block.ljust(self.size, b"\0")
        self.at = self.at + 1 if self.at + 1 < len(self.journal) else 1

    def header(self, kind: int) -> bytes:
        return struct.pack(">III", MAGIC, kind, self.sequence)

    def describe(self, blocks: dict[int, bytes], same_uuid: bool = True) -> None:
        """Write a descriptor block and the blocks that it lists."""
        tags, images_ = b"", []
        for number, (nr, content) in enumerate(blocks.items()):
            escaped = content[:4] == struct.pack(">I", MAGIC)
            same = same_uuid and number > 0
            flags = escaped * ESCAPED | same * SAME_UUID | (number == len(blocks) - 1) * LAST
            tags += struct.pack(">IHH", nr, 0, flags) + (b"" if same else bytes(16))
            images_.append(bytes(4) + content[4:] if escaped else content)
        self.put(self.header(DESCRIPTOR) + tags)
        for content in images_:
            self.put(content)

    def revoke(self, *blocks: int) -> None:
        used = 16 + 4 * len(blocks)
        self.put(self.header(REVOKE) + struct.pack(f">I{len(blocks)}I", used, *blocks))

    def commit(self) -> None:
        self.put(self.header(COMMIT) + bytes(36) + struct.pack(">QI", 1_700_000_000, 0))
        self.sequence += 1


def prepared(place: Path, shape: Shape) -> tuple[Path, list[int]]:
    """An image with a file, and the blocks of its data."""
    path = images.make(place / "image", shape)
    with engine.opened(path) as opened:
        file = opened.layer.open(make_file(opened.layer, b"file"), os.O_RDWR)
        file.pwrite(b"o" * (BLOCKS * shape.block_size), 0)
        file.close()
    image = Image(path.read_bytes())
    (ino,) = (ino for name, ino in (image.tree()[2].names or {}).items() if name == b"file")
    return path, [nr for _, nr in image.mapping(image.inode(ino))]


def content(path: Path) -> bytes:
    """Return the content of the file, as the read-only engine shows it."""
    with engine.opened(path, read_only=True) as opened:
        file = opened.layer.open(find(opened.layer, b"file"), os.O_RDONLY)
        try:
            return file.pread(BLOCKS * 4096, 0)
        finally:
            file.close()


def write_anything(log: Log, blocks: list[int], chance: random.Random) -> None:
    """Write some transactions of all kinds, perhaps with an incomplete one."""
    for _ in range(chance.randrange(1, 8)):
        for _ in range(chance.randrange(1, 4)):
            if chance.random() < 0.3:
                log.revoke(*chance.sample(blocks, chance.randrange(1, 6)))
            else:
                chosen = chance.sample(blocks, chance.randrange(1, 12))
                log.describe({nr: some(log.size, chance) for nr in chosen}, chance.random() < 0.7)
        log.commit()
    how = chance.randrange(4)
    if how == 1:  # without a commit block
        log.describe({blocks[0]: some(log.size, chance)})
        log.revoke(blocks[1])
    elif how == 2:  # of another transaction than the next
        log.sequence += chance.choice((1, 100, -1))
        log.describe({blocks[0]: some(log.size, chance)})
        log.commit()
    elif how == 3:  # old data
        log.put(chance.randbytes(log.size))


def some(size: int, chance: random.Random) -> bytes:
    """Return a block of data, which may begin like a block of the journal."""
    start = chance.choice((chance.randbytes(4), struct.pack(">I", MAGIC), bytes(4)))
    return start + chance.randbytes(4) * (size // 4 - 1)


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_the_engine_replays_what_e2fsck_does(place: Path, shape: Shape) -> None:
    path, blocks = prepared(place, shape)
    base, changed = path.read_bytes(), 0
    for seed in range(25):
        chance = random.Random(seed)
        log = Log(bytearray(base))
        log.begin(chance.choice((1, 1, 500, -3, -15, -40)) if seed else 1)
        write_anything(log, blocks, chance)
        log.data[len(base) :] = b""
        path.write_bytes(log.data)
        shutil.copyfile(path, place / "other")
        done = run("e2fsck", "-p", "-E", "journal_only", place / "other", check=False)
        assert done.returncode in (0, 1), done.stdout
        expected = content(place / "other")
        changed += expected != b"o" * len(expected)
        assert content(path) == expected, f"seed {seed}"
        assert path.read_bytes() == log.data
        assert recovery.by_engine(path) is None
        assert content(path) == expected, f"seed {seed}"
    assert changed > 10


@pytest.mark.parametrize(
    "what", ["a block beyond the end", "a block of the journal", "a revoke block", "endless"]
)
def test_a_log_that_makes_no_sense_is_refused(place: Path, what: str) -> None:
    path, blocks = prepared(place, SMALL)
    log = Log(bytearray(path.read_bytes()))
    log.begin(1)
    if what == "a block beyond the end":
        log.describe({1 << 20: bytes(log.size)})
    elif what == "a block of the journal":
        log.describe({log.journal[5]: bytes(log.size)})
    elif what == "a revoke block":
        log.put(log.header(REVOKE) + struct.pack(">II", log.size + 4, blocks[0]))
    else:  # the log wraps around
        for _ in range(len(log.journal)):
            log.describe({})
    log.commit()
    path.write_bytes(log.data)
    for read_only in (True, False):
        if what == "endless":
            with engine.opened(path, read_only=read_only):
                pass
            continue
        with (
            pytest.raises(OSError, match="journal is damaged") as caught,
            engine.opened(path, read_only=read_only),
        ):
            pass
        assert caught.value.errno == errno.EBADMSG
        assert path.read_bytes() == log.data, "it was written to"
