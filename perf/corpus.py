"""The data of the samples: the lower image, the archive to unpack, and lists of files.

Everything is made from a real tree (``/usr``) and cached, so that runs on one machine can be compared.
The kernel mounts the image once more as the *reference*: the systems under test must show the same tree.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ENTRIES = 65_000
MAX_BYTES = 2 << 30
MAX_FILE = 64 << 20
# Many small files first, so that a limited part of a large /usr still resembles a root filesystem.
FIRST = ("bin", "sbin", "include", "libexec", "share", "lib")
TAR_FILES = 8_000
DATA_MIB = 400
PACK_OPTIONS = ("-noappend", "-no-progress", "-quiet")


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in the reference."""

    path: str
    mode: int
    size: int
    nlink: int


@dataclass(frozen=True, slots=True)
class Large:
    """A large file before it was packed into an image."""

    path: Path
    size: int
    digest: str
    """As ``client.py read`` prints it."""


@dataclass(slots=True)
class Corpus:
    """The lower image and the data that is made from it."""

    image: Path
    archive: Path
    """A tar archive of regular files and their directories, on tmpfs."""
    data: Path
    """A file of incompressible bytes, on tmpfs."""
    reference: Path
    entries: list[Entry]
    archived: list[Entry]
    facts: dict[str, Any]
    large: Large | None = None
    in_cache: bool = False
    """Whether cold workloads begin with the image in the page cache, so that they do not measure the disk."""

    def regular_files(self, low: int, high: int, count: int) -> list[Entry]:
        """Return up to *count* regular files of *low* to *high* bytes, spread evenly over the tree."""
        fit = [e for e in self.entries if stat.S_ISREG(e.mode) and low <= e.size <= high and e.nlink == 1]
        if len(fit) <= count:
            return fit
        return [fit[i * len(fit) // count] for i in range(count)]

    def largest_directory(self, max_files: int, max_bytes: int) -> str:
        """Return the directory with the most files within the limits, at most two levels down."""
        files: dict[str, int] = defaultdict(int)
        size: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            parts = entry.path.split("/")[:-1]
            for depth in (1, 2):
                if stat.S_ISREG(entry.mode) and len(parts) >= depth:
                    files["/".join(parts[:depth])] += 1
                    size["/".join(parts[:depth])] += entry.size
        fit = [d for d in files if files[d] <= max_files and size[d] <= max_bytes]
        return max(fit, key=lambda d: (files[d], d), default=".")


def scan(root: Path) -> list[Entry]:
    """Return every name under *root*, sorted, without the root itself and without other filesystems."""
    found: list[Entry] = []
    device = root.lstat().st_dev
    pending = [""]
    while pending:
        base = pending.pop()
        with os.scandir(root / base) as listing:
            for item in listing:
                info = item.stat(follow_symlinks=False)
                path = f"{base}/{item.name}" if base else item.name
                found.append(Entry(path, info.st_mode, info.st_size, info.st_nlink))
                if stat.S_ISDIR(info.st_mode) and info.st_dev == device:
                    pending.append(path)
    return sorted(found, key=lambda e: e.path)


def choose(entries: list[Entry], max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> list[Entry]:
    """Return a limited part of *entries*: top directories in the order of FIRST, then the others."""

    def sort_key(entry: Entry) -> tuple[int, str]:
        top = entry.path.split("/", 1)[0]
        return (FIRST.index(top) if top in FIRST else len(FIRST), entry.path)

    chosen: list[Entry] = []
    total = 0
    for entry in sorted(entries, key=sort_key):
        size = entry.size if stat.S_ISREG(entry.mode) else 0
        if size > MAX_FILE or total + size > max_bytes:
            continue
        if len(chosen) == max_entries:
            break
        chosen.append(entry)
        total += size
    return chosen


def make_image(cache: Path, source: Path = Path("/usr")) -> Path:
    """Return the path of the lower image in *cache*; make it from *source* if needed, which takes minutes."""
    image = cache / "lower.squashfs"
    if image.exists():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    return pack_image(image, source, [entry.path for entry in choose(scan(source))], "zstd")


def pack_image(
    image: Path, source: Path, paths: list[str], compressor: str, more: Sequence[str] = ()
) -> Path:
    """Pack *paths* of *source* into a squashfs *image*, and return it; *more* arguments go to tar(1)."""
    new, names = image.with_suffix(".new"), image.with_suffix(".names")
    names.write_bytes(b"".join(os.fsencode(path) + b"\0" for path in paths))
    # mksquashfs also accepts a list of files (-cpiostyle), but takes hours with so many: use tar.
    pack = ["tar", "-c", "--null", "--no-recursion", "-T", str(names), *more]
    squash = ["mksquashfs", "-", str(new), "-tar", "-comp", compressor, *PACK_OPTIONS]
    with subprocess.Popen(pack, cwd=source, stdout=subprocess.PIPE) as tar:
        subprocess.run(squash, stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    names.unlink()
    if tar.returncode:
        raise RuntimeError(f"tar could not read all of {source}: the image is incomplete and not used")
    new.rename(image)
    return image


def prepare(image: Path, reference: Path, scratch: Path) -> Corpus:
    """Scan the *reference* (the mounted *image*), and make the archive and the data file in *scratch*."""
    entries = scan(reference)
    archived = choose_archived(entries, TAR_FILES)
    archive = make_archive(scratch / "files.tar", reference, archived)
    data = scratch / "data"
    write_data(data, DATA_MIB)
    regular = [e for e in entries if stat.S_ISREG(e.mode)]
    facts = {
        "lower": "a part of /usr, squashfs, zstd",
        "image_bytes": image.stat().st_size,
        "entries": len(entries),
        "regular_files": len(regular),
        "regular_bytes": sum(e.size for e in regular),
        "archive_files": sum(stat.S_ISREG(e.mode) for e in archived),
        "archive_bytes": archive.stat().st_size,
        "fingerprint": f"{fingerprint(entries):08x}",
    }
    return Corpus(image, archive, data, reference, entries, archived, facts)


def make_archive(archive: Path, reference: Path, archived: list[Entry]) -> Path:
    """Pack *archived* from the *reference* into *archive*, and return its path."""
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for entry in archived:
            tar.add(reference / entry.path, arcname=f"./{entry.path}", recursive=False)
    return archive


def choose_archived(entries: list[Entry], count: int, max_size: int = 1 << 16) -> list[Entry]:
    """Return the last *count* regular files of at most *max_size* bytes, and every directory above them.

    Consecutive files fill whole directories, like the files of a package.
    """
    files = [e for e in entries if stat.S_ISREG(e.mode) and e.size <= max_size and e.nlink == 1][-count:]
    above = {
        "/".join(parts[:n]) for f in files for parts in [f.path.split("/")] for n in range(1, len(parts))
    }
    return [e for e in entries if e.path in above] + files


def write_data(path: Path, mib: int) -> None:
    """Write *mib* MiB to *path*, without two equal blocks of 4 KiB."""
    block = bytearray(os.urandom(1 << 20))
    with path.open("wb") as file:
        for number in range(mib):
            for offset in range(0, len(block), 4096):
                block[offset : offset + 4] = number.to_bytes(4, "little")
            file.write(block)


def fingerprint(entries: list[Entry]) -> int:
    """Return a number that is the same for two runs only if they used the same tree."""
    text = json.dumps([[e.path, e.mode, e.size] for e in entries])
    return zlib.crc32(text.encode("ascii"))
