"""What all operations of the union share: its layers, its nodes and its inode numbers."""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, TypeVar

from cowfs.errors import os_error
from cowfs.layers.base import Cached, Key, LowerLayer, UpperLayer
from cowfs.layers.partial import Part
from cowfs.overlay.companions import NOT_HERE, Companions
from cowfs.overlay.host import Host
from cowfs.overlay.index import came_from, is_of_lower, names_of, open_index
from cowfs.overlay.node import APART, LAYER, LAYER_BITS, ROOT_INO, Node, NodeTable
from cowfs.overlay.stack import Stack, is_whiteout, notes_of
from cowfs.overlay.xattr_format import TRUSTED, XattrFormat, as_device
from cowfs.types import Attr, AttrData, FileHandle, FsStats, own_attr

_LAYER_SHIFT = 40
_REAL_MASK = (1 << _LAYER_SHIFT) - 1
_STRANGE = 0xFF << _LAYER_SHIFT
_TYPE = stat.S_IFIFO
"""The least difference of two modes whose types differ."""
_MOST_REAL = (1 << 32) - 1
"""Larger numbers of inodes in images are made up at each mount."""


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """How the union stores its notes in the upper."""

    xattr_prefix: bytes = TRUSTED
    """``user.overlay.`` where trusted.* is not allowed (the kernel's *userxattr*)."""
    metacopy: bool = True
    """Whether any file may be copied up without its data."""
    metacopy_from: int = 65536
    """Files of at least this many bytes are copied up without their data when they get an xattr or another
    name; if copying may wait for others, all that have any. A change of owner, mode or times never copies
    data: such a file keeps its place, where the lower's data belong."""
    nobody: tuple[int, int] | None = None
    """The user and the group that files show whose owner has no number in this user namespace, if some may.
    All files of theirs that have data are copied up without it, so that a renamed one keeps its redirect:
    only the lower knows its owner."""
    lazy_from: int = 64 << 20
    """Files of at least this many bytes are copied up after they were opened to be written to, bit by bit,
    where the holes of the upper's files can be filled."""
    has_exact_holes: bool = False
    """Whether the holes of the upper's files are exactly the data that was never written, as in an image."""
    inline_up_to: int = 262144
    """Files of at most this many bytes are copied up within the request, without a thread, if their data
    waits for nobody."""
    sync_copy_up: bool = False
    """Put a copied-up file on disk before it gets its name: for uppers whose filesystem does not
    order data before metadata, as ext3 does."""
    redirect_dir: bool = True
    """Whether a directory that is in a lower can be renamed. Else that is EXDEV, and the upper has nothing
    that only overlayfs understands."""
    has_xattrs: bool = True
    """Whether files have extended attributes for users. Else all calls for them are EOPNOTSUPP."""
    counts_directories: bool = True
    """Whether a directory's link count says how many directories are in it. Else it is 1."""
    first_ino: int = 0
    """What is added to all numbers of inodes: for a union that shares its :class:`NodeTable` with another."""


R = TypeVar("R")
Steps = Generator[Callable[[], Any] | None, Any, R]
"""Long work that others need not wait for: between two steps they may have a turn, and change anything. If a
step yields something other than None, call it, in any thread since it blocks, and send its result back; throw
its exception in.
"""


def done_at_once(steps: Steps[R]) -> R:
    """Do all steps now; return their result."""
    try:
        call = next(steps)
        while True:
            call = next(steps) if call is None else steps.send(call())
    except StopIteration as end:
        result: R = end.value
        return result


@dataclass(slots=True)
class Pending:
    """A file that is being copied up lazily, and is still partial."""

    key: Key
    part: Part
    path: bytes
    """Where its lower is, from the root of the lowers."""
    node: Node | None = None
    """Its node, if it was looked up since the mount; it may no longer be in use."""


class Rubbish(NamedTuple):
    """A directory in the work directory that contains only whiteouts."""

    name: bytes
    node: Node | None
    """Its node, if that is still in use."""


class OverlayFs:
    """The union's layers and nodes. Not thread-safe: all calls come from one thread.

    *upper_root*, *work* and *index* are directories of the upper layer: the changed tree, the place
    for temporaries, which must be empty, and the index of hard links, if wanted.
    """

    def __init__(
        self,
        upper: UpperLayer,
        upper_root: Key,
        work: Key,
        index: Key | None,
        lowers: Sequence[LowerLayer],
        options: OverlayOptions | None = None,
        frozen: Sequence[LowerLayer] = (),
        beneath: Key | None = None,
    ) -> None:
        """*frozen* are earlier uppers in the upper's filesystem, above all *lowers*, the newest first.

        *beneath*: the first of the *lowers* is another union's upper layer, whose tree begins there.
        """
        self.options = options or OverlayOptions()
        self.upper = upper
        self.work = work
        self.index = index
        self.format = XattrFormat(self.options.xattr_prefix)
        self.modules: list[LowerLayer] = []
        """The modules (:mod:`~cowfs.overlay.modules`), by number less that of the first; some may be gone."""
        self.loaded: tuple[int, ...] = ()
        """The numbers of those that are merged, topmost first."""
        self.covered: dict[Node, None] = {}
        """Nodes in use that lost their name to a module, parents first."""
        self.left: dict[int, set[Node]] = {}
        """Parts of removed modules that are still in use, by their numbers."""
        self.lay(lowers, frozen, beneath)
        mode = upper.stat(upper_root).st_mode
        self._first = self.options.first_ino
        self.root = Node(ROOT_INO + self._first, mode, None, b"", upper_root, self.stack.roots)
        self.nodes = NodeTable(self.root)
        self.root.lookups = 1
        self.hard_links = None if index is None else open_index(upper, index, self.format)
        self.indexed: set[bytes] = set() if self.hard_links is None else self.hard_links.names
        self.companions: Companions | None = None
        self.stand_in: Callable[[Key], None] = lambda _: None
        """Makes an inode that cannot hold notes one that can, if the upper supports that."""
        self.shared_whiteout: Key | None = None
        self.fill_unit = upper.fill_unit
        """The unit, in bytes, of holes in the upper's files that can be filled; 0: none can."""
        self.notebook: Key | None = None
        """The inode of the upper that lists the incomplete files, if they must be listed."""
        self.pending: dict[int, Pending] = {}
        """These files, by the upper's inode numbers."""
        self.host = Host()
        self.trash: Callable[[], Key | None] = lambda: None
        """Returns the directory of the upper that holds reverted files …"""
        self.away: Counter[int] | None = None
        """… and how many names files have there, by the upper's inode numbers; None: not counted yet."""
        self.rubbish: list[Rubbish] = []
        """Directories to remove from the work directory (:mod:`cowfs.overlay.whiteout`)."""
        self.unnamed: dict[Node, bytes] = {}
        """Files that have no name yet (O_TMPFILE), and the ones that they have in the work directory."""
        self.below: dict[Node, int | None] = {}
        """How many directories in merged ones only lower layers have, where :mod:`~cowfs.overlay.nlink` has
        counted them."""
        self._begin_numbers()

    def _begin_numbers(self) -> None:
        """Prepare the numbers of inodes and temporaries."""
        self._temporaries = count()
        self.exports = None not in self._generations
        """Whether an inode's number and generation identify it permanently (file handles)."""
        self._incarnations = count(1)
        self._strange: dict[tuple[int, int, int], int] = {}
        self.displaced: dict[int, set[int]] = {}
        """By number: the numbers of nodes that should have it, but another inode had it."""
        self._taken: dict[int, tuple[int, int, int]] = {}

    def lay(
        self, lowers: Sequence[LowerLayer], frozen: Sequence[LowerLayer], beneath: Key | None = None
    ) -> None:
        """Set the layers below the upper. Loaded modules stay."""
        all_lowers = (*lowers, *self.modules)
        self.stack = Stack(
            all_lowers, self.format, beneath, frozen=frozen, bound=len(lowers), modules=self.loaded
        )
        self.lowers = self.stack.layers
        """The layers by the numbers in :data:`~cowfs.overlay.stack.Place`; not in the order of the stack."""
        self._generations = [layer.generation for layer in (self.upper, *self.lowers)]
        devs = [self.upper.dev, *(layer.dev for layer in self.lowers)]
        self._filesystems = [devs.index(dev) for dev in devs]

    @property
    def base(self) -> Sequence[LowerLayer]:
        """The lowers that the union was made from, topmost first, without modules."""
        return self.lowers[: self.stack.bound]

    @property
    def frozen(self) -> Sequence[LowerLayer]:
        """The frozen uppers, the newest first."""
        return self.lowers[len(self.lowers) - self.stack.frozen :]

    # --- which union a node belongs to, if there are several (:mod:`cowfs.overlay.graft`)

    def unions(self) -> tuple[OverlayFs, ...]:
        """Return all unions that this one consists of."""
        return (self,)

    def union_of(self, node: Node) -> OverlayFs:
        """Return the union that a node belongs to."""
        return self

    def own_nodes(self) -> Iterator[Node]:
        """Yield the nodes of this union alone."""
        return (node for node in self.nodes.all() if node.ino & APART == self._first)

    def above(self, node: Node) -> Node:
        """Return the parent directory (``..``) of a directory."""
        return node.parent or node

    def room_of(self, ino: int) -> FsStats:
        """Return the statfs figures of the store that holds the data of this inode."""
        return self.upper.statfs()

    # --- numbers

    def ino_of(self, layer: int, dev: int, attr: Attr) -> int:
        """Return the union's number for a layer's inode: the filesystem in the high bits, the inode in the
        low.

        *layer* is 0 for the upper, i + 1 for lower i; *dev* is the layer's. Layers on one filesystem share
        its numbers, and so do the upper and the frozen uppers. Numbers of more than 40 bits, those of
        subvolumes in a layer, and the two that FUSE reserves are replaced by numbers from a separate range.
        These are unique, but may differ at the next mount.
        """
        real = attr.st_ino
        number = self._filesystems[layer] if layer > 0 else 0
        if real <= _REAL_MASK and attr.st_dev == dev and (number or real > ROOT_INO):
            return (real | number << _LAYER_SHIFT) + self._first
        return self.strange_ino(layer, attr.st_dev, real)

    def ino_of_real(self, layer: int, dev: int, real: int) -> int:
        """Like :meth:`ino_of`, if only the number of the inode is known."""
        number = self._filesystems[layer] if layer > 0 else 0
        if real <= _REAL_MASK and (number or real > ROOT_INO):
            return (real | number << _LAYER_SHIFT) + self._first
        return self.strange_ino(layer, dev, real)

    def strange_ino(self, layer: int, dev: int, real: int) -> int:
        """Return a number from the separate range, for an inode whose own number cannot be used.

        Only numbers of live nodes are remembered. The number is computed from the arguments, so the same
        inode gets its old number again, unless another has taken it.
        """
        inode = layer, dev, real
        number = self._strange.get(inode)
        if number is None:
            start = _STRANGE + self._first
            number = start | hash(inode) & _REAL_MASK
            while number in self._taken:
                number = start | number + 1 & _REAL_MASK
            self._strange[inode] = number
            self._taken[number] = inode
        return number

    def displaced_from(self, ino: int) -> list[Node]:
        """Return the live nodes that have another number since this one, theirs, was another's."""
        if ino not in self.displaced:
            return []
        nodes = [node for number in self.displaced[ino] if (node := self.nodes.get(number)) is not None]
        if not nodes:
            del self.displaced[ino]
        return nodes

    def generation_of(self, ino: int, attr: Attr) -> int:
        """Return the generation, which tells a new node from earlier ones with the same number."""
        return self.generation_from(ino, attr.st_gen if isinstance(attr, AttrData) else None)

    def generation_from(self, ino: int, real: int | None) -> int:
        """The same, if only the generation of the layer's inode is known; None: it has none."""
        number = ino - self._first >> _LAYER_SHIFT
        if not self.exports or number >= len(self._generations) or ino & _REAL_MASK > _MOST_REAL:
            return next(self._incarnations) & 0x7FFFFFFF
        return real if number == 0 and real is not None else self._generations[number] or 0

    def temporary(self) -> bytes:
        """Return an unused name in the work directory."""
        return b"#%x" % next(self._temporaries)

    # --- attributes

    def topmost(self, node: Node) -> tuple[LowerLayer, Key]:
        """Return the topmost layer that has a node, and its key there. ESTALE if none has it."""
        if node.upper is not None:
            return self.upper, node.upper
        if not node.lowers:
            raise os_error(errno.ESTALE, node.name)
        layer, key = node.lowers[0]
        return self.lowers[layer], key

    def stat(self, node: Node) -> Attr:
        """Return the attributes of a node as its topmost layer has them.

        Their ``st_ino`` and ``st_nlink`` are the layer's. The union's are ``node.ino`` and the result of
        :mod:`~cowfs.overlay.nlink`.
        """
        if node.upper is not None:
            attr = self.upper.stat(node.upper)
            if node.metacopy:
                return self._with_data_blocks(node, attr)
            return attr if node.mode ^ attr.st_mode < _TYPE else as_device(attr)
        below = node.below
        if isinstance(below, int):
            return self.lowers[below & LAYER].stat(below >> LAYER_BITS)
        if not below:
            raise os_error(errno.ESTALE, node.name)
        layer, key = below[0]
        attr = self.lowers[layer].stat(key)
        if len(below) > 1 and not node.is_dir:  # a metacopy
            return self._with_data_blocks(node, attr)
        if layer >= 0:
            return attr
        return attr if node.mode ^ attr.st_mode < _TYPE else as_device(attr)

    def covers(self, directory: Node | None) -> None:
        """Note that the upper now has a name in *directory* that a lower directory may have."""
        below = self.below.get(directory) if self.below and directory is not None else None
        if below and directory is not None:
            self.below[directory] = below - 1

    def _with_data_blocks(self, node: Node, attr: Attr) -> Attr:
        layer, key = node.lowers[-1]
        whole = own_attr(attr)
        whole.st_blocks = self.lowers[layer].stat(key).st_blocks
        return whole

    def stored(self, node: Node) -> Key | None:
        """Return the store's inode of a node, in the upper or in a frozen upper."""
        if node.upper is not None:
            return node.upper
        return node.lowers[0][1] if node.lowers and node.lowers[0][0] < 0 else None

    def in_module(self, node: Node) -> bool:
        """Whether a part of a node is in a module."""
        return bool(self.modules) and any(layer >= self.stack.bound for layer, _ in node.lowers)

    def data_waits(self, node: Node) -> bool:
        """Whether a file's data is in a lower that may have to wait for something, for example a server."""
        lowers = node.lowers
        return bool(lowers) and self.lowers[lowers[-1][0]].waits

    # --- the union's own xattrs in the upper

    def note(self, key: Key, name: bytes, value: bytes) -> None:
        """Set one of the union's own xattrs in the upper."""
        try:
            self.upper.setxattr(key, name, value)
        except OSError as failure:
            holder = self.companions.of(key) if self.companions and failure.errno in NOT_HERE else None
            if holder is None:
                raise
            self.upper.setxattr(holder, name, value)

    def noted(self, key: Key, name: bytes) -> bytes:
        """Return one of the union's own xattrs in the upper. ENODATA if it is missing."""
        holder = self.companions.of(key) if self.companions else None
        return self.upper.getxattr(key if holder is None else holder, name)

    def index_of(self, name: bytes) -> Key | None:
        """Return the index directory that has an indexed hard link of this name; None if there is no
        index."""
        if self.companions is not None and name in self.companions.names:
            return self.companions.place
        return self.index

    def notes(self, layer: LowerLayer, key: Key) -> dict[bytes, bytes] | None:
        """Return the union's own xattrs of a layer's inode by full name; None if it has none."""
        if layer is self.upper and self.companions and (holder := self.companions.of(key)) is not None:
            key = holder
        return notes_of(layer, key, self.format)

    def came_from(self, key: Key, place: bytes) -> bool:
        """Whether an indexed hard link was copied up from the lower inode at this place."""
        holder = self.companions.of(key) if self.companions and place else None
        return came_from(self.upper, key if holder is None else holder, place, self.format)

    def find_in_index(self, handle: FileHandle | None) -> tuple[Key, Attr] | None:
        """Return the upper inode of a hard-linked lower inode that was copied up under another name."""
        for name, is_old in names_of(handle) if self.companions is not None else ():
            if self.companions is None or handle is None or name not in self.companions.names:
                continue
            found = self.upper.lookup(self.companions.place, name)
            if found is None or not self.came_from(found[0], handle.place):
                continue
            holder = self.companions.of(found[0]) or found[0]
            if not is_old or is_of_lower(self.upper, holder, handle.lower, self.format):
                return found
        return self.hard_links.find(handle) if self.hard_links is not None else None

    def index_what_takes_no_notes(self, place: Key) -> None:
        """Also index hard links of symlinks, fifos, sockets and devices, in a directory of cowfs's own."""
        self.companions = Companions(self.upper, place)
        self.indexed.update(self.companions.names)

    def is_whiteout(self, key: Key, attr: Attr) -> bool:
        """Whether an inode of the upper is a whiteout, in any form."""
        return is_whiteout(self.upper, key, attr, self.format)

    # --- life and death of nodes

    def forget(self, node: Node, lookups: int) -> None:
        """Subtract references that the kernel dropped; without any left, release the node."""
        node.lookups -= lookups
        if node.lookups <= 0:
            self.release(node)

    def release(self, node: Node) -> None:
        """Free a node that nothing refers to any more; does nothing for others."""
        if node.lookups > 0 or node.children or node.handles:
            return
        for gone in self.nodes.unused(node):
            if gone.ino >= _STRANGE and self.nodes.get(gone.ino) is None and gone.ino in self._taken:
                del self._strange[self._taken.pop(gone.ino)]
            if gone.upper is not None:
                self.upper.forget(gone.upper)
            for layer, key in gone.lowers:
                self.lowers[layer].forget(key)
            if self.modules:
                self._close_unused_modules(gone)
            if self.below:
                self.below.pop(gone, None)
            if self.unnamed and gone in self.unnamed:
                with suppress(OSError):  # the next mount removes what stays
                    self.upper.unlink(self.work, self.unnamed.pop(gone), None)

    def _close_unused_modules(self, gone: Node) -> None:
        """Close the removed modules of which *gone* was the last inode in use."""
        self.covered.pop(gone, None)
        for number in [number for number, nodes in self.left.items() if gone in nodes]:
            self.left[number].discard(gone)
            if not self.left[number]:
                del self.left[number]
                self.close_module(number)

    def close_module(self, number: int) -> None:
        """Close a module that is no longer in use, and free its number."""
        layer = self.lowers[number]
        layer.close()
        if isinstance(layer, Cached):
            layer.shrink()
