"""Reading a file on a server: whatever the server does, the data is right, or there is an error."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cowfs.cli.options import join_lowers, split_layers, split_lowers
from cowfs.errors import CowfsError, LayerError, UsageError
from cowfs.url import http, names, opened
from cowfs.url.http import HttpFile
from cowfs.url.link import Link
from cowfs.url.opened import Opened, open_url
from cowfs.url.protocol import LONGEST, Kind, Refused, Unreachable, Version, pack, unpack
from cowfs.url.remote import BLOCK
from cowfs.url.settings import Settings
from cowfs.url.waiting import WouldWait, at_once
from tests.support.fileserver import FileServer, serving
from tests.support.mounts import eventually
from tests.support.system import run

DATA = random.Random(1).randbytes(40 * BLOCK + 4567)
OTHER = random.Random(2).randbytes(len(DATA))


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        server.behaviour.files["/root.sqsh"] = DATA
        yield server


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Nothing is cached on disk unless a test asks for it."""

    def set_to(**how: object) -> None:
        monkeypatch.setattr(opened, "_settings", Settings(**{"patience": 60.0, "cache": "", **how}))  # type: ignore[arg-type]

    set_to()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return set_to


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start *call* in a thread; its result or exception is appended to the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def fetcher_of(file: Opened) -> int:
    """Return the fetcher process, which a helper process has forked."""
    above = file.file._link._process.pid
    children = Path(f"/proc/{above}/task/{above}/children")
    eventually(lambda: children.read_text().split(), "a process that fetches")
    return int(children.read_text().split()[0])


def test_reads_what_the_server_has(server: FileServer) -> None:
    with closing(open_url(server.url())) as file:
        assert file.size == len(DATA)
        chance = random.Random(3)
        for _ in range(100):
            at, size = chance.randrange(len(DATA) + 10), chance.choice([1, 96, 5000, 3 * BLOCK])
            assert file.pread(size, at) == DATA[at : at + size]
        assert server.served.bytes < 2 * len(DATA)


def test_who_reads_on_waits_seldom(server: FileServer) -> None:
    server.behaviour.latency = 0.02
    with closing(open_url(server.url())) as file:
        assert b"".join(file.pread(20_000, at) for at in range(0, len(DATA), 20_000)) == DATA
        assert server.served.requests <= 20  # a request a block would be 41
        assert server.served.most_under_way >= 2  # it reads ahead while it is read
        assert server.served.bytes <= len(DATA) + 4096  # nothing twice


def test_who_jumps_about_fetches_what_is_read(server: FileServer) -> None:
    with closing(open_url(server.url())) as file:
        before = server.served.bytes
        for number in random.Random(5).sample(range(0, 40, 2), 20):
            assert file.pread(500, number * BLOCK + 7) == DATA[number * BLOCK + 7 :][:500]
        assert server.served.bytes - before <= 23 * BLOCK


def test_one_failure_in_ten_and_cut_answers_are_not_noticed(server: FileServer) -> None:
    server.behaviour.failures = 0.1
    with closing(open_url(server.url())) as file:
        assert b"".join(file.pread(50_000, at) for at in range(0, len(DATA), 50_000)) == DATA
    server.behaviour.failures = 0
    server.behaviour.files["/other"] = OTHER
    with closing(open_url(server.url("/other"))) as file:
        server.behaviour.cut = 10
        thread, results = in_thread(lambda: file.pread(500, 1000))
        seen = server.served.requests
        eventually(lambda: server.served.requests >= seen + 3, "more attempts")
        assert not results
        server.behaviour.cut = 0
        thread.join(20)
        assert results == [OTHER[1000:1500]]


def test_a_file_that_changes_is_never_mixed_with_what_it_was(
    server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_url(server.url())) as file:
        assert file.pread(100, 0) == DATA[:100]
        server.behaviour.files["/root.sqsh"] = OTHER
        server.behaviour.etag = '"second"'
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                file.pread(100, 20 * BLOCK)
            assert caught.value.errno == errno.ESTALE
        told = [record.message for record in caplog.records if "another file" in record.message]
        assert len(told) == 1 and '"second"' in told[0] and '"first"' in told[0]
        assert file.pread(100, 0) == DATA[:100]  # what it has it goes on with
        server.behaviour.files["/root.sqsh"] = DATA[:-1]  # and a shorter one
        server.behaviour.etag = '"first"'
        with pytest.raises(OSError):
            file.pread(100, 20 * BLOCK)
        server.behaviour.files["/root.sqsh"] = DATA
        assert file.pread(100, 20 * BLOCK) == DATA[20 * BLOCK :][:100]  # it is there again


def test_without_marks_a_file_is_known_by_its_beginning(server: FileServer) -> None:
    server.behaviour.etag = server.behaviour.modified = None
    with closing(open_url(server.url())) as file:
        assert file.pread(100, 10 * BLOCK) == DATA[10 * BLOCK :][:100]
        server.behaviour.files["/root.sqsh"] = OTHER
        with pytest.raises(OSError) as caught:
            file.pread(100, 20 * BLOCK)
        assert caught.value.errno == errno.ESTALE


def test_the_network_goes_and_comes_back(server: FileServer, settings: Callable[..., None]) -> None:
    with closing(open_url(server.url())) as file:
        assert file.pread(10, 0) == DATA[:10]
        server.behaviour.away.set()
        thread, results = in_thread(lambda: file.pread(10, 30 * BLOCK))
        seen = server.served.requests
        eventually(lambda: server.served.requests >= seen + 3, "more attempts")
        assert file.pread(10, 5) == DATA[5:15] and not results
        assert at_once(file.pread, 10, 5) == DATA[5:15]
        with pytest.raises(WouldWait):
            at_once(file.pread, 10, 35 * BLOCK)
        server.behaviour.away.clear()
        thread.join(20)
        assert results == [DATA[30 * BLOCK :][:10]]
    settings(patience=0.5)
    with closing(open_url(server.url())) as file:
        server.behaviour.away.set()
        with pytest.raises(OSError) as caught:
            file.pread(10, 0)
        assert caught.value.errno == errno.ETIMEDOUT


def test_who_waits_is_let_go_at_the_end(server: FileServer) -> None:
    with closing(open_url(server.url())) as file:
        server.behaviour.stalls.set()
        thread, results = in_thread(lambda: file.pread(10, 0))
        eventually(lambda: server.served.waiting, "a request that hangs")
        file.stop()
        thread.join(10)
        assert isinstance(results[0], OSError) and results[0].errno == errno.EIO


def test_a_fetcher_that_dies_or_hangs_harms_nobody(server: FileServer) -> None:
    with closing(open_url(server.url())) as file:
        server.behaviour.stalls.set()
        thread, results = in_thread(lambda: file.pread(10, 30 * BLOCK))
        eventually(lambda: server.served.waiting, "a request that hangs")
        os.kill(fetcher_of(file), signal.SIGKILL)
        server.behaviour.stalls.clear()
        thread.join(20)
        assert results == [DATA[30 * BLOCK :][:10]]
        hanging = fetcher_of(file)
        os.kill(hanging, signal.SIGSTOP)
        thread, results = in_thread(lambda: file.pread(10, 0))
        assert file.pread(10, 30 * BLOCK) == DATA[30 * BLOCK :][:10] and not results
        above = file.file._link._process
    assert above.wait(10) is not None and not Path(f"/proc/{hanging}").exists()
    thread.join(10)
    assert isinstance(results[0], OSError)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whose fetcher is nobody")
def test_roots_fetcher_is_nobody(server: FileServer) -> None:
    with closing(open_url(server.url())) as file:
        status = Path(f"/proc/{fetcher_of(file)}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(lines["Uid"].split()) == set(lines["Gid"].split()) == {"65534"}
        assert not lines["Groups"].strip() and int(lines["CapEff"], 16) == 0 and lines["NoNewPrivs"] == "1"
        limits = Path(f"/proc/{fetcher_of(file)}/limits").read_text()
        assert "Max nice priority         0                    0 " in limits


def refusal(url: str) -> str:
    with pytest.raises(CowfsError) as caught:
        open_url(url).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_will_not_is_told_of_in_one_line(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, does = server.url(), server.behaviour
    assert "no such file (404 Not Found) (check the URL)" in refusal(server.url("/other"))
    does.files["/empty"] = b""
    assert "is empty" in refusal(server.url("/empty"))
    does.ranges = False
    assert "does not take range requests (download the image first" in refusal(url)
    does.ranges = True
    does.status = 403
    assert "the server does not allow it (403 Forbidden)" in refusal(url)
    does.status = 418
    assert "the server answers 418" in refusal(url)
    does.status = 0
    does.redirects["/round"] = "/round"
    assert "leads on more than 10 times" in refusal(server.url("/round"))
    does.redirects["/away"] = "file:///etc/passwd"
    assert "leads to file:///etc/passwd, which is less secure" in refusal(server.url("/away"))
    does.redirects["/far"] = "file:///" + "x" * 60_000
    assert len(refusal(server.url("/far"))) < 400
    for target in ("http://[::bad/", "http://localhost:99999/x"):
        does.redirects["/bad"] = target
        assert "leads to something that is no URL (give the final URL)" in refusal(server.url("/bad"))
    does.encoding = "gzip"
    assert "the server compresses what it sends" in refusal(url)
    does.encoding = ""
    does.redirects["/here"] = "/root.sqsh"
    with closing(open_url(server.url("/here"))) as file:
        assert file.pread(10, 0) == DATA[:10]
    does.login = ("me", "secret")
    assert "wants a login (401 Unauthorized) (write user and password into ~/.netrc)" in refusal(url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    with closing(open_url(url)) as file:
        assert file.pread(3, 0) == DATA[:3]
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "netrc").rename(tmp_path / ".netrc")
    with closing(open_url(url)) as file:
        assert file.pread(10, 0) == DATA[:10]


def test_https_needs_a_certificate_that_holds(nobody_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = nobody_path / "certificate"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "2"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", certificate, "-out", nobody_path / "public"),
    )
    with certificate.open("a") as file:
        file.write((nobody_path / "public").read_text())
    with serving(certificate=certificate) as server, serving() as other:
        server.behaviour.files["/root.sqsh"] = DATA
        assert "its certificate cannot be verified: self" in refusal(server.url())
        monkeypatch.setenv("SSL_CERT_FILE", str(nobody_path / "public"))
        with closing(open_url(server.url())) as image:
            assert image.pread(10 * BLOCK, 7) == DATA[7:][: 10 * BLOCK]
        server.behaviour.redirects["/root.sqsh"] = other.url()
        assert "which is less secure" in refusal(server.url())


def test_a_server_that_sends_without_end_does_no_harm(
    server: FileServer, settings: Callable[..., None]
) -> None:
    settings(patience=0.3)
    server.behaviour.files["/ö ü"] = DATA
    with closing(open_url(server.url("/ö%20ü"))) as file:
        server.behaviour.endless = True
        with pytest.raises(OSError) as caught:
            file.pread(10, 5 * BLOCK)
        assert caught.value.errno == errno.ETIMEDOUT
        server.behaviour.endless = False
        assert file.pread(10, 5 * BLOCK) == DATA[5 * BLOCK :][:10]


def test_an_answer_that_takes_too_long_is_broken_off(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_SLOWEST", 0.1)
    file = HttpFile(server.url(), lambda _: None, timeout=60)
    version = Version(len(DATA), (("ETag", '"first"'),))
    server.behaviour.stalls.set()
    with pytest.raises(Unreachable):
        file.read(0, 10, version, math.inf)
    server.behaviour.stalls.clear()


def test_no_message_repeats_all_that_a_server_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        file = HttpFile(f"http://127.0.0.1:{listener.getsockname()[1]}/x", lambda _: None, timeout=60)
        for said in (b"\0\xff" * 30_000, b"HTTP/1.1 404 " + b"x" * 60_000):
            thread, results = in_thread(lambda: file.version(math.inf))
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(said + b"\r\n\r\n")
            thread.join(10)
            assert isinstance(results[0], Unreachable | Refused) and len(str(results[0])) < 400


def test_so_is_one_after_which_the_server_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SLOWEST", 0.1)
    head = (
        b'HTTP/1.1 206 Partial Content\r\nConnection: close\r\nETag: "first"\r\n'
        b"Content-Range: bytes 0-9/100\r\nContent-Length: 10\r\n\r\n12345"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        file = HttpFile(f"http://127.0.0.1:{listener.getsockname()[1]}/x", lambda _: None, timeout=60)
        version = Version(100, (("ETag", '"first"'),))
        thread, results = in_thread(lambda: file.read(0, 10, version, math.inf))
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(head)
            thread.join(10)
    assert isinstance(results[0], Unreachable)


HEAD = (
    b'HTTP/1.1 206 Partial Content\r\nETag: "first"\r\n'
    b"Content-Range: bytes 0-999999/1000000\r\nContent-Length: 1000000\r\n\r\n"
)


@pytest.mark.parametrize(
    ("scheme", "said", "slowly"),
    [
        *(("https", b"", b""), ("https", b"\x16\x03\x03\x40\x00", b"x")),
        *(("http", b"", b""), ("http", HEAD, b""), ("http", b"HTTP", b"x"), ("http", HEAD[:30], b"x")),
        *(("http", HEAD[:-2], b"X: y\r\n"), ("http", HEAD, b"x")),
        ("http", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_read_ends_in_time_whatever_comes(scheme: str, said: bytes, slowly: bytes) -> None:
    """The connection, TLS, the head and the body may all stall, or come a byte at a time."""
    over = threading.Event()

    def send(listener: socket.socket) -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(said)
            while not over.wait(0.01):
                connection.sendall(slowly)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/x"
        file = HttpFile(url, lambda _: None, timeout=60)
        version, until = Version(1_000_000, (("ETag", '"first"'),)), time.monotonic() + 0.5
        sender = threading.Thread(target=send, args=[listener])
        sender.start()
        thread, results = in_thread(lambda: file.read(0, 1_000_000, version, until))
        thread.join(10)
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        sender.join(10)
    assert isinstance(results[0], Unreachable)


def test_a_head_without_end_is_not_read_for_long() -> None:
    """It would keep a processor busy until the time is over."""

    def send(listener: socket.socket) -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            while True:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        (sender := threading.Thread(target=send, args=[listener])).start()
        file = HttpFile(f"http://127.0.0.1:{listener.getsockname()[1]}/x", lambda _: None, timeout=60)
        with pytest.raises(Unreachable, match="head of its answer has more than 64 KiB"):
            file.version(time.monotonic() + 20)
        sender.join(10)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_an_address_of_ipv6_needs_no_port(scheme: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def refuse(address: tuple[str, int], *_: object) -> None:
        reached.append(address)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(Unreachable, match="refused"):
        HttpFile(f"{scheme}://[::1]/x", lambda _: None, timeout=1).version(math.inf)
    assert set(reached) == {("::1", port)}


@pytest.mark.parametrize(
    ("said", "wait"),
    [
        *(("7", 7), ("9" * 400, 60), ("", 0), ("soon", 0), ("-1", 0), ("Fri, 01 Jan 2100 00:00:00 GMT", 60)),
        *(
            ("Sat, 01 Aug 2020 10:00:00 GMT", 0),
            ("Sat, 01 Aug 2020 10:00:00", 0),
            ("1 Jan 99999 0:0:0 GMT", 0),
        ),
    ],
)
def test_a_server_says_when_to_ask_again(said: str, wait: int) -> None:
    """And gets the path as it is in the URL, with two slashes."""
    head = f"HTTP/1.0 503 Later\r\nRetry-After: {said}\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}//a//x?y=/z"
        file = HttpFile(url, lambda _: None, timeout=60)
        thread, results = in_thread(lambda: file.version(math.inf))
        with listener.accept()[0] as connection:
            asked = connection.recv(65536)
            connection.sendall(head.encode())
        thread.join(10)
    assert isinstance(results[0], Unreachable)
    assert (results[0].why, results[0].wait) == ("the server answers 503 Later", wait)
    assert asked.startswith(b"GET //a//x?y=/z HTTP/1.1\r\n")


@pytest.mark.parametrize("said", ["", "Content-Range: bytes 0-9/*\r\n", "Content-Range: bytes x-y/z\r\n"])
def test_a_part_of_an_unknown_whole_is_refused_as_such(said: str) -> None:
    head = f"HTTP/1.1 206 Partial Content\r\nConnection: close\r\n{said}Content-Length: 10\r\n\r\n1234567890"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        file = HttpFile(f"http://127.0.0.1:{listener.getsockname()[1]}/x", lambda _: None, timeout=60)
        thread, results = in_thread(lambda: file.version(math.inf))
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(head.encode())
            thread.join(10)
    assert isinstance(results[0], Refused)
    assert "does not say which bytes it sends" in str(results[0])


class Fetching:
    """Reply like a fetcher process that an attacker has taken over."""

    pid = 0

    def __init__(self, opened: bytes, data: list[tuple[int, bytes]]) -> None:
        self._answers = opened, data
        self._thread = threading.Thread(target=self._answer)

    def start(self, fd: int) -> Fetching:
        self._socket = socket.socket(fileno=os.dup(fd))
        self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0

    def _answer(self) -> None:
        opened, data = self._answers
        with self._socket:
            while raw := self._socket.recv(LONGEST):
                message = unpack(raw)
                if message.kind == Kind.OPEN:
                    self._socket.send(pack(Kind.OPENED, message.number, rest=opened))
                else:
                    for place, piece in data:
                        self._socket.send(pack(Kind.DATA, message.number, place, rest=piece))
                    self._socket.send(pack(Kind.DONE, message.number))


def test_who_fetches_is_not_believed() -> None:
    sizes = (b'"x"', b"-1", b"1" + bytes([48]) * 18, b"Infinity", b"NaN", b"9" * 5000)
    claims = [b'{"size": %s, "marks": []}' % size for size in sizes]
    for nonsense in (b"[1]", b"{", b"[" * 20_000, *claims):
        link = Link("http://x/y", 1.0, Fetching(nonsense, []).start)
        with closing(link), pytest.raises(LayerError, match="sent an invalid reply"):
            link.open()
    data = [(0, b"12345"), (0xFFFF, b"67890")]
    with closing(Link("http://x/y", 1.0, Fetching(b'{"size": 10, "marks": []}', data).start)) as link:
        link.open()
        fetch = link.prepare(0, 10, urgent=True)
        link.send(fetch)
        with pytest.raises(OSError, match="5 bytes fetched, not 10"):
            link.wait(fetch, lambda: False)


@pytest.mark.nightly
def test_no_server_is_told_of_in_one_line() -> None:
    assert "Connection refused" in refusal("http://127.0.0.1:9/root.sqsh")
    assert "host is not known" in refusal("http://nowhere.invalid/root.sqsh")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://me:secret@host/x", "https://host/x: a login in a URL is shown to all users"),
        ("https://host", "names no file"),
        ("s3://bucket/", "names no file .write it as s3://HOST/PATH"),
        ("https:///x", "names no host"),
        ("http://host:1x/y", "the port is not valid"),
        ("http://host/a b", "no spaces"),
    ],
)
def test_urls_that_cannot_be(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        names.check(url)
    assert "secret" not in str(caught.value)


def test_colons_of_urls_among_others() -> None:
    text = r"/a:https://host:8080/x\:y:http://[::1]:80/z::s3://bucket/d"
    assert split_layers(text) == (("/a", "https://host:8080/x:y", "http://[::1]:80/z", "s3://bucket/d"), 1)
    for lowers in [("ab://a", "x"), ("ab://a\\b", "c"), ("ab://a\\:b/", "c"), ("ab:///x:y", "/z")]:
        assert split_lowers(join_lowers(lowers)) == lowers
    assert split_lowers("./http://x") == ("./http", "//x")
    assert join_lowers(["https://host:80/x", "/y"]) == "https://host:80/x:/y"


# --- the cache on the disk


def test_what_is_on_the_disk_is_not_fetched_again(
    server: FileServer, settings: Callable[..., None], tmp_path: Path
) -> None:
    settings(cache=str(tmp_path / "cache"))
    with closing(open_url(server.url())) as file:
        assert file.pread(len(DATA), 0) == DATA
    once = server.served.bytes
    with closing(open_url(server.url())) as file:
        assert file.pread(len(DATA), 0) == DATA
        assert server.served.bytes < once + BLOCK
    (kept,) = (tmp_path / "cache").iterdir()
    damaged = bytearray(kept.read_bytes())
    damaged[-1000] ^= 1
    kept.write_bytes(damaged)
    with closing(open_url(server.url())) as file:
        assert file.pread(len(DATA), 0) == DATA  # and the block is fetched once more
        assert server.served.ranges[-1] == ("/root.sqsh", 40 * BLOCK, len(DATA))
    server.behaviour.etag = '"second"'
    server.behaviour.files["/root.sqsh"] = OTHER
    with closing(open_url(server.url())) as file:
        assert file.pread(len(DATA), 0) == OTHER
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_is_bounded(server: FileServer, settings: Callable[..., None], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings(cache=str(cache), cache_size=20 * BLOCK)
    big = random.Random(4).randbytes(400 * BLOCK)
    server.behaviour.files["/big"] = big
    for path in ("/root.sqsh", "/big"):
        with closing(open_url(server.url(path))) as file:
            data = server.behaviour.files[path]
            assert b"".join(file.pread(BLOCK, at) for at in range(0, len(data), BLOCK)) == data
    used = sum(file.stat().st_blocks * 512 for file in cache.iterdir())
    assert used <= 20 * BLOCK + (17 << 20)  # it looks after each 16 MiB
    assert len(list(cache.iterdir())) == 1  # the older one made room


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to give a directory away")
def test_a_cache_that_others_can_write_to_is_not_used(
    server: FileServer, settings: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    settings(cache=str(cache))
    with closing(open_url(server.url())) as file:
        assert file.pread(10, 0) == DATA[:10]
    assert not list(cache.iterdir()) and "others can write there" in caplog.text


# --- by fsspec


def test_other_urls_are_read_by_fsspec(nobody_path: Path) -> None:
    pytest.importorskip("fsspec", reason="needs the extra url")
    file_there = nobody_path / "x"
    file_there.write_bytes(DATA)
    with closing(open_url(f"file://{file_there}")) as file:
        assert file.pread(len(DATA), 0) == DATA
    with closing(open_url(f"file://{file_there}")) as file:
        file_there.write_bytes(OTHER)
        with pytest.raises(OSError) as caught:
            file.pread(10, 0)
        assert caught.value.errno == errno.ESTALE
    assert "no such file" in refusal(f"file://{nobody_path}/other")
    assert "fsspec cannot read nonsense://" in refusal("nonsense://host/x")
    with pytest.raises(LayerError, match="is not a file"):
        open_url(f"file://{nobody_path}")
