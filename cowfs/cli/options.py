"""Mount options as mount(8) passes them with ``-o``: those of cowfs, of libfuse, and of other programs."""

from __future__ import annotations

import argparse
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from cowfs import command
from cowfs.errors import CowfsError, LayerError, UsageError
from cowfs.formats.verified import is_root_hash
from cowfs.store.format.sizes import is_size, parse_size
from cowfs.types import Atime
from cowfs.url.names import authority, is_url
from cowfs.url.settings import DEFAULT_LIMIT, Settings

if TYPE_CHECKING:
    from cowfs.api import Lowers

ENGINES = ("auto", "process", "kernel")
_CHOICES = {
    "engine": ENGINES,
    "io_uring": ("auto", "on", "off"),
    "passthrough": ("auto", "off"),
    "whiteouts": ("auto", "overlayfs", "userxattr", "trustedxattr", "aufs", "oci"),
}

VALUES = {
    "store": "the writable store: an image, a directory, or memory (the default)",
    "key_file": "the key of a store that is encrypted with LUKS (default: ask for the passphrase)",
    "subdir": "one of several stores in the store, for its own system: a name",
    "engine": "engine for images: cowfs (process, auto) or the kernel (root only)",
    "offset": "byte offset of the lower image in its file, or auto; colons separate several",
    "image_offset": "the same, for mount(8) and fstab: mount(8) takes offset= for itself",
    "verify": "root hash of the lower image's dm-verity tree, or a file with it; colons separate several",
    "size": "maximum size of a store in memory: 256M, 2G (default: half of the RAM)",
    "io_uring": "receive requests over io_uring: auto, on or off (Linux 6.14)",
    "passthrough": "let the kernel read and write the store's files: auto or off (Linux 6.9)",
    "whiteouts": "format of whiteouts in the lowers: overlayfs, userxattr, aufs, oci, or auto",
    "volatile": "do not keep changes below these directories: /tmp:/run; the store remembers; or none",
    "url_cache": "cache data read by URL in this directory, or none (/var/cache/cowfs, ~/.cache/cowfs)",
    "url_cache_size": "maximum size of that cache, for all images: 500M, 8G (default: 2G)",
    "url_wait": "seconds that a read waits for a server that does not answer (default: 600)",
    "fsname": "what mount(8) and df(1) show as the source (default: the lowers)",
    "log": "write the log to this file",
    "fault": "make requests fail, for tests: *.conf:write:ENOSPC:AFTER=3; may be repeated; or none",
    "debug": "topics to log: requests, overlay, store, cache; separated by colons",
}
_SAME = {"image_offset": "offset"}
_FLAGS = {
    "force_lower": "use the store even if it belongs to another lower",
    "allow_other": "let other users access the mount (the default for root)",
    "noallow_other": "let only the user who mounts access the mount",
    "noacl": "do not support POSIX ACLs",
    "blame": "record in the store which program makes each change (cowfs blame)",
    "fakeroot": "act as root inside: see all owners, may do everything (users only)",
    "ro": "read-only",
    "rw": "writable (the default)",
    "sloppy": "ignore unknown options",
}
DEBUG_TOPICS = {
    "requests": "each request of the kernel, its answer and its duration",
    "overlay": "in which layers a name was found",
    "store": "each change made to the store",
    "cache": "reads from images, and cache entries that the kernel must drop",
}
_FUSE_FLAGS = {"suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync"}
_ATIME = {
    "noatime": ("noatime", True), "atime": ("noatime", False), "relatime": ("noatime", False),
    "strictatime": ("strictatime", True), "nostrictatime": ("strictatime", False),
    "nodiratime": ("nodiratime", True), "diratime": ("nodiratime", False),
}  # fmt: skip
"""The options about atime: the flag that each one sets or clears."""
_IGNORED = {
    "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "defaults",
    "loop", "default_permissions", "norelatime", "async", "silent", "loud",
    "mand", "nomand", "lazytime", "nolazytime", "iversion", "noiversion",
}  # fmt: skip


def names() -> list[str]:
    """Return all known options in order, with a ``=`` at the end of those that take a value."""
    return sorted([*(f"{name}=" for name in VALUES), *_FLAGS, *_FUSE_FLAGS, *_ATIME])


@dataclass(slots=True)
class Options:
    """The values that ``-o`` set."""

    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    fuse: set[str] = field(default_factory=set)
    debug: frozenset[str] = frozenset()
    """The topics to log (cowfs.trace)."""
    faults: list[str] = field(default_factory=list)
    """The faults to inject (cowfs.faults)."""

    @property
    def size(self) -> int | None:
        """The value of the size option in bytes."""
        return parse_size(self.values["size"]) if "size" in self.values else None

    @property
    def verify(self) -> tuple[str, ...]:
        """The value of the verify option, one for each lower it names: root hashes, or paths of files."""
        given = self.values.get("verify")
        parts = _split(given, ":") if given else []
        return tuple(part if not part or is_root_hash(part) else os.path.abspath(part) for part in parts)

    @property
    def by_url(self) -> Settings:
        """How to read lowers given by URL. UsageError."""
        cache, wait = self.values.get("url_cache"), self.values.get("url_wait", "600")
        if not wait.isdecimal() or not 0 < int(wait) < 1 << 31:
            raise UsageError(f"url_wait={wait}: not a number of seconds", "write url_wait=600")
        if cache is not None:
            cache = "" if cache == "none" else os.path.abspath(cache)
        size = self.values.get("url_cache_size")
        return Settings(float(wait), cache, DEFAULT_LIMIT if size is None else parse_size(size))

    @property
    def atime(self) -> Atime:
        """When reading from the store updates atime: by default as with the kernel's relatime."""
        always = "strictatime" in self.fuse
        files = (always or "noatime" not in self.fuse) and "ro" not in self.flags
        return Atime(files, files and "nodiratime" not in self.fuse, always)

    @property
    def volatile(self) -> tuple[str, ...] | None:
        """The directories of the volatile option, without those inside another; None if it is not given.

        UsageError for an invalid one.
        """
        given = self.values.get("volatile")
        return None if given is None else parse_volatile(given)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The value of the offset option in bytes, one for each lower it names."""
        return parse_offsets(self.values.get("offset", ""))


_OFFSET = re.compile(r"([0-9]{1,18})([kmgt]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


AUTO = -1
"""The offset to be found by a search."""


def parse_offsets(text: str) -> tuple[int, ...]:
    """Return the offsets in OFFSET[:OFFSET...], in bytes. ``offset=`` may precede them.

    A number without a unit is in bytes, ``4K`` is 4096, ``auto`` is AUTO, and an empty one is 0. UsageError.
    """
    offsets = []
    given = text.removeprefix("offset=")
    for part in given.split(":") if given else ():
        if part == "auto":
            offsets.append(AUTO)
            continue
        match = _OFFSET.fullmatch(part or "0")
        if not match:
            raise UsageError(f"{part!r} is not an offset", "give a number of bytes, 4K, 1M, or auto")
        offsets.append(int(match[1]) * _UNITS[match[2].lower()])
    return tuple(offsets)


def find_offsets(offsets: Sequence[int], lowers: Sequence[str]) -> tuple[int, ...]:
    """Replace each AUTO by the offset of the image in that lower.

    Reads the file up to the image. Blocks. LayerError for a file without an image; an unreadable file is
    refused later.
    """
    found = list(offsets)
    for number, (offset, lower) in enumerate(zip(offsets, lowers, strict=False)):
        if offset == AUTO:
            found[number] = _image_in(lower)
    return tuple(found)


def _image_in(path: str) -> int:
    from cowfs.formats.squashfs.find import find_image
    from cowfs.linux.files import open_ordinary

    if is_url(path):
        raise UsageError(f"{path}: offset=auto would read all of it", "give the offset: offset=BYTES")
    try:
        fd = open_ordinary(path, os.O_RDONLY)
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                return 0
            found = find_image(fd)
        except LayerError as error:
            raise LayerError(f"{path}: {error.message}", error.hint) from None
        finally:
            os.close(fd)
    except OSError:
        return 0
    if found is None:
        raise LayerError(f"{path}: contains no squashfs image", "give the offset: offset=BYTES")
    return found


def parse_volatile(text: str) -> tuple[str, ...]:
    """Return the directories in PATH[:PATH...], each once, and none below another.

    UsageError for anything but an absolute path below the root.
    """
    if text == "none":
        return ()
    paths: set[str] = set()
    for path in filter(None, _split(text, ":")):
        parts = [part for part in path.split("/") if part not in {"", "."}]
        if not path.startswith("/"):
            raise UsageError(f"volatile: {path!r} is not an absolute path", "write it from the root: /tmp")
        if ".." in parts:
            raise UsageError(f"volatile: {path!r} has .. in it", "write the path without it")
        if not parts:
            raise UsageError("volatile: / would keep nothing at all", "use store=memory for that")
        paths.add("/" + "/".join(parts))
    return tuple(sorted(path for path in paths if not any(path.startswith(f"{p}/") for p in paths)))


def split(text: str) -> list[str]:
    """Split at commas; ``\\,`` is a comma that belongs to a value, and ``\\\\`` a backslash."""
    return [part for part in _split(text, ",") if part]


def is_nofail(given: Sequence[str]) -> bool:
    """Whether the arguments of -o have ``nofail``."""
    return any("nofail" in split(text) for text in given)


def split_lowers(text: str) -> tuple[str, ...]:
    """Split LOWER[:LOWER...][::DATA...] into its names, as :func:`split_layers` does."""
    return split_layers(text)[0]


def split_layers(text: str) -> tuple[tuple[str, ...], int]:
    """Split LOWER[:LOWER...][::DATA...]; return the names, and how many of the last ones are data-only.

    In a URL, no colon up to the end of the host separates names. As in overlayfs's lowerdir, ``\\:`` is a
    colon in a name and ``\\\\`` a backslash; before any other character, a backslash is literal. UsageError
    for an empty name among others, and for an ordinary lower after a data-only one.
    """
    parts = _split(text, ":", authority)
    if parts == [""]:
        return (), 0
    names, after = [parts[0]], [False]
    rest = iter(parts[1:])
    for part in rest:
        after.append(not part)
        names.append(part or next(rest, ""))
    if not all(names):
        raise UsageError(f"{text}: an empty lower", "remove the colon, or write \\: for one in a name")
    data_only = sum(after)
    if data_only and not all(after[-data_only:]):
        raise UsageError(
            f"{text}: an ordinary lower below a data-only one",
            "write :: before each lower after the first ::",
        )
    return tuple(names), data_only


def must_precede(command: str, store: str, size: str | None) -> None:
    """UsageError if the size was given before the store."""
    if size is not None and is_size(store.removeprefix("+")) and not is_size(size.removeprefix("+")):
        raise UsageError(f"{store}: the store comes before its size", f"cowfs {command} {size} {store}")


def must_have_name(path: str | None, option: str = "") -> None:
    """UsageError for ``-``, which elsewhere is standard output: what is written here cannot go there."""
    if path == "-":
        raise UsageError(f"{option}-: cannot be standard output", "give a name; ./- is a file of this name")


def lowers_of(args: argparse.Namespace, engine: str = "auto", *, force: bool = False) -> Lowers:
    """Return the lowers of ``--lower`` and ``--offset``."""
    from cowfs.api import Lowers

    given, data_only = (None, 0) if args.lower is None else split_layers(args.lower)
    offsets = parse_offsets(args.offset)
    if AUTO in offsets and given is None:
        raise UsageError("--offset auto: no lower given", "give it with --lower, or leave out --offset")
    return Lowers(given, find_offsets(offsets, given or ()), engine, force, data_only)


def lowers_to_open(args: argparse.Namespace) -> Lowers:
    """Return the lowers of :func:`add_opening`'s options. UsageError for an unescaped colon in a name."""
    lowers = lowers_of(args, args.engine, force=args.force_lower)
    refuse_bare_colon(lowers.given or ())
    return lowers


def refuse_bare_colon(lowers: Sequence[str], directory: str = "") -> None:
    """UsageError if a colon that separates two lowers belongs to the name of one.

    Checks which of the files exist. The names are relative to *directory*.
    """
    missing = [at for at, part in enumerate(lowers) if not os.path.lexists(os.path.join(directory, part))]
    for first, last in combinations(range(len(lowers)), 2) if missing else ():
        if not any(first <= at <= last for at in missing):
            continue
        whole = ":".join(lowers[first : last + 1])
        if os.path.lexists(os.path.join(directory, whole)):
            raise UsageError(
                f"{whole}: a colon separates lowers",
                f"in a name, write it as \\:, as in '{join_lowers([whole])}'",
            )


def is_by_options(args: argparse.Namespace) -> bool:
    """Return whether all options came with ``-o``, as from mount(8) and users who are used to it."""
    return bool(args.options) and not (args.store or args.engine or args.force_lower)


@contextmanager
def own_spelling(args: argparse.Namespace) -> Iterator[None]:
    """In the hint of an error in the block, spell options as the caller did."""
    try:
        yield
    except CowfsError as error:
        if is_by_options(args):
            hint = error.hint.replace("--force-lower", "-o force_lower")
            error.hint = re.sub(r"--(engine|store) (\w+)", r"-o \1=\2", hint)
        raise


def join_lowers(lowers: Sequence[str], data_only: int = 0) -> str:
    """Return LOWER[:LOWER...][::DATA...] for absolute paths and URLs: the inverse of :func:`split_layers`."""
    return command.join_lowers(lowers, data_only)


def _split(text: str, separator: str, whole: Callable[[str], str] = lambda _: "") -> list[str]:
    """Split *text*. *whole* returns the beginning of a part that is literal."""
    parts = [whole(text)]
    characters = iter(range(len(parts[0]), len(text)))
    for at in characters:
        character = text[at]
        if character == "\\":
            following = text[next(characters, len(text)) :][:1]
            parts[-1] += following if following in {separator, "\\"} else character + following
        elif character == separator:
            parts.append(whole(text[at + 1 :]))
            for _ in parts[-1]:
                next(characters)
        else:
            parts[-1] += character
    return parts


def parse(given: list[str]) -> Options:
    """Parse the options of all ``-o``. UsageError for an unknown one."""
    options = Options()
    parts = [part for text in given for part in split(text)]
    for option in parts:
        name, equals, value = option.partition("=")
        name = _SAME.get(name, name) if equals and value else name
        if name in VALUES and equals:
            if not value:
                raise UsageError(f"option {name} needs a value: {name}=…", VALUES[name])
            options.values[name] = value
            if name == "fault":
                options.faults.append(value)
        elif name in VALUES:
            raise UsageError(f"option {name} needs a value: {name}=…", VALUES[name])
        elif equals and name in {*_FLAGS, *_FUSE_FLAGS, *_ATIME}:
            raise UsageError(f"option {option}: {name} takes no value", f"write {name} alone")
        elif name in _FLAGS:
            options.flags.add(name.replace("-", "_"))
        elif name in _FUSE_FLAGS:
            options.fuse.add(name)
        elif name in _ATIME:
            flag, is_on = _ATIME[name]
            (options.fuse.add if is_on else options.fuse.discard)(flag)
        elif not (is_ignored(name) or "sloppy" in parts):
            known = ", ".join([*(f"{name}=" for name in VALUES), *_FLAGS])
            raise UsageError(f"unknown option {option!r}", f"known: {known}, and mount's suid, dev, exec …")
    for name, choices in _CHOICES.items():
        value = options.values.get(name, choices[0])
        if value not in choices:
            raise UsageError(f"unknown {name} {value!r}", "give one of " + ", ".join(choices))
    options.debug = parse_topics(options.values.get("debug", ""))
    return options


def is_ignored(name: str) -> bool:
    """Return whether an option is for other programs, such as mount(8) or systemd, which read fstab(5)."""
    return name in _IGNORED or name.startswith(("x-", "X-", "comment"))


def parse_topics(text: str) -> frozenset[str]:
    """Return the topics named in *text*, separated by commas or colons. UsageError for an unknown one."""
    topics = frozenset(filter(None, text.replace(":", ",").split(",")))
    for topic in sorted(topics - DEBUG_TOPICS.keys()):
        raise UsageError(f"unknown debug topic {topic!r}", "the topics are " + ", ".join(DEBUG_TOPICS))
    return topics


def describe() -> str:
    """Return the help text for ``-o``."""
    lines = [f"  {name + '=…':<17}{text}" for name, text in VALUES.items()]
    lines += [f"  {name:<17}{text}" for name, text in _FLAGS.items()]
    return "\n".join(lines)


def describe_topics() -> str:
    """Return the help text for ``--debug``."""
    return "\n".join(f"  {name:<16}{text}" for name, text in DEBUG_TOPICS.items())


def add_lower(parser: argparse.ArgumentParser, *, letter: bool = True) -> None:
    """Add ``--lower`` and ``--offset``: for subcommands that read a store that is not mounted.

    Without *letter*, ``-o`` stays free for another use.
    """
    parser.add_argument("--lower", metavar="LOWER[:LOWER...]", help="the lower that the store belongs to")
    add_offset(parser, letter=letter)


def add_opening(parser: argparse.ArgumentParser, verb: str = "use", *, letter: bool = True) -> None:
    """Add what :func:`lowers_to_open` reads: ``--lower``, ``--offset``, ``--force-lower`` and ``--engine``.

    *verb* says in the help what the command does with the lower; *letter* is as for :func:`add_lower`.
    """
    add_lower(parser, letter=letter)
    parser.add_argument(
        "--force-lower", action="store_true", help=f"{verb} LOWER even if the store belongs to another"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="engine for images: cowfs (auto, process) or the kernel",
    )


def add_json_or_null(
    parser: argparse.ArgumentParser, fields: str, json_help: str = "print one JSON object per line"
) -> None:
    """Add ``--json`` and ``-z``, of which one may be given; *fields* are those that ``-z`` prints."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help=json_help)
    how.add_argument(
        "-z",
        "--null",
        action="store_true",
        help=f"end each field with a NUL, and do not escape names; the fields: {fields}",
    )


def add_trust(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add ``--trust``, for subcommands that create files which users may execute."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help=f"{verb} set-ID bits, capabilities and devices, whoever can change the store or the lower",
    )


def add_offset(parser: argparse.ArgumentParser, *, letter: bool = True) -> None:
    """Add ``--offset`` to a subcommand that opens images; :func:`parse_offsets` reads it."""
    parser.add_argument(
        *(("-o",) if letter else ()),
        "--offset",
        metavar="BYTES[:BYTES...]",
        default="",
        help="byte offset of the image in its file",
    )
