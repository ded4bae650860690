"""``cowfs overlay``: replace fuse-overlayfs, with its command line, for podman and buildah."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import cowfs
from cowfs.cli import options as mount_options
from cowfs.cli.output import warn
from cowfs.errors import UsageError
from cowfs.overlay.named_whiteouts import STYLES

if TYPE_CHECKING:
    from cowfs.fuse.owners import OwnerMap
    from cowfs.union import UnionOptions

_OURS = {
    "lowerdir": "LOWER[:LOWER...]: the layers, the leftmost on top; write a colon in a name as \\:",
    "upperdir": "a directory: where changes are written; without it the mount is read-only",
    "workdir": "a directory on the same mount as upperdir, needed with it",
    "uidmapping": "FILE:SHOWN:COUNT[:...]: users of files, and those that are shown",
    "gidmapping": "FILE:SHOWN:COUNT[:...]: the same for groups",
    "squash_to_root": "show all files as root's",
    "squash_to_uid": "show all files as this user's",
    "squash_to_gid": "show all files as this group's",
    "volatile": "do not wait until data is on disk: fsync(2) returns at once",
    "fsync": "0: the same as volatile",
    "static_nlink": "show 1 as the link count of all directories",
    "noxattrs": "1: do not support extended attributes",
    "noacl": "do not support POSIX ACLs",
    "metacopy": "on: changed attributes do not copy the data of large files (off)",
    "whiteouts": "format of whiteouts in the layers: oci (the default), aufs, overlayfs",
    "redirect_dir": "on: directories of layers can be renamed (off: mv(1) copies them)",
    "xattr_permissions": "only 0 is supported: owners and modes are those of the files",
}
_PASSED = {"io_uring", "passthrough", "log", "debug", "fsname"}
_QUIET = {
    "index", "xino", "userxattr", "nfs_export", "uuid", "context", "fscontext", "defcontext", "rootcontext",
    "clone_fd", "max_idle_threads", "max_threads", "threaded", "timeout", "auto_unmount",
    "allow_root", "ino32_t", "fast_ino", "plugins", "kernel_cache", "auto_cache", "max_write",
}  # fmt: skip
"""Options without an effect that a caller of fuse-overlayfs could miss."""
DESCRIPTION = "Mount merged directories, with the command line of fuse-overlayfs. cowfs-overlay is the same."
_EPILOG = """\
Options for -o, separated by commas (write a comma in a name as \\,):
{options}
  those of `cowfs mount`: io_uring=, passthrough=, log=, debug=, fsname=, ro, noatime, nosuid, nodev …
  others are ignored, with a warning

examples:
  cowfs overlay -o lowerdir=/a:/b,upperdir=/up,workdir=/work /mnt
  podman --storage-driver overlay --storage-opt overlay.mount_program=/usr/bin/cowfs-overlay info
"""


class _Version(argparse.Action):
    """Prints the version, which podman info shows."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"cowfs-overlay: version {cowfs.__version__}")
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.epilog = _EPILOG.format(options="\n".join(f"  {name:<18}{text}" for name, text in _OURS.items()))
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="ignored: mount(8) and fstab give one")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    parser.add_argument("-o", metavar="OPTS", dest="options", action="append", default=[], help="see below")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument(
        "-d", "--debug", action="store_true", help="stay in the foreground, and log each request"
    )
    parser.add_argument("-s", action="store_true", help="ignored: requests are served in one thread")
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version")


def run(args: argparse.Namespace) -> int:
    """Mount; return when the mount answers, or with -f when it has been unmounted."""
    from cowfs.cli.mount import start

    words = dict(_words(args.options))
    given = _for_mount(words)
    if args.debug:
        given.debug |= {"requests"}
    union = _union(words, given)
    return start(
        union, args.mountpoint, given, foreground=args.foreground or args.debug, owner_map=_owner_map(words)
    )


def _words(given: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of all ``-o`` with their values. Quotes enclose commas (``context="a,b"``)."""
    for text in given:
        hidden = re.sub(r'="([^"]*)"', lambda found: "=" + found[1].replace(",", "\\,"), text)
        for word in mount_options.split(hidden):
            name, _, value = word.partition("=")
            yield name, value


def _for_mount(words: dict[str, str]) -> mount_options.Options:
    """Return the options for `cowfs mount`. Ignores unknown ones, as fuse-overlayfs does."""
    known = {name.removesuffix("=") for name in mount_options.names()} - set(_OURS) | {"noacl"}
    taken, unknown = [], []
    for name, value in words.items():
        if name == "debug" and not value:
            words["debug"] = value = "requests"
        if name in _PASSED or (name in known and not value and name not in mount_options.VALUES):
            taken.append(f"{name}={value}" if value else name)
        elif name not in _OURS and name not in _QUIET and not mount_options.is_ignored(name):
            unknown.append(name)
    for name in unknown:
        warn(f"option {name} is unknown and ignored")
    given = mount_options.parse(taken)
    # As with fuse-overlayfs, the caller decides what to mount for which users.
    if os.geteuid() == 0:
        if "noallow_other" not in given.flags:
            given.flags.add("allow_other")
        given.fuse |= {name for name in ("suid", "dev") if f"no{name}" not in given.fuse}
    if "upperdir" not in words:
        given.flags.add("ro")
    if _is_on(words, "noxattrs", "0"):
        given.flags.add("noacl")
    return given


def _is_on(words: dict[str, str], name: str, default: str) -> bool:
    """Return whether an option that takes a number is not 0. UsageError for anything else."""
    value = words.get(name, default)
    if not re.fullmatch(r"-?[0-9]+", value):
        raise UsageError(f"{name}={value}: not a number", f"write {name}=0 or {name}=1")
    return bool(value.strip("-0"))


def _union(words: dict[str, str], given: mount_options.Options) -> UnionOptions:
    """Return what to merge. UsageError for options that exclude each other."""
    from cowfs.store.format.foreign import named_whiteout
    from cowfs.union import UnionOptions

    lowers, data_only = mount_options.split_layers(_between_colons(words.get("lowerdir", "")))
    if not lowers:
        raise UsageError("no lowerdir given", "-o lowerdir=LOWER[:LOWER...] names the layers")
    upper, work = words.get("upperdir", ""), words.get("workdir", "")
    if upper and not work:
        raise UsageError("upperdir without workdir", "give workdir=DIR, on the same mount as upperdir")
    permissions = words.get("xattr_permissions", "0")
    if permissions not in {"0", ""}:
        raise UsageError(
            f"xattr_permissions={permissions}: cowfs does not keep owners and modes in attributes",
            "remove force_mask from storage.conf, or use fuse-overlayfs",
        )
    for layer in [*lowers, *([_plain(upper)] if upper else [])]:
        _must_be_plain(layer)
    style = _style(words)
    # A layer of an image, as podman unpacks it, has whiteouts by name, and a write could change what its
    # digest is of. In an upper that was written through cowfs such names are files, as for the kernel.
    names_are_files = not upper or style == "overlayfs" or _was_written(_plain(work))
    named = None if names_are_files else named_whiteout(_plain(upper))
    if named is not None:
        warn(
            f"{named}: a whiteout by name in upperdir: mounted read-only (whiteouts=overlayfs reads no names)"
        )
        given.flags.add("ro")
        lowers, upper = (_plain(upper), *lowers), ""
    return UnionOptions(
        lowers=tuple(os.path.abspath(lower) for lower in lowers),
        store=os.path.abspath(_plain(upper)) if upper else "memory",
        work=os.path.abspath(_plain(work)) if upper else "",
        force_lower=True,
        data_only=data_only,
        whiteouts=(style,) * (len(lowers) - data_only),
        atime=given.atime,
        durable="volatile" not in words and _is_on(words, "fsync", "1"),
        metacopy=words.get("metacopy") == "on",
        redirect_dir=words.get("redirect_dir") == "on",
        has_xattrs=not _is_on(words, "noxattrs", "0"),
        counts_directories="static_nlink" not in words,
    )


def _between_colons(lowers: str) -> str:
    """Return the layers without colons before and after them, as fuse-overlayfs reads them."""
    return re.sub(r"(?<!\\):+$", "", lowers.lstrip(":"))


def _must_be_plain(layer: str) -> None:
    """Raise UsageError if attributes of the files in a layer say other owners and modes than the files have.

    Like fuse-overlayfs, it looks at the root of the layer only.
    """
    from cowfs.store.format.foreign import OVERRIDES

    for name in OVERRIDES:
        with suppress(OSError):  # it has none, or is missing, which the mount reports
            os.getxattr(layer, name)
            raise UsageError(
                f"{layer}: keeps owners and modes in attributes ({name}), which cowfs does not read",
                "pull the image into a storage without force_mask, or use fuse-overlayfs",
            )


def _style(words: dict[str, str]) -> str:
    """Return the format of whiteouts to write.

    fuse-overlayfs reads both devices and names, and writes names if it may not create devices.
    """
    style = words.get("whiteouts", "oci")
    if style not in STYLES:
        raise UsageError(f"unknown whiteouts {style!r}", "give one of " + ", ".join(STYLES))
    return style


def _was_written(work: str) -> bool:
    """Whether cowfs has mounted the upper of this work dir writable before."""
    from cowfs.store.format.layout import HEADER, PRIVATE

    return os.path.exists(os.path.join(work, os.fsdecode(PRIVATE), os.fsdecode(HEADER)))


def _plain(path: str) -> str:
    """Return a path without the backslashes that escape its colons."""
    return re.sub(r"\\([:\\])", r"\1", path)


def _owner_map(words: dict[str, str]) -> OwnerMap | None:
    """Return the map of owners to show; None if all files keep theirs."""
    from cowfs.fuse.owners import OwnerMap

    root = 0 if "squash_to_root" in words else None
    found = OwnerMap(
        _ranges(words, "uidmapping"),
        _ranges(words, "gidmapping"),
        _number(words, "squash_to_uid", root),
        _number(words, "squash_to_gid", root),
    )
    return None if found == OwnerMap() else found


_LAST = (1 << 32) - 2
_NUMBER = re.compile(r"[0-9]{1,10}")


def _number(words: dict[str, str], name: str, default: int | None) -> int | None:
    value = words.get(name)
    if value is None:
        return default
    if not _NUMBER.fullmatch(value) or int(value) > _LAST:
        raise UsageError(f"{name}={value}: not the number of a user or group", f"write {name}=1000")
    return int(value)


def _ranges(words: dict[str, str], name: str) -> tuple[tuple[int, int, int], ...]:
    value = words.get(name)
    if not value:
        return ()
    parts = value.split(":")
    if len(parts) % 3 or not all(_NUMBER.fullmatch(part) and int(part) <= _LAST + 1 for part in parts):
        raise UsageError(
            f"{name}={value}: not FILE:SHOWN:COUNT[:...]", f"write {name}=0:1000:1:1:100000:65536"
        )
    numbers = list(map(int, parts))
    return tuple((numbers[at], numbers[at + 1], numbers[at + 2]) for at in range(0, len(numbers), 3))
