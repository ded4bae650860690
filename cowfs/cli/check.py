"""``cowfs check``: check a store, and repair its filesystem."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from cowfs.cli.output import Tally, note, progress_line, say, shares
from cowfs.client import find_mount
from cowfs.errors import StoreError

if TYPE_CHECKING:
    from cowfs.store.offline.check import Report

FSCK_OPERATIONAL, FSCK_USAGE = 8, 16  # of fsck(8)

DESCRIPTION = """\
Check a store that is not mounted. First e2fsck checks its filesystem, and repairs what is safe to repair
without asking. Then cowfs checks the rules that it and the kernel's overlayfs rely on: the header, whiteouts,
redirects and metacopy files. Violations of these rules are reported, one per line, but never repaired.
"""
EPILOG = """\
example:
  cowfs check -n sysrcd.bs         check without changing anything

Exit codes are those of fsck(8): 0 no errors; 1 errors corrected; 4 errors left uncorrected; 8 the store
could not be checked (it is missing or in use, or e2fsck is missing); 16 usage error. Codes are added: 12 is
4 and 8.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE", help="an image or a directory store")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-n", "--no-changes", action="store_true", help="report errors, but change nothing")
    how.add_argument(
        "-y", "--repair-all", action="store_true", help="repair all that e2fsck can, even if files get lost"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    # Those of fsck(8), where 1 means that errors were corrected.
    parser.set_defaults(usage_code=FSCK_USAGE, failure_code=FSCK_OPERATIONAL)


def run(args: argparse.Namespace) -> int:
    """Check the store; return the exit code of fsck(8)."""
    from cowfs.store.format.sniff import split_subdir
    from cowfs.store.offline.check import Listener, check_store

    if find_mount(args.store) is not None:
        raise StoreError(f"{args.store}: is a mountpoint, not a store", "unmount it, then check its store")
    with progress_line() as show:
        tally = Tally(show, "names")
        listener = Listener(_ignored if args.json else note, shares(show), tally.add)
        report = check_store(
            split_subdir(args.store)[0],
            read_only=args.no_changes,
            repair_all=args.repair_all,
            listener=listener,
        )
    return (_show_json if args.json else _show)(args.store, report)


def _ignored(_: str) -> None:
    pass


def _state(code: int) -> str:
    """Return the meaning of an exit code of fsck(8) in one word."""
    from cowfs.store.e2fsprogs.tools import FSCK_CORRECTED, FSCK_UNCORRECTED

    if code & FSCK_UNCORRECTED:
        return "errors"
    if code & ~(FSCK_CORRECTED | 2):
        return "unchecked"
    return "repaired" if code else "clean"


def _show(store: str, report: Report) -> int:
    for problem in report.problems:
        say(problem)
    found = {"errors": "ERRORS REMAIN", "unchecked": "NOT CHECKED"}.get(state := _state(report.code), state)
    if found == state and not report.checked:
        found = f"the filesystem is {found}; its contents were not checked"
    (say if found != state else note)(f"{store}: {found}")
    return report.code


def _show_json(store: str, report: Report) -> int:
    facts = {
        "version": 1,
        "store": store,
        "state": _state(report.code),
        "exit_code": report.code,
        "contents_checked": report.checked,
        "problems": list(report.problems),
    }
    print(json.dumps(facts, indent=2))
    return report.code
