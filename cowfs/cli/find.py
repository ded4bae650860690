"""``cowfs find``: which stores a boot would consider, which it would take, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from contextlib import suppress
from typing import Any

from cowfs.cli.client import ask, find_mount
from cowfs.cli.output import say
from cowfs.errors import CowfsError

NAME = "find"

_EPILOG = """\
BACKSTORE is what stands after backstore= on the kernel's command line: alldev (all disks, not only those
that can be removed), /path/to/a/store, both with a comma, or nothing, for /sysrcd.bs on removable disks.

Disks that are not mounted are looked at as well, but by root only, and without a change to them.

examples:
  cowfs find                          what a boot without options finds
  cowfs find alldev                   and on hard disks
  cowfs find alldev,/my.bs --image /live/sysrcd.dat
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="list the stores that a boot would consider",
        description="List the stores that a boot would consider, and tell which it would take and why.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backstore", metavar="BACKSTORE", nargs="?", default="", help="as the boot option")
    parser.add_argument("--image", metavar="FILE", help="the root image (default: that of the running root)")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is found; 0 if a boot would take one of it, 1 if none."""
    from cowfs.store.find import find_stores, parse_wanted

    wanted = parse_wanted(args.backstore)
    fingerprint, device = _image(args.image)
    found = find_stores(wanted, fingerprint=fingerprint, first=device)
    if args.json:
        print(json.dumps([dataclasses.asdict(thing) for thing in found], indent=2, default=str))
    for thing in () if args.json else found:
        say(f"{thing.device}  {thing.path}{f'  (mounted on {thing.where})' if thing.where else ''}")
        if thing.facts:
            say(f"    {_store_line(thing.facts)}")
            for lower in thing.facts["lowers"]:
                say(f"    lower: {lower['path']} ({lower['description']})")
        say(f"    {'TAKEN' if thing.taken else 'not taken'}: {thing.why}")
    taken = any(thing.taken for thing in found)
    if not args.json and not taken:
        say(f"no store would be taken ({wanted.path}, {_SCOPES[wanted.scope]}): changes would be in memory")
    return 0 if taken else 1


_SCOPES = {"removable": "removable disks", "all": "all disks", "off": "backstore=off"}


def _image(given: str | None) -> tuple[str, str]:
    """Return the fingerprint of the root image, and the device it is on, as far as they are known."""
    if given is not None:
        from cowfs.store.identity import identify_lower

        return identify_lower(given).fingerprint, ""
    root = find_mount("/")
    if root is not None:
        with suppress(CowfsError, OSError, StopIteration):
            lower = next(ask(root.dev, "info"))["lowers"][-1]
            on = re.match("/run/initramfs/cowfs/disk/([^/]+)/", lower["path"])
            return lower["fingerprint"], on[1] if on else ""
    return "", ""


def _store_line(facts: dict[str, Any]) -> str:
    from cowfs.store.sizes import format_size

    used = f"{format_size(facts['used'])} of {format_size(facts['size'])} used"
    return f"{used}, format: {facts['format']}, {facts['state']}"
