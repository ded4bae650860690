"""The images of the squashfs benchmarks: one tree, packed by each compressor, made once and kept.

The tree is the lower image's, without what is larger than half a block, and a file ``large``: all
regular files of the lower one after the other, programs and text as they come.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

from perf import corpus
from perf.corpus import Corpus, Entry, Large

COMPRESSORS = ("gzip", "xz", "zstd")
"""Each with mksquashfs's defaults, and so with blocks of 128 KiB."""
LARGE = "large"
LARGE_BYTES = 1 << 30
_MAX_FILE = 1 << 16
USER, USER_FILES, NOBODY = "user", 20_000, 65534
"""The image of an ordinary user: its name, how many files it has at most, and whose they are."""


def prepare(cache: Path, lower: Corpus, compressor: str, reference: Path) -> Corpus:
    """Return the corpus of the image for *compressor*, and mount that at *reference*."""
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
    """Where the image for *compressor* is kept."""
    return cache / f"tree-{compressor}.squashfs"


def make(cache: Path, lower: Path, entries: list[Entry], compressor: str) -> Path:
    """Return the image for *compressor*, made of the mounted *lower* if it is not in *cache* (minutes)."""
    image = path(cache, compressor)
    if image.exists():
        return image
    large = make_large(cache, lower, entries).path
    chosen = [e.path for e in entries if not stat.S_ISREG(e.mode) or e.size <= _MAX_FILE]
    names = cache / f"names-{compressor}"
    names.write_bytes(b"".join(os.fsencode(name) + b"\0" for name in chosen))
    new = image.with_suffix(".new")
    # By way of tar: mksquashfs takes a list of files too (-cpiostyle), but for hours with so many.
    pack = ["tar", "-c", "--null", "--no-recursion", "-T", str(names), "-C", str(large.parent), large.name]
    squash = ["mksquashfs", "-", str(new), "-tar", "-comp", compressor, "-noappend", "-no-progress", "-quiet"]
    with subprocess.Popen(pack, cwd=lower, stdout=subprocess.PIPE) as tar:
        subprocess.run(squash, stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    names.unlink()
    if tar.returncode:
        raise RuntimeError("tar could not read the lower: what was made of it is not used")
    new.rename(image)
    return image


def make_user(cache: Path, lower: Corpus) -> Path:
    """Return the image of a directory of the *lower* that is all nobody's, made if it is not in *cache*."""
    image = cache / f"{USER}.squashfs"
    if not image.exists():
        new = image.with_suffix(".new")
        source = lower.reference / lower.directory(USER_FILES, 400 << 20)
        owner = [word for kind in ("uid", "gid") for word in (f"-force-{kind}", str(NOBODY))]
        squash = ["mksquashfs", str(source), str(new), "-comp", "zstd", "-noappend", "-no-progress", "-quiet"]
        subprocess.run([*squash, *owner], stdout=subprocess.DEVNULL, check=True)
        new.rename(image)
    return image


def make_large(cache: Path, lower: Path, entries: list[Entry]) -> Large:
    """Return the large file, made of the mounted *lower* if it is not in *cache*."""
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
