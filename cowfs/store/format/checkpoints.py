"""Checkpoints of a store: uppers from before, each a directory below ``cowfs/layers/``.

::

    upper/              P cowfs.below = the number of the layer right below it
                        P cowfs.fresh = y: what work/index has is of another upper, and to be removed
    cowfs/layers/N/     one that was upper/ once, with the attributes that it had then; and
                        P cowfs.checkpoint = JSON: N, name ("" if only others stand on it) and time

``upper/`` changes places with a new directory (RENAME_EXCHANGE): that is the step that makes the new state.
A directory without ``checkpoint``, or with another number in it, is what a step before it, or after it, has
left: it goes when the store is opened next.
"""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cowfs.errors import StoreError, UsageError
from cowfs.layers.base import Key, UpperLayer, together
from cowfs.layers.frozen import FrozenLayer
from cowfs.linux.files import RENAME_EXCHANGE
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format import layout
from cowfs.store.format.header import WITH_LAYERS, Header

LAYERS = b"layers"
UPPER = 0
"""What stands for the upper where layers have numbers."""
_LONGEST = 100
_MOST = 100
"""How many layers may be below an upper: the kernel's overlayfs takes 500, its options a page."""
_MOST_KEPT = 10_000
"""How many a store may have."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A layer that was the upper once."""

    number: int
    name: str
    """"" if it was deleted, and others stand on it."""
    taken: str
    """ISO 8601, UTC."""
    below: tuple[int, ...]
    """The layers below it, topmost first."""
    key: Key


class Prepared(NamedTuple):
    """An empty directory that can be an upper."""

    number: int
    key: Key
    directory: Key
    """The directory that contains it. A key follows renames of exactly its own directory's key."""


def check_name(name: str) -> str:
    """Return a name; UsageError if a checkpoint cannot have it."""
    why = ""
    if not name:
        why = "is empty"
    elif len(os.fsencode(name)) > _LONGEST:
        why = f"is longer than {_LONGEST} bytes"
    elif "/" in name:
        why = "has a slash"
    elif not name.isprintable():
        why = "has characters that cannot be printed"
    elif name[0] in "-." or name != name.strip():
        why = "begins with '-' or '.', or has a space at an end"
    if why:
        raise UsageError(f"{name!r}: a checkpoint cannot have this name: it {why}", "choose another name")
    return name


def is_taken(name: str) -> UsageError:
    """Return the error for a name that another checkpoint has."""
    return UsageError(
        f"{name!r}: a checkpoint of this name already exists", "delete it first, or choose another name"
    )


class Layers:
    """The layers of an open store."""

    def __init__(self, layer: UpperLayer, prefix: bytes) -> None:
        self._layer = layer
        self._prefix = prefix

    # --- what is there

    def all(self) -> dict[int, Checkpoint]:
        """Return those that are complete, by number: named or not."""
        found = {}
        keys = dict(self._entries())
        under = {number: self._under(key) for number, key in keys.items()}
        for number, key in keys.items():
            facts = self._facts(number, key)
            if facts is not None:
                found[number] = Checkpoint(number, *facts, _chain(under[number], under.get), key)
        return found

    def below(self, root: Key) -> tuple[int, ...]:
        """Return what stands below an upper, or what was one: numbers, topmost first."""
        directory = layout.find(self._layer, layout.PRIVATE, LAYERS)

        def under(number: int) -> int | None:
            found = None if directory is None else self._layer.lookup(directory, b"%d" % number)
            return None if found is None else self._under(found[0])

        return _chain(self._under(root), under)

    def _under(self, root: Key) -> int | None:
        """Return the number of the layer right below another, or an upper."""
        return _number(self._get(root, b"below") or b"")

    def _facts(self, number: int, key: Key) -> tuple[str, str] | None:
        """Return the name of a layer and its time; None if it is not complete."""
        try:
            content: Any = json.loads(self._get(key, b"checkpoint") or b"")
            return (str(content["name"]), str(content["taken"])) if content["number"] == number else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def frozen(self, upper: Key) -> list[Checkpoint]:
        """Return what the union of an upper has below it and above the lowers, topmost first.

        StoreError if some of it is missing.
        """
        return self._found(self.below(upper))

    def under(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """Return a checkpoint and what it has below it, topmost first. StoreError if some is missing."""
        return [checkpoint, *self._found(checkpoint.below)]

    def _found(self, numbers: tuple[int, ...]) -> list[Checkpoint]:
        known = self.all() if numbers else {}
        for number in numbers:
            if number not in known:
                raise StoreError(
                    f"{self._layer.name}: an incomplete store: cowfs/layers/{number} is missing",
                    "it holds changes that were made before a checkpoint; restore it from a copy",
                )
        if len(numbers) > _MOST:
            raise StoreError(f"{self._layer.name}: damaged: more than {_MOST} checkpoints below each other")
        return [known[number] for number in numbers]

    def named(self, name: str) -> Checkpoint:
        """Return the checkpoint with this name. UsageError if there is none."""
        for checkpoint in self.all().values():
            if checkpoint.name == name and name:
                return checkpoint
        raise UsageError(f"{name!r}: no such checkpoint", "cowfs checkpoints lists them")

    def standing_on(self, number: int, upper: Key) -> list[int]:
        """Return the layers that have this one right below them; 0 is the upper."""
        found = [one.number for one in self.all().values() if one.below[:1] == (number,)]
        return [*found, *([UPPER] if self.below(upper)[:1] == (number,) else [])]

    def is_fresh(self, upper: Key) -> bool:
        """Whether an upper is a new one, and the index is not emptied yet."""
        return self._get(upper, b"fresh") is not None

    # --- another upper

    def prepare(self, model: Key, below: tuple[int, ...], *, fresh: bool = True) -> Prepared:
        """Make an empty directory that can be the upper above other layers.

        It gets owner, mode, times and attributes from the root *model*. For a new checkpoint of the upper,
        the first of *below* must be its own number: see next_number(). *fresh*: start with an empty index.
        """
        layer = self._layer
        private = layout.find(layer, layout.PRIVATE)
        directory = layout.ensure_directory(layer, private, LAYERS, 0o700)
        number = self.next_number()
        key = layer.mkdir(directory, b"%d" % number, 0o700, *layout.owner(layer))
        _copy_root(layer, model, key, self._prefix)
        if below:
            self._set(key, b"below", b"%d" % below[0])
        if fresh:
            self._set(key, b"fresh", b"y")
        return Prepared(number, key, directory)

    def next_number(self) -> int:
        """Return a number that no layer has."""
        return max((number for number, _ in self._entries()), default=0) + 1

    def exchange(self, upper: Key, new: Prepared, name: str | None = None) -> None:
        """Let a prepared directory be the upper, and what was the upper the layer of this number.

        With a *name* that is a checkpoint from then on; else it goes. This is the step: before it nothing has
        changed, after it everything. *upper* is that of the store; both keys follow.
        """
        layer = self._layer
        with together(layer):
            if name is not None:
                self.name(upper, new.number, name)
            layer.rename(
                (new.directory, b"%d" % new.number),
                (layer.root, layout.UPPER),
                RENAME_EXCHANGE,
                moved=new.key,
                replaced=upper,
            )

    def replace(self, child: int, new: Prepared) -> None:
        """Let a prepared directory be another layer, with its name: it shows what that does with one below.

        That one becomes rubbish, as does what has the number of the other now.
        """
        one = self.all()[child]
        self.name(new.key, child, one.name, one.taken)
        self._layer.sync()
        self._layer.rename(
            (new.directory, b"%d" % new.number),
            (new.directory, b"%d" % child),
            RENAME_EXCHANGE,
            moved=new.key,
        )

    def name(self, root: Key, number: int, name: str, taken: str = "") -> None:
        """Write down the name of a layer."""
        taken = taken or datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._set(root, b"checkpoint", json.dumps({"number": number, "name": name, "taken": taken}).encode())

    def settle(self, upper: Key, index: Key | None, links: Key | None) -> None:
        """Complete an exchange: a new upper begins with an empty index."""
        layer = self._layer
        if not self.is_fresh(upper):
            self._drop(upper, b"checkpoint")  # of one that was not taken
            return
        for directory in (index, links):
            if directory is not None:
                layout.empty(layer, directory)
        if index is not None:  # by which the kernel knows whose it is
            for own in (b"upper", b"origin"):
                with suppress(OSError):
                    layer.removexattr(index, self._prefix + own)
        self._drop(upper, b"fresh")

    def rubbish(self, upper: Key) -> list[int]:
        """Return the layers that nobody can come back to: without a name, and with nothing above them.

        Only for an upper that is settled.
        """
        known = self.all()
        needed = set(self.below(upper))
        for one in known.values():
            if one.name:
                needed.update((one.number, *one.below))
        return [number for number, _ in self._entries() if number not in needed]

    def remove(self, number: int) -> Iterator[None]:
        """Remove a layer and all that is in it; yields now and then. Cut short, it can be begun again."""
        layer = self._layer
        directory = layout.find(layer, layout.PRIVATE, LAYERS)
        found = None if directory is None else layer.lookup(directory, b"%d" % number)
        if found is None or not stat.S_ISDIR(found[1].st_mode):
            return
        key = found[0]
        self._drop(key, b"checkpoint")
        yield from layout.emptying(layer, key)
        layer.rmdir(directory, b"%d" % number, None)
        layer.forget(key)

    # --- attributes

    def _entries(self) -> Iterator[tuple[int, Key]]:
        """Yield what may be a layer, complete or not. StoreError if there is more than we would make."""
        directory = layout.find(self._layer, layout.PRIVATE, LAYERS)
        if directory is None or not stat.S_ISDIR(self._layer.stat(directory).st_mode):
            return
        count = 0
        for entry in self._layer.readdir(directory):
            number = _number(entry.name)
            found = None if number is None else self._layer.lookup(directory, entry.name)
            if number is None or found is None or not stat.S_ISDIR(found[1].st_mode):
                continue
            count += 1
            if count > _MOST_KEPT:
                raise StoreError(f"{self._layer.name}: damaged: more than {_MOST_KEPT} checkpoints")
            yield number, found[0]

    def _get(self, key: Key, what: bytes) -> bytes | None:
        try:
            return self._layer.getxattr(key, self._prefix + b"cowfs." + what)
        except OSError:
            return None

    def _set(self, key: Key, what: bytes, value: bytes) -> None:
        self._layer.setxattr(key, self._prefix + b"cowfs." + what, value)

    def _drop(self, key: Key, what: bytes) -> None:
        if self._get(key, what) is not None:
            self._layer.removexattr(key, self._prefix + b"cowfs." + what)


def _number(text: bytes) -> int | None:
    """Return the number of a layer; None for anything else, or a number in another spelling."""
    number = int(text) if text.isdigit() and len(text) < 10 else UPPER
    return number if number != UPPER and b"%d" % number == text else None


def _chain(number: int | None, under: Callable[[int], int | None]) -> tuple[int, ...]:
    """Follow the chain of layers below; a circle, or a chain longer than any we make, is cut."""
    chain: list[int] = []
    while number is not None and number not in chain and len(chain) <= _MOST:
        chain.append(number)
        number = under(number)
    return tuple(chain)


def _copy_root(layer: UpperLayer, source: Key, target: Key, prefix: bytes) -> None:
    """Copy to an empty directory everything of a root except its contents and its place in the chain."""
    xattrs = XattrFormat(prefix)
    kept = {xattrs.protattr}
    for name in layer.listxattr(source):
        if not xattrs.is_own(name) or name in kept:
            layer.setxattr(target, name, layer.getxattr(source, name))
    attr = layer.stat(source)
    layer.chown(target, attr.st_uid, attr.st_gid)
    layer.chmod(target, stat.S_IMODE(attr.st_mode))
    layer.utimens(target, attr.st_atime_ns, attr.st_mtime_ns)


def must_have_room(below: int, known: int) -> None:
    """StoreError when an upper has as many layers below it, or a store in all, as there can be."""
    for count, most, where in ((below, _MOST, " below each other"), (known, _MOST_KEPT - 2, "")):
        if count >= most:
            raise StoreError(f"there are {count} checkpoints{where}, the maximum", "delete some first")


def must_have_room_for(more: int, known: int) -> None:
    """Raise StoreError if a store cannot have this many more layers for a while."""
    if known + more > _MOST_KEPT:
        raise StoreError(f"there are {known} checkpoints, too many to rebuild them", "delete some first")


def with_layers(layer: UpperLayer, header: Header) -> Header:
    """Let the header say that there are layers, which an older cowfs does not know; return it."""
    if header.version >= WITH_LAYERS:
        return header
    header = replace(header, version=WITH_LAYERS)
    layout.save_header(layer, header)
    layer.sync()
    return header


def as_layers(layer: UpperLayer, frozen: list[Checkpoint]) -> list[FrozenLayer]:
    """Return these as layers of a union."""
    return [FrozenLayer(layer, one.key) for one in frozen]


class Range(NamedTuple):
    """What lies between two states of the tree."""

    has_upper: bool
    """Whether the later of them is what there is now."""
    newer: list[Checkpoint]
    """The layers that the later one has and the earlier one has not, topmost first, without the upper."""
    older: list[Checkpoint]
    """Those that both have."""

    @property
    def is_empty(self) -> bool:
        return not self.newer and not self.has_upper


def between(layers: Layers, upper: Key, since: str | None, until: str | None) -> Range:
    """Return what lies between two checkpoints; None are the lowers, and now. *upper* is the store's.

    UsageError if one is not there, or the later was not made from the earlier.
    """
    if until is None:
        chain = layers.frozen(upper)
    else:
        chain = layers.under(layers.named(until))
    at = len(chain)
    if since is not None:
        numbers = [one.number for one in chain]
        earlier = layers.named(since)
        if earlier.number not in numbers:
            what = "the tree" if until is None else f"checkpoint {until!r}"
            raise UsageError(
                f"{since!r}: {what} is not based on this checkpoint",
                "`cowfs checkpoints` shows which is based on which",
            )
        at = numbers.index(earlier.number)
    return Range(until is None, chain[:at], chain[at:])


def listed(layers: Layers, upper: Key) -> list[dict[str, Any]]:
    """Return what programs get about checkpoints, the oldest first. *upper* is the store's."""
    known, below = layers.all(), layers.below(upper)

    def on(numbers: tuple[int, ...]) -> str | None:
        return next((known[one].name for one in numbers if one in known and known[one].name), None)

    return [
        {
            "name": one.name,
            "taken": one.taken,
            "on": on(one.below),
            "current": one.number in below,
            "last": one.name == on(below),
        }
        for one in sorted(known.values(), key=lambda one: (one.taken, one.number))
        if one.name
    ]
