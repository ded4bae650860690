"""The images of the squashfs benchmarks: one tree, packed by each compressor, made once and cached.

The tree has the lower image's files up to half a block, and a file ``large`` that consists of all regular
files of the lower.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
from pathlib import Path

from perf import corpus
from perf.corpus import Corpus, Entry, Large

COMPRESSORS = ("gzip", "xz", "zstd")
"""Each is used with mksquashfs's defaults, and therefore with blocks of 128 KiB."""
LARGE = "large"
LARGE_BYTES = 1 << 30
_MAX_FILE = 1 << 16
USER, USER_FILES, NOBODY = "user", 20_000, 65534
"""The image of an ordinary user: its name, its maximum number of files, and their owner."""


def prepare(cache: Path, lower: Corpus, compressor: str, reference: Path) -> Corpus:
    """Mount the image for *compressor* at *reference*, and return its corpus."""
    image = make(cache, lower.reference, lower.entries, compressor)
    reference.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(image), str(reference)], check=True)
    entries = corpus.scan(reference)
    large = make_large(cache, lower.reference, lower.entries)
    facts = {
        "image_bytes": image.stat().st_size,
        "entries": len(entries),
        "large_bytes": large.size,
        "fingerprint": f"{corpus.fingerprint(entries):08x}",
    }
    return Corpus(image, lower.archive, lower.data, reference, entries, [], facts, large, in_cache=True)


def path(cache: Path, compressor: str) -> Path:
    """Return the path of the cached image for *compressor*, which need not exist."""
    return cache / f"tree-{compressor}.squashfs"


def make(cache: Path, lower: Path, entries: list[Entry], compressor: str) -> Path:
    """Return the path of the image for *compressor*; make it from *lower* if needed, which takes minutes."""
    image = path(cache, compressor)
    if image.exists():
        return image
    large = make_large(cache, lower, entries).path
    chosen = [e.path for e in entries if not stat.S_ISREG(e.mode) or e.size <= _MAX_FILE]
    return corpus.pack_image(image, lower, chosen, compressor, ["-C", str(large.parent), large.name])


def make_user(cache: Path, lower: Corpus) -> Path:
    """Return the path of an image of a directory of the *lower*, owned by nobody; make it if needed."""
    image = cache / f"{USER}.squashfs"
    if not image.exists():
        new = image.with_suffix(".new")
        source = lower.reference / lower.largest_directory(USER_FILES, 400 << 20)
        owner = [word for kind in ("uid", "gid") for word in (f"-force-{kind}", str(NOBODY))]
        pack = ["mksquashfs", str(source), str(new), *corpus.PACK_OPTIONS, "-comp", "zstd", *owner]
        subprocess.run(pack, stdout=subprocess.DEVNULL, check=True)
        new.rename(image)
    return image


def make_large(cache: Path, lower: Path, entries: list[Entry]) -> Large:
    """Return the large file; make it from *lower* if it is not in *cache*."""
    kept = cache / LARGE
    if not kept.exists():
        new = kept.with_suffix(".new")
        with new.open("wb") as target:
            for entry in entries:
                if not stat.S_ISREG(entry.mode):
                    continue
                with (lower / entry.path).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                if target.tell() >= LARGE_BYTES:
                    break
            target.truncate(min(target.tell(), LARGE_BYTES))
        new.rename(kept)
    digest = hashlib.blake2b(digest_size=16)
    with kept.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    size = kept.stat().st_size
    return Large(kept, size, f"{size} {digest.hexdigest()}")
