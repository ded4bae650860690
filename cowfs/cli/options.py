"""Mount options: ``-o`` as mount(8) passes them, split into ours, libfuse's and those for others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cowfs.errors import UsageError
from cowfs.store.sizes import parse_size

ENGINES = ("auto", "process", "kernel")
_CHOICES = {"engine": ENGINES, "io_uring": ("auto", "on", "off"), "passthrough": ("auto", "off")}

_VALUES = {
    "store": "the writable store: an image, a directory, or memory (the default)",
    "engine": "who reads and writes images: process (and auto), or kernel (root only)",
    "offset": "where in its file the lower image begins, in bytes; several with colons",
    "size": "how large a store in memory may become: 256M, 2G (default: half of the RAM)",
    "io_uring": "take requests on the CPU where they are made: auto, on or off (Linux 6.14)",
    "passthrough": "let the kernel read and write the store's files: auto or off (Linux 6.9)",
    "log": "write the log to this file",
}
_FLAGS = {
    "force_lower": "use the store though it was made for another lower",
    "allow_other": "let other users in (root's mounts do by default)",
    "noallow_other": "let only the one who mounts in",
    "noacl": "do not serve POSIX ACLs",
    "fakeroot": "be root inside: see all owners, be denied nothing (users only)",
    "ro": "read-only",
    "rw": "writable (the default)",
    "sloppy": "ignore options that nobody knows",
}
_FUSE_FLAGS = {"suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync", "noatime", "atime"}
_IGNORED = {
    "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "defaults",
    "loop", "default_permissions", "relatime", "norelatime", "strictatime", "async", "diratime", "nodiratime",
    "silent", "loud", "mand", "nomand", "lazytime", "nolazytime", "iversion", "noiversion",
}  # fmt: skip


@dataclass(slots=True)
class Options:
    """What ``-o`` said."""

    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    fuse: set[str] = field(default_factory=set)

    @property
    def size(self) -> int | None:
        """The size option in bytes."""
        return parse_size(self.values["size"]) if "size" in self.values else None

    @property
    def offsets(self) -> tuple[int, ...]:
        """The offset option, in bytes, for as many of the lowers as it names."""
        return parse_offsets(self.values.get("offset", ""))


_OFFSET = re.compile(r"([0-9]{1,18})([kmgt]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_offsets(text: str) -> tuple[int, ...]:
    """Return the bytes that OFFSET[:OFFSET...] means; none is 0, and ``offset=`` may stand before it.

    A bare number is in bytes, ``4K`` is 4096. UsageError for anything else.
    """
    offsets = []
    given = text.removeprefix("offset=")
    for part in given.split(":") if given else ():
        match = _OFFSET.fullmatch(part or "0")
        if not match:
            raise UsageError(f"{part!r} is not an offset", "a number of bytes, or 4K, 1M")
        offsets.append(int(match[1]) * _UNITS[match[2].lower()])
    return tuple(offsets)


def split(text: str) -> list[str]:
    """Split at commas; ``\\,`` is a comma that belongs to a value, and ``\\\\`` a backslash."""
    return _split(text, ",")


def split_lowers(text: str) -> tuple[str, ...]:
    """Split LOWER[:LOWER...]; ``\\:`` is a colon in a name, as in overlayfs's lowerdir, ``\\\\`` a backslash.

    Before anything else a backslash is one.
    """
    return tuple(_split(text, ":"))


def join_lowers(lowers: Sequence[str]) -> str:
    """Write LOWER[:LOWER...] so that :func:`split_lowers` has the same back."""
    return ":".join(lower.replace("\\", "\\\\").replace(":", "\\:") for lower in lowers)


def _split(text: str, separator: str) -> list[str]:
    parts = [""]
    characters = iter(text)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            parts[-1] += following if following in {separator, "\\"} else character + following
        elif character == separator:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def parse(given: list[str]) -> Options:
    """Sort the options of all ``-o``. UsageError names one that nobody knows."""
    options = Options()
    parts = [part for text in given for part in split(text)]
    for option in parts:
        name, equals, value = option.partition("=")
        if name in _VALUES and equals:
            if not value:
                raise UsageError(f"option {name} needs a value: {name}=…", _VALUES[name])
            options.values[name] = value
        elif name in _VALUES:
            raise UsageError(f"option {name} needs a value: {name}=…", _VALUES[name])
        elif equals and name in {*_FLAGS, *_FUSE_FLAGS}:
            raise UsageError(f"option {option}: {name} takes no value", f"write {name} alone")
        elif name in _FLAGS:
            options.flags.add(name.replace("-", "_"))
        elif name in _FUSE_FLAGS:
            options.fuse.add(name)
        elif not (name in _IGNORED or name.startswith(("x-", "X-", "comment")) or "sloppy" in parts):
            known = ", ".join([*(f"{name}=" for name in _VALUES), *_FLAGS])
            raise UsageError(f"unknown option {option!r}", f"known: {known}, and mount's suid, dev, exec …")
    for name, choices in _CHOICES.items():
        value = options.values.get(name, choices[0])
        if value not in choices:
            raise UsageError(f"unknown {name} {value!r}", "one of " + ", ".join(choices))
    return options


def describe() -> str:
    """Return the help text for ``-o``."""
    lines = [f"  {name + '=…':<16}{text}" for name, text in _VALUES.items()]
    lines += [f"  {name:<16}{text}" for name, text in _FLAGS.items()]
    return "\n".join(lines)


def add_offset(parser: argparse.ArgumentParser) -> None:
    """Add the offset of images to a subcommand that opens them; :func:`parse_offsets` reads it."""
    parser.add_argument(
        "-o",
        "--offset",
        metavar="BYTES[:BYTES...]",
        default="",
        help="where in its file the image begins",
    )
