"""A file on a web server, read by ranges (RFC 9110), over one persistent connection per thread.

Each answer tells its version of the file, so data of another version is never used.
"""

from __future__ import annotations

import base64
import http.client
import io
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from email.utils import parsedate_to_datetime
from hashlib import sha256
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from cowfs.url.protocol import BEGINNING, Refused, Unreachable, Version

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Login = Callable[[str], tuple[str, str] | None]
"""Return the user and the password for a host, if any are known."""

_REDIRECTS = {301, 302, 303, 307, 308}
_MOST_REDIRECTS = 10
_MOST_SAID = 200
"""Characters of what a server says that a message repeats."""
_LATER = {408, 425, 429, 500, 502, 503, 504}
"""Status codes after which a later request may succeed."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_LENGTH = re.compile(r"\d{1,18}")
_WHOLE = re.compile(r"bytes \*/(\d{1,18})")
_MARKS = ("ETag", "Last-Modified")
_START = 4096
_LONGEST_WAIT = 60.0
_LONGEST_HEAD = 64 << 10
"""Bytes of the head of an answer, with everything that comes before it."""
_SLOWEST = 120.0
"""Seconds in which all of an answer must have come."""
_KEPT = "%/:?#[]@!$&'()*+,;=~"
"""Characters that a URL keeps, besides letters, digits and -._; all others become %XX (RFC 3986)."""
_DRAINED = 4096
"""An unwanted answer is read if it has at most this many bytes; otherwise the connection is closed."""

NO_RANGES = "the server only sends whole files: it does not take range requests"
NO_RANGES_HINT = "download the image first, or serve it by nginx, Apache, lighttpd or Caddy"


class _Moved(Exception):
    """The server redirects to another URL."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


class _TooSlow(TimeoutError):
    """The server sends something, but not all of the answer in time."""


class _LongHead(http.client.HTTPException):
    """The server sends more before the body than any head has: 100 Continue without end, perhaps."""


class _Thread(threading.local):
    """The connection of a thread, and the URL at which it found the file."""

    connection: http.client.HTTPConnection | None = None
    until: float = 0.0
    """When all of the answer must have come."""
    place: tuple[str, str] = ("", "")
    url = ""


class _Timed(io.RawIOBase):
    """What comes from a socket in time: a timeout of the socket alone begins anew with each byte."""

    def __init__(self, sock: socket.socket, until: Callable[[], float]) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._until = until
        self._has_begun = False
        self.head_left: int | None = _LONGEST_HEAD
        """How many more bytes may come before the body; None once the head is complete."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self._until() - time.monotonic()
        if left <= 0:
            raise _TooSlow
        if self.head_left is not None and self.head_left <= 0:
            raise _LongHead
        if left < (self._sock.gettimeout() or 0):
            self._sock.settimeout(left)
        try:
            got = self._raw.readinto(buffer)
        except TimeoutError:
            raise _TooSlow if self._has_begun else TimeoutError from None
        self._has_begun = True
        if self.head_left is not None:
            self.head_left -= got or 0
        return got

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that must come in time, and with a head of limited length."""

    def __init__(self, until: Callable[[], float], sock: socket.socket, *how: object, **more: object) -> None:
        super().__init__(sock, *how, **more)  # type: ignore[arg-type]
        self.fp.close()
        self._timed = _Timed(sock, until)
        self.fp = io.BufferedReader(self._timed)

    def begin(self) -> None:
        """Read the head. HTTPException, OSError."""
        super().begin()
        self._timed.head_left = None


class HttpFile:
    """A file on a web server. For any thread; each has its own connection."""

    def __init__(self, url: str, login: Login, timeout: float) -> None:
        """*timeout*: the seconds within which the server must send something.

        Each method returns, or fails, before *until*, a time of time.monotonic().
        """
        self._url = url
        self._login = login
        self._timeout = timeout
        self._mine = _Thread()
        self._tls: ssl.SSLContext | None = None

    def version(self, until: float) -> Version:
        """Return the version of the file on the server. Blocks; Refused, Unreachable.

        If the server sends nothing that identifies a version, the beginning of the file identifies it.
        """
        version, start = self._ask(0, _START, None, until)
        return version if version.marks else Version(version.size, ((BEGINNING, sha256(start).hexdigest()),))

    def read(self, start: int, length: int, version: Version, until: float) -> bytes:
        """Return bytes of this version of the file. Blocks. Refused if the file has changed; Unreachable."""
        if version.marks[0][0] != BEGINNING:
            return self._ask(start, length, version, until)[1]
        data = self._ask(start, length, Version(version.size, ()), until)[1]
        found = self.version(until)  # later: so that what was read before is of this one
        if found != version:
            raise changed(version, found)
        return data

    def _ask(self, start: int, length: int, version: Version | None, until: float) -> tuple[Version, bytes]:
        known = bool(self._mine.url)
        try:
            return self._follow(start, length, version, until)
        except Refused as error:
            if error.changed or not known:
                raise
        except Unreachable:
            self._drop()
            if not known or time.monotonic() >= until:
                raise
        # A redirect's target may be gone, or an old connection closed: start again once.
        self._drop()
        try:
            return self._follow(start, length, version, until)
        except Unreachable:
            self._drop()
            raise

    def _follow(
        self, start: int, length: int, version: Version | None, until: float
    ) -> tuple[Version, bytes]:
        mine = self._mine
        url = mine.url or self._url
        for _ in range(_MOST_REDIRECTS):
            try:
                found = self._once(url, start, length, version, until)
            except _Moved as moved:
                url = self._allowed(url, moved.url)
                continue
            mine.url = url
            return found
        raise Refused(f"leads on more than {_MOST_REDIRECTS} times", "give the URL of the file itself")

    def _allowed(self, from_: str, to: str) -> str:
        try:
            url = urljoin(from_, to)
            parts = urlsplit(url)
            scheme, _ = parts.scheme, parts.port  # ValueError for a port beyond 65535, too
        except ValueError:
            raise Refused("leads to something that is no URL", "give the final URL") from None
        if scheme not in {"http", "https"} or (scheme == "http" and from_.startswith("https:")):
            raise Refused(f"leads to {_cut(url)}, which is less secure", "give the final URL")
        return url

    def _once(
        self, url: str, start: int, length: int, version: Version | None, until: float
    ) -> tuple[Version, bytes]:
        try:
            connection, target, headers = self._connected(urlsplit(url))
            self._limit(connection, until)
            headers["Range"] = f"bytes={start}-{start + length - 1}"
            connection.request("GET", target, headers=headers)
            with closing(connection.getresponse()) as answer:
                found = self._judge(url, answer, start, length, version)
                data = answer.read(length + 1)  # read no more, even if the server sends more
        except ssl.SSLCertVerificationError as error:
            raise Refused(
                f"its certificate cannot be verified: {error.verify_message}",
                "check the host's name and the clock; update-ca-certificates(8) adds an authority",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(_said(error)) from None
        if len(data) > length:
            raise Unreachable("the server sends more than was asked for")
        if len(data) != min(length, found.size - start):
            raise Unreachable(f"the answer was cut short: {len(data)} of {length} bytes")
        return found, data

    def _limit(self, connection: http.client.HTTPConnection, until: float) -> None:
        """Let all that comes next over a connection end before *until*. TimeoutError."""
        now = time.monotonic()
        if now >= until:
            raise TimeoutError
        self._mine.until = min(until, now + _SLOWEST)
        connection.timeout = min(self._timeout, until - now)
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)

    def _response(self, sock: socket.socket, *how: object, **more: object) -> http.client.HTTPResponse:
        """Return an answer that must come in time."""
        mine = self._mine
        return _Answer(lambda: mine.until, sock, *how, **more)

    def _judge(
        self,
        url: str,
        answer: http.client.HTTPResponse,
        start: int,
        length: int,
        version: Version | None,
    ) -> Version:
        """Return the version of the file in an answer, after checking that it is what was requested."""
        try:
            found = self._found(answer, start, length, version)
        except BaseException:
            if (answer.length or 0) > _DRAINED or answer.chunked or answer.length is None:
                self._drop()
            else:
                answer.read()
            raise
        if version is not None and found != version:
            self._drop()
            raise changed(version, found)
        return found

    def _found(
        self, answer: http.client.HTTPResponse, start: int, length: int, version: Version | None
    ) -> Version:
        status = answer.status
        location = answer.getheader("Location")
        if status in _REDIRECTS and location:
            raise _Moved(location)
        if status in _LATER:
            raise Unreachable(f"the server answers {_reason(answer)}", _wait(answer))
        marks = tuple((name, value) for name in _MARKS if (value := answer.getheader(name)))
        if status == HTTPStatus.PARTIAL_CONTENT:
            match = _RANGE.fullmatch(answer.getheader("Content-Range", "").strip())
            if answer.getheader("Content-Encoding", "identity") != "identity":
                raise Refused("the server compresses what it sends", "switch that off there for this file")
            if match is None:
                raise Refused("the server does not say which bytes it sends, of how many", NO_RANGES_HINT)
            first, last, size = map(int, match.groups())
            if first != start or last != min(start + length, size) - 1:
                if version is not None and size != version.size:
                    return Version(size, marks)
                raise Unreachable(f"the server sent bytes {first}-{last}, which are not those asked for")
            return Version(size, marks)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            match = _WHOLE.fullmatch(answer.getheader("Content-Range", "").strip())
            size = int(match[1]) if match else 0
            if version is not None and size != version.size:
                return Version(size, marks)
            raise Refused("is empty" if not size else NO_RANGES, "" if not size else NO_RANGES_HINT)
        if status == HTTPStatus.OK:
            length_said = _LENGTH.fullmatch(answer.getheader("Content-Length", "").strip())
            size = int(length_said[0]) if length_said else -1
            if version is not None and size >= 0 and Version(size, marks) != version:
                return Version(size, marks)
            raise Refused("is empty" if size == 0 else NO_RANGES, "" if size == 0 else NO_RANGES_HINT)
        raise _refusal(answer)

    def _connected(self, url: SplitResult) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Return a connection to the server of a URL, the request target, and its headers."""
        mine = self._mine
        host = url.hostname or ""
        asked = (url.path or "/") + (f"?{url.query}" if url.query else "")
        target = quote(asked, safe=_KEPT)
        headers = {"Accept-Encoding": "identity", "User-Agent": "cowfs"}
        login = self._login(host)
        if login is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        proxy = _proxy(url.scheme, url.netloc)
        if proxy is not None and url.scheme == "http":
            target = quote(urlunsplit((*url[:4], "")), safe=_KEPT)
        if mine.connection is None or mine.place != (url.scheme, url.netloc):
            self._disconnect()
            mine.connection = self._connect(url, host, proxy)
            mine.connection.response_class = self._response  # type: ignore[assignment]
            mine.place = (url.scheme, url.netloc)
        return mine.connection, target, headers

    def _connect(self, url: SplitResult, host: str, proxy: SplitResult | None) -> http.client.HTTPConnection:
        usual = http.client.HTTP_PORT if url.scheme == "http" else http.client.HTTPS_PORT
        port = url.port or usual  # without a number, http.client takes the end of an IPv6 address for it
        to, its = (host, port) if proxy is None else (proxy.hostname or "", proxy.port or usual)
        if url.scheme == "http":
            return http.client.HTTPConnection(to, its, timeout=self._timeout)
        if self._tls is None:
            self._tls = ssl.create_default_context()
        connection = http.client.HTTPSConnection(to, its, timeout=self._timeout, context=self._tls)
        if proxy is not None:
            connection.set_tunnel(host, port)
        return connection

    def _disconnect(self) -> None:
        connection, self._mine.connection = self._mine.connection, None
        if connection is not None:
            connection.close()

    def _drop(self) -> None:
        """Drop the connection; the next request opens a new one."""
        self._mine.url = ""
        self._disconnect()


def changed(version: Version, found: Version) -> Refused:
    """Return the exception for a file that has changed."""
    return Refused(
        f"is another file than the one that was opened: {_cut(f'{found}')}, not {_cut(f'{version}')}",
        "put the old one back, or unmount, and mount the new one",
        changed=True,
    )


def _refusal(answer: http.client.HTTPResponse) -> Refused:
    status, reason = answer.status, _reason(answer)
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}:
        return Refused(f"the server wants a login ({reason})", "write user and password into ~/.netrc")
    if status == HTTPStatus.FORBIDDEN:
        return Refused(f"the server does not allow it ({reason})", "check the URL, and the login in ~/.netrc")
    if status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
        return Refused(f"the server has no such file ({reason})", "check the URL")
    return Refused(f"the server answers {reason}", "check the URL")


def _reason(answer: http.client.HTTPResponse) -> str:
    return f"{answer.status} {_cut(answer.reason)}".strip()


def _cut(said: str) -> str:
    """Return what a server says, as much of it as a message has room for."""
    return said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."


def _wait(answer: http.client.HTTPResponse) -> float:
    """Return the seconds that Retry-After says, as a number or as a date; 0 if it says nothing valid."""
    said = answer.getheader("Retry-After", "")
    if said.isdecimal():
        return min(float(said), _LONGEST_WAIT)
    try:
        seconds = parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, min(seconds, _LONGEST_WAIT))


def _said(error: Exception) -> str:
    if isinstance(error, _TooSlow):
        return "its answer does not come in time"
    if isinstance(error, _LongHead):
        return f"the head of its answer has more than {_LONGEST_HEAD >> 10} KiB"
    if isinstance(error, TimeoutError):
        return "the server does not answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    if isinstance(error, socket.gaierror):
        return f"its host is not known: {error.strerror}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"the server's answer is not HTTP: {_cut(str(error)) or type(error).__name__}"


def _proxy(scheme: str, netloc: str) -> SplitResult | None:
    proxy = urllib.request.getproxies_environment().get(scheme)
    if not proxy or urllib.request.proxy_bypass(netloc):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")
