"""Trees for tests: build a tree from a description, take snapshots, compare two snapshots.

Standard library only, because child processes that work in a mount import it too. All walks use directory
descriptors, so that a tree may be deeper than PATH_MAX.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EPOCH_NS = 1_000_000_000_000_000_000
"""The time of every built tree (September 2001). Newer files were changed by the test."""
RECENT_NS = 1_500_000_000_000_000_000
PRIVATE = ("trusted.overlay.", "user.overlay.")
NOT_OURS = ("security.selinux",)

Snapshot = dict[str, dict[str, Any]]


@dataclass
class Node:
    """A file in a tree to build. *kind* is ``file dir symlink link fifo socket char`` or ``block``."""

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
    """The size of the file; the rest after *data* is a hole."""


def directory(mode: int = 0o755, **more: Any) -> Node:
    """Return a directory. Directories above a path need no node."""
    return Node("dir", mode=mode, **more)


def symlink(target: str, **more: Any) -> Node:
    """Return a symbolic link."""
    return Node("symlink", target=target, **more)


def link(target: str) -> Node:
    """Return a hard link to *target*, an earlier path in the same tree."""
    return Node("link", target=target)


def whiteout() -> Node:
    """Return a whiteout, in the format of the kernel's overlayfs."""
    return Node("char", rdev=0, mode=0)


def opaque(**more: Any) -> Node:
    """Return an opaque directory."""
    return Node("dir", mode=0o755, xattrs={"trusted.overlay.opaque": b"y"}, **more)


Tree = Mapping[str, Node | bytes]


def build(root: str | os.PathLike[str], tree: Tree) -> None:
    """Build *tree* below *root*, with old mtimes that are the same for the same tree."""
    base = os.fspath(root)
    os.makedirs(base, exist_ok=True)
    made: dict[str, Node] = {".": Node("dir", mode=0o755)}
    for path, content in tree.items():
        node = Node(data=content) if isinstance(content, bytes) else content
        for parent in _parents(path):
            if parent not in made:
                os.mkdir(os.path.join(base, parent), 0o755)
                made[parent] = Node("dir", mode=0o755)
        if node.kind != "dir" or path not in made:
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
    """Return the whole tree as ``{path: facts}``; the root is ``.``. *private* includes overlay xattrs.

    The name of an errno replaces a fact that cannot be read, so that failures can be compared too.
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


TYPES = {
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
    kind = TYPES[stat.S_IFMT(st.st_mode)]
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
    """Add to each path the other paths with the same inode."""
    groups: dict[int, list[str]] = {}
    for path, facts in result.items():
        if "ino" in facts:
            groups.setdefault(facts["ino"], []).append(path)
    for paths in groups.values():
        if len(paths) > 1:
            for path in paths:
                result[path]["same_inode_as"] = [other for other in paths if other != path]


def stable(snap: Snapshot, *, ignore: Iterable[str] = ("ino",)) -> Snapshot:
    """Return the part of a snapshot that must be the same on two systems.

    A recent mtime becomes ``now``. Inode numbers are left out, and so are the link counts of directories: the
    kernel's overlayfs returns 1 for every merged directory, and other tests check what cowfs returns.
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
    """Return a line for each difference between two stable snapshots."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        one, two = left.get(path), right.get(path)
        if one is None or two is None:
            side = names[0] if two is None else names[1]
            lines.append(f"{path!r}: only in {side}: {one or two}")
            continue
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                lines.append(f"{path!r}: {key}: {names[0]} {one.get(key)!r}, {names[1]} {two.get(key)!r}")
    return lines


def moved_inodes(before: Snapshot, after: Snapshot) -> list[str]:
    """Return the paths that are in both snapshots with different inode numbers."""
    return sorted(
        path
        for path in before.keys() & after.keys()
        if before[path].get("ino") != after[path].get("ino")
        and before[path].get("type") == after[path].get("type")
    )
