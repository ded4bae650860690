"""Commit changes to the lowers that they were made to: all of them, or none, even if it is interrupted.

The lower cannot change while cowfs still reads the new content from it: it reads a renamed file by its old
name. So a commit is first *staged* in a directory of its own, with the contents in ``files/N`` and everything
else in ``manifest``. The manifest gets its name when all of it is on disk. From then on the commit is
*final*: if it is interrupted, the next run completes it. Before that nothing has changed, and the next run
removes it.

The manifest has lines of JSON, one for the whole, then one for each path. Paths and attributes are base64.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import Any

from cowfs.changes.paths import join
from cowfs.changes.version import Node, Tree
from cowfs.errors import CowfsError, StoreError, SystemFailure
from cowfs.exports.apply import Apply
from cowfs.exports.apply_root import Root
from cowfs.exports.entries import Entry, Tick, Withheld, copy, data_runs, feed, opened, target_of
from cowfs.exports.losses import Losses
from cowfs.exports.meanwhile import Facts, changed, facts_of, renamed
from cowfs.exports.plan import Item, Plan
from cowfs.exports.renames import Renames
from cowfs.layers import beneath
from cowfs.layers.base import File
from cowfs.layers.kernel_file import KernelFile
from cowfs.linux import files, user_namespace
from cowfs.types import AttrData, Change

_VERSION = 1
_MANIFEST, _FILES = "manifest", "files"
_TIMES = {"content", "times"}
"""The kinds of changes that leave the other attributes of a directory as they are."""


def conflicts(items: Plan, before: Tree, since: int) -> Iterator[tuple[bytes, str]]:
    """Yield each path that would be replaced or removed, but has changed in the lower after *since* (ns).

    With it comes what has happened. *before* is the lower as it is now. Blocks; OSError.
    """
    for path, item in items.items():
        was = before.node(path)
        if was is None or (was.is_dir and item is Item.NODE):
            continue
        waiting = [(path, was)]
        while waiting:
            there, node = waiting.pop()
            if node.attr.st_ctime_ns > since:
                yield there, "was changed in the lower meanwhile"
            if node.is_dir:
                below = ((join(there, name), before.node(join(there, name))) for name in before.names(there))
                waiting += [(name, each) for name, each in below if each is not None]


def forbidden(items: Plan, before: Tree, told: dict[bytes, Change], root: str) -> Iterator[bytes]:
    """Yield each path of *root*, the lower, that this user may not change as planned. Blocks; OSError.

    Root of a user namespace may do everything in the merged tree, but not in the lower.
    """
    if os.geteuid() == 0 and user_namespace.has_all("uid"):
        return
    with closing(Root(root)) as here:
        for path, item in items.items():
            was, change = before.node(path), told.get(path)
            stays = was is not None and was.is_dir and item is Item.NODE
            if stays and (change is None or _TIMES.issuperset(_what(change) or ("all",))):
                continue
            fd = here.open(path)
            try:
                may = _may(here, path, fd, change, stays=stays)
                if not may or (was is not None and was.is_dir and not stays and not _may_empty(here, path)):
                    yield path
            finally:
                if fd is not None:
                    os.close(fd)


def _may(here: Root, path: bytes, fd: int | None, change: Change | None, *, stays: bool) -> bool:
    info = None if fd is None else os.fstat(fd)
    is_ours = info is None or (info.st_uid == os.geteuid() and not user_namespace.lacks(info.st_uid, 0))
    if stays:
        return is_ours
    if not is_ours and change is not None and _what(change) is not None:  # a new file would change the owner
        return _is_content(change) and fd is not None and beneath.may_change(fd)
    above = path.rpartition(b"/")[0]
    while (there := here.open(above)) is None:
        above = above.rpartition(b"/")[0]
    try:
        if beneath.may_change(there) and (is_ours or not _is_sticky(there)):
            return True
    finally:
        os.close(there)
    return _is_content(change) and fd is not None and beneath.may_change(fd)


def _is_content(change: Change | None) -> bool:
    return change is not None and _TIMES.issuperset(_what(change) or ("all",))


def _is_sticky(directory: int) -> bool:
    """Whether this user may remove only its own files from a directory (the sticky bit)."""
    info = os.fstat(directory)
    return bool(info.st_mode & stat.S_ISVTX) and info.st_uid != os.geteuid()


def _may_empty(here: Root, top: bytes) -> bool:
    """Whether this user may remove everything below a directory."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            directory = here.directory(path)
            found = beneath.entries(directory)
        except PermissionError:
            return False
        except (FileNotFoundError, NotADirectoryError):
            continue
        if found and not beneath.may_change(directory):
            return False
        if _is_sticky(directory) and any(
            info is None or info.st_uid != os.geteuid()
            for info in (here.stat_in(directory, entry.name) for entry in found)
        ):
            return False
        waiting += [join(path, entry.name) for entry in found if entry.type in {stat.S_IFDIR, 0}]
    return True


# --- staging


class Stage:
    """A commit that is being staged. A lock keeps other processes from completing or removing it."""

    def __init__(self, place: str) -> None:
        """Create it in the directory *place*, which is created if missing. SystemFailure."""
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
            _must_be_private(place)
            self.path = tempfile.mkdtemp(prefix="commit-", dir=place)
            self._lock = _locked(self.path)
            os.mkdir(os.path.join(self.path, _FILES))
        except OSError as error:
            raise SystemFailure(
                f"{place}: cannot prepare the changes there: {error.strerror}",
                "set XDG_STATE_HOME to a directory on a disk that you can write to",
            ) from None
        self._trees: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        self._count = 0

    def add(
        self,
        root: str,
        items: Plan,
        before: Tree,
        after: Tree,
        changes: Iterable[Change],
        losses: Losses,
        tick: Tick,
        withheld: Withheld,
        *,
        keeps_acls: bool = False,
    ) -> None:
        """Stage the changes of one more directory, *root*, without what is *withheld*. Blocks; OSError.

        *keeps_acls*: the store could not have all ACLs, so those that are missing in it stay.
        """
        info = os.stat(root)
        self._trees.append(
            {"root": os.path.abspath(root), "dev": info.st_dev, "ino": info.st_ino, "fsid": _fsid(root)}
        )
        told = {change.path: change for change in changes}
        renames = Renames(items, before, after, told)
        sink = _Sink(self, before, told, renames, losses, tick, keeps_acls=keeps_acls)
        feed(items.items(), after, sink, losses, tick, None, withheld)
        for path, source in renames.gone():
            sink.gone(path, source)

    def note(self, line: dict[str, Any]) -> None:
        self._lines.append({"tree": len(self._trees) - 1, **line})

    def new_file(self) -> tuple[str, KernelFile]:
        """Create a file for a content; return its name and the file."""
        self._count += 1
        name = str(self._count)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return name, KernelFile(os.open(os.path.join(self.path, _FILES, name), flags, 0o600))

    def finish(self) -> None:
        """Make the commit final. Blocks; OSError."""
        temporary = os.path.join(self.path, f"{_MANIFEST}.new")
        whole = {"version": _VERSION, "trees": self._trees, "users": _users(), "lines": len(self._lines)}
        with open(temporary, "x", encoding="ascii") as file:
            for line in [whole, *self._lines]:
                file.write(json.dumps(line) + "\n")
        files.syncfs(self._lock)
        os.rename(temporary, os.path.join(self.path, _MANIFEST))
        os.fsync(self._lock)

    def abandon(self) -> None:
        """Remove the commit, even if it is final."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, _MANIFEST))
        self.close()

    def close(self) -> None:
        """Release the lock. Removes the commit if it is not final."""
        if not os.path.exists(os.path.join(self.path, _MANIFEST)):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class _Sink:
    """A :class:`cowfs.exports.entries.Sink` that stages the changes of a directory."""

    def __init__(
        self,
        stage: Stage,
        before: Tree,
        told: dict[bytes, Change],
        renames: Renames,
        losses: Losses,
        tick: Tick,
        *,
        keeps_acls: bool,
    ) -> None:
        self._stage = stage
        self._renames = renames
        self._keeps_acls = keeps_acls
        self._before = before
        self._told = told
        self._losses = losses
        self._tick = tick

    def whiteout(self, path: bytes) -> None:
        self._stage.note({"path": _text(path), "was": self._was(path)})

    def gone(self, path: bytes, source: bytes) -> None:
        """Note that *path*, which was at *source*, must not come along when a directory is renamed."""
        was = facts_of(self._before, source, stays=False)
        facts = {_text(path + each[len(source) :]): facts for each, facts in was}
        self._stage.note({"path": _text(path), "was": facts})

    def add(self, entry: Entry) -> None:
        attr, change = entry.node.attr, self._told.get(entry.path)
        source = self._renames.source(entry.path)
        line: dict[str, Any] = {
            "path": _text(entry.path), "mode": entry.mode, "uid": attr.st_uid, "gid": attr.st_gid,
            "rdev": attr.st_rdev, "size": attr.st_size, "mtime": entry.mtime_ns,
            "xattrs": {_text(name): _text(value) for name, value in entry.xattrs.items()},
            "same": None if entry.same_as is None else _text(entry.same_as), "nlink": attr.st_nlink,
            "what": _what(change), "keeps_acls": self._keeps_acls,
            "was": self._was(entry.path, stays=stat.S_ISDIR(entry.mode)),
        }  # fmt: skip
        if source is not None:
            line["source"] = _text(source)
            line["what"] = self._renames.what(entry.path)
        old_path = self._renames.old_path(entry.path)
        if old_path is not None:
            line["was"] |= {_text(entry.path): facts for _, facts in renamed(self._before, old_path)}
        if stat.S_ISLNK(attr.st_mode):
            line["target"] = _text(target_of(entry))
        elif stat.S_ISREG(attr.st_mode) and entry.same_as is None:
            line["file"] = self._copied(entry)
        self._stage.note(line)

    def _was(self, path: bytes, *, stays: bool = False) -> dict[str, Facts]:
        return {_text(each): facts for each, facts in facts_of(self._before, path, stays=stays)}

    def _copied(self, entry: Entry) -> str:
        name, file = self._stage.new_file()
        with closing(file), opened(entry) as data:
            file.truncate(entry.size)
            copy(entry, data, data_runs(data, entry.size), file.pwrite, self._losses, self._tick)
            os.utime(file.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
        return name


def _what(change: Change | None) -> list[str] | None:
    """Return which attributes have changed; None if all have."""
    if change is None:
        return []
    return sorted(change.what) if change.kind == "M" and "type" not in change.what else None


# --- applying


@dataclass(slots=True)
class _Staged:
    """The staged changes of one directory: its new content as a Tree, and :class:`Known` facts."""

    files: str
    lines: dict[bytes, dict[str, Any]] = field(default_factory=dict)

    def plan(self) -> Plan:
        return {path: Item.NODE if "mode" in line else Item.WHITEOUT for path, line in self.lines.items()}

    def node(self, path: bytes) -> Node | None:
        line = self.lines.get(path)
        if line is None or "mode" not in line:
            return None
        first = _bytes(line["same"]) if line["same"] is not None else path
        attr = AttrData(
            line["mode"], 0, 0, line["nlink"], line["uid"], line["gid"], line["rdev"], line["size"],
            st_mtime_ns=line["mtime"],
        )  # fmt: skip
        xattrs = {_bytes(name): _bytes(value) for name, value in line["xattrs"].items()}
        return Node(
            attr, (0, 0, self.lines[first]["number"]), lambda: xattrs, lambda: _bytes(line["target"]),
            lambda: self._open(self.lines[first]["file"]),
        )  # fmt: skip

    def changed(self, root: Root) -> Iterator[bytes]:
        """Yield each path whose state is neither the old nor the new one."""
        for path, line in self.lines.items():
            if "was" in line:  # older versions of cowfs did not write it
                was = {_bytes(each): (*facts,) for each, facts in line["was"].items()}
                yield from changed(root, path, was, self.node(path))

    def names(self, path: bytes) -> set[bytes]:
        return {each.rpartition(b"/")[2] for each in self.lines if each and each.rpartition(b"/")[0] == path}

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        return iter(())

    def differs(self, entry: Entry) -> bool:
        what = self.lines[entry.path]["what"]
        return what is None or not _TIMES.issuperset(what)

    def keeps_owner(self, path: bytes) -> bool:
        what = self.lines[path]["what"]
        return what is not None and "owner" not in what

    def keeps_acls(self, path: bytes) -> bool:
        return bool(self.lines[path].get("keeps_acls", False))

    def source(self, path: bytes) -> bytes | None:
        source = self.lines[path].get("source")
        return None if source is None else _bytes(source)

    def _open(self, name: str) -> File:
        return KernelFile(os.open(os.path.join(self.files, name), os.O_RDONLY | os.O_CLOEXEC))


def complete(path: str, losses: Losses, tick: Tick, *, force: bool = True) -> None:
    """Make the changes of a final commit, and remove it. Blocks; CowfsError, OSError with the path.

    Without *force*, it changes nothing if another program has changed a file that it would overwrite or
    remove.
    """
    trees = _read(path)
    with ExitStack() as stack:
        roots = []
        for told, _ in trees:
            roots.append(Root(str(told["root"])))
            stack.callback(roots[-1].close)
            _must_be_it(roots[-1], told, path)
        for root, (_, staged) in zip(roots, trees, strict=True):
            for there in () if force else staged.changed(root):
                raise SystemFailure(
                    f"{os.path.join(root.path, os.fsdecode(there))}: has changed meanwhile",
                    "move it elsewhere, or overwrite it with cowfs run --force",
                )
        for root, (_, staged) in zip(roots, trees, strict=True):
            Apply(root, staged, losses, tick).run(staged.plan(), staged, {})
    os.unlink(os.path.join(path, _MANIFEST))
    shutil.rmtree(path, ignore_errors=True)


def _read(path: str) -> list[tuple[dict[str, Any], _Staged]]:
    """Return what a manifest contains: directories, and the staged changes of each. StoreError."""
    try:
        with open(os.path.join(path, _MANIFEST), encoding="ascii") as file:
            whole = json.loads(file.readline())
            if whole["version"] != _VERSION:
                raise StoreError(f"{path}: was prepared by a newer cowfs", "complete it with that version")
            trees = [(dict(tree), _Staged(os.path.join(path, _FILES))) for tree in whole["trees"]]
            for text in file:
                line = json.loads(text)
                lines = trees[line["tree"]][1].lines
                lines[_bytes(line["path"])] = line | {"number": len(lines)}
        if sum(len(staged.lines) for _, staged in trees) != whole["lines"]:
            raise ValueError(path)
        users = whole["users"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{path}: a prepared commit is damaged", "remove it, and commit again") from None
    if users != _users():
        raise StoreError(
            f"{path}: was prepared with other user and group IDs",
            "start cowfs run as the same user, with the same /etc/subuid and /etc/subgid",
        )
    return trees


def _must_be_it(root: Root, told: dict[str, Any], path: str) -> None:
    """StoreError unless *root* is the directory that a commit was prepared for."""
    info = root.stat()
    # The device number of a disk may change at boot; the ID of its filesystem does not.
    known = told.get("fsid")
    is_on_it = info.st_dev == told["dev"] if known is None else root.fsid() == known
    if info.st_ino != told["ino"] or not is_on_it:
        raise StoreError(
            f"{path}: another directory is at {root.path} now",
            "mount the filesystem that was there when it began",
        )


def resume(
    place: str,
    losses: Losses,
    tick: Tick,
    force: Callable[[list[str]], bool] = lambda _: False,
) -> Iterator[tuple[str, list[str], str]]:
    """Complete the interrupted commits in *place*; yield the path of each, its directories, and any error.

    The error is "" for a completed one. If *force* returns true for the directories, it overwrites what other
    programs have changed meanwhile. Commits that are not final are removed. Blocks.
    """
    with suppress(OSError):
        _must_be_private(place)  # others could have left commits there that nobody has asked for
        for name in sorted(os.listdir(place)):
            path = os.path.join(place, name)
            try:
                lock = _locked(path)
            except OSError:
                continue  # another process stages or completes it
            try:
                if os.path.exists(os.path.join(path, _MANIFEST)):
                    roots = _roots(path)
                    yield path, roots, _completed(path, losses, tick, force=force(roots))
                else:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _must_be_private(place: str) -> None:
    """PermissionError if another user owns the directory of the commits, or may write to it."""
    info = os.stat(place)
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others can write there", place)


def _fsid(path: str) -> int | None:
    """Return the ID of the filesystem of *path* (f_fsid of statvfs(3)); None if it has none."""
    return os.statvfs(path).f_fsid or None


def _completed(path: str, losses: Losses, tick: Tick, *, force: bool) -> str:
    try:
        complete(path, losses, tick, force=force)
    except CowfsError as error:
        return str(error)
    except OSError as error:
        return f"{os.fsdecode(error.filename or path)}: {error.strerror}"
    return ""


def _roots(path: str) -> list[str]:
    """Return the directories that a commit is for; none if the manifest cannot be read."""
    try:
        with open(os.path.join(path, _MANIFEST), encoding="ascii") as file:
            return [str(tree["root"]) for tree in json.loads(file.readline())["trees"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _locked(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _users() -> list[list[list[int]]]:
    """Return how this user namespace maps users and groups."""
    return [[list(each) for each in user_namespace.ranges(kind)] for kind in ("uid", "gid")]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
