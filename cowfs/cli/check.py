"""``cowfs check``: check a store, and repair its filesystem."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cowfs.cli.output import say, warn
from cowfs.errors import StoreError, SystemFailure

NAME = "check"
FSCK_USAGE = 16

_DESCRIPTION = """\
Check a store that is not mounted: first its filesystem, by e2fsck, which repairs what can be repaired
without a question; then what cowfs and the kernel's overlayfs rely on: the header, and whiteouts,
redirects and metacopy files that make sense. Those are reported, one a line, and never changed.
"""
_EPILOG = """\
example:
  cowfs check -n sysrcd.bs         look, and change nothing

exit codes are those of fsck(8): 0 nothing wrong; 1 errors were corrected; 4 errors are left; 8 it could
not be checked (no store, in use, e2fsck is missing); 16 wrong usage. They add up: 12 is 4 and 8. What is
in a store of the aufs format is not checked (and no error), only its filesystem.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="check a store",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="an image, or a directory store")
    parser.add_argument("-n", "--no-changes", action="store_true", help="change nothing, only report")
    parser.set_defaults(run=run)

    def error(message: str) -> NoReturn:
        warn(f"{message} (see `{parser.prog} --help`)")
        raise SystemExit(FSCK_USAGE)

    parser.error = error  # type: ignore[method-assign]  # fsck(8): 1 would mean that errors were corrected


def run(args: argparse.Namespace) -> int:
    """Check the store; return the exit code of fsck(8)."""
    from cowfs.store.check import check_store
    from cowfs.store.tools import FSCK_CORRECTED, FSCK_OPERATIONAL, FSCK_UNCORRECTED

    try:
        report = check_store(args.store, read_only=args.no_changes, progress=say)
    except (StoreError, SystemFailure) as error:
        warn(str(error))
        return FSCK_OPERATIONAL
    for problem in report.problems:
        say(problem)
    found = "repaired" if report.code else "clean"
    if report.code & FSCK_UNCORRECTED:
        found = "ERRORS ARE LEFT"
    elif report.code & ~(FSCK_CORRECTED | 2):
        found = "COULD NOT BE CHECKED"
    elif not report.checked:
        found = f"the filesystem is {found}; what is in it was not checked"
    say(f"{args.store}: {found}")
    return report.code
