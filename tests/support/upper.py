"""The meaning of an upper directory in the format of the kernel's overlayfs.

Two implementations may write the same change in different bytes: an absolute or a relative redirect, an
opaque mark on a directory without a lower one, an origin. The description leaves these out. It keeps
whiteouts, what each directory merges with, metacopies, and everything that users wrote.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.support.tree import Snapshot, facts_of

P = "trusted.overlay."
COMPARED = ("type", "mode", "owner", "xattrs", "rdev", "target")
LARGE = 65536
"""From this size on, a change of attributes must not copy the data. For smaller files it may."""
SHARED_WHITEOUT = "#whiteout"
"""A link in the work directory to the inode that all whiteouts share; it may stay there."""


def meaning(upper: str, lowers: Sequence[str], prefix: str = P) -> Snapshot:
    """Describe *upper* on *lowers* (topmost first) as ``{path: facts}``."""
    result: Snapshot = {}
    with _opened(upper) as fd:
        _describe(fd, "", ".", list(lowers), result, prefix)
    return result


@contextmanager
def _opened(name: str, dir_fd: int | None = None) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_whiteout(st: os.stat_result) -> bool:
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def _describe(
    fd: int, path: str, below: str | None, lowers: list[str], result: Snapshot, prefix: str
) -> None:
    for name in sorted(os.listdir(fd)):
        child = f"{path}/{name}" if path else name
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if _is_whiteout(st):
            result[child] = {"whiteout": True, "in_merged_directory": below is not None}
            continue
        facts = facts_of(fd, os.fsencode(name), st.st_dev, False)
        # Leave out link counts, because the index has links too, and inode numbers, which users do not see.
        kept: dict[str, Any] = {key: facts[key] for key in COMPARED if key in facts}
        result[child] = kept
        if stat.S_ISDIR(st.st_mode):
            merges = _lower_path(fd, name, below, prefix)
            if merges is not None and not _is_lower_directory(lowers, merges):
                merges = None
            kept["merges_with"] = merges
            with _opened(name, fd) as sub:
                _describe(sub, child, merges, lowers, result, prefix)
        elif stat.S_ISREG(st.st_mode):
            if _xattr(fd, name, prefix + "metacopy") is None:
                kept["content"] = facts.get("content")
            elif st.st_size >= LARGE:
                kept["metacopy_of"] = _lower_path(fd, name, below, prefix)
            else:
                kept["content"] = _lower_content(lowers, _lower_path(fd, name, below, prefix))


def _xattr(fd: int, name: str, attribute: str) -> bytes | None:
    try:
        return os.getxattr(f"/proc/self/fd/{fd}/{name}", attribute, follow_symlinks=False)
    except OSError:
        return None


def _lower_path(fd: int, name: str, below: str | None, prefix: str) -> str | None:
    """Return the path in the lowers that this name merges with; None if there is none."""
    if _xattr(fd, name, prefix + "opaque") == b"y":
        return None
    redirect = _xattr(fd, name, prefix + "redirect")
    if redirect and redirect.startswith(b"/"):
        return os.fsdecode(redirect[1:])
    if below is None:
        return None
    last = os.fsdecode(redirect) if redirect else name
    return last if below == "." else f"{below}/{last}"


def _is_lower_directory(lowers: list[str], path: str) -> bool:
    """Return whether the lowers together have a directory at *path*, without following their redirects."""
    for lower in lowers:
        full = lower
        for part in path.split("/"):
            full = os.path.join(full, part)
            try:
                mode = os.lstat(full).st_mode
            except OSError:
                break
            if not stat.S_ISDIR(mode):
                return False
        else:
            return True
    return False


def _lower_content(lowers: list[str], path: str | None) -> str | None:
    for lower in lowers:
        if path is not None and os.path.isfile(os.path.join(lower, path)):
            with _opened(os.path.dirname(os.path.join(lower, path))) as fd:
                name = os.path.basename(path)
                content = facts_of(fd, os.fsencode(name), 0, False).get("content")
                return str(content)
    return None


def leftovers(store: str, prefix: str = P) -> list[str]:
    """Return what must not be there after a clean unmount: temporaries, and whiteouts that hide nothing.

    The kernel treats a whiteout in an opaque directory as corruption.
    """
    found = []
    for name, known in (("work", {"work", "index"}), ("work/work", {SHARED_WHITEOUT})):
        place = os.path.join(store, name)
        if os.path.isdir(place):
            found += [f"temporary {name}/{entry}" for entry in set(os.listdir(place)) - known]
    with _opened(os.path.join(store, "upper")) as fd:
        _misplaced(fd, "", False, found, prefix)
    return found


def _misplaced(fd: int, path: str, opaque: bool, found: list[str], prefix: str) -> None:
    for name in os.listdir(fd):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            with _opened(name, fd) as sub:
                is_opaque = _xattr(fd, name, prefix + "opaque") == b"y"
                _misplaced(sub, f"{path}{name}/", is_opaque, found, prefix)
        elif opaque and _is_whiteout(st):
            found.append(f"whiteout in an opaque directory: {path}{name}")
