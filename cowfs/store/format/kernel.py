"""The commands with which the kernel's overlayfs shows what a store and its lowers hold."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from cowfs.errors import LayerError
from cowfs.store.format.header import USER
from cowfs.store.format.sniff import split_subdir
from cowfs.types import DATA_ONLY
from cowfs.url.names import is_url

_PLACE = "/run/cowfs-kernel"
_MOUNTED = {"directory", "squashfs", "erofs"}
"""The kinds of lowers that it mounts. For others mount(8) would start programs."""
_LONGEST = 255
"""Bytes of an option that mount(8) hands over by fsconfig(2)."""


def commands(
    path: str, kind: str, prefix: str, uuid: str, lowers: Sequence[dict[str, Any]], below: Sequence[int]
) -> list[str]:
    """Return lines for a shell, to be run by root while nobody uses the store at *path*.

    *lowers* are those of the header, *below* the layers of checkpoints, each topmost first. The tree is
    mounted at ``$MOUNTPOINT``, or /mnt; images in directories of their own below /run. All of it is data:
    a word of the header stays one word.
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
    options = f"lowerdir={joined},upperdir=upper,workdir=work,{features}"
    how = "LIBMOUNT_FORCE_MOUNT2=always " if len(os.fsencode(joined)) > _LONGEST else ""
    lines.append(
        f"cd {shlex.quote(store)} &&"
        f' {how}mount -t overlay overlay "${{MOUNTPOINT:-/mnt}}" -o {shlex.quote(options)}'
    )
    return lines


def _escaped(path: str) -> str:
    """Return a path for the list of lowers: what would end it there has a backslash before it."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
