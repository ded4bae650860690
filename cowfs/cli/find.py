"""``cowfs find``: list the stores that a boot would consider, which one it would use, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from contextlib import suppress
from typing import Any

from cowfs.cli.output import say
from cowfs.client import ask, find_mount
from cowfs.errors import CowfsError

DESCRIPTION = "List the stores that a boot would consider, which one it would use, and why."
EPILOG = """\
BACKSTORE is the value of the boot option backstore=: alldev (all disks, not only removable ones),
/path/to/a/store, or both, separated by a comma. The default is /sysrcd.bs on removable disks.

Root also searches disks that are not mounted, without changing them.

examples:
  cowfs find                          what a boot without options finds
  cowfs find alldev                   the same, including hard disks
  cowfs find alldev,/my.bs --image /live/sysrcd.dat

Exit codes: 0 a boot would use one of the stores; 1 it would use none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "backstore", metavar="BACKSTORE", nargs="?", default="", help="the value of the boot option"
    )
    parser.add_argument("--image", metavar="FILE", help="the root image (default: the one in use)")
    parser.add_argument("--json", action="store_true", help="print a JSON array")


def run(args: argparse.Namespace) -> int:
    """Print the stores found; return 0 if a boot would use one of them, 1 if none."""
    from cowfs.store.disks.find import find_stores, parse_wanted

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
        say(f"    {'SELECTED' if thing.taken else 'not selected'}: {thing.why}")
    taken = any(thing.taken for thing in found)
    if not args.json and not taken:
        where = f"{wanted.path}, {_SCOPES[wanted.scope]}"
        say(f"no store would be used ({where}): changes would be kept in memory")
    return 0 if taken else 1


_SCOPES = {"removable": "removable disks", "all": "all disks", "off": "backstore=off"}


def _image(given: str | None) -> tuple[str, str]:
    """Return the fingerprint of the root image, and the device it is on, as far as known."""
    if given is not None:
        from cowfs.store.format.identity import identify_lower

        return identify_lower(given).fingerprint, ""
    root = find_mount("/")
    if root is not None:
        with suppress(CowfsError, OSError, StopIteration):
            lower = next(ask(root.dev, "info"))["lowers"][-1]
            on = re.match("/run/initramfs/cowfs/disk/([^/]+)/", lower["path"])
            return lower["fingerprint"], on[1] if on else ""
    return "", ""


def _store_line(facts: dict[str, Any]) -> str:
    from cowfs.store.format.sizes import format_size

    used = f"{format_size(facts['used'])} of {format_size(facts['size'])} used"
    return f"{used}, format: {facts['format']}, {facts['state']}"
