"""Open the lowers of a union: directories, and images in files or at URLs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import zip_longest

from cowfs.errors import LayerError, SystemFailure
from cowfs.formats import archives, erofs
from cowfs.formats.squashfs.by_kernel import refused
from cowfs.formats.squashfs.source import open_bytes
from cowfs.layers.archive import ArchiveLayer
from cowfs.layers.base import LowerLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.iso9660 import Iso9660Layer
from cowfs.layers.module import ModuleLayer
from cowfs.layers.shared_directory import SharedDirectoryLayer
from cowfs.layers.slow import SlowLayer
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.layers.tar import TarLayer
from cowfs.layers.zip import ZipLayer
from cowfs.linux.loop_devices import attach_loop
from cowfs.linux.mounts import detached_mount
from cowfs.linux.remote import may_wait
from cowfs.overlay.named_whiteouts import NamedWhiteouts, reworded
from cowfs.types import lower_uuid
from cowfs.url.names import is_url, place

_ARCHIVES = {"tar": TarLayer, "zip": ZipLayer, "iso9660": Iso9660Layer}


def open_lower(spec: str, engine: str = "auto", offset: int = 0, whiteouts: str = "overlayfs") -> LowerLayer:
    """Open one lower layer: a directory, or the image that begins *offset* bytes into a file or a URL.

    *whiteouts* is the format of its whiteouts.

    Raises LayerError if it is neither, SystemFailure if the engine is not available.
    """
    layer = _open_lower(spec, engine, offset)
    if isinstance(layer, SlowLayer):
        layer.inner = reworded(layer.inner, whiteouts)
        return layer
    return reworded(layer, whiteouts)


def _open_lower(spec: str, engine: str, offset: int) -> LowerLayer:
    if is_url(spec):
        if engine == "kernel":
            raise LayerError(f"{spec}: the kernel cannot read by URL", "use --engine process")
        return SlowLayer(_by_url(spec, offset), knows_at_once=True)
    if os.path.isdir(spec) and not offset:
        fd, waits = _look_at(spec, os.O_DIRECTORY)
        return _directory(fd, spec, waits=waits)
    fd, waits = _look_at(spec)
    os.close(fd)
    with closing(open_bytes(spec)) as data:
        head = data.pread(archives.SAMPLE, offset)
    if not offset and (kind := archives.kind_of(head)):
        archive = _ARCHIVES[kind](os.path.abspath(spec))
        return SlowLayer(archive) if waits else archive
    if engine != "kernel":
        image = SquashfsLayer(os.path.abspath(spec), offset=offset)
        return SlowLayer(image) if waits else image
    if os.geteuid() != 0:
        raise SystemFailure(
            f"{spec}: only root can use the kernel engine", "--engine process works without root"
        )
    is_erofs = erofs.is_erofs(head)
    why, hint = ("", "") if is_erofs else refused(spec, offset)
    if why:
        raise LayerError(f"{spec}: {why}", hint)
    try:
        return _kernel_mounted(spec, "erofs" if is_erofs else "squashfs", offset, waits=waits)
    except OSError as error:
        missing = "this kernel has no EROFS: modprobe erofs" if error.errno == errno.ENODEV else ""
        raise LayerError(f"{spec}: cannot be mounted: {error.strerror or error}", missing) from None


def _by_url(spec: str, offset: int) -> LowerLayer:
    """Open the image or the archive that a URL names. LayerError."""
    try:
        # Held open until the layer has opened it too: one process fetches for both.
        with closing(open_bytes(spec)) as data:
            kind = "" if offset else archives.kind_of(data.pread(archives.SAMPLE, 0))
            return _ARCHIVES[kind](spec) if kind else SquashfsLayer(spec, offset=offset)
    except OSError as error:
        raise LayerError(error.strerror or str(error)) from None


def _look_at(spec: str, flags: int = 0) -> tuple[int, bool]:
    """Return a descriptor (O_PATH) of the path, and whether reading it can wait for others."""
    try:
        with ExitStack() as stack:
            fd = os.open(spec, os.O_PATH | flags)
            stack.callback(os.close, fd)
            waits = may_wait(fd)
            stack.pop_all()
            return fd, waits
    except OSError as error:
        raise LayerError(f"{spec}: {error.strerror}") from None
    raise AssertionError("not reached")


def _directory(fd: int, spec: str, *, waits: bool, alone: bool = False) -> LowerLayer:
    """Return a layer that shows the directory *fd*; if it *waits* for others, one that threads can share."""
    name = os.path.abspath(spec)
    if not waits:
        layer = DirectoryLayer(fd, name, alone=alone)
        layer.separate_names()
        return layer
    shared = SharedDirectoryLayer(fd, name, alone=alone)
    shared.separate_names()
    return SlowLayer(shared)


def _kernel_mounted(spec: str, kind: str, offset: int, *, waits: bool) -> LowerLayer:
    loop_fd, device = attach_loop(spec, readonly=True, offset=offset)
    try:
        fd = detached_mount(kind, device, {}, readonly=True, noatime=True)
    finally:
        os.close(loop_fd)
    return _directory(fd, spec, waits=waits, alone=True)


def open_lowers(
    specs: Sequence[str],
    engine: str = "auto",
    offsets: Sequence[int] = (),
    data_only: int = 0,
    whiteouts: Sequence[str] = (),
) -> list[LowerLayer]:
    """Open all lower layers, or none.

    *offsets* are those of the first ones; the last *data_only* layers are data-only. *whiteouts* has the
    format of the whiteouts of each (:attr:`cowfs.types.Identity.whiteouts`).
    """
    layers: list[LowerLayer] = []
    try:
        for spec, offset, style in zip_longest(specs, offsets, whiteouts):
            layers.append(open_lower(str(spec), engine, offset or 0, style or "overlayfs"))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    for layer in layers[len(layers) - data_only :]:
        layer.data_only = True
    _tell_apart(layers)
    return layers


def _tell_apart(layers: Sequence[LowerLayer]) -> None:
    """Make all handles of *layers* (topmost first) unique: images have no UUID, and disks can be cloned."""
    known: dict[bytes, int] = {}
    for number, layer in enumerate(reversed(layers)):
        bare = layer
        while isinstance(bare, SlowLayer | NamedWhiteouts):
            bare = bare.inner
        if not isinstance(bare, DirectoryLayer | SquashfsLayer | ArchiveLayer):
            continue
        if known.setdefault(bare.uuid, bare.dev) != bare.dev:
            bare.uuid = lower_uuid(number)
            bare.number = len(layers) - 1 - number


def open_module(spec: str, offset: int) -> LowerLayer:
    """Open an image as a module; LayerError if it is not one."""
    waits = is_url(spec)
    if not waits:
        fd, waits = _look_at(spec)
        os.close(fd)
    layer = ModuleLayer(place(spec), offset=offset)
    if not waits:
        return layer
    slow = SlowLayer(layer, knows_at_once=is_url(spec))
    slow.has_notes = True
    return slow
