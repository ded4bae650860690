"""How files on servers are read."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_LIMIT = 2 << 30
"""How many bytes of the disk are used, but at most half of the free space."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How files on servers are read."""

    patience: float = 600.0
    """Seconds that a read waits for a server that does not answer."""
    cache: str | None = None
    """Where blocks are kept on the disk; "" for nowhere, None for the user's usual place."""
    cache_size: int = DEFAULT_LIMIT
    """Bytes of all files there."""
