"""Recognise stores of other live systems: find their overlayfs pair, or say what they are and what to do.

==================  ==========================================================================
archiso             ``persistent_LABEL/ARCH/upperdir`` and ``workdir`` in its cowspace
Debian live-boot    ``rw`` and ``work`` beside ``persistence.conf``, which has a line ``/ union``
Slax, MiniOS        ``changes`` and ``workdir`` or ``work``
casper (Ubuntu)     ``upper`` and ``work``
openSUSE (kiwi)     ``rw`` and ``work``
Fedora (dracut)     ``overlayfs`` and ``ovlwork``; or ``overlay-LABEL-UUID`` and ``ovlwork`` in ``LiveOS``
Podman, Docker      ``diff`` and ``work`` beside ``link``, in the directory of a container's layer
==================  ==========================================================================

All of these use the kernel's overlayfs, and cowfs uses their pair of directories as it is. Podman may also
use fuse-overlayfs, whose own forms of whiteouts and owners cannot be written: see :func:`refuse_other_forms`.
:mod:`cowfs.overlay.aufs` recognises stores of aufs (Puppy's save files, Porteus).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from cowfs.errors import StoreError
from cowfs.layers.base import Key, UpperLayer
from cowfs.linux.files import open_ordinary
from cowfs.overlay.named_whiteouts import BRANCH_NAMES, OPAQUE_NAME, hidden_by

_PAIRS = (
    (b"upperdir", b"workdir", "archiso's cowspace"),
    (b"rw", b"work", "a persistence of Debian live, or the overlay of openSUSE"),
    (b"changes", b"workdir", "the changes of Slax or MiniOS"),
    (b"changes", b"work", "the changes of Slax or MiniOS"),
    (b"overlayfs", b"ovlwork", "the overlay of a Fedora live system"),
    (b"upper", b"work", "an overlayfs pair"),
)
_FEDORA_WORK, _FEDORA_UPPER = b"ovlwork", b"overlay-"
"""The work dir in LiveOS, and the prefix of the upper beside it. Source: dmsquash-live-root.sh of dracut."""
_LAYER, _LAYER_WORK, _LAYER_NAME = b"diff", b"work", b"link"
_OF_A_LAYER = {_LAYER, _LAYER_WORK, _LAYER_NAME, b"lower", b"merged", b"committed"}
"""What containers/storage and Docker (overlay2) keep of each layer. Source: their overlay.go."""
OVERRIDES = (
    "user.containers.override_stat",  # what force_mask of containers/storage writes
    "user.fuseoverlayfs.override_stat",
    "security.fuseoverlayfs.override_stat",
)
"""Attributes with the owner, mode and type that fuse-overlayfs shows for a file."""
_CONTAINER = b"changes.dat"
"""The first file, or the prefix of the files, in which DynFileFS keeps the changes of Slax and MiniOS."""
_DYNFILEFS = "dynfilefs -f {} -m DIR; mount -o loop DIR/virtual.dat DIR2, and give DIR2"
_OF_A_WORK_DIR = {b"work", b"index", b"cowfs"}
_BESIDE = {b"lost+found", b"persistence.conf", b"cowfs"}
_CONFIGURATION = "persistence.conf"
_DEEPEST, _MOST = 3, 200
"""How deep, and in how many directories, pairs are searched."""
_LARGEST = 64 << 10


class Pair(NamedTuple):
    """The upper and work dir of another system's overlayfs."""

    upper: str
    work: str


def pair_in(path: str) -> Pair | None:
    """Return the one pair in another system's directory; None if there is none. Blocks.

    ``upper/`` and ``work/`` alone are a store of cowfs and are not returned. StoreError for a persistence of
    Debian that does not contain the changes of the whole root.
    """
    try:
        names = {os.fsencode(name) for name in os.listdir(path)}
    except OSError:
        return None
    pair = _of_fedora(os.path.abspath(path), names) or _of_container(os.path.abspath(path), names)
    if pair is not None or names & {b"upper"}:
        return pair
    beside = _BESIDE
    if os.fsencode(_CONFIGURATION) in names:
        path, kept = _of_debian(path)
        beside = beside | kept
        try:
            names = {os.fsencode(name) for name in os.listdir(path)}
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}", f"{_CONFIGURATION} names it") from None
        if names <= beside:
            hint = f"to use it as a store: mkdir {path}/rw {path}/work"
            raise StoreError(f"{path}: a persistence of Debian live without changes yet", hint)
    for upper, work, _ in _PAIRS:
        if {upper, work} <= names <= {upper, work} | beside:
            pair = Pair(os.path.join(path, os.fsdecode(upper)), os.path.join(path, os.fsdecode(work)))
            return pair if all(map(_is_directory, pair)) and _is_work_dir(pair.work) else None
    return None


def _of_fedora(path: str, names: set[bytes]) -> Pair | None:
    """Return the pair of a directory that is LiveOS, or the upper in it."""
    above, name = os.path.split(path)
    if _FEDORA_WORK not in names:
        pair = Pair(path, os.path.join(above, os.fsdecode(_FEDORA_WORK)))
        if not name.startswith(os.fsdecode(_FEDORA_UPPER)) or not os.path.isdir(pair.work):
            return None
    else:
        uppers = [os.fsdecode(each) for each in names if each.startswith(_FEDORA_UPPER)]
        uppers = [each for each in uppers if os.path.isdir(os.path.join(path, each))]
        if len(uppers) != 1:
            return None
        pair = Pair(os.path.join(path, uppers[0]), os.path.join(path, os.fsdecode(_FEDORA_WORK)))
    return pair if all(map(_is_directory, pair)) and _is_work_dir(pair.work) else None


def _of_container(path: str, names: set[bytes]) -> Pair | None:
    """Return the pair of a container's layer, given its directory or the upper in it."""
    above, name = os.path.split(path)
    if os.fsencode(name) == _LAYER and os.path.isfile(os.path.join(above, os.fsdecode(_LAYER_NAME))):
        path, names = above, {os.fsencode(one) for one in os.listdir(above)}
    if not {_LAYER, _LAYER_WORK, _LAYER_NAME} <= names <= _OF_A_LAYER:
        return None
    pair = Pair(os.path.join(path, os.fsdecode(_LAYER)), os.path.join(path, os.fsdecode(_LAYER_WORK)))
    return pair if all(map(_is_directory, pair)) and _is_work_dir(pair.work) else None


def refuse_other_forms(pair: Pair) -> None:
    """StoreError if fuse-overlayfs wrote to a container's layer in its own forms. Blocks; reads it whole.

    The forms are owners and modes in attributes (of which it looks at the root only), and whiteouts by name.
    """
    if os.path.basename(pair.upper) != os.fsdecode(_LAYER):
        return
    as_lower = f"use it as a lower: cowfs mount {pair.upper}:LOWER DIR -o whiteouts=auto --store STORE"
    for name in OVERRIDES:
        with suppress(OSError):
            os.getxattr(pair.upper, name, follow_symlinks=False)
            raise StoreError(
                f"{pair.upper}: keeps owners and modes in attributes ({name}), which cowfs does not read",
                "use fuse-overlayfs",
            )
    where = named_whiteout(pair.upper)
    if where is not None:
        raise StoreError(f"{where}: a whiteout by name, as fuse-overlayfs writes it", as_lower)


def named_whiteout(upper: str) -> str | None:
    """Return the path of a whiteout by name (of a name, or of all below) in a tree; None if it has none."""
    for directory, _, files in os.walk(upper):
        for name in map(os.fsencode, files):
            if name == OPAQUE_NAME or hidden_by(name) is not None:
                return os.path.join(directory, os.fsdecode(name))
    return None


def _is_directory(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


def _is_work_dir(path: str) -> bool:
    try:
        return {os.fsencode(name) for name in os.listdir(path)} <= _OF_A_WORK_DIR
    except OSError:
        return False


def upper_of(path: str) -> str:
    """Return the directory of a store's changes: the upper of a pair at *path*, or *path* itself. Blocks."""
    with suppress(StoreError):
        pair = pair_in(path)
        return pair.upper if pair is not None else path
    return path


def _of_debian(path: str) -> tuple[str, set[bytes]]:
    """Return the directory with the changes of the root in a persistence, and its other directories.

    Source: persistence.conf(5).
    """
    sources: dict[str, str] = {}
    lines = list(_lines(path))
    for directory, options in lines:
        source = next((one[len("source=") :] for one in options if one.startswith("source=")), "")
        if directory == "/" and "union" in options and "/" not in sources:
            if source.startswith("/") or ".." in source.split("/"):
                raise StoreError(
                    f"{path}/{_CONFIGURATION}: source={source} leads out of it",
                    "write the source as a path in it",
                )
            sources["/"] = source or "."
        elif directory != "/":
            sources[directory] = source or directory
    if "/" not in sources:
        kept = ", ".join([directory for directory, _ in lines[:3]])
        raise StoreError(
            f"{path}: a persistence of Debian live, but not of the whole root: "
            f"{_CONFIGURATION} has no line '/ union'",
            f"it keeps {kept or 'nothing'}; give an empty directory in it as a store",
        )
    root = os.path.normpath(os.path.join(path, sources.pop("/")))
    others = (os.path.relpath(os.path.join(path, source.strip("/")), root) for source in sources.values())
    return root, {os.fsencode(other.partition("/")[0]) for other in others}


def _lines(path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the directories in persistence.conf, each with its options."""
    try:
        with open(open_ordinary(os.path.join(path, _CONFIGURATION), os.O_RDONLY), "rb") as file:
            lines = file.read(_LARGEST).decode(errors="replace").splitlines()
    except OSError as error:
        raise StoreError(
            f"{path}/{_CONFIGURATION}: {error.strerror}", "run this as root, or check its disk"
        ) from None
    for line in lines:
        words = line.partition("#")[0].split()
        if words:
            yield words[0], words[1].split(",") if len(words) > 1 else []


# --- what is no store


def refusal(layer: UpperLayer, names: set[bytes]) -> StoreError | None:
    """Return the error for a tree with another system's store that cannot be used; None if it has none.
    Blocks.
    """
    found = next((pair for pair in _PAIRS if set(pair[:2]) <= names), None)
    is_image = not hasattr(layer, "descriptor")
    mount = f"mount it (mount -o loop {layer.name} DIR)"
    container = min((name for name in names if name.startswith(_CONTAINER)), default=None)
    if container is not None:
        what = os.path.join(layer.name, os.fsdecode(container).removesuffix(".0"))
        return StoreError(
            f"{layer.name}: holds a container of DynFileFS, as Slax and MiniOS make it",
            _DYNFILEFS.format("FILE" if is_image else what),
        )
    if found is not None and is_image:
        return StoreError(f"{layer.name}: {found[2]}, in an image", f"{mount}, and give DIR as the store")
    if found is not None:
        more = sorted(names - {*found[:2], *_BESIDE})
        said = f", and {os.fsdecode(more[0])} beside it" if more else ""
        return StoreError(
            f"{layer.name}: {found[2]}{said}",
            f"cowfs overlay -o upperdir={os.fsdecode(found[0])},workdir={os.fsdecode(found[1])},...",
        )
    inside = next(_pairs_below(layer), None)
    if inside is None:
        return None
    where, whose = os.fsdecode(inside[0]), inside[1]
    if is_image:
        return StoreError(
            f"{layer.name}: {whose}, in an image", f"{mount}, and give DIR/{where} as the store"
        )
    return StoreError(f"{layer.name}: holds {whose}", f"give {os.path.join(layer.name, where)} as the store")


def _pairs_below(layer: UpperLayer) -> Iterator[tuple[bytes, str]]:
    """Yield the paths of pairs near the root of a tree, and the systems that they belong to."""
    waiting: list[tuple[bytes, Key, int]] = [(b"", layer.root, 0)]
    looked = 0
    while waiting and looked < _MOST:
        path, key, depth = waiting.pop(0)
        looked += 1
        try:
            entries = {entry.name: entry.type for entry in layer.readdir(key)}
        except OSError:
            continue
        for upper, work, whose in _PAIRS:
            if path and {upper, work} <= entries.keys():
                yield path, whose
        if path and {_LAYER, _LAYER_WORK, _LAYER_NAME} <= entries.keys():
            yield path, "the layer of a container"
        if _FEDORA_WORK in entries and any(name.startswith(_FEDORA_UPPER) for name in entries):
            yield path, "the overlay of a Fedora live system"
        if path and not entries.keys().isdisjoint(BRANCH_NAMES):
            yield path, "the changes of Slax, Porteus or Puppy, which aufs has written"
        if depth == _DEEPEST:
            continue
        for name, kind in sorted(entries.items()):
            found = layer.lookup(key, name) if kind in {0, stat.S_IFDIR} else None
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                waiting.append((path + b"/" + name if path else name, found[0], depth + 1))
