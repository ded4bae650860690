"""The control socket: requests that a client may send to a daemon, and replies of a daemon.

The first byte of an input selects one of the two.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from cowfs.changes.render import from_json
from cowfs.client import checked_answer, replies
from cowfs.errors import CowfsError
from cowfs.fuse import control
from cowfs.serve import commands
from cowfs.union import UnionOptions, open_union
from tests.fuzz.driver import Run, Target

_DEV = "0:1"


class _Ask:
    """A daemon's side of the control socket, and a client that sends arbitrary data."""

    def __init__(self, directory: Path, known: dict[str, Any]) -> None:
        self._path = str(directory / _DEV)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._known = known

    def one(self, data: bytes) -> None:
        """Send *data*; fail unless the reply is correct."""
        failed: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: failed.append(record.getMessage())  # type: ignore[method-assign]
        handler.setLevel(logging.ERROR)
        logging.disable(logging.WARNING)
        logging.getLogger("cowfs").addHandler(handler)
        try:
            answer = trio.run(self._talk, data)
        finally:
            logging.getLogger("cowfs").removeHandler(handler)
            logging.disable(logging.CRITICAL)
        assert not failed, failed
        lines = [json.loads(line) for line in answer.splitlines()]
        assert lines and ("error" in lines[-1] or lines[-1] == {"end": True}), answer

    async def _talk(self, data: bytes) -> bytes:
        answer = b""
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    control.serve, self._directory, _DEV, self._known, trio.lowlevel.checkpoint
                )
                while not os.path.exists(self._path):
                    await trio.sleep(0)
                stream = await trio.open_unix_socket(self._path)
                async with stream:
                    with suppress(trio.BrokenResourceError):
                        await stream.send_all(data)
                        await stream.send_eof()
                    with suppress(trio.BrokenResourceError):
                        async for some in stream:
                            answer += some
                nursery.cancel_scope.cancel()
        return answer


def _answered(data: bytes) -> None:
    """Let a client receive an arbitrary reply from a daemon of another user."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(CowfsError):
            for reply in replies(ours, os.getpid(), "/mnt"):
                assert isinstance(reply, dict) and reply.get("pid", os.getpid()) == os.getpid()
                with checked_answer("/mnt"):
                    from_json(reply["change"])


@contextmanager
def _run() -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = Path(name)
        (place / "lower").mkdir()
        (place / "socket").mkdir()
        union = open_union(UnionOptions(lowers=(str(place / "lower"),)))
        stack.callback(union.close)
        ask = _Ask(place / "socket", _harmless(commands(union, dict)))

        def one(data: bytes) -> None:
            if data[:1] < b"\x80":
                ask.one(data[1:])
            else:
                _answered(data[1:])

        yield one


def _harmless(known: Any) -> dict[str, Callable[..., Any]]:
    """Return the commands, without those that would change something."""
    return {name: known[name] for name in ("info", "diff", "grow")}


def _seeds() -> list[bytes]:
    asked = [
        b'{"command": "info"}\n',
        b'{"command": "diff", "x": [1]}\n',
        b'{"command": "grow", "size": "x"}\n',
        b"[]\n",
        b"",
    ]
    told = [
        b'{"pid": 1}\n{"end": true}\n',
        b'{"error": "no", "hint": "x", "exit_code": 3}\n',
        b'{"change": {"kind": "A"}}\n',
    ]
    deep = b'{"command": ' + b"[" * 3000 + b"]" * 3000 + b"}\n"
    return [
        *(b"\0" + text for text in (*asked, deep)),
        *(b"\xff" + text for text in (*told, deep, b"[]\n", b"1\n")),
    ]


TARGET = Target(_run, _seeds, ("cowfs.fuse.control", "cowfs.client"), largest=70_000)
