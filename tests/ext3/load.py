"""A seeded load of all operations on a layer, with the model that says what the tree must be."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from os.path import commonpath
from typing import Any

from cowfs.layers.base import UpperLayer
from tests.ext3.model import Model, Node, Synced
from tests.ext3.reader import ROOT, Facts, Image

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
BEGIN, COMMITTED, SYNCED = 1, 2, 3
"""What a mark says: an operation is about to begin; all up to one is committed; an inode is synced."""
_WEIGHTS = {
    "create": 16, "write": 14, "append": 8, "truncate": 6, "mkdir": 5, "symlink": 3, "mknod": 3, "rename": 10,
    "exchange": 3, "whiteout": 3, "link": 4, "unlink": 12, "rmdir": 4, "setxattr": 5, "removexattr": 2,
    "chmod": 3, "chown": 2, "utimens": 2, "forget": 5, "sparse": 1,
}  # fmt: skip
T0 = 1_500_000_000_000_000_000


class Refused(Exception):
    """The chosen operation does not suit the tree as it is."""


class Load:
    """Does random operations, each on the layer first and then on the model.

    *mark* is told of each step, see BEGIN; *settled* gets the model after each, and what has changed.
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
        tolerate: frozenset[int] = frozenset(),
        largest: int = 60_000,
        files: int = 120,
    ) -> None:
        self.layer = layer
        self.model = Model(image)
        self.random = random.Random(seed)
        self._seed = seed
        self.mark = mark
        self._settled = settled
        self.tolerate = tolerate
        self.largest = largest
        self.files = files
        self.syncs: list[Synced] = []
        self.spared = {ROOT, 11}
        """Inodes that are left alone but for their names: 11 is ``lost+found``."""
        self.failed = 0
        """Operations that failed with a tolerated errno."""
        self._held: dict[int, Any] = {}
        self._directories: dict[int, Any] = {}
        self._touched: set[int] = set()
        self._count = 0
        self._device_numbers = [(0, 0), (1, 3), (8, 0), (200, 100), (300, 70_000)]

    # --- running

    def run(self, operations: int, commit_every: int = 25, sync_every: int = 15) -> None:
        """Do so many operations, with commits and fsyncs between."""
        for _ in range(operations):
            self.step()
            if self.random.randrange(commit_every) == 0:
                self.commit()
            elif self.random.randrange(sync_every) == 0:
                self.sync_one()

    def step(self) -> None:
        """One operation of a kind that suits the tree."""
        kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
        while True:
            kind = self.random.choices(kinds, weights)[0]
            self._touched = set()
            try:
                self._announced = False
                getattr(self, "_" + kind)()
            except Refused:
                continue
            except OSError as error:
                if error.errno not in self.tolerate:
                    raise
                self.failed += 1
                self._touched = set()
            break
        for ino in list(self._touched):
            if ino in self.model.nodes:
                self.model.see(ino, self.layer.stat(self.key(ino)))
        self.model.settle(self._touched)
        self._settled(self.model, self._touched)

    def commit(self) -> None:
        """Sync the layer: everything up to now is promised."""
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
        self.syncs.append(Synced(self.model.operation, ino, datasync))
        self.mark(SYNCED, len(self.syncs) - 1)

    def release(self) -> None:
        """Forget every orphan."""
        for ino in list(self._held):
            self.layer.forget(self._held.pop(ino))
            del self.model.orphans[ino]

    def check(self) -> None:
        """Everything reads as the model has it, through the layer."""
        for ino, node in self.model.nodes.items():
            key = self.key(ino)
            facts = node.facts
            self.model.see(ino, self.layer.stat(key))
            assert node.facts == facts, f"inode {ino} has other times"
            if node.kind == stat.S_IFDIR:
                assert sorted(self.layer.names(key)) == sorted(node.names)
                for name, kind in self.layer.readdir(key):
                    assert kind in (0, self.model.nodes[node.names[name]].kind)
            if node.kind == stat.S_IFREG:
                self.check_data(ino, key)
            if node.kind == stat.S_IFLNK:
                assert self.layer.readlink(key) == node.facts.target
            names = self.layer.listxattr(key)
            assert {name: self.layer.getxattr(key, name) for name in names} == node.facts.xattrs
        for ino, key in self._held.items():
            if self.model.node(ino).kind == stat.S_IFREG:
                self.check_data(ino, key)

    def check_data(self, ino: int, key: Any) -> None:
        """One file, in pieces, and where it has data."""
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
        """The key of an inode, found by one of its names."""
        if ino == ROOT:
            return self.layer.root
        if ino in self._held:
            return self._held[ino]
        if ino in self._directories:
            return self._directories[ino]
        directory, name = min(self.model.nodes[ino].places)
        found = self.layer.lookup(self.key(directory), name)
        assert found is not None, f"{name!r} is not there"
        if self.model.nodes[ino].kind == stat.S_IFDIR:
            self._directories[ino] = found[0]
        return found[0]

    def begin(self) -> None:
        """Every choice is made: the operation begins."""
        if not self._announced:
            self._announced = True
            self.mark(BEGIN, self.model.operation + 1)

    def _pick(self, *kinds: int, orphans: bool = False) -> int:
        nodes = [
            ino for ino, node in self.model.nodes.items()
            if (not kinds or node.kind in kinds) and ino not in self.spared
        ]  # fmt: skip
        if orphans:
            nodes += [ino for ino, node in self.model.orphans.items() if node.kind in kinds]
        if not nodes:
            raise Refused
        return self.random.choice(nodes)

    def _directory(self) -> int:
        found = [ino for ino, node in self.model.nodes.items() if node.kind == stat.S_IFDIR and ino != 11]
        return self.random.choice(found)

    def _name(self) -> bytes:
        self._count += 1
        long = self.random.choice((b"", b"", b"", b"n" * 30, b"\xff" * 100, b"long " * 48))
        return b"%d.%d%s" % (self._seed, self._count, long)

    def _place(self, directories: bool = True) -> tuple[int, bytes, int]:
        """A name that is there: its directory, itself, its inode."""
        node = self.model.nodes[self._pick()]
        if not directories and node.kind == stat.S_IFDIR:
            raise Refused
        directory, name = self.random.choice(sorted(node.places))
        return directory, name, node.ino

    def _owner(self) -> tuple[int, int]:
        return self.random.choice(((0, 0), (1000, 1000), (70_000, 3), (4_000_000_000, 65_536)))

    # --- making

    def _new(
        self, directory: int, name: bytes, key: Any, mode: int, owner: tuple[int, int], **more: Any
    ) -> int:
        attr = self.layer.stat(key)
        ino = attr.st_ino
        assert ino not in self.model.nodes and ino not in self.model.orphans, f"inode {ino} is in use"
        is_directory = stat.S_ISDIR(mode)
        facts = Facts(
            mode, 2 if is_directory else 1, *owner, more.get("size", 0), more.get("rdev", (0, 0)),
            0, 0, 0, {}, more.get("target", b""), {} if is_directory else None,
        )  # fmt: skip
        self.model.nodes[ino] = Node(ino, facts)
        self.model.enter(directory, name, ino)
        if is_directory:
            self._count_link(directory, 1)
        self._touched |= {ino, directory}
        return ino

    def _count_link(self, ino: int, change: int) -> None:
        node = self.model.node(ino)
        self.model.set(ino, nlink=node.facts.nlink + change)
        self._touched.add(ino)

    def _create(self) -> None:
        if len(self.model.nodes) > self.files:
            raise Refused
        directory, name, owner = self._directory(), self._name(), self._owner()
        mode = stat.S_IFREG | self.random.choice((0o644, 0o600, 0o4755, 0o2710))
        self.begin()
        key, file = self.layer.create(self.key(directory), name, stat.S_IMODE(mode), *owner)
        file.close()
        self._new(directory, name, key, mode, owner)

    def _mkdir(self) -> None:
        if len(self.model.nodes) > self.files:
            raise Refused
        directory, name, owner = self._directory(), self._name(), self._owner()
        self.begin()
        key = self.layer.mkdir(self.key(directory), name, 0o755, *owner)
        self._new(directory, name, key, stat.S_IFDIR | 0o755, owner)

    def _symlink(self) -> None:
        directory, name, owner = self._directory(), self._name(), self._owner()
        target = b"t" * self.random.choice((1, 59, 60, 61, self.model.block_size - 2))
        self.begin()
        key = self.layer.symlink(self.key(directory), name, target, *owner)
        self._new(directory, name, key, stat.S_IFLNK | 0o777, owner, target=target, size=len(target))

    def _mknod(self) -> None:
        directory, name, owner = self._directory(), self._name(), self._owner()
        kind = self.random.choice((stat.S_IFCHR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
        rdev = self.random.choice(self._device_numbers) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0)
        self.begin()
        key = self.layer.mknod(self.key(directory), name, kind | 0o600, os.makedev(*rdev), *owner)
        self._new(directory, name, key, kind | 0o600, owner, rdev=rdev)

    # --- data

    def _put(self, ino: int, offset: int, length: int) -> None:
        data = self.random.randbytes(length)
        self.begin()
        file = self.layer.open(self.key(ino), os.O_RDWR)
        try:
            done = file.pwrite(data, offset)
            assert done == length
        except OSError as error:
            if error.errno not in self.tolerate:
                raise
            self.failed += 1
            data = self._written(ino, file, offset, data)
        finally:
            file.close()
        if data:
            self.model.write(ino, offset, data)
        self._touched.add(ino)

    def _written(self, ino: int, file: Any, offset: int, data: bytes) -> bytes:
        """How much of a write that failed was done after all."""
        got, old = file.pread(len(data), offset), self.model.data(ino, offset, len(data))
        assert len(got) >= len(old)
        done = len(commonpath([got, data]))
        if len(got) == len(old):  # nothing was added, so the rest must be as it was
            assert got[done:] == old[done:]
        else:
            assert done == len(got), "what was not written is part of the file"
        return data[:done]

    def _write(self) -> None:
        ino = self._pick(stat.S_IFREG, orphans=True)
        size = self.model.node(ino).facts.size
        offset = self.random.randrange(min(size, 1 << 20) + 1)
        if self.random.random() < 0.5:
            offset -= offset % self.model.block_size
        length = self.random.choice((1, 100, self.model.block_size, 3 * self.model.block_size, 20_000))
        self._put(ino, offset, min(length, self.largest))

    def _append(self) -> None:
        ino = self._pick(stat.S_IFREG, orphans=True)
        size = self.model.node(ino).facts.size
        if size > 300_000:
            raise Refused
        self._put(ino, size, self.random.choice((10, 4096, 9_000, self.largest)))

    def _sparse(self) -> None:
        """Far behind the end: through all the indirect blocks."""
        ino = self._pick(stat.S_IFREG)
        width = self.model.block_size // 4
        index = self.random.choice(
            (11, 12, 12 + width, 12 + width + width * width - 1, 12 + width + width * width)
        )
        self._put(ino, index * self.model.block_size - 10, 200)

    def _truncate(self) -> None:
        ino = self._pick(stat.S_IFREG, orphans=True)
        size = self.model.node(ino).facts.size
        length = self.random.choice(
            (0, 0, size // 2, min(size, 13 * self.model.block_size), size + 5_000, max(size - 1, 0))
        )
        self.begin()
        self.layer.truncate(self.key(ino), length)
        self.model.truncate(ino, length)
        self._touched.add(ino)

    # --- names

    def _link(self) -> None:
        ino = self._pick(stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR)
        directory, name = self._directory(), self._name()
        self.begin()
        self.layer.link(self.key(ino), self.key(directory), name)
        self.model.enter(directory, name, ino)
        self._count_link(ino, 1)
        self._touched.add(directory)

    def _remove(self, directory: int, name: bytes, ino: int, keep: Any) -> None:
        """The model's side of a name that goes: one that stands there no more."""
        self.model.leave(directory, name, keep is not None)
        self._touched |= {directory, ino}
        self._directories.pop(ino, None)
        if ino in self.model.nodes:
            self._count_link(ino, -1)
        elif keep is not None:
            self._held[ino] = keep

    def _keep(self, ino: int) -> Any:
        """The key of what is about to lose a name, if somebody is to go on using it."""
        last = len(self.model.nodes[ino].places) == 1
        return self.key(ino) if last and self.random.random() < 0.4 else None

    def _unlink(self) -> None:
        directory, name, ino = self._place(directories=False)
        keep = self._keep(ino)
        self.begin()
        self.layer.unlink(self.key(directory), name, keep)
        self._remove(directory, name, ino, keep)

    def _rmdir(self) -> None:
        empty = [
            ino for ino, node in self.model.nodes.items() if node.facts.names == {} and ino not in self.spared
        ]
        if not empty:
            raise Refused
        ino = self.random.choice(empty)
        ((directory, name),) = self.model.nodes[ino].places
        keep = self._keep(ino)
        self.begin()
        self.layer.rmdir(self.key(directory), name, keep)
        self._remove(directory, name, ino, keep)
        self._count_link(directory, -1)

    def _forget(self) -> None:
        if not self._held:
            raise Refused
        ino = self.random.choice(list(self._held))
        self.begin()
        self.layer.forget(self._held.pop(ino))
        del self.model.orphans[ino]

    def _rename(self, flags: int = 0) -> None:
        source, name, ino = self._place()
        is_directory = self.model.nodes[ino].kind == stat.S_IFDIR
        replaced = None
        if self.random.random() < 0.5:
            target, new = self._directory(), self._name()
        else:
            target, new, replaced = self._place()
            over = self.model.nodes[replaced]
            if replaced == ino or is_directory != (over.kind == stat.S_IFDIR) or over.facts.names:
                raise Refused
        if is_directory and self.model.is_below(target, ino):
            raise Refused
        keep = self._keep(replaced) if replaced is not None else None
        self.begin()
        self.layer.rename(
            (self.key(source), name), (self.key(target), new), flags, moved=self.key(ino), replaced=keep
        )
        if replaced is not None:
            self._remove(target, new, replaced, keep)
            if is_directory:
                self._count_link(target, -1)
        self.model.enter(target, new, ino)
        self.model.leave(source, name, False)
        self._touched |= {source, target, ino}
        if is_directory and source != target:
            self._count_link(source, -1)
            self._count_link(target, 1)
        if flags & WHITEOUT:
            found = self.layer.lookup(self.key(source), name)
            assert found is not None
            attr = found[1]
            owner = (attr.st_uid, attr.st_gid)
            self._new(source, name, found[0], attr.st_mode, owner)
            assert stat.S_ISCHR(attr.st_mode) and attr.st_rdev == 0

    def _whiteout(self) -> None:
        self._rename(WHITEOUT)

    def _exchange(self) -> None:
        (one, one_name, first), (two, two_name, second) = self._place(), self._place()
        if first == second:
            raise Refused
        for ino, other in ((first, two), (second, one)):
            if self.model.nodes[ino].kind == stat.S_IFDIR and self.model.is_below(other, ino):
                raise Refused
        self.begin()
        self.layer.rename(
            (self.key(one), one_name), (self.key(two), two_name), EXCHANGE,
            moved=self.key(first), replaced=self.key(second),
        )  # fmt: skip
        for directory, name, old, new in ((one, one_name, first, second), (two, two_name, second, first)):
            self.model.nodes[old].places.discard((directory, name))
            self.model.enter(directory, name, new)
        for ino, old, new in ((first, one, two), (second, two, one)):
            if self.model.nodes[ino].kind == stat.S_IFDIR and one != two:
                self._count_link(old, -1)
                self._count_link(new, 1)
        self._touched |= {one, two, first, second}

    # --- attributes

    def _setxattr(self) -> None:
        ino = self._pick(stat.S_IFREG, stat.S_IFDIR)
        name = self.random.choice((b"user.one", b"trusted.overlay.opaque", b"security.x", b"user.two"))
        room = self.model.block_size - 300 - sum(
            len(value) + 40 for key, value in self.model.nodes[ino].facts.xattrs.items() if key != name
        )  # fmt: skip
        length = self.random.choice((0, 1, 20, 60, 500, self.model.block_size // 2))
        if length > room:
            raise Refused
        value = self.random.randbytes(length)
        self.begin()
        self.layer.setxattr(self.key(ino), name, value)
        self.model.set(ino, xattrs={**self.model.nodes[ino].facts.xattrs, name: value})
        self._touched.add(ino)

    def _removexattr(self) -> None:
        have = [ino for ino, node in self.model.nodes.items() if node.facts.xattrs]
        if not have:
            raise Refused
        ino = self.random.choice(have)
        xattrs = dict(self.model.nodes[ino].facts.xattrs)
        name = self.random.choice(sorted(xattrs))
        del xattrs[name]
        self.begin()
        self.layer.removexattr(self.key(ino), name)
        self.model.set(ino, xattrs=xattrs)
        self._touched.add(ino)

    def _chmod(self) -> None:
        ino = self._pick(stat.S_IFREG, stat.S_IFDIR)
        mode = self.random.choice((0o600, 0o755, 0o1777, 0o4711))
        self.begin()
        self.layer.chmod(self.key(ino), mode)
        self.model.set(ino, mode=self.model.nodes[ino].kind | mode)
        self._touched.add(ino)

    def _chown(self) -> None:
        ino, owner = self._pick(), self._owner()
        mode = self.model.nodes[ino].facts.mode
        if stat.S_ISREG(mode) and mode & 0o6000:
            raise Refused  # whether that takes them away is for the tests of the layer
        self.begin()
        self.layer.chown(self.key(ino), *owner)
        self.model.set(ino, uid=owner[0], gid=owner[1])
        self._touched.add(ino)

    def _utimens(self) -> None:
        ino = self._pick()
        self.begin()
        self.layer.utimens(
            self.key(ino), T0 + self.random.randrange(10**15), T0 + self.random.randrange(10**15)
        )
        self._touched.add(ino)
