"""What is a URL, and how to write it among other lowers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from cowfs.errors import UsageError
from cowfs.linux.files import absolute

_START = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/?#\\]*")
"""Up to where a colon belongs to the URL: to its scheme, its port, or an address of IPv6."""


def is_url(text: str) -> bool:
    """Whether the name of a lower is a URL, with a scheme and ``://``. ./ before it makes it a path."""
    return _START.match(text) is not None


def authority(text: str) -> str:
    """Return the leading part of a URL in which a colon does not separate lowers; "" if *text* is no URL."""
    match = _AUTHORITY.match(text)
    return match[0] if match else ""


def place(text: str) -> str:
    """Return the absolute path or the URL of a lower. SystemFailure as :func:`absolute`."""
    return text if is_url(text) else absolute(text)


def check(url: str) -> None:
    """UsageError for a URL that cannot be used, or that would expose a password to everybody."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        hint = "write it as https://HOST/PATH or https://HOST:PORT/PATH"
        raise UsageError(f"{url}: the host or the port is not valid", hint) from None
    if parts.password is not None or (parts.scheme in {"http", "https"} and parts.username is not None):
        shown = url.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)
        raise UsageError(f"{shown}: a login in a URL is shown to all users", "write it into ~/.netrc")
    if not parts.netloc and parts.scheme != "file":
        raise UsageError(f"{url}: names no host", f"write it as {parts.scheme}://HOST/PATH")
    if port == 0 or parts.path in {"", "/"}:
        raise UsageError(f"{url}: names no file", f"write it as {parts.scheme}://HOST/PATH")
    if any(ord(character) <= 32 or ord(character) == 127 for character in url):
        raise UsageError(f"{url!r}: a URL has no spaces in it", "write a space as %20")
