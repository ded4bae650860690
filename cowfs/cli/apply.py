"""``cowfs apply``: apply the changes to a directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, say, warn
from cowfs.errors import UsageError, printable
from cowfs.linux.signals import read_answer

if TYPE_CHECKING:
    from cowfs.exports.losses import Losses

EXIT_PARTIAL = 64
EXIT_CONFLICT = 65

DESCRIPTION = """\
Make the changes of the store in the directory ROOT, a copy of the lower: afterwards it holds the merged tree.
Other files in ROOT stay. ROOT can also be another store that is not mounted, or a mountpoint.
"""
EPILOG = """\
If a path in ROOT differs from the lower (in content or type, or because one of them does not have it), this
is a conflict: conflicts are listed, and nothing is changed. --force also replaces and removes these files.

Each file is replaced in one step: after an interruption, the content of each path is old or new, and the same
command completes the rest. Nothing outside ROOT is changed, whatever links are in it. Other filesystems
mounted in ROOT are not touched.

--backup DIR first copies files that will be replaced to DIR; --undo restores them, and removes added files.

examples:
  cowfs apply sysrcd.bs /mnt/unpacked --dry-run    list what would be done, as cowfs diff does
  cowfs apply sysrcd.bs /mnt/unpacked
  cowfs apply /mnt /srv/root-copy                  the changes of a mount
  cowfs apply sysrcd.bs /mnt/unpacked --backup old && cowfs apply --undo --backup old /mnt/unpacked

Exit codes: 0 done; 64 done, but some owners, attributes or devices could not be created, which are listed;
65 there are conflicts, and nothing was changed; 1 usage error; 2 ROOT could not be read or changed; 32 the
store or the lower cannot be used.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT", help="the changes; with --undo left out")
    parser.add_argument("root", metavar="ROOT", nargs="?", help="the directory, or the store, to change")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only list what would be done")
    parser.add_argument("-f", "--force", action="store_true", help="also change paths that are in conflict")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="ask for each change, and each conflict"
    )
    parser.add_argument(
        "--backup", metavar="DIR", default="", help="copy replaced files to DIR; with --undo: read them"
    )
    parser.add_argument("--undo", action="store_true", help="restore ROOT from DIR")
    options.add_trust(parser, "make")
    options.add_opening(parser)


def run(args: argparse.Namespace) -> int:
    """Find conflicts, and change the directory."""
    from cowfs.api import apply
    from cowfs.changes.render import escape, line
    from cowfs.linux.limits import take_all_descriptors

    options.must_have_name(args.backup, "--backup ")
    lowers = options.lowers_to_open(args)
    take_all_descriptors()  # each directory on the way to a path uses one
    if args.undo:
        return _undo(args)
    if args.root is None:
        raise UsageError("no ROOT given", "name the directory to change after the store")
    if args.dry_run and (args.interactive or args.backup):
        raise UsageError(
            "--dry-run excludes --interactive and --backup: it changes nothing", "leave one of them out"
        )
    with progress_line() as progress:
        found, losses = apply(
            args.what,
            args.root,
            lowers,
            force=args.force,
            trust=args.trust,
            dry_run=(lambda change: say(line(change))) if args.dry_run else None,
            backup=args.backup,
            ask=_asking() if args.interactive else None,
            tell=warn,
            tick=_counting(progress),
        )
    if not args.interactive:
        for path, why in found:
            warn(f"conflict: {escape(path) or '/'} {why}")
    if found and not args.force and not args.interactive:
        if not args.dry_run:
            warn("nothing was changed (give --force to also change these paths)")
        return EXIT_CONFLICT
    return _told(args.root, losses)


def _counting(progress: Callable[[str], None]) -> Callable[[bytes, int], None]:
    """Return a function that counts paths, and the bytes of their content."""
    tally = Tally(progress, "paths")
    return lambda _, length: tally.add(not length, length)


def _told(root: str, losses: Losses) -> int:
    for text in losses:
        warn(f"{root}: {text}")
    return EXIT_PARTIAL if losses.is_partial else 0


def _undo(args: argparse.Namespace) -> int:
    from cowfs.api import undo_apply
    from cowfs.changes.render import escape

    if args.dry_run or args.interactive or args.force:
        raise UsageError("--undo: has no --dry-run, --interactive or --force", "leave them out")
    if not args.backup:
        raise UsageError("--undo: which backup?", "name it with --backup DIR")
    root = args.root or args.what
    with progress_line() as progress:
        stay, losses = undo_apply(root, args.backup, _counting(progress), trust=args.trust)
    for path in stay:
        warn(f"{root}: /{escape(path)} stays: something else is in it")
    return _told(root, losses)


def _asking() -> Callable[[str, bytes, str], bool]:
    """Return a function that asks on standard error and reads answers from standard input."""
    from cowfs.changes.render import escape

    rest: bool | None = None

    def ask(kind: str, path: bytes, conflict: str) -> bool:
        nonlocal rest
        while rest is None:
            question = f"{kind}  {escape(path) or '/'}" + (f"  conflict: {conflict}" if conflict else "")
            answer = read_answer(f"{printable(question)}  [y,n,a,d,q,?] ")
            if not answer.endswith("\n") or not sys.stdin.isatty():  # nothing has ended the line there
                print(file=sys.stderr)
            match answer.strip().lower():
                case "y" | "n" as one:
                    return one == "y"
                case "a" | "d" as one:
                    rest = one == "a"
                case "q" | "" if answer in {"", "q\n", "Q\n", "q"}:
                    raise UsageError("nothing was changed")
                case _:
                    warn("y: change it; n: do not; a: change all others too; d: no others; q: change nothing")
        return rest

    return ask
