"""``cowfs report``: write the changes as a page for a browser."""

from __future__ import annotations

import argparse
import re

from cowfs.cli import options
from cowfs.cli.diff import add_aspects, patterns_of, selection_of
from cowfs.cli.output import Tally, progress_line, warn

_OFFSET = re.compile(r"(?:offset=)?(?:auto|\d+[kmg]?)(?::(?:auto|\d+[kmg]?))*", re.I)
"""A value of ``-o`` in other subcommands. In older versions of this one, ``-o`` was a file."""

DESCRIPTION = """\
Write the changes as one HTML file for a browser: a summary, what fills the store, when and by
which programs (if recorded with -o blame), a table that sorts and filters, and differences of texts.
"""
EPILOG = """\
The file loads nothing from the network. It contains parts of the changed files, so only you can read it.
Two reports of the same store are identical.

A PATH is relative to the root of the tree, and includes everything below it. A glob such as '*.conf'
matches in all directories.

examples:
  cowfs report /mnt -O changes.html
  cowfs report sysrcd.bs etc '*.conf' -O etc.html
  cowfs report /mnt --content -O - | ssh desk 'cat >changes.html'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("paths", metavar="PATH", nargs="*", default=(), help="only this path, or glob")
    parser.add_argument(
        "-O",
        "--output",
        metavar="FILE",
        default="cowfs-report.html",
        help="default: cowfs-report.html; -: standard output",
    )
    parser.add_argument("-o", dest="old", default=None, help=argparse.SUPPRESS)  # of older versions
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE")
    add_aspects(parser, "leave out")
    options.add_opening(parser, "compare with", letter=False)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from cowfs.api import report

    if args.old is not None and _OFFSET.fullmatch(args.old):
        args.offset = args.old
    elif args.old is not None:
        args.output = args.old
    lowers = options.lowers_to_open(args)
    what, paths = patterns_of(args)
    with progress_line() as progress:
        tally = Tally(progress, "inodes")

        def tick(what: str, count: int, whole: int) -> None:
            if not count:
                tally.begin(what, whole)
            tally.add()

        report(
            what,
            args.output,
            selection_of(args, paths),
            lowers,
            force=args.force,
            tell=warn,
            tick=tick,
        )
    return 0
