"""The expected tree after each operation, and what may be found after a crash.

A state is numbered by the operation that led to it. Files are kept block by block, with all that each
block ever held: data goes to its place at once, metadata with the commit, so that after a crash a block
holds what it held at the commit or what was written over it since. A block that was freed and is
allocated again is another :class:`Block`: nothing of the one may ever be seen in the other.
"""

from __future__ import annotations

import bisect
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cowfs.types import Attr
from tests.ext3.reader import ROOT, Facts, Image


class Block:
    """The contents that a block of a file has had, with the numbers of the operations that wrote them."""

    __slots__ = ("operations", "versions")

    def __init__(self, operation: int, data: bytes) -> None:
        self.operations = [operation]
        self.versions = [data]

    @property
    def data(self) -> bytes:
        return self.versions[-1]

    def write(self, operation: int, data: bytes) -> None:
        self.operations.append(operation)
        self.versions.append(data)

    def possible(self, floor: int, high: int) -> list[bytes]:
        """Return what may be on disk: the content at *floor*, and later ones up to *high*."""
        first = max(bisect.bisect_right(self.operations, floor) - 1, 0)
        return self.versions[first : bisect.bisect_right(self.operations, high)]


@dataclass
class Node:
    """An inode of the model."""

    ino: int
    facts: Facts
    blocks: dict[int, Block] = field(default_factory=dict)
    places: set[tuple[int, bytes]] = field(default_factory=set)
    """The (directory, name) of each of its names."""

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.facts.mode)

    @property
    def names(self) -> dict[bytes, int]:
        assert self.facts.names is not None
        return self.facts.names


class State(NamedTuple):
    """The tree after an operation, without inodes that have no name."""

    facts: dict[int, Facts]
    blocks: dict[int, dict[int, Block]]


class Model:
    """The expected tree of an image."""

    def __init__(self, image: Image) -> None:
        self.block_size = image.block_size
        self.nodes: dict[int, Node] = {}
        for ino, facts in image.tree().items():
            node = self.nodes[ino] = Node(ino, facts)
            if stat.S_ISREG(facts.mode):
                node.blocks = {index: Block(0, data) for index, data in image.contents(ino).items()}
        for node in list(self.nodes.values()):
            for name, ino in (node.facts.names or {}).items():
                self.nodes[ino].places.add((node.ino, name))
        self.orphans: dict[int, Node] = {}
        """The inodes that have no name but are in use."""
        self.states = [State({}, {})]
        self.settle(self.nodes.keys())

    @property
    def operation(self) -> int:
        """Return the number of the last completed operation."""
        return len(self.states) - 1

    def settle(self, changed: Iterable[int]) -> None:
        """Record the current state; only *changed* inodes are copied."""
        last = self.states[-1]
        state = State(dict(last.facts), dict(last.blocks))
        for ino in changed:
            node = self.nodes.get(ino)
            if node is None:
                state.facts.pop(ino, None)
                state.blocks.pop(ino, None)
            else:
                state.facts[ino] = node.facts
                if node.kind == stat.S_IFREG:
                    state.blocks[ino] = dict(node.blocks)
        if self.states[0].facts:
            self.states.append(state)
        else:
            self.states[0] = state

    # --- changes

    def set(self, ino: int, **what: object) -> None:
        """Change facts of an inode."""
        node = self.node(ino)
        node.facts = replace(node.facts, **what)  # type: ignore[arg-type]

    def node(self, ino: int) -> Node:
        """Return the inode, even if it is an orphan."""
        return self.nodes.get(ino) or self.orphans[ino]

    def enter(self, directory: int, name: bytes, ino: int) -> None:
        """Add a name to a directory. The caller updates link counts."""
        where = self.nodes[directory]
        self.set(directory, names={**where.names, name: ino})
        self.nodes[ino].places.add((directory, name))

    def leave(self, directory: int, name: bytes, keep: bool) -> int:
        """Remove a name; an inode without names is removed, or becomes an orphan."""
        names = dict(self.nodes[directory].names)
        ino = names.pop(name)
        self.set(directory, names=names)
        node = self.nodes[ino]
        node.places.discard((directory, name))
        if not node.places:
            del self.nodes[ino]
            if keep:
                self.orphans[ino] = node
        return ino

    def write(self, ino: int, offset: int, data: bytes) -> None:
        """Write to a file, as the next operation."""
        node, size, number = self.node(ino), self.block_size, len(self.states)
        for index in range(offset // size, -(-(offset + len(data)) // size)):
            begin = max(offset, index * size)
            piece = data[begin - offset : (index + 1) * size - offset]
            old = node.blocks[index].data if index in node.blocks else bytes(size)
            at = begin - index * size
            new = old[:at] + piece + old[at + len(piece) :]
            if index in node.blocks:
                node.blocks[index].write(number, new)
            else:
                node.blocks[index] = Block(number, new)
        self.set(ino, size=max(node.facts.size, offset + len(data)))

    def truncate(self, ino: int, length: int) -> None:
        """Set the size, as the next operation."""
        node, size = self.node(ino), self.block_size
        for index in [index for index in node.blocks if index * size >= length]:
            del node.blocks[index]
        last, rest = divmod(length, size)
        if rest and last in node.blocks and length < node.facts.size:
            kept = node.blocks[last].data[:rest]
            node.blocks[last].write(len(self.states), kept + bytes(size - rest))
        self.set(ino, size=length)

    def data(self, ino: int, offset: int, length: int) -> bytes:
        """Return the expected content of a file."""
        node, size = self.node(ino), self.block_size
        length = max(0, min(length, node.facts.size - offset))
        begin = offset // size
        parts = [
            node.blocks[index].data if index in node.blocks else bytes(size)
            for index in range(begin, -(-(offset + length) // size))
        ]
        return b"".join(parts)[offset - begin * size :][:length]

    # --- looking

    def see(self, ino: int, attr: Attr) -> None:
        """Take the times of an inode from *attr*, which must agree in everything else."""
        facts = self.node(ino).facts
        size = 0 if stat.S_ISDIR(attr.st_mode) else attr.st_size
        nlink = facts.nlink if ino in self.nodes else 0
        seen = (attr.st_ino, attr.st_mode, attr.st_nlink, attr.st_uid, attr.st_gid, size)
        expected = (ino, facts.mode, nlink, facts.uid, facts.gid, facts.size)
        assert seen == expected, f"inode {ino} is {seen}, not {expected}"
        self.set(ino, atime=attr.st_atime_ns, mtime=attr.st_mtime_ns, ctime=attr.st_ctime_ns)

    def is_below(self, ino: int, ancestor: int) -> bool:
        """Return whether the directory *ino* is *ancestor* or below it."""
        while ino not in (ancestor, ROOT):
            ((ino, _),) = self.nodes[ino].places
        return ino == ancestor


@dataclass
class Synced:
    """A promise: *ino* was on disk as after *operation* (except for times, if *datasync*)."""

    operation: int
    ino: int
    datasync: bool


@dataclass
class Promises:
    """What was acknowledged and what was begun at the end."""

    committed: int = 0
    """The last operation that is on disk with all before it."""
    begun: int = 0
    """The last operation that was begun."""
    synced: list[Synced] = field(default_factory=list)


def judge(
    states: list[State],
    promises: Promises,
    found: Image,
    unknown: Callable[[dict[int, Facts]], bool] = lambda tree: False,
) -> str | None:
    """Return why *found* is no valid state after a crash; None if it is one.

    *unknown*: is a tree that is none of the states the result of the operation that was going on?
    """
    tree = found.tree()
    high = min(promises.begun, len(states) - 1)
    # With times in whole seconds, several states differ only in their data.
    equal = [number for number in range(high, promises.committed - 1, -1) if states[number].facts == tree]
    if not equal:
        return None if unknown(tree) else _nearest(states, promises.committed, high, tree)
    wrong = [_wrong_state(states, number, promises, found, tree) for number in equal]
    return None if None in wrong else f"state {equal[0]}: {wrong[0]}"


def _wrong_state(
    states: list[State], number: int, promises: Promises, found: Image, tree: dict[int, Facts]
) -> str | None:
    """Return why the image with this state's metadata breaks a promise or has wrong data."""
    floors = dict.fromkeys(tree, number)
    for sync in promises.synced:
        floors[sync.ino] = max(floors.get(sync.ino, number), sync.operation)
        if sync.operation > number:
            was, now = states[sync.operation].facts.get(sync.ino), tree.get(sync.ino)
            if sync.datasync and was and now:
                was = replace(was, atime=now.atime, mtime=now.mtime, ctime=now.ctime)
            if was != now:
                return f"inode {sync.ino} was synced after {sync.operation}: {_change(was, now)}"
    for ino, blocks in states[number].blocks.items():
        wrong = _wrong_block(blocks, found, ino, tree[ino].size, floors[ino], promises.begun)
        if wrong is not None:
            return wrong
    return None


def _wrong_block(
    blocks: dict[int, Block], found: Image, ino: int, size: int, floor: int, high: int
) -> str | None:
    contents, zeros = found.contents(ino), bytes(found.block_size)
    for index in blocks.keys() | contents.keys():
        length = min(found.block_size, size - index * found.block_size)
        if length <= 0:
            continue
        got = contents.get(index, zeros)[:length]
        block = blocks.get(index)
        possible = block.possible(floor, high) if block else [zeros]
        if not any(got == version[:length] for version in possible):
            older = block is not None and any(got == version[:length] for version in block.versions)
            return (
                f"inode {ino}, block {index} of {size} bytes is none of {len(possible)} possible versions"
                f"{' but an older one' if older else ''}: {got[:16].hex()}"
                f" not {possible[0][:16].hex()}"
            )
    return None


def perhaps_written(states: list[State], ino: int, offset: int, data: bytes) -> None:
    """Record a failed write: blocks that existed already may have its data."""
    for index, block in states[-1].blocks.get(ino, {}).items():
        at = index * len(block.data)
        begin, end = max(at, offset), min(at + len(block.data), offset + len(data))
        if begin < end:
            new = block.data[: begin - at] + data[begin - offset : end - offset] + block.data[end - at :]
            block.write(len(states), new)


def _nearest(states: list[State], low: int, high: int, tree: dict[int, Facts]) -> str:
    """Describe the differences from the most similar state."""

    def differing(number: int) -> list[int]:
        facts = states[number].facts
        return sorted(ino for ino in facts.keys() | tree.keys() if facts.get(ino) != tree.get(ino))

    best = min(range(high, low - 1, -1), key=lambda number: len(differing(number)))
    shown = [
        f"inode {ino}: {_change(states[best].facts.get(ino), tree.get(ino))}" for ino in differing(best)[:4]
    ]
    return f"none of the states {low} to {high}; nearest is {best}: {'; '.join(shown)}"


def _change(was: Facts | None, now: Facts | None) -> str:
    if was is None or now is None:
        return f"{'unknown inode' if was is None else 'inode is missing'} {oct((was or now).mode)}"  # type: ignore[union-attr]
    parts = []
    for name in Facts.__dataclass_fields__:
        one, two = getattr(was, name), getattr(now, name)
        if one != two:
            if isinstance(one, dict) and isinstance(two, dict):
                keys = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)][:3]
                one, two = ({key: x.get(key) for key in keys} for x in (one, two))
            parts.append(f"{name} {one!r}, found {two!r}")
    return ", ".join(parts)
