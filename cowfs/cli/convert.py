"""``cowfs convert``: convert a store between the formats of aufs and overlayfs."""

from __future__ import annotations

import argparse
import json

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, warn

DESCRIPTION = """\
Convert a store in place from the aufs format, as SystemRescueCd 1 to 5 wrote it, to the overlayfs format, or
back. The merged tree stays the same.
"""
EPILOG = """\
It needs hardly any space: whiteouts are rewritten, everything else is moved. If it is interrupted, run the
same command to complete it; until then the store cannot be mounted. The store must not be mounted, and its
trash (of `cowfs revert`) must be empty.

To aufs: renamed directories, files copied up without their data, and hard links refer to the lower, so their
data is copied into the store first, and the lower must be available. Names that aufs cannot have (.wh.NAME,
more than 242 bytes) and checkpoints are refused before anything is changed.

examples:
  cowfs convert old.bs --to overlayfs
  cowfs convert sysrcd.bs --to aufs --lower sysrcd.dat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE", help="a store that is not mounted")
    parser.add_argument("--to", choices=("overlayfs", "aufs"), required=True, help="the new format")
    options.add_opening(parser)
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Convert the store, or complete an interrupted conversion."""
    from cowfs.api import convert
    from cowfs.linux.limits import take_all_descriptors
    from cowfs.store.e2fsprogs.signals import cleaned_up

    lowers = options.lowers_to_open(args)
    take_all_descriptors()
    with cleaned_up(), progress_line() as progress:
        tally = Tally(progress, "names")
        done = convert(
            args.store, args.to, lowers, tell=warn, tick=lambda _: tally.add(), expect=tally.expect
        )
    counts = {
        "whiteouts": done.whiteouts,
        "opaque directories": done.opaque,
        "devices 0:0": done.devices,
        "moved": done.names,
        "copied from the lower": done.copied,
    }
    if args.json:
        facts = {name.replace(" ", "_").replace(":", ""): count for name, count in counts.items()}
        say(json.dumps({"store": args.store, "format": args.to, "continued": done.continued, **facts}))
        return 0
    said = ", ".join(f"{name}: {count}" for name, count in counts.items() if count) or "nothing was in it"
    done_now = "completed: " if done.continued else ""
    warn(f"{args.store}: converted to the {args.to} format; {done_now}{said}")
    return 0
