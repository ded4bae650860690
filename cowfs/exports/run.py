"""Write the changes, or a whole merged tree, in the format of another program."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol

from cowfs.changes import pairs, patch
from cowfs.changes.names import Expect
from cowfs.changes.paths import join
from cowfs.changes.version import Tree
from cowfs.errors import SystemFailure, UsageError
from cowfs.exports import iso, lists, oci, squashfs
from cowfs.exports.entries import NOTHING, Tick, Withheld, feed
from cowfs.exports.how import COMPRESSION, DIRECTORIES, FORMATS, STYLES, TAG, How
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, Plan, everything, plan
from cowfs.exports.tar import Tar
from cowfs.exports.target import new_directory, new_file, scratch_directory
from cowfs.exports.upper import Upper
from cowfs.types import Change

_CHANGES_ALONE = {"patch", "rsync", "restic"}
_GIT_MODES = {0o644, 0o755}
_MODES, _XATTRS = "modes other than 644 and 755 left out", "extended attributes and ACLs left out"
_OTHERS, _EMPTY = "devices, FIFOs and sockets left out", "empty directories left out"
_NOT_IN_A_PATCH = (
    (_MODES, re.compile(rb"mode ")),
    ("changes of owner left out", re.compile(rb"owner ")),
    (_XATTRS, re.compile(rb"extended attributes ")),
    (_EMPTY, re.compile(rb"an empty directory ")),
    ("files left out that are too large for a patch", re.compile(rb"[0-9]+ -> [0-9]+ bytes")),
    ("files left out that replace a device, FIFO or socket", re.compile(rb"[a-z]+ became a file")),
)
"""What a patch cannot express, and how the remarks about it begin (:mod:`cowfs.changes.patch`)."""
_STANDARD_OUTPUT = "-"


class Source(pairs.Sides, Protocol):
    """The changes to export, such as :class:`cowfs.api.Changes`."""

    def exactly(self) -> Iterator[Change]:
        """Find the changes, and the directories of which only the time differs."""

    def tree(self) -> Tree:
        """Return the merged tree."""

    def tree_before(self) -> Tree:
        """Return the tree of the lowers."""

    def __iter__(self) -> Iterator[Change]: ...


class Watch:
    """Receives the progress: each path, the number of bytes read of it, and how many paths to expect."""

    def __init__(self, tick: Tick = lambda *_: None, expect: Expect | None = None) -> None:
        self._tick = tick
        self._expect = expect

    def __call__(self, path: bytes, length: int) -> None:
        self._tick(path, length)

    def expect(self, count: Callable[[], int]) -> None:
        """Start again; *count* returns the number of paths to expect."""
        if self._expect is not None:
            self._expect(count)


def check(how: How) -> None:
    """UsageError for options that do not go together."""
    if how.format not in FORMATS:
        raise UsageError(f"--to {how.format}: no such format", "known: " + ", ".join(FORMATS))
    styles = STYLES.get(how.format, ())
    if how.whiteouts and how.whiteouts not in styles:
        hint = "known: " + ", ".join(styles) if styles else "leave it out"
        raise UsageError(f"--whiteouts {how.whiteouts}: not with --to {how.format}", hint)
    if how.merged and how.format in _CHANGES_ALONE:
        raise UsageError(f"--merged: not with --to {how.format}, which exports changes", "leave it out")
    if how.tag != TAG and how.format != "oci":
        raise UsageError("--tag: only with --to oci", "leave it out")
    if not oci.NAME.fullmatch(how.tag):
        raise UsageError(
            f"--tag {how.tag}: not a name for an image",
            "use letters and digits, with one of - . _ : @ + / or -- between them",
        )
    if how.format == "iso":
        if not how.base:
            raise UsageError("--to iso: needs an ISO to copy", "give it with --base")
        return
    if how.merged and (how.base or how.whiteouts):
        raise UsageError(
            f"--{'base' if how.base else 'whiteouts'}: not with --merged", "leave one of them out"
        )
    if how.base and how.format != "oci":
        raise UsageError("--base: only with --to oci or iso", "leave it out")
    if how.compression != COMPRESSION and how.format != "squashfs":
        raise UsageError("--compression: only with --to squashfs or iso", "leave it out")


def export(
    source: Source, how: How, target: str, tick: Watch | None = None, withheld: Withheld = NOTHING
) -> Losses:
    """Write *target*; return what the format cannot express. Blocks.

    *target* is complete at the end, or does not exist; an existing one is replaced only with *how.force*.
    *withheld* applies to formats that are a directory of files; archives contain everything. CowfsError, and
    OSError with the path of a file that cannot be read.
    """
    check(how)
    losses, tick = Losses(), tick or Watch()
    if how.format in DIRECTORIES:
        if target == _STANDARD_OUTPUT:
            raise UsageError(f"-: {how.format} is a directory, not standard output", "give its name")
        with new_directory(target, force=how.force) as fd:
            if how.format == "oci":
                _oci(fd, source, how, losses, tick)
            else:
                _overlayfs(fd, source, how, losses, tick, withheld)
        return losses
    with ExitStack() as stack:
        if target == _STANDARD_OUTPUT:
            if how.format in {"squashfs", "iso"} or how.style == "list":
                raise UsageError(f"-: {how.format} cannot go to standard output", "give the name of a file")
            if os.isatty(1):  # names and contents may contain escape sequences
                raise UsageError(
                    "-: standard output is a terminal", "redirect it, or give the name of a file"
                )
            stack.enter_context(_standard_output())
            fd = 1
        else:
            fd = stack.enter_context(new_file(target, force=how.force))
        if how.style == "list" and not how.merged:
            beside = stack.enter_context(new_file(f"{target}.deleted", force=how.force))
        else:
            beside = -1
        if how.format == "squashfs":
            _squashfs(fd, source, how, losses, tick)
        elif how.format == "iso":
            _iso(fd, source, how, target, losses, tick)
        elif how.format in {"tar", "gnutar"}:
            _tar(fd, beside, source, how, losses, tick)
        else:
            _lines(fd, source, how, losses, tick)
    return losses


def _items(source: Source, how: How, tick: Watch) -> Iterable[tuple[bytes, Item]]:
    return everything(source.tree()) if how.merged else _plan(source, tick).items()


def _plan(source: Source, tick: Watch) -> Plan:
    items = plan(_told(source.exactly(), tick), source.tree(), source.tree_before())
    tick.expect(lambda: len(items))
    return items


def _told(changes: Iterable[Change], tick: Tick) -> Iterator[Change]:
    for change in changes:
        tick(change.path, 0)
        yield change


def _squashfs(fd: int, source: Source, how: How, losses: Losses, tick: Watch) -> None:
    items, tree = _items(source, how, tick), source.tree()
    style = "" if how.merged else how.style
    made = how.latest or 0
    with squashfs.making(fd, losses, tick, style, how.compression, made) as sink:
        feed(items, tree, sink, losses, tick, how.latest)


def _iso(fd: int, source: Source, how: How, target: str, losses: Losses, tick: Watch) -> None:
    with ExitStack() as stack:
        base = iso.open_base(how.base, stack)
        scratch = stack.enter_context(scratch_directory(target))
        image = iso.new_image(scratch)
        try:
            _squashfs(image, source, replace(how, merged=True), losses, tick)
        finally:
            os.close(image)
        iso.write(fd, base, scratch, how.latest or 0)


def _tar(fd: int, beside: int, source: Source, how: How, losses: Losses, tick: Watch) -> None:
    items, tree = _items(source, how, tick), source.tree()
    with _buffered(fd) as write:
        tar = Tar(write, losses, tick, "" if how.merged else how.style, gnu=how.format == "gnutar")
        feed(items, tree, tar, losses, tick, how.latest)
        tar.close()
    if beside >= 0:
        _note_kept_xattrs(items, tree, source.tree_before(), losses)
        replaced = [path for path, item in items if item is Item.REPLACED]
        with _buffered(beside) as write:
            for path in sorted([*tar.deleted, *replaced]):
                write(path + b"\0")


def _note_kept_xattrs(items: Iterable[tuple[bytes, Item]], after: Tree, before: Tree, losses: Losses) -> None:
    """Note directories that have lost xattrs: unpacking an archive does not remove any."""
    for path, item in items:
        was, node = (before.node(path), after.node(path)) if item is Item.NODE else (None, None)
        if was is not None and node is not None and was.is_dir and node.is_dir:
            if was.xattrs().keys() - node.xattrs().keys():
                losses.add("directories that keep extended attributes that were removed", path)


def _overlayfs(fd: int, source: Source, how: How, losses: Losses, tick: Watch, withheld: Withheld) -> None:
    upper = Upper(fd, losses, tick, whole=how.merged)
    try:
        feed(_items(source, how, tick), source.tree(), upper, losses, tick, how.latest, withheld)
    finally:
        upper.close()


def _oci(fd: int, source: Source, how: How, losses: Losses, tick: Watch) -> None:
    with ExitStack() as stack:
        base = oci.Base(how.base, stack) if how.base else None
        items = _items(source, how, tick)
        layout = oci.Layout(fd)
        stack.callback(layout.close)
        if base is not None:
            base.copy_layers(layout)
        with layout.blob() as blob:
            archive = oci.Gzip(blob)
            # layer.md: no sparse files. Programs in Go take an empty record of pax as missing.
            tar = Tar(archive.write, losses, tick, "oci", sparse=False, accepts=lambda _, value: bool(value))
            feed(items, source.tree(), tar, losses, tick, how.latest)
            tar.close()
            layer = archive.finish()
        layout.finish(layer, base, how.latest or 0, how.tag)


def _lines(fd: int, source: Source, how: How, losses: Losses, tick: Watch) -> None:
    if how.format == "patch":
        lines = _patch(source, losses, tick)
    elif how.format == "rsync":
        lines = lists.for_rsync(_plan(source, tick))
    else:
        lines = lists.for_restic(_plan(source, tick), source.tree(), losses)
    with _buffered(fd) as write:
        for line in lines:
            write(line)


def _patch(source: Source, losses: Losses, tick: Watch) -> Iterator[bytes]:
    changes = _noted(_told(source, tick), source.tree(), losses)
    for piece in patch.patch(_noted_emptied(changes, source, losses), source, binary=True):
        for line in piece.splitlines():
            if not line.startswith(b"# "):
                break
            path, _, said = line[2:].partition(b": ")
            losses.add(next((what for what, words in _NOT_IN_A_PATCH if words.match(said)), _OTHERS), path)
        yield piece


def _noted(changes: Iterable[Change], tree: Tree, losses: Losses) -> Iterator[Change]:
    """Note what is lost of added files and directories, which the patch does not mention."""
    first: dict[tuple[int, int, int], bytes] = {}
    for change in changes:
        node = tree.node(change.path) if change.kind == "A" or "type" in change.what else None
        if node is not None:
            mode = node.attr.st_mode
            if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) not in ({0o755} if node.is_dir else _GIT_MODES):
                losses.add(_MODES, change.path)
            if node.xattrs():
                losses.add(_XATTRS, change.path)
        if node is not None and node.attr.st_nlink > 1 and not node.is_dir:
            if first.setdefault(node.identity, change.path) != change.path:
                losses.add("hard links that become files of their own", change.path)
        yield change


def _noted_emptied(changes: Iterable[Change], source: Source, losses: Losses) -> Iterator[Change]:
    """Note directories that have lost their last file: git removes them."""
    emptied: set[bytes] = set()
    waiting: set[bytes] = set()
    for change in changes:
        if change.kind in {"D", "R"} and change.type in {"file", "symlink", "directory"}:
            gone = change.path if change.source is None else change.source
            waiting.add(gone.rpartition(b"/")[0])
        yield change
    after, before = source.tree(), source.tree_before()
    while waiting:
        path = waiting.pop()
        node, was = (after.node(path), before.node(path)) if path else (None, None)
        if node is None or was is None or not (node.is_dir and was.is_dir):
            continue
        if {join(path, name) for name in after.names(path)} <= emptied:
            emptied.add(path)
            waiting.add(path.rpartition(b"/")[0])
    for path in sorted(emptied):
        losses.add(_EMPTY, path)


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise  # an error of a file that is read
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise SystemFailure(f"cannot write to standard output: {why}") from None


@contextmanager
def _buffered(fd: int) -> Iterator[Callable[[bytes], object]]:
    with os.fdopen(fd, "wb", buffering=1 << 20, closefd=False) as file:
        yield file.write
