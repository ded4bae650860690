"""The commands that mount a store and its lowers with the kernel's overlayfs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from cowfs.errors import LayerError
from cowfs.formats.squashfs.by_kernel import refused
from cowfs.store.format.foreign import pair_in
from cowfs.store.format.header import USER
from cowfs.store.format.sniff import split_subdir
from cowfs.types import DATA_ONLY
from cowfs.url.names import is_url

_PLACE = "/run/cowfs-kernel"
_MOUNTED = {"directory", "squashfs", "erofs"}
"""The kinds of lowers that the kernel mounts. For others, mount(8) would start programs."""
_LONGEST = 255
"""Bytes of the longest option that mount(8) can pass with fsconfig(2)."""


def commands(
    path: str,
    kind: str,
    prefix: str,
    uuid: str,
    lowers: Sequence[dict[str, Any]],
    below: Sequence[int],
) -> list[str]:
    """Return lines for a shell, to be run by root while nobody uses the store at *path*.

    *lowers* are those of the header, *below* the layers of checkpoints, each topmost first. The lines mount
    the tree at ``$MOUNTPOINT``, or /mnt, and images below /run. All values of the header are quoted.
    """
    lines, place = [], f"{_PLACE}/{re.sub('[^0-9A-Za-z-]', '_', uuid[:8])}"
    joined = ":".join(f"cowfs/layers/{number}" for number in below)
    for number, lower in enumerate(lowers):
        at = str(lower["path"])
        if is_url(at):
            raise LayerError(
                f"{at}: the kernel cannot read by URL", "download the image, and mount that once"
            )
        if lower["kind"] == "tar":
            raise LayerError(f"{at}: the kernel mounts no tar archives", f"tar2sqfs IMAGE <{at}")
        if lower["kind"] in {"zip", "iso9660"}:
            what = "zip archives" if lower["kind"] == "zip" else "ISO 9660 images with a store"
            raise LayerError(
                f"{at}: the kernel mounts no {what}", "unpack it, and make an image of that with mksquashfs"
            )
        if lower["kind"] not in _MOUNTED or not at.startswith("/"):
            raise LayerError(f"{at}: the kernel mounts no {lower['kind']} of this name")
        if lower["kind"] == "squashfs":
            _check(at, lower.get("offset"))
        if lower["kind"] != "directory":
            source, at = at, f"{place}/lower{number}"
            offset = f",offset={lower['offset']}" if lower.get("offset") else ""
            lines.append(shlex.join(["mkdir", "-p", at]))
            mount = ["mount", "-t", str(lower["kind"]), "-o", f"ro,loop{offset}", source, at]
            lines.append(shlex.join(mount))
        between = "::" if str(lower["fingerprint"]).startswith(DATA_ONLY) else ":" if joined else ""
        joined += between + _escaped(at)
    store = path
    if kind == "image":
        image, subdir = split_subdir(path)
        at = f"{place}/store"
        lines.append(shlex.join(["mkdir", "-p", at]))
        lines.append(shlex.join(["mount", "-t", "ext3", "-o", "loop", image, at]))
        store = os.path.join(at, subdir) if subdir else at
    features = "userxattr,index=on" if prefix == USER else "redirect_dir=on,metacopy=on,index=on,xino=on"
    upper, work = "upper", "work"
    if kind == "directory" and (pair := pair_in(path)) is not None:
        store = os.path.commonpath(pair)
        upper, work = (_escaped(os.path.relpath(one, store)) for one in pair)
    options = f"lowerdir={joined},upperdir={upper},workdir={work},{features}"
    how = "LIBMOUNT_FORCE_MOUNT2=always " if len(os.fsencode(joined)) > _LONGEST else ""
    lines.append(
        f"cd {shlex.quote(store)} &&"
        f' {how}mount -t overlay overlay "${{MOUNTPOINT:-/mnt}}" -o {shlex.quote(options)}'
    )
    return lines


def _check(path: str, offset: Any) -> None:
    """LayerError if this kernel cannot mount the image at *path*; a missing image is not checked."""
    try:
        why, _ = refused(path, offset if isinstance(offset, int) else 0)
    except (LayerError, OSError, ValueError):
        return
    if why:
        raise LayerError(f"{path}: {why}", "make a new image of its files with mksquashfs, or use cowfs")


def _escaped(path: str) -> str:
    """Return a path for the list of lowers, with a backslash before each separator in it."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
