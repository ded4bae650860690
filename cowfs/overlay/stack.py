"""Where a stack of layers has a name, by which rule, and what a merged directory lists.

The rules are those of the kernel's overlayfs (ovl_lookup() and its helpers in fs/overlayfs/namei.c). In each
layer, topmost first, a whiteout or anything but a directory ends the search, an opaque directory ends it
below itself, and a redirect renames what is searched in the layers below. A metacopy has only the attributes
of a file: the search goes on for its data.

Everything here is plain data: no nodes, no FUSE. The mounted union (:mod:`cowfs.overlay.lookup`) uses it,
and so do the tools that read layers without a mount. Blocks if the layers do; raises their :class:`OSError`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from cowfs.errors import os_error
from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.named_whiteouts import use_format
from cowfs.overlay.xattr_format import (
    NAME_MAX,
    Notes,
    RedirectError,
    XattrFormat,
    is_whiteout_device,
    may_exist,
    names_of_redirect,
)
from cowfs.types import Attr, DirEntry

log = logging.getLogger(__name__)

Place = tuple[int, Key]
"""An inode in a stack: the number of the layer, and the key in it. Layers that were frozen have the numbers
below 0, so that a new one on top changes none."""
Hit = tuple[int, Key, Attr]
"""The same, with the inode's attributes."""
Path = tuple[bytes, ...]

_METACOPY_MIN = 4
"""The length of the shortest value that is not empty (OVL_METACOPY_MIN_SIZE)."""
_NO_XATTRS = {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}


class Rule(Enum):
    """A rule that decides what an inode of a layer means in a search."""

    SHOWN = "its attributes are shown, and its data or its entries"
    MERGED = "its entries are shown with those of the directory above it"
    METACOPY = "its attributes are shown; its data is in a layer below"
    DATA = "its data is shown, by a metacopy above it"
    INCOMPLETE = "a metacopy below another: the data is further down"
    WHITEOUT = "a whiteout: hides its name in the layers below"
    OPAQUE = "an opaque directory: hides the directory in the layers below"
    REDIRECT = "the layers below have it under another name"
    NO_DIRECTORY = "not a directory: a directory above hides it and all below it"
    NO_FILE = "no regular file: it has no data for the metacopy above it"
    INDEX = "a hard link: the inode in the index is shown, which was changed under another name"


class Verdict(NamedTuple):
    """One decision in a search: the layer, and the rule that applied."""

    rule: Rule
    layer: int
    path: Path
    """Where the layer has what the rule is about: below where the search began, or below the root if …"""
    from_root: bool
    """… an absolute redirect led there."""
    redirect: bytes | None = None
    """For ``REDIRECT``: the value."""


class Found(NamedTuple):
    """The result of a search: what the layers have under one name."""

    hits: list[Hit]
    """For a directory all that are merged into it, topmost first; for a file the one shown and, if that is a
    metacopy, the one that has its data. Empty: nothing is shown."""
    is_complete: bool
    """Whether a file has its data: False for a metacopy without any."""
    further: tuple[Path, bool] | None = None
    """Where layers below would be searched next: a path, and whether it is from the root. None: nowhere."""


class Stack:
    """Layers that are merged, topmost first."""

    __slots__ = (
        "bottom",
        "bound",
        "data",
        "format",
        "frozen",
        "has_upper",
        "kept",
        "layers",
        "modules",
        "root_of",
        "roots",
    )

    def __init__(
        self,
        layers: Sequence[LowerLayer],
        xattrs: XattrFormat,
        upper: Key | None = None,
        *,
        frozen: Sequence[LowerLayer] = (),
        is_part: bool = False,
        bound: int | None = None,
        modules: Sequence[int] = (),
    ) -> None:
        """*upper*: where the union's tree begins in the topmost layer, if that is a union's upper layer.

        *frozen* are earlier uppers of the same union, above all *layers*, the newest first. *is_part*: there
        are other layers below these.

        The first *bound* of the *layers* (all, if None) are always merged. The others are modules, whose
        numbers never change: *modules* says which of them are merged, above the first ones, and in which
        order. No metacopy above has its data in a module, and no redirect above leads into one
        (:mod:`cowfs.overlay.modules`).
        """
        self.layers = (*layers, *frozen)
        """By number: those below 0 count from the end."""
        self.frozen = len(frozen)
        """How many layers have numbers below 0."""
        for layer in self.layers:
            use_format(layer, xattrs)
        self.format = xattrs
        self.has_upper = upper is not None
        self.bound = len(layers) if bound is None else bound
        """From this number on they are modules, …"""
        self.modules = tuple(modules)
        """… of which these are merged, topmost first."""
        below = [number for number, layer in enumerate(layers[: self.bound]) if layer.data_only]
        self.data: tuple[Place, ...] = tuple((number, layers[number].root) for number in below)
        """The roots of the data-only layers, which are below all others: no name of theirs is searched."""
        merged = self.bound - len(below)
        order = (*range(-len(frozen), 0), *self.modules, *range(merged))
        roots = {number: self.layers[number].root for number in order}
        if upper is not None:
            roots[0] = upper
        self.roots: tuple[Place, ...] = tuple(roots.items())
        self.kept: tuple[Place, ...] = self.without_modules(self.roots) if modules else self.roots
        """Those but of modules."""
        self.root_of: dict[int, Key] = dict((*self.roots, *self.data))
        """Where each layer's tree begins, by number."""
        self.bottom = merged - (not is_part)
        """The number of the layer below which there is nothing to be merged."""

    def without_modules(self, places: Sequence[Place]) -> tuple[Place, ...]:
        return tuple(place for place in places if place[0] < self.bound)

    def in_order(self) -> list[LowerLayer]:
        """Return the layers, topmost first."""
        return [self.layers[number] for number, _ in (*self.roots, *self.data)]

    def below_layer(self, layer: int) -> tuple[Place, ...]:
        """Return the roots of the layers below *layer*."""
        numbers = [number for number, _ in self.roots]
        return self.roots[numbers.index(layer) + 1 :]

    # --- a name

    def find(self, places: Sequence[Place], name: bytes) -> list[Hit]:
        """Search for *name* in the directory that is merged from *places*; return its hits, topmost first.

        See :class:`Found`. EIO for a metacopy without data.
        """
        for position, (layer, key) in enumerate(places):
            hit = self.layers[layer].lookup(key, name)
            if hit is None:
                continue
            if is_whiteout(self.layers[layer], *hit, self.format):
                self.layers[layer].forget(hit[0])
                return []
            if layer == self.bottom and not self._lacks_data(layer, *hit):
                return [(layer, *hit)]  # nothing is below: the case of most names
            return self._whole(self._look(places[position:], (name,), _Search(self, False, None), hit), name)
        return []

    def search(
        self,
        places: Sequence[Place],
        path: Path,
        *,
        directories: bool = False,
        verdicts: list[Verdict] | None = None,
    ) -> list[Hit]:
        """Like :meth:`find`, for a path below *places*.

        With *directories*, find only directories, because a layer above has a directory. If *verdicts* is
        given, append what each layer had and which rule decided.
        """
        return self._whole(self.look(places, path, directories=directories, verdicts=verdicts), path[-1])

    def below(
        self,
        places: Sequence[Place],
        name: bytes,
        redirect: bytes | None,
        *,
        directories: bool = False,
        verdicts: list[Verdict] | None = None,
    ) -> list[Hit]:
        """Return what is below an inode that an upper layer has under *name*, with this redirect.

        *places* are those of the parent directory in this stack.
        """
        path: Path = (name,)
        if self.modules and (redirect is not None or not directories):
            places = self.without_modules(places)
        if redirect is not None:
            path = names_of_redirect(redirect)
            if redirect.startswith(b"/"):
                places = self.kept
        return self.search(places, path, directories=directories, verdicts=verdicts)

    def look(
        self,
        places: Sequence[Place],
        path: Path,
        *,
        directories: bool = False,
        verdicts: list[Verdict] | None = None,
    ) -> Found:
        """Like :meth:`search`, but without an error for a metacopy without data."""
        return self._look(places, path, _Search(self, directories, verdicts))

    def _look(
        self, places: Sequence[Place], path: Path, search: _Search, first: tuple[Key, Attr] | None = None
    ) -> Found:
        try:
            return search.run(places, path, first)
        except RedirectError as failure:
            tell_of(failure)
            raise

    def _lacks_data(self, layer: int, key: Key, attr: Attr) -> bool:
        """Whether an inode is a metacopy, whose data is in a layer below."""
        if not stat.S_ISREG(attr.st_mode):
            return False
        notes = self.notes(layer, key)
        return notes is not None and self.format.is_metacopy(notes, attr)

    @staticmethod
    def _whole(found: Found, name: bytes) -> list[Hit]:
        """Return the hits. EIO for a metacopy without data."""
        if not found.is_complete:
            raise os_error(errno.EIO, name)
        return found.hits

    def notes(self, layer: int, key: Key) -> dict[bytes, bytes] | None:
        """Return the overlay's own attributes of an inode (:func:`notes_of`)."""
        return notes_of(self.layers[layer], key, self.format)

    def redirect_of(self, notes: Notes) -> bytes | None:
        """Return where the layers below have an inode with these attributes; None: under its own name."""
        try:
            return self.format.redirect_of(notes)
        except RedirectError as failure:
            tell_of(failure)
            raise

    def shows(self, places: Sequence[Place], name: bytes) -> bool:
        """Whether the layers show anything under a name (ovl_lower_positive())."""
        for layer, key in places:
            found = self.layers[layer].lookup(key, name)
            if found is not None:
                self.layers[layer].forget(found[0])
                return not is_whiteout(self.layers[layer], *found, self.format)
        return False

    def forget(self, hits: Iterable[Hit]) -> None:
        """Release the keys of these hits: the caller does not use them again."""
        for layer, key, _ in hits:
            self.layers[layer].forget(key)


class _Search:
    """The state of one search down the layers (struct ovl_lookup_data)."""

    __slots__ = ("_directories", "_format", "_layers", "_stack", "_verdicts", "hits", "incomplete")

    def __init__(self, stack: Stack, directories: bool, verdicts: list[Verdict] | None) -> None:
        self._stack = stack
        self._layers = stack.layers
        self._format = stack.format
        self._directories = directories
        self._verdicts = verdicts
        self.hits: list[Hit] = []
        self.incomplete = False

    def run(self, places: Sequence[Place], path: Path, first: tuple[Key, Attr] | None) -> Found:
        """*first* is what the first layer has under the first name, if that was looked up already."""
        position = 0
        stopped = absolute = False
        stack = self._stack
        from_root = places is stack.roots or places is stack.kept
        while position < len(places):
            layer, base = places[position]
            position += 1
            step = self._walk(layer, base, path, from_root, first)
            first = None
            if step.hit is not None:
                step.stop |= self._take(layer, step, path, from_root)
            if step.stop:
                stopped = True
                break
            if step.path is not None:
                path = step.path
                if step.absolute:
                    absolute = True
                    places, position, from_root = stack.below_layer(layer), 0, True
            if stack.modules and layer < stack.bound and (step.path is not None or step.metacopy):
                places, position = stack.without_modules(places[position:]), 0
        if self.incomplete and absolute and not stopped:
            self._find_data(path)
        return Found(self.hits, not self.incomplete, None if stopped else (path, from_root))

    def _find_data(self, path: Path) -> None:
        """Look for the data of a metacopy in the data-only layers, where an absolute redirect leads.

        Only regular files count there; their xattrs are ignored (ovl_lookup_data_layers()).
        """
        for number, root in self._stack.data:
            hit = self._reach(number, root, path)
            if hit is not None:
                if len(self.hits) == 2:
                    self._stack.forget([self.hits.pop()])
                self._tell(Rule.DATA, number, path, True)
                self.hits.append((number, *hit))
                self.incomplete = False
                return

    def _reach(self, number: int, root: Key, path: Path) -> tuple[Key, Attr] | None:
        """Return the regular file that a single layer has at a path; None if it has none."""
        layer, directory = self._layers[number], root
        hit: tuple[Key, Attr] | None = None
        for depth, name in enumerate(path, 1):
            hit = layer.lookup(directory, name) if may_exist(name) else None
            if directory is not root:
                layer.forget(directory)
            if hit is None:
                return None
            directory, attr = hit
            if not (stat.S_ISREG if depth == len(path) else stat.S_ISDIR)(attr.st_mode):
                layer.forget(directory)
                return None
        return hit

    def _take(self, layer: int, step: _Step, path: Path, from_root: bool) -> bool:
        """Add what a layer has at the end of the path, if it is wanted; return whether the search ends."""
        assert step.hit is not None
        key, attr = step.hit
        above = self.hits[-1][2] if self.hits else None
        if not stat.S_ISDIR(attr.st_mode):
            if self._directories or (above is not None and stat.S_ISDIR(above.st_mode)):
                self._refuse(Rule.NO_DIRECTORY, layer, key, path, from_root)
                is_module = bool(self._stack.modules) and layer >= self._stack.bound
                return not is_module  # before it was added, the layers below merged with the directory above
            if self.incomplete and not stat.S_ISREG(attr.st_mode):
                return self._refuse(Rule.NO_FILE, layer, key, path, from_root)
            if len(self.hits) == 2:  # a chain of metacopies: the first has the attributes, the last the data
                self._stack.forget([self.hits.pop()])
            self.incomplete = step.metacopy
        elif above is not None and not stat.S_ISDIR(above.st_mode):
            return self._refuse(Rule.NO_FILE, layer, key, path, from_root)
        if self._verdicts is not None:
            self._tell(_rule_of(step, attr, is_first=above is None), layer, path, from_root)
        self.hits.append((layer, key, attr))
        return not stat.S_ISDIR(attr.st_mode) and not step.metacopy

    def _refuse(self, rule: Rule, layer: int, key: Key, path: Path, from_root: bool) -> bool:
        self._tell(rule, layer, path, from_root)
        self._layers[layer].forget(key)
        return True

    def _tell(
        self, rule: Rule, layer: int, path: Path, from_root: bool, redirect: bytes | None = None
    ) -> None:
        if self._verdicts is not None:
            self._verdicts.append(Verdict(rule, layer, path, from_root, redirect))

    def _walk(
        self, number: int, base: Key, path: Path, from_root: bool, hit: tuple[Key, Attr] | None
    ) -> _Step:
        """Follow *path* in one layer; note the opaque directories and redirects on it."""
        step = _Step()
        layer = self._layers[number]
        directory = base
        below = number != self._stack.bottom
        for depth, name in enumerate(path):
            if depth or hit is None:
                hit = layer.lookup(directory, name) if may_exist(name) else None
            if directory is not base:
                layer.forget(directory)
            if hit is None:
                return step
            key, attr = hit
            at_end = depth == len(path) - 1
            if is_whiteout(layer, key, attr, self._format):
                step.stop = True
                self._tell(Rule.WHITEOUT, number, path[: depth + 1], from_root)
                layer.forget(key)
                return step
            if not stat.S_ISDIR(attr.st_mode):
                if not at_end:
                    step.stop = self._refuse(Rule.NO_DIRECTORY, number, key, path[: depth + 1], from_root)
                    return step
                # Also in the lowest layer: a metacopy there has no data, and its zeros must not be shown.
                notes = self._stack.notes(number, key) if stat.S_ISREG(attr.st_mode) else None
                if notes is not None and self._format.is_metacopy(notes, attr):
                    step.metacopy = True
                    self._must_be_valid(notes, number, name)
                    self._redirect(step, notes, number, path, depth, from_root)
            elif below:
                notes = self._stack.notes(number, key)
                if notes is None:
                    pass
                elif self._format.is_opaque(notes):
                    step.stop = True
                    self._tell(Rule.OPAQUE, number, path[: depth + 1], from_root)
                else:
                    self._redirect(step, notes, number, path, depth, from_root)
            if at_end:
                step.hit = hit
            directory = key
        return step

    def _must_be_valid(self, notes: Notes, number: int, name: bytes) -> None:
        """EIO for a metacopy whose attribute is too short to be one (ovl_check_metacopy_xattr())."""
        is_upper = self._stack.has_upper and not number
        if 0 < len(notes[self._format.metacopy]) < _METACOPY_MIN and not (
            is_upper and self._format.partial in notes
        ):
            raise os_error(errno.EIO, name)

    def _redirect(
        self, step: _Step, notes: Notes, number: int, path: Path, depth: int, from_root: bool
    ) -> None:
        """Follow the redirect of an inode on the way, if it has one (ovl_check_redirect())."""
        is_upper = self._stack.has_upper and not number
        redirect = self._format.redirect_of(notes, is_upper=is_upper)
        if redirect is None:
            return
        self._tell(Rule.REDIRECT, number, path[: depth + 1], from_root, redirect)
        rest = path[depth + 1 :]
        if redirect.startswith(b"/"):
            step.path = (*names_of_redirect(redirect), *rest)
            step.absolute = True
            step.stop = False  # an opaque directory above does not affect the target of the redirect
        else:
            step.path = (*(step.path or path)[: -len(rest) - 1], redirect, *rest)


class _Step:
    """The result of following a path in one layer."""

    __slots__ = ("absolute", "hit", "metacopy", "path", "stop")

    def __init__(self) -> None:
        self.hit: tuple[Key, Attr] | None = None
        self.stop = False
        self.path: Path | None = None
        self.absolute = False
        self.metacopy = False


def _rule_of(step: _Step, attr: Attr, *, is_first: bool) -> Rule:
    if stat.S_ISDIR(attr.st_mode):
        return Rule.SHOWN if is_first else Rule.MERGED
    if step.metacopy:
        return Rule.METACOPY if is_first else Rule.INCOMPLETE
    return Rule.SHOWN if is_first else Rule.DATA


# --- reading one layer


def notes_of(layer: LowerLayer, key: Key, xattrs: XattrFormat) -> dict[bytes, bytes] | None:
    """Return the overlay's own attributes of an inode by full name; None if it has none."""
    prefix, escaped = xattrs.prefix, xattrs.escaped
    try:
        names = [name for name in layer.listxattr(key) if name.startswith(prefix)]
    except OSError as failure:
        if failure.errno in _NO_XATTRS:
            return None
        raise
    if not names:
        return None
    notes = {}
    for name in names:
        if name.startswith(escaped):
            continue
        try:
            notes[name] = layer.getxattr(key, name)
        except OSError as failure:  # removed meanwhile, or user.* of a file that we may not read
            if failure.errno not in _NO_XATTRS:
                raise
    return notes


class Merging:
    """Decides which entries of its layers a merged directory shows: each name once, from the topmost
    layer."""

    __slots__ = ("_format", "_seen")

    def __init__(self, xattrs: XattrFormat) -> None:
        self._format = xattrs
        self._seen: set[bytes] = set()

    def shows(self, layer: LowerLayer, directory: Key, entry: DirEntry) -> bool:
        """Whether an entry of a layer is shown: no layer above has the name, and it is not a whiteout.

        Call it with all entries of all layers of the directory, topmost layer first.
        """
        name = entry.name
        if name in self._seen:
            return False
        self._seen.add(name)
        return bool(entry.type and not stat.S_ISCHR(entry.type)) or not hides(
            layer, directory, name, self._format
        )


def hides(layer: LowerLayer, directory: Key, name: bytes, xattrs: XattrFormat) -> bool:
    """Whether a name that a layer lists is a whiteout, or does not exist any more."""
    found = layer.lookup(directory, name)
    if found is None:
        return True
    layer.forget(found[0])
    return is_whiteout(layer, *found, xattrs)


def is_whiteout(layer: LowerLayer, key: Key, attr: Attr, xattrs: XattrFormat) -> bool:
    """Whether an inode of a layer is a whiteout, in any form.

    The forms are a character device 0:0, and an empty file with the attribute ``whiteout``
    (ovl_path_is_whiteout(), since Linux 6.7).
    """
    if not stat.S_ISREG(attr.st_mode):
        return is_whiteout_device(attr)
    if attr.st_size:
        return False
    try:
        return xattrs.whiteout in layer.listxattr(key)
    except OSError as failure:
        if failure.errno in _NO_XATTRS:
            return False
        raise


# --- redirects that are not followed

_MOST_TOLD = 200
_told: set[bytes] = set()


def tell_of(failure: RedirectError) -> None:
    """Log that a redirect is not followed, once."""
    value = failure.value
    if value not in _told and len(_told) < _MOST_TOLD:
        _told.add(value)
        log.warning("redirect not followed: %r: %s", value[:NAME_MAX], os.strerror(failure.args[0]))
