"""Trees for tests: build one from a description, take a snapshot of one, compare two snapshots.

Standard library only: the children that act on a mount import it too. All walking goes through
directory descriptors, so that a tree may be deeper than PATH_MAX.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EPOCH_NS = 1_000_000_000_000_000_000
"""Every built tree is this old (September 2001): what is newer was touched by the test."""
RECENT_NS = 1_500_000_000_000_000_000
PRIVATE = ("trusted.overlay.", "user.overlay.")
NOT_OURS = ("security.selinux",)

Snapshot = dict[str, dict[str, Any]]


@dataclass
class Node:
    """One thing in a tree to build. *kind*: ``file dir symlink link fifo socket char block``."""

    kind: str = "file"
    data: bytes = b""
    target: str = ""
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    mtime_ns: int | None = None
    size: int | None = None
    """Make the file this long, the rest being a hole."""


def directory(mode: int = 0o755, **more: Any) -> Node:
    """A directory; the ones above a path are made anyway."""
    return Node("dir", mode=mode, **more)


def symlink(target: str, **more: Any) -> Node:
    """A symbolic link."""
    return Node("symlink", target=target, **more)


def link(target: str) -> Node:
    """One more name of *target*, a path in the same tree that is made earlier."""
    return Node("link", target=target)


def whiteout() -> Node:
    """What hides a name of the layers below, in the format of the kernel's overlayfs."""
    return Node("char", rdev=0, mode=0)


def opaque(**more: Any) -> Node:
    """A directory that hides the layers below."""
    return Node("dir", mode=0o755, xattrs={"trusted.overlay.opaque": b"y"}, **more)


Tree = Mapping[str, Node | bytes]


def build(root: str | os.PathLike[str], tree: Tree) -> None:
    """Make *tree* below *root*. Everything gets an old mtime, the same for the same tree."""
    base = os.fspath(root)
    os.makedirs(base, exist_ok=True)
    made: dict[str, Node] = {".": Node("dir", mode=0o755)}
    for path, what in tree.items():
        node = Node(data=what) if isinstance(what, bytes) else what
        for parent in _parents(path):
            if parent not in made:
                os.mkdir(os.path.join(base, parent), 0o755)
                made[parent] = Node("dir", mode=0o755)
        if node.kind == "dir" and path in made:
            pass
        else:
            _make(base, path, node)
        if node.kind != "link":
            made[path] = node
    for number, (path, node) in enumerate(sorted(made.items(), reverse=True)):
        _set_attributes(os.path.join(base, path), node, EPOCH_NS + number * 1_000_000_001)


def _parents(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[: n + 1]) for n in range(len(parts)))


def _make(base: str, path: str, node: Node) -> None:
    full = os.path.join(base, path)
    kinds = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK}
    if node.kind == "dir":
        os.mkdir(full)
    elif node.kind == "symlink":
        os.symlink(node.target, full)
    elif node.kind == "link":
        os.link(os.path.join(base, node.target), full, follow_symlinks=False)
    elif node.kind in kinds:
        os.mknod(full, kinds[node.kind] | 0o600, node.rdev)
    else:
        with open(full, "wb") as out:
            out.write(node.data)
            if node.size is not None:
                out.truncate(node.size)


def _set_attributes(full: str, node: Node, mtime_ns: int) -> None:
    if (node.uid, node.gid) != (0, 0):
        os.chown(full, node.uid, node.gid, follow_symlinks=False)
    if node.kind != "symlink":
        os.chmod(full, node.mode if node.mode is not None else 0o644)
    for name, value in node.xattrs.items():
        os.setxattr(full, name, value, follow_symlinks=False)
    mtime = node.mtime_ns if node.mtime_ns is not None else mtime_ns
    os.utime(full, ns=(EPOCH_NS, mtime), follow_symlinks=False)


def snapshot(root: str | bytes | os.PathLike[str] | int, *, private: bool = False) -> Snapshot:
    """Read the whole tree: ``{path: facts}``, the root being ``.``; *private* keeps overlay xattrs.

    A fact that cannot be read is replaced by its errno's name, so that two systems can be compared
    in their failures as well.
    """
    top = os.dup(root) if isinstance(root, int) else os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        result: Snapshot = {}
        _walk(top, b"", result, os.fstat(top).st_dev, private)
    finally:
        os.close(top)
    group_links(result)
    return result


def _walk(fd: int, path: bytes, result: Snapshot, dev: int, private: bool) -> None:
    result[os.fsdecode(path) or "."] = facts_of(fd, b".", dev, private)
    try:
        with os.scandir(fd) as listing:
            entries = sorted(((os.fsencode(e.name), e) for e in listing), key=lambda pair: pair[0])
    except OSError as error:
        result[os.fsdecode(path) or "."]["listing"] = _name(error)
        return
    for name, entry in entries:
        child = path + b"/" + name if path else name
        facts = facts_of(fd, name, dev, private)
        if "ino" in facts:
            facts["d_ino"] = entry.inode() == facts["ino"]
        if facts.get("type") != "dir":
            result[os.fsdecode(child)] = facts
            continue
        try:
            sub = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as error:
            result[os.fsdecode(child)] = {**facts, "listing": _name(error)}
            continue
        try:
            _walk(sub, child, result, dev, private)
            result[os.fsdecode(child)]["d_ino"] = facts.get("d_ino")
        finally:
            os.close(sub)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def facts_of(fd: int, name: bytes, dev: int, private: bool) -> dict[str, Any]:
    try:
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        return {"stat": _name(error)}
    kind = _TYPES[stat.S_IFMT(st.st_mode)]
    facts: dict[str, Any] = {
        "type": kind,
        "mode": oct(stat.S_IMODE(st.st_mode)),
        "owner": f"{st.st_uid}:{st.st_gid}",
        "mtime": st.st_mtime_ns,
        "ino": st.st_ino,
        "nlink": st.st_nlink,
        "same_dev": st.st_dev == dev,
        "xattrs": _xattrs(fd, name, private),
    }
    if kind in ("file", "symlink"):
        facts["size"] = st.st_size
    if kind in ("char", "block"):
        facts["rdev"] = st.st_rdev
    if kind == "symlink":
        try:
            facts["target"] = os.fsdecode(os.readlink(name, dir_fd=fd))
        except OSError as error:
            facts["target"] = _name(error)
    if kind == "file":
        facts["content"] = _content(fd, name)
    return facts


def _xattrs(fd: int, name: bytes, private: bool) -> dict[str, str]:
    path = b"/proc/self/fd/%d/" % fd + name
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        return {"list": _name(error)}
    found: dict[str, str] = {}
    for attribute in sorted(names):
        if attribute in NOT_OURS or (attribute.startswith(PRIVATE) and not private):
            continue
        try:
            found[attribute] = os.getxattr(path, attribute, follow_symlinks=False).hex()
        except OSError as error:
            found[attribute] = _name(error)
    return found


def _content(fd: int, name: bytes) -> str:
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME, dir_fd=fd)
    except OSError as error:
        return _name(error)
    try:
        digest, first, total = hashlib.blake2b(digest_size=8), b"", 0
        while chunk := os.read(file, 1 << 18):
            first = first or chunk
            total += len(chunk)
            digest.update(chunk)
        return repr(first) if total <= 64 else f"{total} bytes, hash {digest.hexdigest()}"
    except OSError as error:
        return _name(error)
    finally:
        os.close(file)


def group_links(result: Snapshot) -> None:
    """Note with each path the others that are the same inode."""
    groups: dict[int, list[str]] = {}
    for path, facts in result.items():
        if "ino" in facts:
            groups.setdefault(facts["ino"], []).append(path)
    for paths in groups.values():
        if len(paths) > 1:
            for path in paths:
                result[path]["same_inode_as"] = [other for other in paths if other != path]


def stable(snap: Snapshot, *, ignore: Iterable[str] = ("ino",)) -> Snapshot:
    """The part of a snapshot that two systems must agree on.

    A recent mtime becomes ``now``, inode numbers go, and so do the link counts of directories
    (the kernel's overlayfs says 1 for every merged directory; what cowfs says is tested by itself).
    """
    drop = set(ignore)
    result: Snapshot = {}
    for path, facts in snap.items():
        kept = {key: value for key, value in facts.items() if key not in drop}
        if facts.get("type") == "dir":
            kept.pop("nlink", None)
        if kept.get("mtime", 0) > RECENT_NS:
            kept["mtime"] = "now"
        result[path] = kept
    return result


def differences(left: Snapshot, right: Snapshot, names: tuple[str, str] = ("left", "right")) -> list[str]:
    """Every difference between two stable snapshots, one line each; empty when they agree."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        one, two = left.get(path), right.get(path)
        if one is None or two is None:
            there = names[0] if two is None else names[1]
            lines.append(f"{path!r}: only in {there}: {one or two}")
            continue
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                lines.append(f"{path!r}: {key}: {names[0]} {one.get(key)!r}, {names[1]} {two.get(key)!r}")
    return lines


def moved_inodes(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths that are in both snapshots with another inode number."""
    return sorted(
        path
        for path in before.keys() & after.keys()
        if before[path].get("ino") != after[path].get("ino")
        and before[path].get("type") == after[path].get("type")
    )


def make_socket(path: str) -> None:
    """Leave a unix socket at *path*, however long the path is."""
    parent, name = os.path.split(path)
    fd = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
