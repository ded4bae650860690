"""``cowfs list``: list the mounts of cowfs, with their stores and users."""

from __future__ import annotations

import argparse
import json
import os
import pwd
from typing import Any

from cowfs.cli.output import say
from cowfs.client import Dead, Patience
from cowfs.errors import CowfsError, printable
from cowfs.linux.fuse import FSTYPE
from cowfs.linux.mount_table import MountInfo, mountinfo

_PATIENCE, _IN_ALL = 2.0, 6.0
"""The time limits in seconds: for the answer of one daemon, and for all together."""
_HEADINGS = ("MOUNTPOINT", "LOWER", "STORE", "USER", "STATE")
DESCRIPTION = "List what cowfs has mounted where, with which store, and for which user."
EPILOG = """\
A store whose daemon does not answer within 2 seconds, or that belongs to another user, is shown as `?'.

example:
  cowfs list --json | jq -r '.[].mountpoint'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(args: argparse.Namespace) -> int:
    """Print a line for each visible mount, in the order of mounting."""
    patience = Patience(_PATIENCE, _IN_ALL)
    found = [_about(mount, patience) for mount in mountinfo() if mount.fstype == FSTYPE]
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    if not found:
        return 0
    rows = [_HEADINGS, *(tuple(map(printable, _row(each))) for each in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS) - 1)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True))
        say("  ".join(cells).rstrip())
    return 0


def _about(mount: MountInfo, patience: Patience) -> dict[str, Any]:
    """Return the facts about a mount, from the kernel, and from its daemon if that answers."""
    user = next((word[8:] for word in mount.super_words if word.startswith("user_id=")), "")
    about: dict[str, Any] = {
        "mountpoint": os.fsdecode(mount.mountpoint),
        "source": os.fsdecode(mount.source),
        "uid": int(user) if user.isdecimal() else None,
        "user": _name(int(user)) if user.isdecimal() else None,
        "readonly": "ro" in mount.options.split(","),
        "state": "ro" if "ro" in mount.options.split(",") else "rw",
        "lowers": None,
        "store": None,
        "pid": None,
        "error": None,
    }
    try:
        facts = patience.facts_of(mount.dev)
    except CowfsError as error:
        about["error"] = str(error)
        if os.geteuid() in {0, about["uid"]}:  # other users get no answer
            about["state"] = "dead" if isinstance(error, Dead) else "no answer"
    else:
        lowers = facts.get("lowers")
        if isinstance(lowers, list) and all(isinstance(lower, dict) for lower in lowers):
            about["lowers"] = [str(lower.get("path")) for lower in lowers]
        about["store"] = {"kind": facts["store"]["kind"], "path": facts["store"]["path"]}
        about["pid"] = facts["pid"]
    return about


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _row(about: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a line."""
    store = about["store"]
    kept = "?" if store is None else "memory" if store["kind"] == "memory" else store["path"]
    lowers = ":".join(about["lowers"]) if about["lowers"] else about["source"]
    return about["mountpoint"], lowers, kept, about["user"] or "?", about["state"]
