"""``cowfs info``: what a store, an image or a mount is, how full, and who uses it."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from contextlib import closing
from typing import Any

from cowfs.cli import options
from cowfs.cli.client import facts_of, find_mount, resident, sensible
from cowfs.cli.output import say
from cowfs.cli.requests import Requests, requests_in
from cowfs.errors import LayerError, MountFailure, UsageError

NAME = "info"

_EPILOG = """\
examples:
  cowfs info sysrcd.bs        size, use, the lower it belongs to, who has it open
  cowfs info /mnt             what is mounted there, and how full its store is
  cowfs info sysrcd.dat       what a squashfs image says of itself, and its fingerprint
  cowfs info -o 188392 a.AppImage   of one that begins further on in its file
  cowfs info /mnt --json      the same for programs
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="tell what a store, an image or a mount is, and how full",
        description="Tell about a store, about a squashfs image, or about a mount and what it is made of.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="STORE|IMAGE|MOUNTPOINT")
    options.add_offset(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is known."""
    found = find_mount(args.what)
    offsets = options.parse_offsets(args.offset)
    if len(offsets) > 1 or (offsets and found is not None):
        why = "--offset is for one image" if found is None else f"{args.what}: is a mount, no image"
        raise UsageError(why, "give one offset, and the image that begins there")
    if found is not None:
        facts = facts_of(found.dev)
        facts["rss"] = resident(facts["pid"])
        with sensible(args.what):
            requests = requests_in(facts)
            lines = _mount_lines(facts, requests)
            if requests is not None:
                facts["requests"] = requests.to_json()
    elif offsets or _is_image(args.what):
        facts, lines = _image(args.what, *offsets)
    else:
        from cowfs.store.info import store_info
        from cowfs.store.saving import disk_of

        if not os.path.lexists(args.what):
            hint = "give a store, a squashfs image or a mountpoint; cowfs create makes a store"
            raise MountFailure(f"{args.what}: there is nothing of that name", hint)
        facts = store_info(args.what)
        on_disk = disk_of(facts["path"])
        facts["disk"] = on_disk._asdict() if on_disk else None
        lines = _store_lines(facts)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        width = max(len(key) for key, _ in lines) + 2
        for key, value in lines:
            say(f"{key + ':':<{width}}{value}")
    return 0


def _is_image(path: str) -> bool:
    """Whether a file is a squashfs image, of any version, or a program with something appended to it."""
    from cowfs.formats.squashfs.recognise import SAMPLE, appended_at

    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            head = file.read(SAMPLE)
    except PermissionError as error:
        raise LayerError(
            f"{path}: no permission to read it: {error.strerror}", "ask as its owner, or as root"
        ) from None
    except OSError:
        return False  # a directory, or something to be told about as a store
    end = appended_at(head)
    return head[:4] in {b"hsqs", b"sqsh"} or (end is not None and end < os.path.getsize(path))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _image(path: str, offset: int = 0) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what a squashfs image says of itself: for programs, and for people."""
    from cowfs.layers.squashfs import SquashfsLayer
    from cowfs.store.identity import identify_lower
    from cowfs.store.sizes import format_size

    identity = identify_lower(path, offset)
    with closing(SquashfsLayer(identity.path, offset=offset)) as layer:
        summary = layer.summary()
    facts: dict[str, Any] = {"path": identity.path, "kind": identity.kind, "offset": offset}
    facts |= {what.replace(" ", "_"): _value(what, said) for what, said in summary}
    facts["fingerprint"] = identity.fingerprint
    lines = [("path", identity.path), *([("offset", f"{offset} bytes")] if offset else [])]
    for what, said in summary:
        lines.append((what, f"{format_size(facts['size'])} ({said})" if what == "size" else said))
    return facts, [*lines, ("fingerprint", identity.fingerprint)]


_LISTS = {"uncompressed", "strategies", "filters"}
_NUMBER = re.compile(r"(\d+)(?: bytes)?")


def _value(what: str, said: str) -> int | bool | str | list[str]:
    """Return what a line of the summary says in the type that a program expects."""
    if what in _LISTS:
        return [] if said == "nothing" else said.split(", ")
    if said in {"yes", "no"}:
        return said == "yes"
    if what == "attribute sets" and said == "none":
        return 0
    number = _NUMBER.fullmatch(said)
    return int(number[1]) if number else said


def _mount_lines(facts: dict[str, Any], requests: Requests | None) -> list[tuple[str, str]]:
    from cowfs.store.sizes import format_size

    store = facts["store"]
    own = store["kind"] == "image" or store["path"] == "memory"
    where = "in memory" if store["path"] == "memory" else store["path"]
    if store["kind"] == "memory":
        where += " (lost at the unmount)"
    lines = [("mounted at", facts["mountpoint"]), *_lower_lines(facts)]
    lines += [
        ("store", where),
        _room(store["size"], store["free"], own=own),
        *_disk_lines(store["disk"] if own else None),
        *_partial_lines(facts),
        *([("UNSAVED", store["unsaved"]["said"])] if store["unsaved"] else []),
        *([("hint", store["hint"].replace("MOUNTPOINT", facts["mountpoint"]))] if store["hint"] else []),
        ("since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))),
        ("daemon", f"pid {facts['pid']}, {format_size(facts['rss'])} resident, cowfs {facts['version']}"),
        ("requests", f"by {facts.get('transport', '/dev/fuse')}"),
        ("data", _passed_by(facts.get("passthrough"))),
        *([("served", f"{requests.count():,}; cowfs top {facts['mountpoint']}")] if requests else []),
        ("known", f"{facts['inodes_known']} inodes{_open(facts['open_files'])}"),
    ]
    return lines


def _passed_by(passthrough: dict[str, Any] | None) -> str:
    """Say who reads and writes the files of the store: a daemon of before tells nothing."""
    why = "its daemon is older" if passthrough is None else passthrough["why_not"]
    if passthrough is None or why:
        return f"by way of the daemon ({why})"
    count = passthrough["lent"]
    return f"the store's by the kernel itself (passthrough), {count} {'file' if count == 1 else 'files'} now"


def _open(files: int | None) -> str:
    """Say how many files are open; nothing where the kernel opens them by itself."""
    return "" if files is None else f", {files} open files"


def _store_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from cowfs.store.room import nearly_full
    from cowfs.store.saving import Disk, lacks_room

    lines = [("path", facts["path"]), ("kind", facts["kind"])]
    lines.append(_room(facts["size"], facts["free"], own=facts["kind"] == "image"))
    if facts["kind"] == "image":
        lines.append(("inodes", f"{facts['free_inodes']} of {facts['inodes']} are free"))
        used, of = facts["size"] - facts["free"], facts["inodes"]
        said = nearly_full(facts["path"], used, facts["size"], of - facts["free_inodes"], of)
        lines += _disk_lines(facts["disk"])
        on_disk = Disk(**facts["disk"]) if facts["disk"] else None
        said = lacks_room(on_disk) or said
        lines += [("hint", said)] if said else []
    lines += _partial_lines(facts)
    if facts["state"] == "needs recovery":
        facts = {
            **facts,
            "state": "needs recovery: was not unmounted; the next mount recovers it, or cowfs check",
        }
    for key in ("state", "problem", "format", "version", "created", "created_by", "uuid"):
        if facts[key] is not None:
            lines.append((key.replace("_", " "), str(facts[key])))
    lines += _lower_lines(facts)
    if facts["in_use_by"]:
        lines.append(("in use by", facts["in_use_by"]))
    return lines


def _partial_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what of large files is not in the store yet."""
    from cowfs.store.sizes import format_size

    missing = facts.get("partial") or {"files": 0}
    if not missing["files"]:
        return []
    files = "1 file is" if missing["files"] == 1 else f"{missing['files']} files are"
    return [("partial", f"{files} copied up in part; {format_size(missing['bytes'])} to come")]


def _lower_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [("lower", f"{lower['path']} ({lower['description']})") for lower in facts["lowers"]]


def _room(size: int, free: int, *, own: bool) -> tuple[str, str]:
    """Say how full a store is, or, if it has no filesystem of its *own*, how much fits into it still."""
    from cowfs.store.sizes import format_size

    if not own:
        return "free", f"{format_size(free)} on its filesystem"
    percent = 100 * (size - free) // size if size else 0
    return "used", f"{format_size(size - free)} of {format_size(size)} ({percent} %)"


def _disk_lines(disk: dict[str, int] | None) -> list[tuple[str, str]]:
    """Say how much room there is on the disk that an image is on."""
    from cowfs.store.sizes import format_size

    if disk is None:
        return []
    lacks = f"; the store's file may still take {format_size(disk['missing'])}" if disk["missing"] else ""
    return [("disk", f"{format_size(disk['free'])} free{lacks}")]
