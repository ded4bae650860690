"""A random load of operations on a layer, with a model of the expected tree."""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cowfs.layers.base import UpperLayer
from tests.ext3.model import Model, Synced
from tests.ext3.operations import OPERATIONS, Refused
from tests.ext3.reader import ROOT, Image
from tests.support.listing import names_of

Operation = Callable[["Load"], None]
BEGIN, COMMITTED, SYNCED = 1, 2, 3
"""The meaning of marks: an operation begins; all up to one is committed; an inode is synced."""


class Load:
    """Does random operations, each on the layer first and then on the model.

    *mark* is told of each step, see BEGIN; *settled* gets the model after each, and what has changed,
    and *writing* is told before data is written to an inode.
    Errors whose errno is among those to *tolerate* must have changed nothing.
    """

    def __init__(
        self,
        layer: UpperLayer,
        image: Image,
        seed: int,
        mark: Callable[[int, int], None] = lambda kind, number: None,
        *,
        settled: Callable[[Model, set[int]], None] = lambda model, touched: None,
        writing: Callable[[int, int, bytes], None] = lambda ino, offset, data: None,
        tolerate: frozenset[int] = frozenset(),
        largest: int = 60_000,
        files: int = 120,
        kinds: Mapping[Operation, int] = OPERATIONS,
    ) -> None:
        self.layer = layer
        self.model = Model(image)
        self.random = random.Random(seed)
        self._seed = seed
        self.mark = mark
        self.writing = writing
        self._settled = settled
        self.tolerate = tolerate
        self.largest = largest
        self.files = files
        self._kinds = kinds
        self.syncs: list[Synced] = []
        self.spared = {ROOT, 11}
        """Inodes to leave alone, except for names in the root; 11 is ``lost+found``."""
        self.failed = 0
        """Operations that failed with a tolerated errno."""
        self.held: dict[int, Any] = {}
        self.directories: dict[int, Any] = {}
        self.touched: set[int] = set()
        self._count = 0
        self._lock = threading.Lock()

    # --- running

    def run(self, operations: int, commit_every: int = 25, sync_every: int = 15) -> None:
        """Do this number of operations, with commits and fsyncs in between."""
        for _ in range(operations):
            self.step()
            if self.random.randrange(commit_every) == 0:
                self.commit()
            elif self.random.randrange(sync_every) == 0:
                self.sync_one()

    def step(self) -> None:
        """Do an operation of a kind that is possible in the tree."""
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while True:
            (operation,) = self.random.choices(kinds, weights)
            try:
                self.do(operation)
                return
            except Refused:
                continue

    def do(self, operation: Callable[[Load], None]) -> None:
        """Do an operation, and record its outcome in the model."""
        self.touched = set()
        self._announced = False
        try:
            operation(self)
        except OSError as error:
            if error.errno not in self.tolerate:
                raise
            self.failed += 1
            self.touched = set()
        for ino in list(self.touched):
            if ino in self.model.nodes:
                self.model.see(ino, self.layer.stat(self.key(ino)))
        self.model.settle(self.touched)
        self._settled(self.model, self.touched)

    def commit(self) -> None:
        """Sync the layer, so that everything up to now is promised."""
        self.layer.sync()
        self.mark(COMMITTED, self.model.operation)

    def sync_one(self) -> None:
        """Sync one file or directory."""
        ino = self.random.choice(list(self.model.nodes))
        node = self.model.nodes[ino]
        datasync = self.random.random() < 0.3
        if node.kind == stat.S_IFREG:
            file = self.layer.open(self.key(ino), os.O_RDWR)
        elif node.kind == stat.S_IFDIR:
            file = self.layer.open_directory(self.key(ino))
        else:
            return
        try:
            file.fsync(datasync)
        finally:
            file.close()
        self.promise(Synced(self.model.operation, ino, datasync))

    def promise(self, sync: Synced) -> None:
        """Record what was synced. May be called from any thread."""
        with self._lock:
            self.syncs.append(sync)
            self.mark(SYNCED, len(self.syncs) - 1)

    def release(self) -> None:
        """Forget every orphan."""
        for ino in list(self.held):
            self.layer.forget(self.held.pop(ino))
            del self.model.orphans[ino]

    def check(self) -> None:
        """Fail unless the layer shows the tree of the model."""
        for ino, node in self.model.nodes.items():
            key = self.key(ino)
            facts = node.facts
            self.model.see(ino, self.layer.stat(key))
            assert node.facts == facts, f"inode {ino} has other times"
            if node.kind == stat.S_IFDIR:
                assert sorted(names_of(self.layer, key)) == sorted(node.names)
                for name, kind in self.layer.readdir(key):
                    assert kind in (0, self.model.nodes[node.names[name]].kind)
            if node.kind == stat.S_IFREG:
                self.check_data(ino, key)
            if node.kind == stat.S_IFLNK:
                assert self.layer.readlink(key) == node.facts.target
            names = self.layer.listxattr(key)
            assert {name: self.layer.getxattr(key, name) for name in names} == node.facts.xattrs
        for ino, key in self.held.items():
            if self.model.node(ino).kind == stat.S_IFREG:
                self.check_data(ino, key)

    def check_data(self, ino: int, key: Any) -> None:
        """Read a file in pieces, and compare where it has data."""
        file = self.layer.open(key, os.O_RDONLY)
        try:
            size = self.model.node(ino).facts.size
            for index in self.model.node(ino).blocks:
                begin = index * self.model.block_size
                got = file.pread(self.model.block_size, begin)
                assert got == self.model.data(ino, begin, self.model.block_size), (
                    f"inode {ino}, block {index}"
                )
            if size < 1 << 20:
                assert file.pread(size + 10, 0) == self.model.data(ino, 0, size), f"inode {ino}"
        finally:
            file.close()

    # --- choosing

    def key(self, ino: int) -> Any:
        """Return the key of an inode, found by one of its names."""
        if ino == ROOT:
            return self.layer.root
        if ino in self.held:
            return self.held[ino]
        if ino in self.directories:
            return self.directories[ino]
        directory, name = min(self.model.nodes[ino].places)
        found = self.layer.lookup(self.key(directory), name)
        assert found is not None, f"{name!r} is not there"
        if self.model.nodes[ino].kind == stat.S_IFDIR:
            self.directories[ino] = found[0]
        return found[0]

    def begin(self) -> None:
        """All choices are made: the operation begins."""
        if not self._announced:
            self._announced = True
            self.mark(BEGIN, self.model.operation + 1)

    def pick(self, *kinds: int, orphans: bool = False) -> int:
        """Return an inode, of the given types of files if any."""
        nodes = [
            ino for ino, node in self.model.nodes.items()
            if (not kinds or node.kind in kinds) and ino not in self.spared
        ]  # fmt: skip
        if orphans:
            nodes += [ino for ino, node in self.model.orphans.items() if node.kind in kinds]
        if not nodes:
            raise Refused
        return self.random.choice(nodes)

    def directory(self) -> int:
        """Return a directory for a new file."""
        left_alone = self.spared - {ROOT}
        found = [ino for ino, node in self.model.nodes.items() if node.kind == stat.S_IFDIR]
        return self.random.choice([ino for ino in found if ino not in left_alone])

    def name(self) -> bytes:
        """Return a name that was never used."""
        self._count += 1
        long = self.random.choice((b"", b"", b"", b"n" * 30, b"\xff" * 100, b"long " * 48))
        return b"%d.%d%s" % (self._seed, self._count, long)

    def place(self, directories: bool = True) -> tuple[int, bytes, int]:
        """Return an existing name: its directory, the name, its inode."""
        node = self.model.nodes[self.pick()]
        if not directories and node.kind == stat.S_IFDIR:
            raise Refused
        directory, name = self.random.choice(sorted(node.places))
        return directory, name, node.ino

    def owner(self) -> tuple[int, int]:
        """Return a uid and gid, small or large."""
        return self.random.choice(((0, 0), (1000, 1000), (70_000, 3), (4_000_000_000, 65_536)))
