"""Which file an image was last written in: how a copy is known that was made while it was in use.

An image that is open says so in its superblock. A copy of it says the same, and its parts are of different
moments: it was read from a file that was written to meanwhile. So does an image whose user was killed, and
that is sound. They differ in where they are: the directory ``cowfs/`` of an image has an attribute that tells
which file (:func:`cowfs.store.identity.identify_file`) it was in when it was last opened to be written to.
"""

from __future__ import annotations

from contextlib import suppress

from cowfs.errors import StoreError
from cowfs.layers.base import UpperLayer
from cowfs.store import layout
from cowfs.store.identity import identify_file

ATTRIBUTE = b"trusted.overlay.cowfs.file"
"""Of ``cowfs/``. In an image everybody may have it."""


def noted(layer: UpperLayer) -> str:
    """Return the file that the image was in; "" if that is not known."""
    with suppress(OSError):
        private = layout.find(layer, layout.PRIVATE)
        if private is not None and ATTRIBUTE in layer.listxattr(private):
            return layer.getxattr(private, ATTRIBUTE).decode(errors="replace")
    return ""


def note(layer: UpperLayer, fd: int) -> None:
    """Write down that the image is in the file *fd* now; it is on disk when this returns. Blocks.

    Without room for it nothing is written, and nothing known at the next time.
    """
    here = identify_file(fd)
    if noted(layer) == here:
        return
    with suppress(OSError):
        private = layout.find(layer, layout.PRIVATE)
        layer.removexattr(private, ATTRIBUTE) if not here else layer.setxattr(
            private, ATTRIBUTE, here.encode()
        )
        layer.sync()


def is_copy(layer: UpperLayer, fd: int) -> bool | None:
    """Say whether the image in the file *fd* was in another one when it was written to; None: not known."""
    before, here = noted(layer), identify_file(fd)
    return before != here if before and here else None


def torn(path: str) -> StoreError:
    """Return what is to be told of an image that needs recovery and is a copy."""
    return StoreError(
        f"{path}: a copy of a store that was in use, in which files may be incomplete",
        f"unmount the store and copy it again; or cowfs check {path}, and this is taken as it is",
    )
