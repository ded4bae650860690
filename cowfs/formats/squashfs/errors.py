"""The exceptions for a damaged image."""

from __future__ import annotations

import errno

AGAIN = "download or copy it again, and compare its checksum"
"""The hint for a truncated or damaged image."""


class DamagedImage(OSError):
    """EIO: something in the image points outside, contradicts itself or does not decompress.

    The message names the position. :meth:`Source.damaged` logs it and returns this exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)


class CodecError(Exception):
    """A compressed block is damaged, or larger than allowed. Not raised outside this package."""
