"""A web server on the loopback interface that serves ranges of files, and misbehaves as tests require."""

from __future__ import annotations

import base64
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_PIECE = 128 << 10


@dataclass
class Behaviour:
    """How the server behaves. It may be changed at any time."""

    files: dict[str, bytes] = field(default_factory=dict)
    """The content of the files, by path."""
    etag: str | None = '"first"'
    modified: str | None = "Sat, 01 Aug 2026 10:00:00 GMT"
    ranges: bool = True
    login: tuple[str, str] | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    status: int = 0
    """If not 0, the status of every reply."""
    latency: float = 0.0
    failures: float = 0.0
    """The share of requests whose connection is reset, 0 to 1."""
    cut: int = 0
    """The number of bytes that are missing at the end of each reply."""
    away: threading.Event = field(default_factory=threading.Event)
    """While it is set, every connection is reset."""
    stalls: threading.Event = field(default_factory=threading.Event)
    """While it is set, requests wait for their reply."""
    endless: bool = False
    """Whether replies never end."""
    encoding: str = ""
    """The Content-Encoding header of replies, if any."""
    bandwidth: float = 0.0
    """Bytes per second for all clients together; 0 for no limit."""


@dataclass
class Served:
    """What clients have requested."""

    requests: int = 0
    bytes: int = 0
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    waiting: int = 0
    under_way: int = 0
    most_under_way: int = 0
    """The highest number of requests that were served at the same time."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.served = Served()
        self.over = threading.Event()
        self.free_at = 0.0
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        served = self.server.served
        with served.lock:
            served.under_way += 1
            served.most_under_way = max(served.most_under_way, served.under_way)
        try:
            self._get(self.server.behaviour, served)
        finally:
            with served.lock:
                served.under_way -= 1

    def _get(self, behaviour: Behaviour, served: Served) -> None:
        self.path = unquote(self.path.partition("?")[0])
        with served.lock:
            served.requests += 1
            served.waiting += 1
        try:
            while behaviour.stalls.is_set() and not self.server.over.wait(0.01):
                pass
        finally:
            with served.lock:
                served.waiting -= 1
        if behaviour.latency:
            time.sleep(behaviour.latency)
        if behaviour.away.is_set() or random.random() < behaviour.failures:
            self._reset()
        elif behaviour.status:
            self._reply(behaviour.status)
        elif self.path in behaviour.redirects:
            self._reply(302, Location=behaviour.redirects[self.path])
        elif behaviour.login and self.headers["Authorization"] != _basic(*behaviour.login):
            self._reply(401, **{"WWW-Authenticate": 'Basic realm="x"'})
        elif self.path not in behaviour.files:
            self._reply(404)
        else:
            self._file(behaviour.files[self.path], behaviour, served)

    def _file(self, data: bytes, behaviour: Behaviour, served: Served) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        headers = {"Content-Type": "application/octet-stream"}
        if behaviour.etag:
            headers["ETag"] = behaviour.etag
        if behaviour.modified:
            headers["Last-Modified"] = behaviour.modified
        if behaviour.encoding:
            headers["Content-Encoding"] = behaviour.encoding
        start, end, status = 0, len(data), 200
        if match and behaviour.ranges:
            start, end = int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                self._reply(416, **headers, **{"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not behaviour.endless:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with served.lock:
            served.bytes += end - start
            served.ranges.append((self.path, start, end))
        end = max(end - behaviour.cut, start)
        whole = memoryview(data)
        while start < end:
            piece = whole[start : min(start + _PIECE, end)]
            if behaviour.bandwidth:
                self._wait_for_turn(len(piece) / behaviour.bandwidth)
            self.wfile.write(piece)
            start += len(piece)
        while behaviour.endless and not self.server.over.is_set():
            self.wfile.write(bytes(_PIECE))
        if behaviour.cut:
            self._reset()

    def _wait_for_turn(self, seconds: float) -> None:
        """Use the line for *seconds*. All connections share it, piece by piece."""
        with self.server.served.lock:
            self.server.free_at = max(self.server.free_at, time.monotonic()) + seconds
            wait = self.server.free_at - time.monotonic()
        time.sleep(max(wait, 0))

    def _reply(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass
class FileServer:
    """A running server."""

    behaviour: Behaviour
    served: Served
    port: int
    scheme: str

    def url(self, path: str = "/root.sqsh") -> str:
        """Return the URL of a path."""
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"


@contextmanager
def serving(
    image: Path | None = None, behaviour: Behaviour | None = None, certificate: Path | None = None
) -> Iterator[FileServer]:
    """Serve *image* as ``/root.sqsh``; with TLS if *certificate* is a file with a certificate and its key."""
    behaviour = behaviour or Behaviour()
    if image is not None:
        behaviour.files["/root.sqsh"] = image.read_bytes()
    server = _Server(behaviour)
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        scheme = "http" if certificate is None else "https"
        yield FileServer(behaviour, server.served, server.server_address[1], scheme)
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
