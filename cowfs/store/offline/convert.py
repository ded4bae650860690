"""Convert a store between the formats of aufs and overlayfs: open it, check that it can be converted,
convert.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from cowfs.errors import StoreError
from cowfs.layers.base import Key, UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.walk import inodes_below
from cowfs.overlay.aufs import NAME_MAX
from cowfs.overlay.named_whiteouts import PREFIX
from cowfs.overlay.stack import notes_of
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.tools import Progress
from cowfs.store.format import conversion, copy_detection, layout
from cowfs.store.format.checkpoints import Layers
from cowfs.store.format.conversion import STAGE
from cowfs.store.format.header import AUFS, TRUSTED, USER, WITH_LAYERS, Header, from_json, new_header
from cowfs.store.format.sniff import split_subdir
from cowfs.store.format.superblock import read_superblock
from cowfs.store.offline.convert_in_place import LOST, Conversion, Converted, Tick
from cowfs.store.served import lock
from cowfs.store.served.directory import is_trusted, refuse_others, refuse_unsafe_path, sees_all
from cowfs.store.served.image import note_closed, open_file, open_layer, refuse_torn


def unfit_for_aufs(layer: UpperLayer, xattrs: XattrFormat, upper: Key) -> Iterator[str]:
    """Yield a line for each path of an upper that aufs would not show, with the reason. Blocks."""
    waiting: list[tuple[Key, bytes]] = [(upper, b"")]
    while waiting:
        directory, path = waiting.pop()
        for entry in layer.readdir(directory):
            child = path + b"/" + entry.name if path else entry.name
            if entry.name.startswith(PREFIX):
                yield f"{os.fsdecode(child)}: aufs reads a name that begins with .wh. as a whiteout"
            elif len(entry.name) > NAME_MAX:
                yield f"{os.fsdecode(child)}: the name has more than {NAME_MAX} bytes"
            elif child == LOST:
                yield "lost+found: e2fsck's directory has this name"
            found = layer.lookup(directory, entry.name)
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                waiting.append((found[0], child))


def must_fit(layer: UpperLayer, header: Header, xattrs: XattrFormat, upper: Key) -> None:
    """StoreError, with the first problem, if a store contains something that the format of aufs cannot.
    Blocks."""
    layers = Layers(layer, xattrs.prefix)
    if header.version >= WITH_LAYERS and (layers.all() or layers.below(upper)):
        raise StoreError(
            f"{layer.name}: the store has checkpoints, or layers of deleted ones, and aufs has none",
            f"cowfs export {layer.name} --to overlayfs DIR has its changes without them",
        )
    unfit = list(unfit_for_aufs(layer, xattrs, upper))
    if unfit:
        more = f", and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise StoreError(f"{layer.name}: {unfit[0]}{more}", "rename or remove it; nothing was changed")


def begin(path: str, stack: ExitStack, progress: Progress) -> UpperLayer:
    """Lock and recover the store at *path*, an image or a directory; return its filesystem as a layer.

    *stack* closes it. Blocks. StoreError, StoreBusy.
    """
    if split_subdir(path)[1]:
        raise StoreError(f"{path}: only a whole image can be converted", "give the image")
    if os.path.isdir(path):
        return _directory(path, stack, progress)
    fd = open_file(path)
    stack.callback(os.close, fd)
    lock.lock(fd, path, progress=progress)
    lock.refuse_mounted_image(fd, path)
    superblock = read_superblock(fd, path)
    if refuse_torn(fd, path, superblock) and superblock.has_errors:
        raise copy_detection.torn_copy(path)
    copy_detection.opened(fd)
    stack.callback(note_closed, fd, path)
    if superblock.state != "clean":
        tools.recover(fd, path, progress, "-f")
    layer = open_layer(fd, path, stack)
    copy_detection.note(layer, fd)  # if it is interrupted, this is not taken for a copy of a store in use
    return layer


def _directory(path: str, stack: ExitStack, progress: Progress) -> UpperLayer:
    refuse_unsafe_path(path, path)
    with closing(_open_directory(path)) as plain:
        refuse_others(plain, path)
        header = _header_of(plain) or _new_header(plain)
    layer = _open_directory(path, privileged=header.xattrs == TRUSTED)  # else xattrs record the owners
    stack.callback(layer.close)
    lock.refuse_mounted_directory(layer.root.fd, path)
    for place in ((layout.PRIVATE, layout.LOCK), (STAGE, layout.PRIVATE, layout.LOCK)):
        key: Any = layout.find(layer, *place)
        if key is not None and stat.S_ISREG(layer.stat(key).st_mode):
            with closing(layer.open(key, os.O_RDWR)) as file:
                fd = os.dup(file.fileno())
            stack.callback(os.close, fd)
            lock.lock(fd, path, progress=progress)
    return layer


def _open_directory(path: str, *, privileged: bool = True) -> DirectoryLayer:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return DirectoryLayer(fd, path, privileged=privileged)


def judge(path: str, target: str, progress: Progress) -> bool:
    """Return whether the store at *path* refers to its lowers as *target* cannot; change no byte of it.

    Blocks. Raises StoreError for what :func:`convert` would refuse, and StoreBusy.
    """
    with ExitStack() as stack:
        layer = _look(path, stack, progress)
        begun = conversion.begun(layer)
        if begun is not None and begun[0] == target:
            return False
        refused = conversion.interrupted(layer)
        if refused is not None:
            raise refused
        store, _ = _convertible(layer, target)
        needs = target == AUFS and needs_lowers(layer)
        _must_be_empty(layer, store, _TRASH)
        return needs


def _look(path: str, stack: ExitStack, progress: Progress) -> UpperLayer:
    """Open the filesystem of a store as :func:`begin` does, only to read it."""
    if split_subdir(path)[1] or os.path.isdir(path):
        return begin(path, stack, progress)  # which writes nothing to a directory
    fd = open_file(path, read_only=True)
    stack.callback(os.close, fd)
    if read_superblock(fd, path).has_errors:  # it may be readable only when it is repaired
        return begin(path, stack, progress)
    lock.lock(fd, path, shared=True, progress=progress)
    lock.refuse_mounted_image(fd, path)
    return open_layer(fd, path, stack, read_only=True)


def _convertible(layer: UpperLayer, target: str) -> tuple[UpperLayer, Header]:
    """Return a store and its header; StoreError if it has that format, or is none, or is not ours."""
    store = layout.as_store(layer)
    if layout.recognise(store) == "nothing":
        raise StoreError(f"{layer.name}: nothing is in it", "the first mount makes a store of it")
    if layout.whiteouts_of(store) == target:
        raise StoreError(
            f"{layer.name}: the store has the {target} format already", "it can be mounted as it is"
        )
    header = layout.find_header(store) or _new_header(layer)
    if not sees_all(layer, header):
        raise StoreError(f"{layer.name}: the store was created by root", "run this as root")
    return store, header


def _must_be_empty(layer: UpperLayer, store: UpperLayer, place: tuple[bytes, bytes]) -> None:
    key = layout.find(store, *place)
    if key is not None and store.readdir(key):
        why, hint = _EMPTY[place]
        raise StoreError(f"{layer.name}: {why}", hint.format(path=layer.name))


def convert(layer: UpperLayer, target: str, tick: Tick) -> Converted:
    """Convert a store to the format *target*, or complete an interrupted conversion. Blocks.

    StoreError if it has that format already, is not a store, or contains something that cannot be converted.
    """
    begun = conversion.begun(layer)
    if begun is not None:
        header = _header_of(layer) or _new_header(layer)
        return Conversion(layer, target, XattrFormat(header.xattrs.encode()), tick).run(header)
    store, header = _convertible(layer, target)
    xattrs = XattrFormat(header.xattrs.encode())
    for place in _EMPTY:
        _must_be_empty(layer, store, place)
    if target == AUFS:
        upper = layout.find(store, layout.UPPER)
        must_fit(layer, header, xattrs, upper)
        if _refers(layer, xattrs, upper, data_only=True):
            raise StoreError(f"{layer.name}: was changed meanwhile", "run the same command again")
    return Conversion(layer, target, xattrs, tick).run(header)


_TRASH = layout.PRIVATE, b"trash"
_EMPTY = {
    _TRASH: (
        "keeps what `cowfs revert` has taken back, in the format that it has now",
        "cowfs vacuum {path} --trash empties it",
    ),
    (layout.WORK, layout.INDEX): (
        "hard links of the lower are not under all their names yet",
        "mount and unmount it once",
    ),
    (layout.PRIVATE, layout.LINKS): (
        "hard links of the lower are not under all their names yet",
        "mount and unmount it once",
    ),
}
"""Parts that must not exist or must be empty, and what to do otherwise."""


def _new_header(layer: UpperLayer) -> Header:
    """Return a header for another program's store, which has none."""
    of_user = isinstance(layer, DirectoryLayer) and not is_trusted()
    return new_header(xattrs=USER if of_user else TRUSTED)


def _header_of(layer: UpperLayer) -> Header | None:
    """Return the header of a store, also if a conversion has moved it."""
    for place in ((layout.PRIVATE, layout.HEADER), (STAGE, layout.PRIVATE, layout.HEADER)):
        key = layout.find(layer, *place)
        if key is not None:
            with closing(layer.open(key, os.O_RDONLY)) as file:
                return from_json(file.pread(1 << 20, 0), layer.name)
    return None


def needs_lowers(layer: UpperLayer) -> bool:
    """Whether a store refers to its lowers in ways that aufs does not support: see cowfs.changes.flatten.
    Blocks.

    StoreError if it cannot be converted to the format of aufs for other reasons.
    """
    if conversion.begun(layer) is not None:
        return False
    store = layout.as_store(layer)
    header = layout.find_header(store) or _new_header(layer)
    upper = layout.find(store, layout.UPPER)
    if upper is None or layout.whiteouts_of(store) == AUFS:
        return False
    xattrs = XattrFormat(header.xattrs.encode())
    must_fit(layer, header, xattrs, upper)
    index = [
        layout.find(store, *place) for place in ((layout.WORK, layout.INDEX), (layout.PRIVATE, layout.LINKS))
    ]
    return any(key is not None and store.readdir(key) for key in index) or _refers(layer, xattrs, upper)


def _refers(layer: UpperLayer, xattrs: XattrFormat, upper: Key, *, data_only: bool = False) -> bool:
    """Whether an upper has metacopies or redirects; with *data_only*, only metacopies."""
    for key, attr in inodes_below(layer, upper):
        if stat.S_ISDIR(attr.st_mode) or stat.S_ISREG(attr.st_mode):
            notes = notes_of(layer, key, xattrs) or {}
            if xattrs.is_metacopy(notes, attr) or (xattrs.redirect in notes and not data_only):
                return True
    return False
