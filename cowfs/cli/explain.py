"""``cowfs explain``: explain why a path shows what it shows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from cowfs.cli import options
from cowfs.cli.output import say, say_fields, warn
from cowfs.errors import EXIT_MOUNT, UsageError
from cowfs.jsontext import get_path

DESCRIPTION = """\
Explain why the merged tree shows a path as it does: what each layer has there, which rule decides, why the
path counts as changed, and how much space it takes in the store.
"""
EPILOG = """\
examples:
  cowfs explain /mnt/etc/fstab           of a mounted tree
  cowfs explain sysrcd.bs etc/fstab      of a store that is not mounted
  cowfs explain /mnt etc --json          the same for programs

Exit codes: 0 the path shows something; 1 usage error; 32 the path does not exist, or cannot be read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("paths", metavar="PATH", nargs="*", default=(), help="what to explain")
    options.add_json_or_null(
        parser,
        "for each layer path, layer, path there, type, mode, uid, gid, size, mtime in ns, target, rules",
    )
    options.add_lower(parser)


def run(args: argparse.Namespace) -> int:
    """Explain each path."""
    from cowfs.api import open_changes
    from cowfs.changes.explain import date_of, render
    from cowfs.changes.render import escape
    from cowfs.cli.diff import paths_of
    from cowfs.client import checked_answer

    what, paths = paths_of(args)
    if not paths:
        raise UsageError("no path to explain", "name one in the tree: cowfs explain STORE|MOUNTPOINT PATH")
    code = 0
    with open_changes(what, options.lowers_of(args), warn) as changes:
        for path in paths:
            answer = changes.explain(path)
            with checked_answer(what):
                code = code if answer["seen"] else EXIT_MOUNT
                if args.json:
                    print(json.dumps(answer))
                    continue
                if args.null:
                    for each in answer["layers"]:
                        say_fields(path, *_fields(each))
                    continue
                for line in list(render(answer, escape(path) or "/", date_of)):
                    say(line)
    sys.stdout.flush()
    return code


def _fields(layer: dict[str, Any]) -> Iterator[bytes | str]:
    """Yield the fields of a layer's version of a path; they are empty if it has none."""
    yield layer["layer"]
    yield get_path(layer, "path")
    for fact in ("type", "mode", "uid", "gid", "size", "mtime_ns"):
        known = layer.get(fact)
        yield "" if known is None else str(known)
    yield get_path(layer, "target") if "target" in layer else ""
    yield " ".join(str(rule["rule"]) for rule in layer["rules"])
