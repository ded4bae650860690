"""How times and paths are written in JSON, and times for people."""

from __future__ import annotations

import base64
import time
from datetime import UTC, datetime
from typing import Any


def stamp(microseconds: int) -> str:
    """Return a time since the epoch as ISO 8601 has it, UTC, with microseconds. ValueError, OverflowError."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"


def local_time(seconds: float) -> str:
    """Return a time since the epoch as people read it: date and time of their zone, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def to_local_time(text: str) -> str:
    """Return a time in ISO 8601 as :func:`local_time` writes it; *text*, which others may have written, if it
    is none."""
    try:
        return local_time(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        return text


def whole(value: object, most: int, least: int = 0) -> int:
    """Return a number of JSON that others may have written. ValueError if it is none of this range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(value)
    return value


def text(name: bytes) -> str:
    """Return a name as a string from which :func:`raw` has it back, whatever the locale is."""
    return name.decode("utf-8", "surrogateescape")


def raw(text: str) -> bytes:
    """Return the name that :func:`text` made a string of. ValueError."""
    return text.encode("utf-8", "surrogateescape")


def put_path(entry: dict[str, Any], name: str, path: bytes) -> None:
    """Put a path into an object; one that is not UTF-8 is readable there, and exact in NAME_b64."""
    try:
        entry[name] = path.decode()
    except UnicodeDecodeError:
        entry[name] = path.decode(errors="replace")
        entry[f"{name}_b64"] = base64.b64encode(path).decode()


def get_path(entry: dict[str, Any], name: str) -> bytes:
    """Return the path that :func:`put_path` put there. KeyError, TypeError, ValueError, AttributeError."""
    exact = entry.get(f"{name}_b64")
    return base64.b64decode(exact, validate=True) if exact is not None else entry[name].encode()
