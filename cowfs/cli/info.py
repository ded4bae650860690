"""``cowfs info``: describe a store, an image or a mount, how full it is, and who uses it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from cowfs.cli import image_info, options
from cowfs.cli.output import say, warn
from cowfs.cli.requests import Requests, requests_in
from cowfs.client import checked_answer, facts_of, find_mount, resident
from cowfs.errors import MountFailure, UsageError, printable
from cowfs.jsontext import local_time, to_local_time
from cowfs.url.names import is_url

DESCRIPTION = "Describe a store, an image or archive that can be a lower, or a mount and its layers."
EPILOG = """\
examples:
  cowfs info sysrcd.bs        its size, usage, lower, and who uses it
  cowfs info /mnt             what is mounted there, and how full its store is
  cowfs info sysrcd.dat       the superblock of a squashfs image, and its fingerprint
  cowfs info a.zip            the size of an archive, and its fingerprint
  cowfs info -o 188392 a.AppImage   the same for an image inside a file
  cowfs info /mnt --json      the same for programs
  cowfs info sysrcd.bs --kernel | MOUNTPOINT=/mnt sh   mount it without cowfs
"""


_NAMED = 3
"""How many checkpoints are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|IMAGE|MOUNTPOINT")
    options.add_offset(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--kernel",
        action="store_true",
        help="print how the kernel's overlayfs mounts a store, and its lowers",
    )
    form.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    found = find_mount(args.what)
    offsets = options.parse_offsets(args.offset)
    if len(offsets) > 1 or (offsets and found is not None):
        why = (
            "--offset: more than one offset given"
            if found is None
            else f"{args.what}: is a mount, not an image"
        )
        raise UsageError(why, "give an image, and the offset at which it begins")
    if found is not None:
        facts = facts_of(found.dev)
        facts["rss"] = resident(facts["pid"])
        facts["mountpoint"] = os.fsdecode(found.mountpoint)  # the current one, after mount --move or --bind
        with checked_answer(args.what):
            requests = requests_in(facts)
            lines = _mount_lines(facts, requests)
            if requests is not None:
                facts["requests"] = requests.to_json()
    elif offsets or is_url(args.what) or image_info.is_image(args.what):
        facts, lines = image_info.describe(args.what, *options.find_offsets(offsets, [args.what]))
    else:
        from cowfs.store.format.sniff import may_exist, split_subdir
        from cowfs.store.offline.info import store_info
        from cowfs.store.served.disk_space import disk_of

        if not may_exist(args.what):
            hint = "give a store, an image or a mountpoint; cowfs create creates a store"
            raise MountFailure(f"{args.what}: No such file or directory", hint)
        facts = store_info(args.what)
        on_disk = disk_of(split_subdir(facts["path"])[0])
        facts["disk"] = on_disk._asdict() if on_disk else None
        lines = _store_lines(facts)
    if args.kernel:
        return _kernel(args.what, facts)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        width = max(len(key) for key, _ in lines) + 2
        for key, value in lines:
            say(f"{key + ':':<{width}}{value}")
    return 0


def _kernel(what: str, facts: dict[str, Any]) -> int:
    """Print the commands with which the kernel mounts a store; none if it is in use."""
    from cowfs.offline_changes import no_lower
    from cowfs.store.format.kernel import commands

    store = facts.get("store", facts)
    prefix, problem = store.get("xattr_prefix"), facts.get("problem")
    if store["kind"] == "memory" or prefix is None:
        raise UsageError(f"{what}: {problem or 'not a store that the kernel could mount'}", "name a store")
    if not facts["lowers"]:
        raise no_lower(what, facts.get("stores", ()), "mount it once with cowfs")
    if store.get("fresh"):
        raise UsageError(f"{what}: a checkpoint was cut short by a crash", "mount it once with cowfs")
    if store is not facts or facts.get("in_use_by"):
        why = "is in use; a second mount would damage it"
        raise MountFailure(f"{store['path']}: {why}", "unmount it first, and name the store")
    for line in commands(
        store["path"], store["kind"], prefix, store["uuid"], facts["lowers"], store["layers"]
    ):
        print(printable(line) if sys.stdout.isatty() else line)
    files = (facts.get("partial") or {"files": 0})["files"]
    if files:
        warn(f"{files} files are partly copied up; the kernel refuses to open them")
    return 0


def _mount_lines(facts: dict[str, Any], requests: Requests | None) -> list[tuple[str, str]]:
    from cowfs.store.format.sizes import format_size

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
        *_volatile_lines(facts.get("volatile")),
        *_partial_lines(facts),
        *_checkpoint_lines(store),
        *([("UNSAVED", store["unsaved"]["said"])] if store["unsaved"] else []),
        *([("MOVED", store["moved"])] if store.get("moved") else []),
        *([("LOST", said) for said in facts.get("lost_lowers", ())]),
        *([("hint", store["hint"].replace("MOUNTPOINT", facts["mountpoint"]))] if store["hint"] else []),
        ("since", local_time(facts["since"])),
        ("daemon", f"pid {facts['pid']}, {format_size(facts['rss'])} resident, cowfs {facts['version']}"),
        ("requests", f"by {facts.get('transport', '/dev/fuse')}"),
        ("data", _passed_by(facts.get("passthrough"))),
        *_fetched_lines(facts),
        *([("served", f"{requests.count():,}; cowfs top {facts['mountpoint']}")] if requests else []),
        ("known", f"{facts['inodes_known']} inodes{_open(facts['open_files'])}"),
        *_log_lines(facts.get("log")),
    ]
    return lines


def _fetched_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how much of the data read by URL was cached, if any was read."""
    blocks = facts.get("caches", {}).get("blocks by URL")
    if blocks is None:
        return []
    asked = blocks["hits"] + blocks["misses"]
    rate = 100 * blocks["hits"] // max(asked, 1)
    return [("by URL", f"{rate} % of {asked:,} reads of blocks were cached, {blocks['misses']:,} fetched")]


def _log_lines(log: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return where the log is, and whether unexpected errors happened. Empty for an older daemon."""
    if log is None:
        return []
    lines = [("log", log["place"])]
    if log["failures"]:
        when = local_time(log["last_failure_at"])
        times = "once" if log["failures"] == 1 else f"{log['failures']} times, the last"
        lines.append(("FAILED", f"{times} at {when}: {log['last_failure']}; the log says where"))
    return lines


def _passed_by(passthrough: dict[str, Any] | None) -> str:
    """Return whether the kernel or the daemon reads and writes the store's files."""
    why = "the daemon is an older cowfs" if passthrough is None else passthrough["why_not"]
    if passthrough is None or why:
        return f"through the daemon ({why})"
    count = passthrough["lent"]
    files = "1 file" if count == 1 else f"{count} files"
    return f"the kernel reads and writes the store's files itself (passthrough), {files} now"


def _open(files: int | None) -> str:
    """Return how many files are open; "" if the kernel opens them itself."""
    return "" if files is None else f", {files} open files"


def _store_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from cowfs.store.format.sizes import format_size
    from cowfs.store.served.disk_space import Disk, lacks_room
    from cowfs.store.served.fullness import nearly_full

    lines = [("path", facts["path"]), ("kind", facts["kind"])]
    size = facts["size"]
    if facts["kind"] == "image":
        lines.append(("size", format_size(size)))
        size = facts["used"] + facts["free"]  # what a mount has, without the filesystem's own tables
    lines.append(_room(size, facts["free"], own=facts["kind"] == "image"))
    if facts["kind"] == "image":
        lines.append(("inodes", f"{facts['free_inodes']} of {facts['inodes']} are free"))
        used, of = facts["used"], facts["inodes"]
        said = nearly_full(facts["path"], used, size, of - facts["free_inodes"], of)
        lines += _disk_lines(facts["disk"])
        on_disk = Disk(**facts["disk"]) if facts["disk"] else None
        said = lacks_room(on_disk) or said
        lines += [("hint", said)] if said else []
    lines += _partial_lines(facts) + _checkpoint_lines(facts)
    if facts["state"] == "needs recovery":
        facts = {
            **facts,
            "state": "needs recovery: not cleanly unmounted; the next mount or cowfs check recovers it",
        }
    for key in ("state", "problem", "format", "version", "created", "created_by", "uuid"):
        if facts[key] is not None:
            shown = to_local_time(facts[key]) if key == "created" else str(facts[key])
            lines.append((key.replace("_", " "), shown))
    if facts["volatile"]:
        lines.append(("volatile", f"{', '.join(facts['volatile'])}: what is changed there is not kept"))
    lines += _lower_lines(facts)
    if facts["stores"]:
        lines.append(("stores", f"{', '.join(facts['stores'])} (cowfs info {facts['path']}/NAME)"))
    if facts["in_use_by"]:
        lines.append(("in use by", facts["in_use_by"]))
    return lines


def _partial_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how much of large files is not copied up yet."""
    from cowfs.store.format.sizes import format_size

    missing = facts.get("partial") or {"files": 0}
    if not missing["files"]:
        return []
    files = "1 file is" if missing["files"] == 1 else f"{missing['files']} files are"
    return [("partial", f"{files} partly copied up; {format_size(missing['bytes'])} still to copy")]


def _checkpoint_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the number of checkpoints, and the names of the last ones. Empty for an older daemon."""
    names = facts.get("checkpoints") or []
    if not names:
        return []
    more = f"{len(names)}, the last of them " if len(names) > _NAMED else ""
    return [("checkpoints", more + ", ".join(names[-_NAMED:]))]


def _volatile_lines(volatile: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the volatile directories. Empty for an older daemon."""
    from cowfs.store.format.sizes import format_size

    if not volatile:
        return []
    used, size = volatile["size"] - volatile["free"], volatile["size"]
    where = ", ".join(volatile["paths"])
    return [("volatile", f"{where}: in memory, {format_size(used)} of {format_size(size)} used")]


def _lower_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    named = [("module", lower) for lower in facts.get("modules", ())]
    named += [("lower", lower) for lower in facts["lowers"]]
    return [(what, f"{lower['path']} ({lower['description']})") for what, lower in named]


def _room(size: int, free: int, *, own: bool) -> tuple[str, str]:
    """Return how full a store is; or its free space, if it has no filesystem of its *own*."""
    from cowfs.store.format.sizes import format_size

    if not own:
        return "free", f"{format_size(free)} on its filesystem"
    percent = 100 * (size - free) // size if size else 0
    return "used", f"{format_size(size - free)} of {format_size(size)} ({percent} %)"


def _disk_lines(disk: dict[str, int] | None) -> list[tuple[str, str]]:
    """Return the free space of the disk that holds an image."""
    from cowfs.store.format.sizes import format_size

    if disk is None:
        return []
    lacks = f"; the store's file may still need {format_size(disk['missing'])}" if disk["missing"] else ""
    return [("disk", f"{format_size(disk['free'])} free{lacks}")]
