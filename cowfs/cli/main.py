"""The ``cowfs`` command: find the subcommand, and turn every failure into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import cowfs
from cowfs.cli.limits import explain
from cowfs.cli.output import be_quiet, open_streams, warn
from cowfs.errors import EXIT_MOUNT, EXIT_USAGE, CowfsError, UsageError
from cowfs.linux.programs import clean_own_environment
from cowfs.linux.signals import ignore_keyboard_interrupts, raise_keyboard_interrupts

# The text of `cowfs --help`: related subcommands share a line, so that all fit on a screen of 24 lines.
_SUMMARY = (
    ("mount, umount", "mount a lower merged with a store; unmount it"),
    ("run, overlay", "try a command, then commit or discard; mount for Podman"),
    ("create, grow, shrink", "create a store; make it larger; make it smaller"),
    ("check, trim, convert", "check a store; free its unused space; convert it"),
    ("backup, restore", "copy a store, in use or not; copy it back"),
    ("persist, rebase", "save a store that is in memory; move one to a new root"),
    ("list, info", "list the mounts; describe a store, an image or a mount"),
    ("find", "list the stores that a boot would consider"),
    ("top", "show the requests to a mount, and how long they take"),
    ("diff, du", "list the changes; show what fills a store"),
    ("explain, report", "explain what a path shows; write the changes as HTML"),
    ("browse", "browse the changes in the terminal, and revert them"),
    ("export, apply", "write the changes to a file; apply them to a directory"),
    ("blame, watch", "tell which process changed a file; show changes live"),
    ("revert, vacuum", "revert changes; remove redundant entries from a store"),
    ("checkpoint, rollback", "keep the state of a tree; go back to it"),
    ("checkpoints, lower", "list the checkpoints; add and remove modules"),
)
SUBCOMMANDS = tuple(name for names, _ in _SUMMARY for name in names.split(", "))

_DESCRIPTION = """\
Mount a read-only image or directory writable, and keep the changes in a store.
See `cowfs SUBCOMMAND --help`. `cowfs LOWER MOUNTPOINT` means `cowfs mount`.

subcommands:
""" + "\n".join(f"  {names:<21} {does}" for names, does in _SUMMARY)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with the exit code of mount(8)."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        # What matches is a value, not an option: a negative size gets a message of its own.
        self._negative_number_matcher = re.compile(r"-\d*\.?\d+[kmgt]?(?:i?b)?$", re.IGNORECASE)

    def error(self, message: str) -> None:  # type: ignore[override]
        warn(f"{message} (see `{self.prog} --help`)")
        raise SystemExit(self.get_default("usage_code") or EXIT_USAGE)


class _Version(argparse.Action):
    """Reads the version only when it is requested, because that takes longer than a short command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"cowfs {cowfs.__version__}")
        parser.exit()


@functools.cache
def _parser(wanted: str | None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the main parser, and those of the subcommands."""
    parser = _Parser(
        prog="cowfs",
        usage="cowfs [--help] [--version] SUBCOMMAND ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    # Without a description: the usage line names them, and the help must fit on a screen.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action=_Version, nargs=0, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(
        prog="cowfs", help=argparse.SUPPRESS, metavar="SUBCOMMAND", dest="subcommand", parser_class=_Parser
    )
    # Only the requested subcommand is imported: start-up is half of a short command's time.
    if wanted in SUBCOMMANDS:
        module = importlib.import_module(f"cowfs.cli.{wanted}")
        of_command = subparsers.add_parser(
            wanted,
            description=module.DESCRIPTION,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        of_command.set_defaults(run=module.run)
        module.add_arguments(of_command)
        _add_quiet(of_command)
        _add_key_file(of_command)
    return parser, dict(subparsers.choices)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet to every subcommand that has no option of its own for it; the manual describes it once."""
    with suppress(argparse.ArgumentError):
        parser.add_argument("-q", "--quiet", action="store_true", help=argparse.SUPPRESS)


def _add_key_file(parser: argparse.ArgumentParser) -> None:
    """Add --key-file, for encrypted stores, to every subcommand; the manual describes it once."""
    parser.add_argument("--key-file", metavar="FILE", help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Raises only argparse's SystemExit."""
    if argv is None:  # this is the program, not a call from another one
        if "_ARGCOMPLETE" in os.environ:  # a shell requests completions
            from cowfs.cli.completion import complete

            complete(lambda name: _parser(name)[0], SUBCOMMANDS)
        open_streams()
        clean_own_environment()
    args = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("cowfs").addHandler(logging.NullHandler())  # only the daemon has a log
    if argv is not None:
        return guarded(lambda: _run(args))
    try:
        return guarded(lambda: _run_interruptibly(args))
    finally:
        ignore_keyboard_interrupts()  # the work is done, and the exit code is known
        _empty_stderr()


def _empty_stderr() -> None:
    """Flush stderr; if nobody reads it any more, drop what is left: Python 3.13 would exit with 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _, writing = os.pipe()  # a confined daemon has no /dev/null
        os.dup2(writing, 2)


def prepare(arguments: Sequence[str]) -> None:
    """Make and use the parser of a command, so that forks of this process start faster."""
    _parser(arguments[0])[0].parse_known_args(arguments)


def _run_interruptibly(args: list[str]) -> int:
    """Run the command line. From here on Ctrl-C raises KeyboardInterrupt; before, it ended the process."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        raise_keyboard_interrupts()
    try:
        return _run(args)
    except Exception:
        ignore_keyboard_interrupts()  # one line says why it failed; no second one
        raise


def _run(args: list[str]) -> int:
    first = args[0] if args else None
    if first is not None and first.startswith("-") and any("lowerdir=" in word for word in args):
        args.insert(0, "overlay")  # called by the name of fuse-overlayfs
        first = "overlay"
    elif first is not None and first.startswith("-") and len(args) > 1:
        args = _after_subcommand(args)
        first = args[0]
    if first == "lower":
        _refuse_lower(args)
    if first is not None and not first.startswith("-") and first not in SUBCOMMANDS:
        _refuse_misspelt(args)
        args.insert(0, "mount")  # cowfs LOWER MOUNTPOINT -o ...
        first = "mount"
    command: list[str] = []
    if first == "run" and "--" in args:
        at = args.index("--")
        args, command = args[:at], args[at + 1 :]
    parser, of_commands = _parser(first)
    parsed, unknown = parser.parse_known_args(args)
    if hasattr(parsed, "paths") and _are_paths(unknown):
        parsed.paths = [*parsed.paths, *(word for word in unknown if word != "--")]
        unknown = []
    if unknown:
        _refuse_unknown(unknown, parsed, of_commands.get(parsed.subcommand) or parser)
    _refuse_empty(args, parsed, of_commands.get(parsed.subcommand) or parser)
    if command:
        parsed.command = command
    if getattr(parsed, "quiet", False):
        be_quiet()
    if parsed.subcommand is None:
        parser.print_help()
        return EXIT_USAGE
    from cowfs.cli.encrypted import opened

    try:
        with opened(parsed):
            return int(parsed.run(parsed))
    except (CowfsError, OSError) as error:
        if hasattr(parsed, "failure_code") and not isinstance(error, BrokenPipeError):
            warn(str(explain(error) or error))
            return int(parsed.usage_code if isinstance(error, UsageError) else parsed.failure_code)
        if parsed.subcommand == "mount" and isinstance(error, CowfsError) and error.exit_code == EXIT_MOUNT:
            from cowfs.cli.absent import is_tolerated

            if is_tolerated(parsed):
                return 0
        raise


def _refuse_unknown(unknown: list[str], given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a usage error for arguments that a command does not have."""
    if "" in unknown:
        parser.error("an empty argument was given: is a shell variable unset?")
    option = unknown[0].partition("=")[0]
    known = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.75) if option.startswith("--") else []
    near = near or [word for word in known if option[1:] in {word[-len(option) + 1 :], word[1 : len(option)]}]
    if near:
        parser.error(f"unknown option {option}; did you mean {near[0]}?")
    if given.subcommand == "mount" and len(unknown) == 1 and not option.startswith("-"):
        parser.error(f"too many arguments; to use {option} as the store, write --store {option}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _refuse_empty(args: list[str], given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a usage error for an empty argument, which would otherwise mean the current directory."""
    for name, value in vars(given).items():
        if value == "" and parser.get_default(name) != "":
            option = f"--{name.replace('_', '-')}"
            shown = option if any(word.split("=")[0] == option for word in args) else name.upper()
            parser.error(f"an empty argument was given for {shown}: is a shell variable unset?")


def _after_subcommand(args: list[str]) -> list[str]:
    """Move a leading --quiet behind the subcommand. UsageError for any other leading option."""
    if args[0] in {"-q", "--quiet"}:
        return [args[1], args[0], *args[2:]]
    if args[0] in {"-h", "--help", "--version"}:
        return args
    hint = "cowfs SUBCOMMAND [OPTION]...; see `cowfs --help`"
    raise UsageError(f"{args[0]}: no subcommand before it", hint)


def _refuse_misspelt(args: list[str]) -> None:
    """UsageError if the first word is no lower but resembles a subcommand, or is followed by one."""
    word = args[0]
    if os.path.lexists(word) and args[1:2] and args[1] in SUBCOMMANDS and not os.path.lexists(args[1]):
        raise UsageError(
            f"{args[1]}: the subcommand comes first", f"cowfs {args[1]} {' '.join([word, *args[2:]])}"
        )
    if os.path.lexists(word) or not word.replace("-", "").isalpha():
        return
    near = difflib.get_close_matches(word, SUBCOMMANDS, n=1)
    if near:
        raise UsageError(f"unknown subcommand {word!r}; did you mean {near[0]!r}?")
    raise UsageError(f"{word!r} is neither a subcommand nor an existing lower", "see `cowfs --help`")


def _refuse_lower(args: list[str]) -> None:
    """UsageError for `cowfs lower` of a user who means a lower of this name, or mistypes what follows."""
    if args[1:] and args[1][:1] != "-" and args[1] not in {"add", "remove"}:
        is_there = os.path.lexists(args[0])
        hint = "write ./lower for a lower of this name" if is_there else "see `cowfs lower --help`"
        raise UsageError(f"lower: {args[1]!r} is neither add nor remove", hint)


def _are_paths(words: Sequence[str]) -> bool:
    """Whether the words that argparse rejected are paths, which it rejects after an option."""
    return words[:1] == ["--"] or not any(word.startswith("-") for word in words)


def guarded(call: object) -> int:
    """Run *call*; print any failure in one line, and return the exit code."""
    assert callable(call)
    try:
        try:
            return int(call())
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # otherwise Python reports a failed write only at exit, with a traceback
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
        if isinstance(error.__cause__, KeyboardInterrupt):  # in a __set_name__(), up to Python 3.11
            print("cowfs: interrupted", file=sys.stderr)
            return 130
        failure = explain(error)
        if failure is None:
            raise
        warn(str(failure))
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
