"""The operations of a load: each is done on the layer first, and then on the model."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cowfs.layers.base import takes_whole
from cowfs.types import AttrData
from tests.ext3.model import Node
from tests.ext3.reader import Facts

if TYPE_CHECKING:
    from tests.ext3.load import Load

EXCHANGE, WHITEOUT = 2, 4
T0 = 1_500_000_000_000_000_000
DEFAULT_ACL, ACCESS_ACL = b"system.posix_acl_default", b"system.posix_acl_access"
_ANY = 0xFFFFFFFF
_ENTRIES = (
    (1, 7, _ANY),
    (2, 5, 1000),
    (4, 5, _ANY),
    (16, 7, _ANY),
    (32, 0, _ANY),
)
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in _ENTRIES)
DEVICE_NUMBERS = [(0, 0), (1, 3), (8, 0), (200, 100), (300, 70_000)]


class Refused(Exception):
    """The chosen operation is not possible in the current tree."""


# --- creating


def new_node(
    load: Load, directory: int, name: bytes, key: Any, mode: int, owner: tuple[int, int], **more: Any
) -> int:
    """Add a new inode to the model, with the ACLs that the layer shows."""
    attr = load.layer.stat(key)
    ino = attr.st_ino
    assert ino not in load.model.nodes and ino not in load.model.orphans, f"inode {ino} is in use"
    is_directory = stat.S_ISDIR(mode)
    facts = Facts(
        mode, 2 if is_directory else 1, *owner, more.get("size", 0), more.get("rdev", (0, 0)),
        0, 0, 0, {}, more.get("target", b""), {} if is_directory else None,
    )  # fmt: skip
    if DEFAULT_ACL in load.model.nodes[directory].facts.xattrs:
        xattrs = {xattr: load.layer.getxattr(key, xattr) for xattr in load.layer.listxattr(key)}
        facts = replace(facts, mode=attr.st_mode, xattrs=xattrs)
    load.model.nodes[ino] = Node(ino, facts)
    load.model.enter(directory, name, ino)
    if is_directory:
        count_link(load, directory, 1)
    load.touched |= {ino, directory}
    return ino


def count_link(load: Load, ino: int, change: int) -> None:
    """Change a link count by one."""
    node = load.model.node(ino)
    load.model.set(ino, nlink=node.facts.nlink + change)
    load.touched.add(ino)


def create(load: Load) -> None:
    if len(load.model.nodes) > load.files:
        raise Refused
    directory, name, owner = load.directory(), load.name(), load.owner()
    mode = stat.S_IFREG | load.random.choice((0o644, 0o600, 0o4755, 0o2710))
    load.begin()
    key, file = load.layer.create(load.key(directory), name, stat.S_IMODE(mode), *owner)
    file.close()
    new_node(load, directory, name, key, mode, owner)


def copy(load: Load) -> None:
    """Create a complete file or directory in one step, as these are copied up."""
    if len(load.model.nodes) > load.files or not takes_whole(load.layer):
        raise Refused
    directory, name, owner = load.directory(), load.name(), load.owner()
    kind = load.random.choice((stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR))
    # Nothing inherits the group of a directory in the model.
    mode = kind | load.random.choice((0o755, 0o1700) if kind == stat.S_IFDIR else (0o644, 0o4755, 0o2710))
    size = load.random.choice((0, 1, load.model.block_size, 13 * load.model.block_size + 1, 20_000))
    data, xattrs = load.random.randbytes(min(size, load.largest)), {b"trusted.overlay.origin": b"#" * 29}
    is_hole = kind == stat.S_IFDIR or not load.random.randrange(3)
    attr = AttrData(mode, 0, 0, 1, *owner, 0, len(data), st_atime_ns=T0, st_mtime_ns=T0 + 10**9)
    load.begin()
    given = None if is_hole else data
    key = load.layer.copy_in(load.key(directory), name, attr, given, list(xattrs.items()))
    found = load.layer.stat(key)
    assert (found.st_atime_ns, found.st_mtime_ns) == (T0, T0 + 10**9)
    ino = new_node(load, directory, name, key, mode, owner)
    load.model.set(ino, xattrs=xattrs)
    if not is_hole:
        load.model.write(ino, 0, data)
    elif kind == stat.S_IFREG:
        load.model.truncate(ino, len(data))


def mkdir(load: Load) -> None:
    if len(load.model.nodes) > load.files:
        raise Refused
    directory, name, owner = load.directory(), load.name(), load.owner()
    load.begin()
    key = load.layer.mkdir(load.key(directory), name, 0o755, *owner)
    new_node(load, directory, name, key, stat.S_IFDIR | 0o755, owner)


def symlink(load: Load) -> None:
    directory, name, owner = load.directory(), load.name(), load.owner()
    target = b"t" * load.random.choice((1, 59, 60, 61, min(load.model.block_size, 4096) - 2))
    load.begin()
    key = load.layer.symlink(load.key(directory), name, target, *owner)
    new_node(load, directory, name, key, stat.S_IFLNK | 0o777, owner, target=target, size=len(target))


def mknod(load: Load) -> None:
    directory, name, owner = load.directory(), load.name(), load.owner()
    kind = load.random.choice((stat.S_IFCHR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
    rdev = load.random.choice(DEVICE_NUMBERS) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0)
    load.begin()
    key = load.layer.mknod(load.key(directory), name, kind | 0o600, os.makedev(*rdev), *owner)
    new_node(load, directory, name, key, kind | 0o600, owner, rdev=rdev)


# --- data


def put(load: Load, ino: int, offset: int, length: int) -> None:
    data = load.random.randbytes(length)
    load.begin()
    load.writing(ino, offset, data)
    file = load.layer.open(load.key(ino), os.O_RDWR)
    try:
        done = file.pwrite(data, offset)
        assert done == length
    except OSError as error:
        if error.errno not in load.tolerate:
            raise
        load.failed += 1
        data = written(load, ino, file, offset, data)
    finally:
        file.close()
    if data:
        load.model.write(ino, offset, data)
    load.touched.add(ino)


def written(load: Load, ino: int, file: Any, offset: int, data: bytes) -> bytes:
    """Return the part of *data* that a failed write has written."""
    got, old = file.pread(len(data), offset), load.model.data(ino, offset, len(data))
    assert len(got) >= len(old)
    done = next((n for n, (one, two) in enumerate(zip(got, data, strict=False)) if one != two), len(got))
    if len(got) == len(old):  # nothing was added, so the rest must be unchanged
        assert got[done:] == old[done:]
    else:
        assert done == len(got), "what was not written is part of the file"
    return data[:done]


def write(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, orphans=True)
    size = load.model.node(ino).facts.size
    offset = load.random.randrange(min(size, 1 << 20) + 1)
    if load.random.random() < 0.5:
        offset -= offset % load.model.block_size
    length = load.random.choice((1, 100, load.model.block_size, 3 * load.model.block_size, 20_000))
    put(load, ino, offset, min(length, load.largest))


def append(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, orphans=True)
    size = load.model.node(ino).facts.size
    if size > 300_000:
        raise Refused
    put(load, ino, size, load.random.choice((10, 4096, 9_000, load.largest)))


def sparse(load: Load) -> None:
    """Write far after the end, through all the indirect blocks."""
    ino = load.pick(stat.S_IFREG)
    width = load.model.block_size // 4
    index = load.random.choice(
        (11, 12, 12 + width, 12 + width + width * width - 1, 12 + width + width * width)
    )
    put(load, ino, index * load.model.block_size - 10, 200)


def truncate(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, orphans=True)
    size = load.model.node(ino).facts.size
    length = load.random.choice(
        (0, 0, size // 2, min(size, 13 * load.model.block_size), size + 5_000, max(size - 1, 0))
    )
    set_size(load, ino, length)


def set_size(load: Load, ino: int, length: int) -> None:
    """Truncate or extend a file."""
    load.begin()
    load.writing(ino, length, bytes(-length % load.model.block_size))
    load.layer.truncate(load.key(ino), length)
    load.model.truncate(ino, length)
    load.touched.add(ino)


# --- names


def link(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR)
    directory, name = load.directory(), load.name()
    load.begin()
    load.layer.link(load.key(ino), load.key(directory), name)
    load.model.enter(directory, name, ino)
    count_link(load, ino, 1)
    load.touched.add(directory)


def remove(load: Load, directory: int, name: bytes, ino: int, keep: Any) -> None:
    """Remove a replaced or unlinked name from the model."""
    load.model.leave(directory, name, keep is not None)
    load.touched |= {directory, ino}
    load.directories.pop(ino, None)
    if ino in load.model.nodes:
        count_link(load, ino, -1)
    elif keep is not None:
        load.held[ino] = keep


def kept_key(load: Load, ino: int) -> Any:
    """Return the key of an inode that loses a name, if it is used afterwards."""
    node = load.model.nodes[ino]
    if node.facts.xattrs and node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        return None  # e2fsck 1.47 clears orphans of other kinds without freeing their block of attributes
    last = len(node.places) == 1
    return load.key(ino) if last and load.random.random() < 0.4 else None


def unlink(load: Load) -> None:
    unlink_at(load, *load.place(directories=False))


def unlink_at(load: Load, directory: int, name: bytes, ino: int) -> None:
    """Remove a name of a file."""
    keep = kept_key(load, ino)
    load.begin()
    load.layer.unlink(load.key(directory), name, keep)
    remove(load, directory, name, ino, keep)


def rmdir(load: Load) -> None:
    empty = [
        ino for ino, node in load.model.nodes.items() if node.facts.names == {} and ino not in load.spared
    ]
    if not empty:
        raise Refused
    ino = load.random.choice(empty)
    ((directory, name),) = load.model.nodes[ino].places
    keep = kept_key(load, ino)
    load.begin()
    load.layer.rmdir(load.key(directory), name, keep)
    remove(load, directory, name, ino, keep)
    count_link(load, directory, -1)


def forget(load: Load) -> None:
    if not load.held:
        raise Refused
    ino = load.random.choice(list(load.held))
    load.begin()
    load.layer.forget(load.held.pop(ino))
    del load.model.orphans[ino]


def rename(load: Load, flags: int = 0) -> None:
    source, name, ino = load.place()
    is_directory = load.model.nodes[ino].kind == stat.S_IFDIR
    replaced = None
    if load.random.random() < 0.5:
        target, new = load.directory(), load.name()
    else:
        target, new, replaced = load.place()
        over = load.model.nodes[replaced]
        if replaced == ino or is_directory != (over.kind == stat.S_IFDIR) or over.facts.names:
            raise Refused
    if is_directory and load.model.is_below(target, ino):
        raise Refused
    keep = kept_key(load, replaced) if replaced is not None else None
    load.begin()
    load.layer.rename(
        (load.key(source), name), (load.key(target), new), flags, moved=load.key(ino), replaced=keep
    )
    if replaced is not None:
        remove(load, target, new, replaced, keep)
        if is_directory:
            count_link(load, target, -1)
    load.model.enter(target, new, ino)
    load.model.leave(source, name, False)
    load.touched |= {source, target, ino}
    if is_directory and source != target:
        count_link(load, source, -1)
        count_link(load, target, 1)
    if flags & WHITEOUT:
        found = load.layer.lookup(load.key(source), name)
        assert found is not None
        attr = found[1]
        owner = (attr.st_uid, attr.st_gid)
        new_node(load, source, name, found[0], attr.st_mode, owner)
        assert stat.S_ISCHR(attr.st_mode) and attr.st_rdev == 0


def whiteout(load: Load) -> None:
    rename(load, WHITEOUT)


def exchange(load: Load) -> None:
    (one, one_name, first), (two, two_name, second) = load.place(), load.place()
    if first == second:
        raise Refused
    for ino, other in ((first, two), (second, one)):
        if load.model.nodes[ino].kind == stat.S_IFDIR and load.model.is_below(other, ino):
            raise Refused
    load.begin()
    load.layer.rename(
        (load.key(one), one_name), (load.key(two), two_name), EXCHANGE,
        moved=load.key(first), replaced=load.key(second),
    )  # fmt: skip
    for directory, name, old, new in ((one, one_name, first, second), (two, two_name, second, first)):
        load.model.nodes[old].places.discard((directory, name))
        load.model.enter(directory, name, new)
    for ino, old, new in ((first, one, two), (second, two, one)):
        if load.model.nodes[ino].kind == stat.S_IFDIR and one != two:
            count_link(load, old, -1)
            count_link(load, new, 1)
    load.touched |= {one, two, first, second}


# --- attributes


def setxattr(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, stat.S_IFDIR)
    name = load.random.choice((b"user.one", b"trusted.overlay.opaque", b"security.x", b"user.two"))
    room = load.model.block_size - 300 - sum(
        len(value) + 40 for key, value in load.model.nodes[ino].facts.xattrs.items() if key != name
    )  # fmt: skip
    length = load.random.choice((0, 1, 20, 60, 500, load.model.block_size // 2))
    if length > room:
        raise Refused
    value = load.random.randbytes(length)
    load.begin()
    load.layer.setxattr(load.key(ino), name, value)
    load.model.set(ino, xattrs={**load.model.nodes[ino].facts.xattrs, name: value})
    load.touched.add(ino)


def acl(load: Load) -> None:
    """Set a default ACL on a directory, which new files inherit in the same step."""
    ino = load.pick(stat.S_IFDIR)
    xattrs = load.model.nodes[ino].facts.xattrs
    if xattrs:
        raise Refused  # there may be no space for more
    load.begin()
    load.layer.setxattr(load.key(ino), DEFAULT_ACL, ACL)
    load.model.set(ino, xattrs={**xattrs, DEFAULT_ACL: ACL})
    load.touched.add(ino)


def removexattr(load: Load) -> None:
    have = [ino for ino, node in load.model.nodes.items() if node.facts.xattrs]
    if not have:
        raise Refused
    ino = load.random.choice(have)
    xattrs = dict(load.model.nodes[ino].facts.xattrs)
    name = load.random.choice(sorted(xattrs))
    del xattrs[name]
    load.begin()
    load.layer.removexattr(load.key(ino), name)
    load.model.set(ino, xattrs=xattrs)
    load.touched.add(ino)


def chmod(load: Load) -> None:
    ino = load.pick(stat.S_IFREG, stat.S_IFDIR)
    mode = load.random.choice((0o600, 0o755, 0o1777, 0o4711))
    load.begin()
    load.layer.chmod(load.key(ino), mode)
    xattrs = dict(load.model.nodes[ino].facts.xattrs)
    if ACCESS_ACL in xattrs:  # depends on the mode; the tests of the layer check it
        xattrs[ACCESS_ACL] = load.layer.getxattr(load.key(ino), ACCESS_ACL)
    load.model.set(ino, mode=load.model.nodes[ino].kind | mode, xattrs=xattrs)
    load.touched.add(ino)


def chown(load: Load) -> None:
    ino, owner = load.pick(), load.owner()
    mode = load.model.nodes[ino].facts.mode
    if stat.S_ISREG(mode) and mode & 0o6000:
        raise Refused  # the tests of the layer check whether this removes them
    load.begin()
    load.layer.chown(load.key(ino), *owner)
    load.model.set(ino, uid=owner[0], gid=owner[1])
    load.touched.add(ino)


def utimens(load: Load) -> None:
    ino = load.pick()
    load.begin()
    load.layer.utimens(load.key(ino), T0 + load.random.randrange(10**15), T0 + load.random.randrange(10**15))
    load.touched.add(ino)


OPERATIONS: dict[Callable[[Load], None], int] = {
    create: 16, write: 14, append: 8, truncate: 6, mkdir: 5, symlink: 3, mknod: 3, rename: 10, exchange: 3,
    whiteout: 3, link: 4, unlink: 12, rmdir: 4, setxattr: 5, removexattr: 2, chmod: 3, chown: 2, utimens: 2,
    forget: 5, sparse: 1, acl: 1,
}  # fmt: skip
"""How often each operation is done."""
COPYING = {copy: 20, **OPERATIONS}
"""The same, with many files copied up."""
