"""``cowfs info``: what a store or a mount is, how full, and who uses it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from cowfs.cli.client import ask, find_mount

NAME = "info"

_EPILOG = """\
examples:
  cowfs info sysrcd.bs        size, use, the lower it belongs to, who has it open
  cowfs info /mnt             what is mounted there, and how full its store is
  cowfs info /mnt --json      the same for programs
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="tell what a store or a mount is, and how full",
        description="Tell about a store, or about a mount and what it is made of.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is known."""
    found = find_mount(args.what)
    if found is not None:
        facts = next(ask(found.dev, "info"))
        facts["rss"] = _resident(facts["pid"])
        lines = _mount_lines(facts)
    else:
        from cowfs.store.info import store_info

        facts = store_info(args.what)
        lines = _store_lines(facts)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        width = max(len(key) for key, _ in lines) + 2
        for key, value in lines:
            print(f"{key + ':':<{width}}{value}")
    return 0


def _mount_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
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
        ("since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))),
        ("daemon", f"pid {facts['pid']}, {format_size(facts['rss'])} resident, cowfs {facts['version']}"),
        ("known", f"{facts['inodes_known']} inodes, {facts['open_files']} open files"),
    ]
    return lines


def _store_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("path", facts["path"]), ("kind", facts["kind"])]
    lines.append(_room(facts["size"], facts["free"], own=facts["kind"] == "image"))
    if facts["kind"] == "image":
        lines.append(("inodes", f"{facts['free_inodes']} of {facts['inodes']} are free"))
    for key in ("state", "format", "version", "created", "created_by", "uuid"):
        if facts[key] is not None:
            lines.append((key.replace("_", " "), str(facts[key])))
    lines += _lower_lines(facts)
    if facts["in_use_by"]:
        lines.append(("in use by", facts["in_use_by"]))
    return lines


def _lower_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [("lower", f"{lower['path']} ({lower['description']})") for lower in facts["lowers"]]


def _room(size: int, free: int, *, own: bool) -> tuple[str, str]:
    """Say how full a store is, or, if it has no filesystem of its *own*, how much fits into it still."""
    from cowfs.store.sizes import format_size

    if not own:
        return "free", f"{format_size(free)} on its filesystem"
    percent = 100 * (size - free) // size if size else 0
    return "used", f"{format_size(size - free)} of {format_size(size)} ({percent} %)"


def _resident(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 when it may not be seen."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0
