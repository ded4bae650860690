"""Build the fuzzer of the ext3 engine, and its initial images."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from cowfs.formats.ext3.build_engine import HERE as ENGINE
from cowfs.formats.ext3.build_engine import SOURCES as ENGINE_SOURCES
from tests.ext3 import images
from tests.ext3.damage import Target
from tests.ext3.images import Shape
from tests.ext3.originals import make_originals
from tests.ext3.redo import ring
from tests.support.mounts import project_root
from tests.support.system import run

HERE = Path(__file__).parent
HARNESS = ["bases", "damage", "walk", "files", "operations", "run"]
WARNINGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Wno-unused-but-set-variable"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def has_clang() -> bool:
    """Return whether clang with libFuzzer is installed."""
    return shutil.which("clang") is not None


def build(out: Path, *, libfuzzer: bool = True, compiler: str = "clang", flags: Iterable[str] = ()) -> Path:
    """Compile the fuzzer; without *libfuzzer*, a program that runs given inputs, with any compiler.

    Other output of the compiler is beside *out*.
    """
    root, out = Path(project_root()), out.absolute()
    sources = [root / ENGINE / f"{name}.c" for name in ENGINE_SOURCES]
    sources += [HERE / f"{name}.c" for name in (*HARNESS, "mutate" if libfuzzer else "standalone")]
    out.parent.mkdir(parents=True, exist_ok=True)
    run(
        compiler, *WARNINGS, "-O2", *SANITIZERS, *(["-fsanitize=fuzzer"] if libfuzzer else []), *flags,
        "-I", root / ENGINE, "-I", HERE, *sources, "-o", out, "-lext2fs", "-lcom_err", "-lpthread",
        timeout=300, cwd=out.parent,
    )  # fmt: skip
    return out


def up_to_date(out: Path) -> Path:
    """Compile the fuzzer if a source is newer; return its path."""
    sources = [*HERE.glob("*.[ch]"), *(Path(project_root()) / ENGINE).glob("*.[ch]"), Path(__file__)]
    if not out.exists() or any(path.stat().st_mtime > out.stat().st_mtime for path in sources):
        build(out)
    return out


def make_images(place: Path) -> Path:
    """Make the initial images and maps of their structures, N.img and N.map."""
    place.mkdir(parents=True, exist_ok=True)
    made = make_originals(place / "originals")
    made.append(_nearly_full(place / "originals"))
    for number, path in enumerate(made):
        data = path.read_bytes()
        (place / f"{number}.img").write_bytes(data)
        (place / f"{number}.map").write_bytes(_map(Target(path.name, data)))
    shutil.rmtree(place / "originals")
    return place


def _nearly_full(place: Path) -> Path:
    (place / "much").mkdir()
    (place / "much" / "file").write_bytes(random.Random(1).randbytes(1_800_000))
    return images.make(place / "full", Shape(1024, 256, mib=3, journal=1, inodes=64), place / "much")


def _map(target: Target) -> bytes:
    """Return the (offset, length) of each structure in bytes, in the order of fuzz.h's enum region."""
    image, size = target.image, target.image.block_size

    def blocks(numbers: Iterable[int]) -> list[tuple[int, int]]:
        return [(number * size, size) for number in numbers]

    groups = range(image.groups)
    header, _, _ = ring(target.data)
    log = [block for block in target.journal[1:200] if block * size < header]
    at = target.journal.index(header // size)
    regions = [
        [(1024, 1024)],
        [(image.descriptor(number), 32) for number in groups],
        blocks(block for number in groups for block in image.group(number)[:2]),
        [(image.place(ino), image.inode_size) for ino in target.inodes],
        blocks(target.directories),
        blocks(target.indexes),
        blocks(target.indirect),
        blocks(target.xattrs),
        blocks(target.journal[:1]),
        blocks(log),
        blocks(target.journal[at : at + 1]),
        blocks(target.journal[at + 1 :]),
        blocks(target.contents),
        [(0, len(target.data))],
    ]
    return b"".join(
        struct.pack("<I", len(region)) + b"".join(struct.pack("<II", *piece) for piece in region)
        for region in regions
    )
