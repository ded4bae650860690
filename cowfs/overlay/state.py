"""What all operations of the union share: its layers, its nodes, its numbering of inodes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, TypeVar

from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.layers.partial import Part
from cowfs.overlay.node import ROOT_INO, Lower, Node, NodeTable
from cowfs.types import Attr, AttrData

_LAYER_SHIFT = 40
_REAL_MASK = (1 << _LAYER_SHIFT) - 1
_STRANGE = 0xFF << _LAYER_SHIFT


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """How the union keeps its own notes in the upper."""

    xattr_prefix: bytes = b"trusted.overlay."
    """``user.overlay.`` where trusted.* is not allowed (the kernel's *userxattr*)."""
    metacopy_from: int = 65536
    """Files of at least this many bytes are copied up without their data when only attributes change; if
    that may wait for others, all that have any."""
    lazy_from: int = 64 << 20
    """Files of at least this many bytes are copied up after they were opened to be written to, bit by bit,
    where the holes of the upper's files can be filled."""
    has_exact_holes: bool = False
    """Whether the holes of the upper's files are what was never written, exactly: in an image."""
    inline_up_to: int = 262144
    """Files of at most this many bytes are copied up within the request, without a thread, if their data
    waits for nobody."""
    sync_copy_up: bool = False
    """Put a copied-up file on disk before it gets its name: for uppers whose filesystem does not
    order data before metadata, as ext3 does."""


def error(code: int, *names: object) -> OSError:
    """Return the OSError of an errno."""
    return OSError(code, os.strerror(code), *names)


def is_whiteout(attr: Attr) -> bool:
    """Whether an entry of a layer hides the name below (a character device 0:0)."""
    return attr.st_rdev == 0 and stat.S_ISCHR(attr.st_mode)


def count_in(note: bytes) -> int | None:
    """Return the number in a note, None for what is none, or one that nothing is so many of."""
    return int(note) if note.isdigit() and len(note) < 10 else None


R = TypeVar("R")
Steps = Generator[Callable[[], Any] | None, Any, R]
"""Long work that others need not wait for: between two steps they may have a turn, and may change anything.

What is yielded, if it is not None, shall be called, in any thread since it blocks, and the work be sent what
that gave. What it raises is thrown in.
"""


def done_at_once(steps: Steps[R]) -> R:
    """Do all the steps; return what they come to."""
    try:
        call = next(steps)
        while True:
            call = next(steps) if call is None else steps.send(call())
    except StopIteration as end:
        result: R = end.value
        return result


@dataclass(slots=True)
class Pending:
    """A file that is copied up lazily, and not whole yet."""

    key: Key
    part: Part
    path: bytes
    """Where its lower is, from the root of the lowers."""
    node: Node | None = None
    """Whose it is, if it was looked up since the mount; not in use any more, maybe."""


class Rubbish(NamedTuple):
    """A directory in the work directory that holds nothing but whiteouts."""

    name: bytes
    node: Node | None
    """Whose it was, if that is still in use."""


class State:
    """The union's layers and nodes. Not thread-safe: all calls come from one thread.

    *upper_root*, *work* and *index* are directories of the upper layer: the changed tree, the place
    for temporaries, which must be empty, and the index of hard links, if there is to be one.
    """

    def __init__(
        self,
        upper: UpperLayer,
        upper_root: Key,
        work: Key,
        index: Key | None,
        lowers: Sequence[LowerLayer],
        options: OverlayOptions | None = None,
    ) -> None:
        self.options = options or OverlayOptions()
        self.upper = upper
        self.work = work
        self.index = index
        self.lowers = tuple(lowers)
        self.roots: tuple[Lower, ...] = tuple((i, layer.root) for i, layer in enumerate(self.lowers))
        mode = upper.stat(upper_root).st_mode
        self.root = Node(ROOT_INO, mode, None, b"", upper_root, self.roots)
        self.nodes = NodeTable(self.root)
        self.root.lookups = 1
        prefix = self.options.xattr_prefix
        self.x_opaque = prefix + b"opaque"
        self.x_redirect = prefix + b"redirect"
        self.x_metacopy = prefix + b"metacopy"
        self.x_origin = prefix + b"origin"
        self.x_impure = prefix + b"impure"
        self.x_nlink = prefix + b"nlink"
        self.x_links = prefix + b"cowfs.links"  # ours: nlink of the lower inode that a hard link was
        self.x_place = prefix + b"cowfs.place"  # ours: which of the inodes with that handle it was
        self.x_layer = prefix + b"cowfs.layer"  # ours: which lower an origin means, if not the first
        self.x_partial = prefix + b"cowfs.partial"  # ours: see cowfs.overlay.partial
        self.escaped = prefix + b"overlay."
        self.indexed: set[bytes] = set()
        if index is not None:
            self.indexed = {entry.name for entry in upper.readdir(index)}
        self.userxattr = prefix.startswith(b"user.")
        self.shared_whiteout: Key | None = None
        self.fill_unit = upper.fill_unit
        """Of how many bytes are the holes of the upper's files that can be filled; 0: none can."""
        self.notebook: Key | None = None
        """The inode of the upper that has the list of files that are not whole, if they shall be listed."""
        self.pending: dict[int, Pending] = {}
        """These files, by the upper's inode numbers."""
        self.wants_rest: Callable[[], bool] = lambda: True
        """Whether they shall become whole while nobody waits for that."""
        self.rest_soon: Callable[[], None] = lambda: None
        """Called when there is one more."""
        self.make_room: Callable[[], bool] = lambda: False
        """Called when the upper is full; True: there is more room now, try again."""
        self.not_saved: Callable[[OSError], None] = lambda error: None
        """Called when the upper could not put on disk what was written to it."""
        self.rubbish: list[Rubbish] = []
        """What is to be removed from the work directory (:mod:`cowfs.overlay.whiteout`)."""
        self.sweep_soon: Callable[[], None] | None = None
        """Called when there is much of that, to let somebody call :func:`~cowfs.overlay.whiteout.sweep`;
        without it that is done at once."""
        self._temporaries = count()
        self._strange: dict[tuple[int, int, int], int] = {}
        self._taken: dict[int, tuple[int, int, int]] = {}
        devs = [upper.dev, *(layer.dev for layer in self.lowers)]
        self._filesystems = [devs.index(dev) for dev in devs]

    # --- numbers

    def ino_of(self, layer: int, dev: int, attr: Attr) -> int:
        """Return the union's number of a layer's inode: its filesystem's above, its own below.

        *layer* is 0 for the upper, i + 1 for lower i; *dev* the layer's. Layers on one filesystem
        share its numbers. Numbers of more than 40 bits, of subvolumes inside a layer, and the two that
        FUSE keeps, get one of a range of their own: unique, but maybe another at the next mount.
        """
        real = attr.st_ino
        number = self._filesystems[layer]
        if real <= _REAL_MASK and attr.st_dev == dev and (number or real > ROOT_INO):
            return real | number << _LAYER_SHIFT
        return self.strange_ino(layer, attr.st_dev, real)

    def ino_of_real(self, layer: int, dev: int, real: int) -> int:
        """Like :meth:`ino_of`, for an inode of which only the number is known."""
        number = self._filesystems[layer]
        if real <= _REAL_MASK and (number or real > ROOT_INO):
            return real | number << _LAYER_SHIFT
        return self.strange_ino(layer, dev, real)

    def strange_ino(self, layer: int, dev: int, real: int) -> int:
        """Return a number of the range for what has no natural one.

        Only those of live nodes are remembered. It is made from what is given, so that who comes back gets
        the number that it had, if no other has taken that.
        """
        inode = layer, dev, real
        number = self._strange.get(inode)
        if number is None:
            number = _STRANGE | hash(inode) & _REAL_MASK
            while number in self._taken:
                number = _STRANGE | number + 1 & _REAL_MASK
            self._strange[inode] = number
            self._taken[number] = inode
        return number

    def temporary(self) -> bytes:
        """Return a name that is free in the work directory."""
        return b"#%x" % next(self._temporaries)

    # --- attributes

    def stat(self, node: Node) -> Attr:
        """Return the attributes of a node as its topmost layer has them.

        ``st_ino`` and ``st_nlink`` in it are the layer's: the union's are ``node.ino`` and
        :meth:`nlink`.
        """
        if node.upper is not None:
            attr = self.upper.stat(node.upper)
            return self._with_data_blocks(node, attr) if node.metacopy else attr
        if not node.lowers:
            raise error(errno.ESTALE, node.name)
        layer, key = node.lowers[0]
        return self.lowers[layer].stat(key)

    def nlink(self, node: Node, attr: Attr) -> int:
        """Return the number of names, given what :meth:`stat` said.

        A directory merged from several has 1, as the kernel's overlayfs says: not counted.
        """
        if node.dead:
            return 0
        if node.children is not None:
            sources = len(node.lowers) + (node.upper is not None)
            return 1 if sources > 1 else attr.st_nlink
        return attr.st_nlink if node.indexed is None else node.indexed

    def _with_data_blocks(self, node: Node, attr: Attr) -> Attr:
        layer, key = node.lowers[-1]
        blocks = self.lowers[layer].stat(key).st_blocks
        return AttrData(
            st_mode=attr.st_mode,
            st_ino=attr.st_ino,
            st_dev=attr.st_dev,
            st_nlink=attr.st_nlink,
            st_uid=attr.st_uid,
            st_gid=attr.st_gid,
            st_rdev=attr.st_rdev,
            st_size=attr.st_size,
            st_blocks=blocks,
            st_blksize=attr.st_blksize,
            st_atime_ns=attr.st_atime_ns,
            st_mtime_ns=attr.st_mtime_ns,
            st_ctime_ns=attr.st_ctime_ns,
        )

    def data_waits(self, node: Node) -> bool:
        """Whether the data of a file that is not in the upper is in a lower that may wait for others."""
        return bool(node.lowers) and self.lowers[node.lowers[-1][0]].waits

    # --- the union's own xattrs in the upper

    def note(self, key: Key, name: bytes, value: bytes) -> None:
        """Set one of the union's own xattrs."""
        self.upper.setxattr(key, name, value)

    def notes(self, layer: LowerLayer, key: Key) -> dict[bytes, bytes] | None:
        """Return the union's own xattrs of a layer's inode by full name, None when it has none."""
        prefix = self.options.xattr_prefix
        try:
            names = [name for name in layer.listxattr(key) if name.startswith(prefix)]
        except OSError as failure:
            if failure.errno in {errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}:
                return None
            raise
        if not names:
            return None
        return {name: layer.getxattr(key, name) for name in names if not name.startswith(self.escaped)}

    def came_from(self, key: Key, place: bytes) -> bool:
        """Whether an indexed hard link was copied up from the lower inode that is at this place, and not
        from another to which a bad image gives the same number; True where that is not known."""
        try:
            return not place or self.upper.getxattr(key, self.x_place) == place
        except OSError:
            return True  # the kernel, or an old cowfs, has copied it up

    # --- life and death of nodes

    def forget(self, node: Node, lookups: int) -> None:
        """Take back references that the kernel had; the last one lets the node go."""
        node.lookups -= lookups
        if node.lookups <= 0:
            self.release(node)

    def release(self, node: Node) -> None:
        """Let a node go that nobody refers to any more; a no-op for others."""
        if node.lookups > 0 or node.children or node.handles:
            return
        for gone in self.nodes.unused(node):
            if gone.ino >= _STRANGE and self.nodes.get(gone.ino) is None and gone.ino in self._taken:
                del self._strange[self._taken.pop(gone.ino)]
            if gone.upper is not None:
                self.upper.forget(gone.upper)
            for layer, key in gone.lowers:
                self.lowers[layer].forget(key)
