"""Checkpoints of a store: former uppers, each in a directory below ``cowfs/layers/``.

::

    upper/              P cowfs.below = the number of the layer directly below it
                        P cowfs.fresh = y: work/index belongs to another upper, and is to be emptied
    cowfs/layers/N/     a former upper/, with the attributes that it had; and
                        P cowfs.checkpoint = JSON: N, name ("" for a deleted checkpoint) and time

P is the prefix of the overlay's attributes. One step changes the state: RENAME_EXCHANGE of ``upper/`` and a
new directory. A directory without ``checkpoint``, or with another number in it, is left from an operation
that was interrupted before or after this step. It is removed when the store is opened next.
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
BELOW = ""
"""In place of a checkpoint's name: the layer directly below the upper, even if its checkpoint was deleted."""
UPPER = 0
"""The number of the upper, where layers have numbers."""
_LONGEST = 100
_BACK = "restore the store from a copy"
_MOST = 100
"""The most layers below an upper. The kernel's overlayfs accepts 500, but mount options end at one page."""
_MOST_KEPT = 10_000
"""The most layers in a store."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A layer that is a former upper."""

    number: int
    name: str
    """"" if the checkpoint was deleted, but other layers are above it."""
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
    """Return *name*; UsageError if it is not a valid name of a checkpoint."""
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
    """The layers of an open store. Its methods block; OSError."""

    def __init__(self, layer: UpperLayer, prefix: bytes) -> None:
        self._layer = layer
        self._prefix = prefix

    # --- what is there

    def all(self) -> dict[int, Checkpoint]:
        """Return all complete layers by number, also those of deleted checkpoints."""
        found = {}
        keys = dict(self._entries())
        under = {number: self._under(key) for number, key in keys.items()}
        for number, key in keys.items():
            facts = self._facts(number, key)
            if facts is not None:
                found[number] = Checkpoint(number, *facts, _chain(under[number], under.get), key)
        return found

    def below(self, root: Key) -> tuple[int, ...]:
        """Return the numbers of the layers below a present or former upper, topmost first."""
        directory = layout.find(self._layer, layout.PRIVATE, LAYERS)

        def under(number: int) -> int | None:
            found = None if directory is None else self._layer.lookup(directory, b"%d" % number)
            return None if found is None else self._under(found[0])

        return _chain(self._under(root), under)

    def _under(self, root: Key) -> int | None:
        """Return the number of the layer directly below a present or former upper; None if it has none."""
        return _number(self._get(root, b"below") or b"")

    def _facts(self, number: int, key: Key) -> tuple[str, str] | None:
        """Return the name and the time of a layer; None if it is not complete."""
        try:
            content: Any = json.loads(self._get(key, b"checkpoint") or b"")
            return (str(content["name"]), str(content["taken"])) if content["number"] == number else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def frozen(self, upper: Key) -> list[Checkpoint]:
        """Return the layers between an upper and the lowers, topmost first. StoreError if one is missing."""
        return self._found(self.below(upper))

    def under(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """Return a checkpoint and the layers below it, topmost first. StoreError if one is missing, or the
        checkpoint is one of them."""
        if checkpoint.number in checkpoint.below:
            raise StoreError(
                f"{self._layer.name}: damaged: cowfs/layers/{checkpoint.number} is below itself", _BACK
            )
        return [checkpoint, *self._found(checkpoint.below)]

    def beside(self, upper: Key) -> list[Key]:
        """Return the layers that are not below *upper*: it was gone back from them."""
        below = set(self.below(upper))
        return [one.key for number, one in self.all().items() if number not in below]

    def _found(self, numbers: tuple[int, ...]) -> list[Checkpoint]:
        known = self.all() if numbers else {}
        for number in numbers:
            if number not in known:
                raise StoreError(
                    f"{self._layer.name}: an incomplete store: cowfs/layers/{number} is missing",
                    "it holds changes that were made before a checkpoint; restore it from a copy",
                )
        if len(numbers) > _MOST:
            raise StoreError(
                f"{self._layer.name}: damaged: more than {_MOST} checkpoints below each other", _BACK
            )
        return [known[number] for number in numbers]

    def named(self, name: str) -> Checkpoint:
        """Return the checkpoint with this name. UsageError if there is none."""
        for checkpoint in self.all().values():
            if checkpoint.name == name and name:
                return checkpoint
        raise no_such(name)

    def directly_above(self, number: int, upper: Key) -> list[int]:
        """Return the numbers of the layers directly above this one; 0 is the upper."""
        found = [one.number for one in self.all().values() if one.below[:1] == (number,)]
        return [*found, *([UPPER] if self.below(upper)[:1] == (number,) else [])]

    def is_fresh(self, upper: Key) -> bool:
        """Whether an upper is new and the index has not been emptied yet."""
        return self._get(upper, b"fresh") is not None

    def is_at(self, upper: Key, checkpoint: Checkpoint) -> bool:
        """Whether an upper has nothing that the checkpoint below it does not have."""
        if self.below(upper) != (checkpoint.number, *checkpoint.below) or self._layer.readdir(upper):
            return False
        return self._root_facts(upper) == self._root_facts(checkpoint.key)

    def _root_facts(self, root: Key) -> tuple[object, ...]:
        """Return everything of a root that prepare() copies."""
        layer, attr = self._layer, self._layer.stat(root)
        names = _names_of_root(layer, root, self._prefix)
        xattrs = {name: layer.getxattr(root, name) for name in names}
        return attr.st_mode, attr.st_uid, attr.st_gid, attr.st_mtime_ns, xattrs

    # --- another upper

    def prepare(self, model: Key, below: tuple[int, ...], *, fresh: bool = True) -> Prepared:
        """Make an empty directory that can become the upper above the layers *below*.

        It gets owner, mode, times and attributes of the root *model*. To make a checkpoint of the upper, the
        first of *below* must be the checkpoint's number, from next_number(). *fresh*: start with an empty
        index.
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
        """Make a prepared directory the upper, and the former upper the layer of its number, in one step.

        With a *name*, the former upper becomes a checkpoint; otherwise it is removed later. *upper* is the
        store's; both keys follow the rename.
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
        """Replace a layer by a prepared directory with the merged contents of it and the layer below.

        The directory gets the layer's name. Both replaced layers become rubbish.
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
        """Record the name of a layer."""
        taken = taken or datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._set(root, b"checkpoint", json.dumps({"number": number, "name": name, "taken": taken}).encode())

    def settle(self, upper: Key, index: Key | None, links: Key | None) -> None:
        """Complete an exchange: empty the index for the new upper."""
        layer = self._layer
        if not self.is_fresh(upper):
            self._drop(upper, b"checkpoint")  # left from a checkpoint that was interrupted
            return
        for directory in (index, links):
            if directory is not None:
                layout.empty(layer, directory)
        if index is not None:  # the kernel's mark of which upper the index belongs to
            for own in (b"upper", b"origin"):
                with suppress(OSError):
                    layer.removexattr(index, self._prefix + own)
        self._drop(upper, b"fresh")

    def rubbish(self, upper: Key) -> list[int]:
        """Return the layers that nobody can restore: without a name, and with no layer above them.

        Call settle() before.
        """
        known = self.all()
        needed = set(self.below(upper))
        for one in known.values():
            if one.name:
                needed.update((one.number, *one.below))
        return [number for number, _ in self._entries() if number not in needed]

    def remove(self, number: int) -> Iterator[None]:
        """Remove a layer with all its contents; yield now and then. It can be interrupted and repeated."""
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
        """Yield the directories that may be layers, complete or not. StoreError if there are too many."""
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
                raise StoreError(f"{self._layer.name}: damaged: more than {_MOST_KEPT} checkpoints", _BACK)
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
    """Return the number of a layer; None if *text* is not a number in its usual spelling."""
    number = int(text) if text.isdigit() and len(text) < 10 else UPPER
    return number if number != UPPER and b"%d" % number == text else None


def _chain(number: int | None, under: Callable[[int], int | None]) -> tuple[int, ...]:
    """Return the chain of layers below. A cycle, or a chain longer than any valid one, is cut."""
    chain: list[int] = []
    while number is not None and number not in chain and len(chain) <= _MOST:
        chain.append(number)
        number = under(number)
    return tuple(chain)


def _names_of_root(layer: UpperLayer, root: Key, prefix: bytes) -> list[bytes]:
    """Return the names of a root's attributes, except those that say its place in the chain of layers."""
    xattrs = XattrFormat(prefix)
    return [name for name in layer.listxattr(root) if not xattrs.is_own(name) or name == xattrs.protattr]


def _copy_root(layer: UpperLayer, source: Key, target: Key, prefix: bytes) -> None:
    """Copy all attributes of a root to an empty directory, except its place in the chain of layers."""
    for name in _names_of_root(layer, source, prefix):
        layer.setxattr(target, name, layer.getxattr(source, name))
    attr = layer.stat(source)
    layer.chown(target, attr.st_uid, attr.st_gid)
    layer.chmod(target, stat.S_IMODE(attr.st_mode))
    layer.utimens(target, attr.st_atime_ns, attr.st_mtime_ns)


def must_have_room(below: int, known: int) -> None:
    """StoreError if an upper with *below* layers, or a store with *known* layers, cannot have another."""
    for count, most, where in ((below, _MOST, " below each other"), (known, _MOST_KEPT - 2, "")):
        if count >= most:
            raise StoreError(f"there are {count} checkpoints{where}, the maximum", "delete some first")


def must_have_room_for(more: int, known: int) -> None:
    """StoreError if a store with *known* layers cannot have *more* layers for a while."""
    if known + more > _MOST_KEPT:
        raise StoreError(f"there are {known} checkpoints, too many to rebuild them", "delete some first")


def with_layers(layer: UpperLayer, header: Header) -> Header:
    """Write a header that says that there are layers, so that older versions refuse it; return it. Blocks."""
    if header.version >= WITH_LAYERS:
        return header
    header = replace(header, version=WITH_LAYERS)
    layout.save_header(layer, header)
    layer.sync()
    return header


def as_layers(layer: UpperLayer, frozen: list[Checkpoint]) -> list[FrozenLayer]:
    """Return checkpoints as layers of a union."""
    return [FrozenLayer(layer, one.key) for one in frozen]


class Range(NamedTuple):
    """The layers that make the difference between two states of the tree."""

    has_upper: bool
    """Whether the later state is the present one."""
    newer: list[Checkpoint]
    """The layers that only the later state has, topmost first, without the upper."""
    older: list[Checkpoint]
    """The layers that both states have, topmost first."""

    @property
    def is_empty(self) -> bool:
        return not self.newer and not self.has_upper


def between(layers: Layers, upper: Key, since: str | None, until: str | None) -> Range:
    """Return the layers between the checkpoints *since* (None: the lowers) and *until* (None: now).

    :data:`BELOW` is the state directly below *upper*, which is the store's. Blocks. UsageError if a
    checkpoint does not exist, or if the later one is not based on the earlier one.
    """
    if until is None or until == BELOW:
        chain = layers.frozen(upper)
    else:
        chain = layers.under(layers.named(until))
    at = len(chain)
    if since == BELOW:
        at = 0
    elif since is not None:
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


def is_above_deleted(layers: Layers, upper: Key) -> bool:
    """Whether the layer directly below *upper* is that of a deleted checkpoint. Blocks."""
    return any(not one.name for one in layers.frozen(upper)[:1])


def listed(layers: Layers, upper: Key) -> list[dict[str, Any]]:
    """Return the checkpoints as objects for JSON, the oldest first. *upper* is the store's. Blocks."""
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


def no_such(name: str) -> UsageError:
    """Return the error for a name that no checkpoint has."""
    return UsageError(f"{name!r}: no such checkpoint", "cowfs checkpoints lists them")
