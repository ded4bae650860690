"""Look into an ext3 image without mounting it, with e2fsprogs' debugfs. Needs no privilege.

What it shows is what is on disk: while the image is mounted, that may be a few seconds old.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cowfs.errors import StoreError
from cowfs.store.tools import last_line, place, run

_ENTRY = re.compile(rb"/(\d+)/([0-7]+)/\d+/\d+/([^/]+)/\d*/\n")
_XATTR = re.compile(rb"^  (\S+) \(\d+\)(?: = (.*))?$", re.MULTILINE)
_DEVICE = re.compile(rb"^.*Device major/minor number: (\d+):(\d+)", re.MULTILINE)
_BATCH = 4096


@dataclass(slots=True)
class Entry:
    """A name in a tree: what the overlay's rules are checked on."""

    path: bytes
    mode: int
    rdev: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def requests(
    image: int, commands: Sequence[str], *, write: bool = False, pass_fds: Sequence[int] = ()
) -> list[bytes]:
    """Return what debugfs answers to each command, in one run of it. Blocks. Errors are not answers.

    *image* is a descriptor of the image, here and below; *pass_fds* are those of other files to read.
    """
    script = "".join(f"{command}\n" for command in commands).encode()
    options = ["-w", "-f", "-"] if write else ["-f", "-"]
    done = run(["debugfs", *options, place(image)], data=script, pass_fds=[image, *pass_fds])
    if done.returncode:
        raise StoreError(f"debugfs: {last_line(done.stderr)}")
    answers = []
    rest = done.stdout
    for command in commands:  # each is repeated before its answer
        before, found, rest = rest.partition(f"debugfs: {command}\n".encode())
        if not found:
            raise StoreError(f"debugfs has stopped: {last_line(done.stderr)}")
        answers.append(before)
    return [*answers[1:], rest]


def read_file(image: int, path: str) -> bytes:
    """Return the content of a file in the image; empty when there is none."""
    return requests(image, [f"cat {path}"])[0]


def names(image: int) -> set[bytes]:
    """Return the names at the root of the image."""
    return {name for _, _, name in _list(requests(image, ["ls -p <2>"])[0])}


def _list(answer: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield inode, mode and name of everything in a listing."""
    for match in _ENTRY.finditer(answer):
        if match[3] not in {b".", b".."}:
            yield int(match[1]), int(match[2], 8), match[3]


def walk(image: int, top: str) -> Iterator[Entry]:
    """Yield everything below the directory *top* of the image, each directory before what is in it."""
    level: list[tuple[str, bytes]] = [(top, b"")]
    while level:
        below: list[tuple[str, bytes]] = []
        for start in range(0, len(level), _BATCH):
            batch = level[start : start + _BATCH]
            answers = requests(image, [f"ls -p {place}" for place, _ in batch])
            found = [
                (inode, Entry(path + b"/" + name if path else name, mode))
                for (_, path), answer in zip(batch, answers, strict=True)
                for inode, mode, name in _list(answer)
            ]
            yield from _dressed(image, found)
            below += [(f"<{inode}>", entry.path) for inode, entry in found if stat.S_ISDIR(entry.mode)]
        level = below


def _dressed(image: int, found: list[tuple[int, Entry]]) -> Iterator[Entry]:
    """Yield the entries with what a listing does not tell: xattrs and device numbers."""
    for start in range(0, len(found), _BATCH):
        batch = found[start : start + _BATCH]
        asked = [
            f"stat <{inode}>" if stat.S_ISCHR(entry.mode) else f"ea_list <{inode}>" for inode, entry in batch
        ]
        for (_, entry), answer in zip(batch, requests(image, asked), strict=True):
            device = _DEVICE.search(answer)
            if device:
                entry.rdev = os.makedev(int(device[1]), int(device[2]))
            for match in _XATTR.finditer(answer):
                entry.xattrs[match[1]] = _value(match[2] or b"")
            yield entry


def _value(shown: bytes) -> bytes:
    """Return a value as it is from how it is shown: in quotes, or as hexadecimal bytes."""
    if shown.startswith(b'"'):
        return shown[1:-1]
    try:
        return bytes.fromhex(shown.decode())
    except ValueError:
        return shown
