"""Check a store: its filesystem with e2fsck, then the rules of the overlay in it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from cowfs.errors import StoreError, SystemFailure, printable
from cowfs.layers.base import Key, UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.overlay.aufs import NAME_MAX
from cowfs.overlay.stack import notes_of
from cowfs.overlay.xattr_format import Notes, XattrFormat, is_whiteout_device, leads_somewhere, parse_partial
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.signals import deferred
from cowfs.store.e2fsprogs.tools import Progress, Share, quiet
from cowfs.store.format import copy_detection, layout
from cowfs.store.format.checkpoints import Layers
from cowfs.store.format.header import AUFS, TRUSTED, WITH_LAYERS, Header
from cowfs.store.format.sniff import is_plain_directory
from cowfs.store.format.superblock import read_superblock
from cowfs.store.served import lock
from cowfs.store.served.directory import open_to_look, sees_all
from cowfs.store.served.image import is_copy, open_file, open_layer
from cowfs.types import Attr

_ABOUT_E2FSCK = ("e2fsck ", "UNEXPECTED INCONSISTENCY", "\t(i.e., without -a or -p")
"""Starts of e2fsck's lines that say nothing about the store: its version, and advice about its options."""
_SUMMARY = re.compile(r"^(\d+)/(\d+) files \(.*\), (\d+)/(\d+) blocks$")
"""The last line of e2fsck if all is well. Its *files* are inodes."""


@dataclass(slots=True)
class Report:
    """The result of a check. *code* is as in fsck(8): 1 corrected, 4 uncorrected, 8 failed, added up."""

    code: int = 0
    problems: list[str] = field(default_factory=list)
    """Violations of the overlay's rules, one line each."""
    checked: bool = True
    """Whether the rules were checked. They are not if the filesystem is damaged or has another format."""


@dataclass(slots=True)
class Entry:
    """A name in an upper, with its inode."""

    path: bytes
    attr: Attr
    notes: Notes


@dataclass(frozen=True, slots=True)
class Listener:
    """What a check tells while it runs."""

    say: Progress = quiet
    """Gets the lines that e2fsck prints."""
    show: Share | None = None
    """Told how far e2fsck is, from another thread."""
    tick: Callable[[], object] = lambda: None
    """Called for each name in the store."""


def check_store(
    path: str, *, read_only: bool = False, repair_all: bool = False, listener: Listener | None = None
) -> Report:
    """Check the store at *path*, an image or a directory; repair its filesystem unless *read_only*. Blocks.

    It repairs what is safe, or with *repair_all* everything, which can lose files. Violations of the
    overlay's rules are reported, never repaired. StoreError if *path* cannot be checked at all, StoreBusy
    while it is in use.
    """
    path = os.path.abspath(path)
    if is_plain_directory(path):
        raise StoreError(
            f"{path}: not a store: it has no upper, work and cowfs directory", "give the store itself"
        )
    report, listener = Report(), listener or Listener()
    with ExitStack() as stack:
        try:
            if os.path.isdir(path):
                _check_inside(_directory(path, read_only, report, stack), report, listener)
            else:
                how = "-n" if read_only else "-y" if repair_all else "-p"
                _check_image(path, how, listener, report, stack)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read: {error.strerror}", "run this as its owner, or check its disk"
            ) from None
    return report


def _check_image(path: str, how: str, listener: Listener, report: Report, stack: ExitStack) -> None:
    """Check an image; *how* is the option of e2fsck: -n, -p, -y."""
    read_only, progress = how == "-n", listener.say
    fd = open_file(path, read_only=read_only)
    stack.callback(os.close, fd)
    lock.lock(fd, path, shared=read_only, progress=progress)
    lock.refuse_mounted_image(fd, path)
    superblock = read_superblock(fd, path, smallest=0)
    copy = superblock.needs_recovery and is_copy(fd, path)
    if not read_only:
        copy_detection.opened(fd)
    with deferred():
        if read_only and superblock.needs_recovery:
            progress(f"{path}: was not cleanly unmounted; checking it as if its journal had been replayed")
            sound = not superblock.has_errors
            report.code, said = tools.fsck_recovered(fd, path, sound=sound, show=listener.show)
        else:
            report.code, said = tools.fsck(fd, path, "-f", how, show=listener.show)
    for line in said.splitlines():
        if line.strip() and not line.startswith(_ABOUT_E2FSCK):
            progress(_SUMMARY.sub(r"\1 of \2 inodes, \3 of \4 blocks in use", line.rstrip()))
    if report.code & ~(tools.FSCK_CORRECTED | 2):
        way_out = "cowfs check without -n repairs what is safe to repair"
        if not read_only:
            way_out = "copy the file, then run on the copy: e2fsck -f FILE"
        damaged = f"{path}: the filesystem is damaged, so its contents were not checked"
        report.problems.append(f"{damaged} ({way_out})")
        report.checked = False
        return
    if copy:
        report.problems.append(copy_detection.torn_copy(path).message)
        report.code |= tools.FSCK_UNCORRECTED if read_only else tools.FSCK_CORRECTED
    try:
        layer = open_layer(fd, path, stack, read_only=True)
    except (StoreError, SystemFailure) as error:  # e2fsck supports more filesystems than the engine
        report.problems.append(error.message)
        report.code |= tools.FSCK_OPERATIONAL
        report.checked = False
        return
    _check_inside(layer, report, listener)


def _directory(path: str, read_only: bool, report: Report, stack: ExitStack) -> DirectoryLayer:
    """Open a directory store, and lock it against writers. Accept a copy of a store that was in use."""
    layer, root, upper = open_to_look(path, stack)
    if upper is not None:
        lock.refuse_mounted_upper(upper, path)
    fd = layout.open_lock(layer)
    if fd is not None:
        stack.callback(os.close, fd)
        lock.lock(fd, path, shared=True)
        if copy_detection.was_copied_in_use(fd, root):
            report.problems.append(copy_detection.torn_copy(path).message)
            report.code |= tools.FSCK_UNCORRECTED if read_only else tools.FSCK_CORRECTED
            if not read_only and (writable := layout.open_lock(layer, make=True)) is not None:
                stack.callback(os.close, writable)
                copy_detection.leave(writable)
    return layer


def _check_inside(layer: UpperLayer, report: Report, listener: Listener) -> None:
    """Check that the filesystem contains a store that follows the rules."""
    header = None
    try:
        layer = layout.as_store(layer)
    except StoreError as error:
        report.problems.append(str(error))
        report.code |= tools.FSCK_UNCORRECTED
        return
    names = {entry.name for entry in layer.readdir(layer.root)}
    try:
        layout.refuse_mixed(layer)
        header = layout.find_header(layer)
        if header is None:
            report.problems.append(f"{layer.name}: has no header (it was not mounted by cowfs yet)")
        elif not sees_all(layer, header):
            layout.refuse_lossy_copy(layer, header, sees_all=False)
            report.problems.append(f"{layer.name}: was made by root, and only root can check what is in it")
            report.checked = False
            return
        else:
            layout.refuse_lossy_copy(layer, header)
    except StoreError as error:
        report.problems.append(str(error))
        report.code |= tools.FSCK_UNCORRECTED
    found = _broken_layout(layer, names, header, listener)
    if found:
        report.problems += found
        report.code |= tools.FSCK_UNCORRECTED


def _broken_layout(
    layer: UpperLayer, names: set[bytes], header: Header | None, listener: Listener
) -> list[str]:
    missing = sorted({layout.UPPER, layout.WORK} - names)
    found = [f"{layer.name}: {os.fsdecode(name)}/ is missing" for name in missing]
    prefix = header.xattrs if header is not None else TRUSTED
    if layout.UPPER not in missing:
        xattrs = XattrFormat(prefix.encode())
        top = layout.find(layer, layout.UPPER)
        if layout.whiteouts_of(layer) == AUFS:
            return [*found, *_broken_names(_walk(layer, xattrs, top, listener))]
        found += broken_rules(_walk(layer, xattrs, top, listener), xattrs)
        if header is not None and header.version >= WITH_LAYERS:
            found += _broken_layers(layer, xattrs, top, listener)
    return found


def _broken_names(entries: Iterator[Entry]) -> Iterator[str]:
    """Yield a line for each name that aufs would not show."""
    for entry in entries:
        name = entry.path.rpartition(b"/")[2]
        if len(name) > NAME_MAX:
            shown = printable(os.fsdecode(entry.path))
            yield f"{shown}: a name of {len(name)} bytes, and aufs shows none of more than {NAME_MAX}"


def _broken_layers(layer: UpperLayer, xattrs: XattrFormat, upper: Key, listener: Listener) -> Iterator[str]:
    """Yield a line for each problem with the layers of checkpoints."""
    layers = Layers(layer, xattrs.prefix)
    known = layers.all()
    needed = set(layers.below(upper))
    for one in known.values():
        needed.update(one.below)
        called = printable(one.name) or str(one.number)
        for line in broken_rules(_walk(layer, xattrs, one.key, listener), xattrs):
            yield f"checkpoint {called}: {line}"
    for number in sorted(needed - known.keys()):
        yield f"{layer.name}: cowfs/layers/{number}/ is missing, which holds changes from before a checkpoint"


def _walk(layer: UpperLayer, xattrs: XattrFormat, top: Key | None, listener: Listener) -> Iterator[Entry]:
    """Yield all names below an upper, each directory before its contents."""
    stack: list[tuple[Key, bytes]] = [(top, b"")] if top is not None else []
    while stack:
        key, path = stack.pop()
        for name, _ in layer.readdir(key):
            found = layer.lookup(key, name)
            if found is None:
                continue
            child, attr = found
            notes = None
            if stat.S_ISDIR(attr.st_mode) or stat.S_ISREG(attr.st_mode):
                notes = notes_of(layer, child, xattrs)
            entry = Entry(path + b"/" + name if path else name, attr, notes or {})
            listener.tick()
            yield entry
            if stat.S_ISDIR(attr.st_mode):
                stack.append((child, entry.path))
        layer.forget(key)


def broken_rules(entries: Iterable[Entry], xattrs: XattrFormat) -> Iterator[str]:
    """Yield a line for each entry of an upper that an overlay cannot have written.

    In *entries*, a directory must come before its contents. The rules are those of fs/overlayfs/namei.c.
    """
    opaque: set[bytes] = set()
    for entry in entries:
        name = printable(os.fsdecode(entry.path))
        parent = entry.path.rpartition(b"/")[0]
        if xattrs.is_opaque(entry.notes):
            opaque.add(entry.path)
        if is_whiteout_device(entry.attr) and parent in opaque:
            yield f"{name}: a whiteout inside an opaque directory"
        redirect = entry.notes.get(xattrs.redirect)
        if note := entry.notes.get(xattrs.partial):
            try:
                redirect = parse_partial(note).path  # a partial file has its own redirect
            except OSError:
                yield f"{name}: cowfs.partial, which records which data is still in a lower, is invalid"
                continue
        if redirect is not None and not leads_somewhere(redirect):
            yield f"{name}: redirects to {printable(os.fsdecode(redirect))}, not a valid path in a lower"
        # A metacopy needs no origin: a rebase removes it, and the data is found by name.
        if xattrs.is_metacopy(entry.notes, entry.attr) and redirect is None and parent in opaque:
            yield f"{name}: marked as having its data in a lower (metacopy), but its directory is opaque"
