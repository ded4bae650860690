"""What a damaged image answers with."""

from __future__ import annotations

import errno

AGAIN = "download or copy it again, and compare its checksum"
"""What helps when an image is not whole."""


class DamagedImage(OSError):
    """EIO: something in the image points outside, contradicts itself or does not decompress.

    The message names the place. It is logged where it is found (:meth:`Source.damaged`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)


class CodecError(Exception):
    """A compressed block is damaged, or larger than its place allows. Never leaves this package."""
