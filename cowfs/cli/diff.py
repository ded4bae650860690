"""``cowfs diff``: list the changes of a store or a mount."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from cowfs.cli import options
from cowfs.cli.output import Tally, printable_lines, progress_line, warn
from cowfs.errors import EXIT_SYSTEM, CowfsError, UsageError
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.api import Changes
    from cowfs.changes.patch import Counts
    from cowfs.changes.select import Selection

EXIT_CHANGES = 1

DESCRIPTION = """\
List the changes: the differences between the merged tree and its lower. A file that was written to but is the
same as before is not listed.
"""
EPILOG = """\
Each line has a letter and a path:
  A  added     M  modified, followed by what: content, mode, owner, times, xattrs, target of a
  D  deleted      symlink, device, type (a file where a directory was)
  R  renamed: OLD -> NEW; changes in a renamed directory are listed under its new name
The path of a directory ends in a slash. A deleted directory is one line. Times of directories are ignored.
In names, bytes that do not print or are not UTF-8 are written as \\n, \\t or \\ooo (three octal digits).

A PATH is relative to the root of the tree, and includes everything below it. A glob such as '*.conf'
matches in all directories.

A store records where its lower is. If that has been moved or replaced, give it with --lower.
The totals are printed to standard error.

examples:
  cowfs diff /mnt                          of a mount, even while it is in use
  cowfs diff /mnt/etc                      only below /etc
  cowfs diff sysrcd.bs '*.conf' -p         how configuration files changed, as a patch
  cowfs diff sysrcd.bs --lower /media/cdrom/sysrcd.dat
  cowfs diff /mnt --json | jq -r 'select(.kind == "A") | .path'
  cowfs diff /mnt -p --binary >changes.patch; git -C copy-of-the-lower apply ../changes.patch
  cowfs diff /mnt --since before-upgrade   what was changed after a checkpoint
  cowfs diff ~/changes --exit-code >/dev/null && echo nothing was changed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        default=(),
        help="list only this path and everything below it; can be a glob",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-p", "--patch", action="store_true", help="print a patch for git apply")
    form.add_argument(
        "--stat", action="store_true", help="print the number of lines added and removed, per file"
    )
    form.add_argument("--name-only", action="store_true", help="print only paths")
    form.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per line: version kind path type what source",
    )
    parser.add_argument("--binary", action="store_true", help="with -p: include binary files")
    parser.add_argument(
        "-z", "--null", action="store_true", help="end each field with a NUL, and do not escape names"
    )
    add_aspects(parser, "do not list")
    parser.add_argument("--since", metavar="NAME", help="list the changes made after this checkpoint")
    parser.add_argument("--until", metavar="NAME", help="list the changes made before this checkpoint")
    options.add_opening(parser, "compare with")
    parser.add_argument(
        "--exit-code",
        action="store_true",
        help="exit with 1 if there are changes, and with 2 or more on errors",
    )


def run(args: argparse.Namespace) -> int:
    """Print the changes as they are found."""
    from cowfs.api import open_changes
    from cowfs.changes.render import Summary

    try:
        if args.binary and not args.patch:
            raise UsageError("--binary works only with -p", "add -p")
        if args.null and (args.patch or args.stat or args.json):
            raise UsageError("-z works only with lists of names", "leave it out")
        lowers = options.lowers_to_open(args)
        if lowers.given == ():
            raise UsageError(
                "--lower: no lower given", "give an image or a directory: --lower LOWER[:LOWER...]"
            )
        what, paths = patterns_of(args)
        summary = Summary()
        with open_changes(what, lowers, warn, since=args.since, until=args.until) as changes:
            selection = selection_of(args, paths)
            selection.must_exist(changes, what)
            wanted = selection.of(changes.within(selection.places))
            with progress_line() as progress:
                tally = Tally(progress, "changes")
                if not selection.places:
                    tally.expect(changes.count_names)
                _show(args, changes, _watched(summary.counted(wanted), tally))
        sys.stdout.flush()
        if not (args.json or args.name_only or args.null or args.patch or args.stat):
            print(summary, file=sys.stderr)
    except CowfsError as error:
        if args.exit_code and error.exit_code < EXIT_SYSTEM:
            error.exit_code = EXIT_SYSTEM
        raise
    return EXIT_CHANGES if args.exit_code and summary.total else 0


def _watched(changes: Iterator[Change], tally: Tally) -> Iterator[Change]:
    """Count the changes and show the progress, unless the changes themselves appear on the terminal."""
    is_seen = sys.stdout.isatty()
    for change in changes:
        if not is_seen:
            tally.add()
        yield change


def paths_of(args: argparse.Namespace) -> tuple[str, list[bytes]]:
    """Return the given store or mountpoint, and the paths in it."""
    return _asked(args, lambda path: path)


def patterns_of(args: argparse.Namespace) -> tuple[str, list[bytes]]:
    """Return the given store or mountpoint, and the paths and globs in it.

    A path that begins with the mountpoint is not a glob.
    """
    return _asked(args, glob.escape)


def _asked(args: argparse.Namespace, quoted: Callable[[bytes], bytes]) -> tuple[str, list[bytes]]:
    from cowfs.changes.select import normal
    from cowfs.client import find_mount, from_root, mount_above
    from cowfs.store.format.sniff import may_be_store

    if "" in args.paths:  # of a variable that is not set, as in: cowfs revert /mnt "$file"
        raise UsageError("'': an empty path", "give / for the whole tree")
    above = mount_above(args.what)
    what, below = args.what, ""
    if above is not None and not (above[1] and may_be_store(args.what)):
        what, below = above
    mount = find_mount(what)
    place = "" if mount is None else os.fsdecode(mount.mountpoint)
    inside, others = [], []
    for path in args.paths:  # a shell expands /mnt/etc/* to /mnt/etc/a /mnt/etc/b
        rest = path if place in {"", "/"} else from_root(path, place)
        if below and not os.path.isabs(args.what) and not os.path.isabs(path):
            rest = _beside(args.what, path, what)
        if rest != path:
            inside.append(quoted(normal(os.fsencode(rest))))
        else:
            others.append(normal(os.path.join(quoted(os.fsencode(below)), os.fsencode(path).lstrip(b"/"))))
    if below and not others:
        inside.insert(0, quoted(normal(os.fsencode(below))))
    return what, inside + others


def _beside(first: str, path: str, mountpoint: str) -> str:
    """Return where *path*, relative like *first*, is in the tree; *path* itself if it is below *first*."""
    from cowfs.client import mount_above

    found = mount_above(path)
    if found is None or found[0] != mountpoint or (os.path.isdir(first) and not os.path.lexists(path)):
        return path
    return found[1]


def add_aspects(parser: argparse.ArgumentParser, leave_out: str) -> None:
    """Add ``--content`` and ``--ignore``, for :func:`selection_of`; *leave_out* begins the help."""
    parser.add_argument(
        "--content",
        action="store_true",
        help="ignore changes of mode, owner, times and extended attributes",
    )
    parser.add_argument(
        "--ignore",
        metavar="ASPECT,...",
        default="",
        help=f"{leave_out} files that differ only in these: mode, owner, mtime, xattrs, ...",
    )


def selection_of(args: argparse.Namespace, paths: list[bytes]) -> Selection:
    """Return which changes to list. UsageError for an unknown aspect."""
    from cowfs.changes.select import ASPECTS, CONTENT, aspect, selected

    aspects = CONTENT if args.content else frozenset(ASPECTS)
    for name in filter(None, args.ignore.split(",")):
        ignored = aspect(name)
        if ignored is None:
            raise UsageError(f"--ignore: unknown aspect {name!r}", "known: " + ", ".join(ASPECTS))
        aspects -= {ignored}
    return selected(paths, aspects)


def _show(args: argparse.Namespace, changes: Changes, wanted: Iterator[Change]) -> None:
    from cowfs.api import line_counts, patch
    from cowfs.changes.render import escape, json_line, line

    out = sys.stdout.buffer
    if args.patch:
        is_seen = out.isatty()  # file contents must not control a terminal; a program gets them unchanged
        for piece in patch(changes, wanted, binary=args.binary):
            out.write(printable_lines(piece) if is_seen else piece)
    elif args.stat:
        _show_stat(line_counts(changes, wanted))
    elif args.null:
        for change in wanted:
            fields = [] if args.name_only else [change.kind.encode()]
            if change.source is not None and not args.name_only:
                fields.append(change.source)
            out.write(b"".join(field + b"\0" for field in [*fields, change.path]))
    elif args.name_only:
        for change in wanted:
            print(escape(change.path))
    elif args.json:
        for change in wanted:
            print(json_line(change))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        for change in wanted:
            print(line(change, colour=colour))


def _show_stat(counts: Iterable[Counts]) -> None:
    """Print the lines of all files in one column, as git does."""
    from cowfs.changes.render import escape

    rows = []
    added = removed = 0
    for each in counts:
        name = escape(each.path)
        rows.append((f"{escape(each.source)} => {name}" if each.source is not None else name, each))
        added += each.added
        removed += each.removed
    widest = max((len(name) for name, _ in rows), default=0)
    most = max((each.added + each.removed for _, each in rows), default=0)
    room = max(shutil.get_terminal_size().columns - widest - len(str(most)) - 6, 10)
    scale = min(1.0, room / most) if most else 1.0
    for name, each in rows:
        if each.sizes is not None:
            print(f" {name:<{widest}} | Bin {each.sizes[0]} -> {each.sizes[1]} bytes")
        else:
            plus, minus = (-(-int(count * scale * 1000) // 1000) for count in (each.added, each.removed))
            print(
                f" {name:<{widest}} | {each.added + each.removed:>{len(str(most))}} {'+' * plus}{'-' * minus}"
            )
    files = "1 file" if len(rows) == 1 else f"{len(rows)} files"
    print(f" {files} changed, {added} insertions(+), {removed} deletions(-)")
