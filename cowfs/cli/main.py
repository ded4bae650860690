"""The ``cowfs`` command: finds the subcommand, and turns every failure into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import cowfs
from cowfs.cli.lacking import lacking
from cowfs.cli.output import warn
from cowfs.errors import EXIT_SYSTEM, EXIT_USAGE, CowfsError
from cowfs.linux.programs import clean_own_environment

SUBCOMMANDS = ("mount", "umount", "create", "grow", "persist", "check", "info", "top", "diff", "find")

_DESCRIPTION = """\
Merge a read-only root (a squashfs image or a directory) with a writable store, and keep the changes:
new and changed files, and what was deleted, live in the store and are there again at the next mount.
"""
_EPILOG = """\
examples:
  cowfs create sysrcd.bs 512                     make a store of 512 MB
  cowfs mount sysrcd.dat /mnt --store sysrcd.bs  merge an image with it
  cowfs diff /mnt                                see what has changed
  cowfs umount /mnt                              write everything back and let go

`cowfs SUBCOMMAND --help` tells more. Also: cowfs LOWER MOUNTPOINT -o store=FILE (as mount(8) calls it).
"""


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line too, and mount(8)'s exit code for it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        warn(f"{message} (see `{self.prog} --help`)")
        raise SystemExit(EXIT_USAGE)


class _Version(argparse.Action):
    """Find out the version only if it is asked for: that takes longer than a short command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"cowfs {cowfs.__version__}")
        parser.exit()


def _parser(wanted: str | None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole, and those of the subcommands."""
    parser = _Parser(
        prog="cowfs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", dest="subcommand", parser_class=_Parser)
    # Only the subcommand that was asked for is imported: starting up is half of a short command's time.
    names = (wanted,) if wanted in SUBCOMMANDS else SUBCOMMANDS
    for name in names:
        importlib.import_module(f"cowfs.cli.{name}").add_parser(subparsers)
    return parser, dict(subparsers.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Never raises but for SystemExit of argparse."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names are bytes, and are shown as they are
    if argv is None:  # we are the program, and not called by another
        clean_own_environment()
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    logging.getLogger("cowfs").addHandler(logging.NullHandler())  # a log is the daemon's; errors say it all
    first = args[0] if args else None
    if first is not None and not first.startswith("-") and first not in SUBCOMMANDS and len(args) > 1:
        args.insert(0, "mount")  # cowfs LOWER MOUNTPOINT -o ...
        first = "mount"
    parser, of_commands = _parser(first)
    parsed, unknown = parser.parse_known_args(args)
    if unknown:
        (of_commands.get(parsed.subcommand) or parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if parsed.subcommand is None:
        parser.print_help()
        return EXIT_USAGE
    return guarded(lambda: int(parsed.run(parsed)))


def guarded(call: object) -> int:
    """Run *call*; say in one line what went wrong, and return the exit code."""
    assert callable(call)
    try:
        return int(call())
    except CowfsError as error:
        warn(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("cowfs: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, MemoryError, ImportError, BaseExceptionGroup) as error:
        failure = lacking(error)
        if failure is not None:
            warn(str(failure))
            return failure.exit_code
        if not isinstance(error, OSError):
            raise
        where = os.fsdecode(error.filename) + ": " if error.filename is not None else ""
        warn(f"{where}{error.strerror or error}")
        return EXIT_SYSTEM


if __name__ == "__main__":
    sys.exit(main())
