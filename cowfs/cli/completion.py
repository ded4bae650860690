"""Complete ``cowfs`` commands in a shell, with argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable

import argcomplete

from cowfs.cli import options as mount_options
from cowfs.errors import CowfsError
from cowfs.linux.mount_table import mountinfo
from cowfs.store.format.sniff import may_be_store

_files = argcomplete.completers.FilesCompleter()


def complete(parser_of: Callable[[str | None], argparse.ArgumentParser], subcommands: Iterable[str]) -> None:
    """Print the possible next words of the command line that the shell passed, and end the process.

    *parser_of* returns the parser of a subcommand. This neither raises nor prints anything else, which the
    shell would show in the middle of the command line.
    """
    line = os.environ.get("COMP_LINE", "")
    point = os.environ.get("COMP_POINT", "")
    typed = line[: int(point)] if point.isdecimal() else line
    words = typed.split()
    known = tuple(subcommands)
    if len(words) > 1 and words[1] in known and (len(words) > 2 or typed[-1:].isspace()):
        parser = parser_of(words[1])
        for part in _all_of(parser):
            _explain_usage(part)
    else:
        parser = argparse.ArgumentParser("cowfs")
        parser.add_argument("--version", action="store_true")
        # `cowfs LOWER MOUNTPOINT` is also a command.
        first = parser.add_argument("subcommand", nargs="*")
        first.completer = lambda prefix, **_: [*known, *_files(prefix)]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _all_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a parser and of its subparsers."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found.extend(_all_of(below))
        else:
            found.append(action)
    return found


def _explain_usage(action: argparse.Action) -> None:
    """Give an argument its completer, chosen by its name in the usage line."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar == "OPTS":
        action.completer = _mount_options  # type: ignore[attr-defined]
    elif metavar == "MOUNTPOINT":
        action.completer = lambda prefix, **_: [*_mountpoints(), *_directories(prefix)]  # type: ignore[attr-defined]
    elif "MOUNTPOINT" in metavar:
        action.completer = lambda prefix, **_: [*_mountpoints(), *_stores(prefix)]  # type: ignore[attr-defined]
    elif metavar in {"STORE", "FILE|DIR|memory"}:
        action.completer = lambda prefix, **_: _stores(prefix)  # type: ignore[attr-defined]
    elif metavar == "NAME":
        action.completer = _checkpoints  # type: ignore[attr-defined]


def _stores(prefix: str) -> list[str]:
    """Complete the files that may be stores, and directories; any file if none of them may be one."""
    names = list(_files(prefix))
    stores = [name for name in names if name.endswith("/") or may_be_store(name)]
    return stores if any(not name.endswith("/") for name in stores) else names


def _directories(prefix: str) -> list[str]:
    return [name for name in _files(prefix) if name.endswith("/")]


def _mountpoints() -> list[str]:
    """Complete the visible mountpoints of cowfs."""
    names = [os.fsdecode(mount.mountpoint) for mount in mountinfo() if mount.fstype == "fuse.cowfs"]
    return [name for name in names if name.isprintable()]  # other users may have chosen the names


def _checkpoints(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Complete the checkpoints of the store or mount that was typed before."""
    from cowfs.api import checkpoints

    try:
        return [checkpoint.name for checkpoint in checkpoints(parsed_args.what)]
    except (CowfsError, OSError):
        return []


def _mount_options(prefix: str, **_: object) -> list[str]:
    """Complete the options that may follow those already typed."""
    before, comma, _last = prefix.rpartition(",")
    typed = {option.partition("=")[0] for option in before.split(",")}
    return [before + comma + name for name in mount_options.names() if name.rstrip("=") not in typed]
