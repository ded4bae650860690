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
        lines = [
            (key.replace("_", " "), _text(value)) for key, value in facts.items() if value not in (None, [])
        ]
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
    used = store["size"] - store["free"]
    percent = 100 * used // store["size"] if store["size"] else 0
    where = "in memory (lost at the unmount)" if store["kind"] == "memory" else store["path"]
    lines = [("mounted at", facts["mountpoint"])]
    lines += [("lower", f"{lower['path']} ({lower['description']})") for lower in facts["lowers"]]
    lines += [
        ("store", where),
        ("used", f"{format_size(used)} of {format_size(store['size'])} ({percent} %)"),
        ("since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))),
        ("daemon", f"pid {facts['pid']}, {format_size(facts['rss'])} resident, cowfs {facts['version']}"),
        ("known", f"{facts['inodes_known']} inodes, {facts['open_files']} open files"),
    ]
    return lines


def _text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _resident(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 when it may not be seen."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0
