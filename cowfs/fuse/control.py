"""The control socket: how ``cowfs info``, ``umount`` and ``diff`` talk to the daemon of a mount.

Each line is a JSON object. A request names its ``command``; the answer is any number of lines, the last of
which is ``{"end": true}`` or ``{"error": "…"}``. The daemon only answers root and its owner; the socket is
in a directory where only the owner can create it (:mod:`cowfs.linux.sockets`). A descriptor passed with the
request (SCM_RIGHTS) is ``request["fd"]``: the daemon may see other paths than its client, or must not walk
through its own mount.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import select
from array import array
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_PEEK, SCM_RIGHTS, SOL_SOCKET
from typing import Any, NamedTuple, TypeVar

import trio

from cowfs.errors import CowfsError
from cowfs.fuse.feeds import Watcher
from cowfs.fuse.user_threads import UserThreads, in_thread
from cowfs.linux.sockets import control_listener, peer_of

log = logging.getLogger(__name__)


class MayHang(NamedTuple):
    """Work for a thread that may never end. It can be abandoned without harm."""

    call: Callable[[], None]


Replies = Iterator[dict[str, Any] | Callable[[], None] | MayHang | None]
"""What a command yields: replies; None, to let requests of the filesystem be served; and callables for long
work, which a thread does before the next step."""
Command = Callable[[dict[str, Any]], Replies | Watcher]
_REQUEST_MAX = 65536
_SLICE = 64
_PREPARING = 1.0
"""Seconds to wait for the preparation of a command."""


class _Left(Exception):
    """The client no longer waits for an answer."""


Prepare = Callable[[], Awaitable[None]]


async def serve(directory: int, dev: str, commands: Mapping[str, Command], prepare: Prepare) -> None:
    """Answer requests for the mount with this ``major:minor`` until cancelled.

    *directory* comes from open_control_directory(). Before each command, waits for *prepare*, but not long.
    Raises OSError if the socket cannot be created.
    """
    turns = UserThreads()
    with control_listener(directory, dev) as socket:
        listener = trio.socket.from_stdlib_socket(socket)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # no descriptor is free
                    log.warning("a request on the control socket was not accepted: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(_talk, trio.SocketStream(connection), commands, turns, prepare)


async def _talk(
    stream: trio.SocketStream, commands: Mapping[str, Command], turns: UserThreads, prepare: Prepare
) -> None:
    async with stream:
        try:
            _, uid = peer_of(stream.socket._sock)  # type: ignore[attr-defined]
            if uid not in {0, os.geteuid()}:
                await _send(stream, [{"error": "only root and the owner of the mount are answered"}])
                return
            line, fds = await _line(stream.socket)
            try:
                if _is_closed(stream):  # it gave up, and was told that nothing was done
                    raise _Left
                with trio.move_on_after(_PREPARING):
                    await prepare()
                await _execute(
                    stream, _request(line), fds, commands, functools.partial(_with_patience, turns, uid)
                )
            finally:
                for fd in fds:
                    os.close(fd)
        except _Left:
            pass
        except Exception:
            log.exception("a request on the control socket failed")


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    return request if isinstance(request, dict) else {}


Patiently = Callable[[MayHang], Awaitable[None]]


async def _with_patience(turns: UserThreads, uid: int, work: MayHang) -> None:
    """Do *work* in a thread. If it hangs, it delays only this user's work, and not the unmount."""
    async with turns.turn(uid):
        await in_thread(work.call, may_hang=True)


async def _execute(
    stream: trio.SocketStream,
    request: dict[str, Any],
    fds: list[int],
    commands: Mapping[str, Command],
    patiently: Patiently,
) -> None:
    name = request.get("command")
    command = commands.get(name) if isinstance(name, str) else None
    if command is None:
        await _send(
            stream, [{"error": f"unknown command {name!r}" if isinstance(name, str) else "no command"}]
        )
        return
    if fds:
        request["fd"] = fds[0]
    try:
        replies = command(request)
    except CowfsError as error:
        await _send(stream, [_failure(error)])
        return
    if isinstance(replies, Watcher):
        await replies.pour(stream)
    else:
        await _answer(stream, replies, patiently)


def _failure(error: CowfsError) -> dict[str, Any]:
    return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}


async def _answer(stream: trio.SocketStream, replies: Replies, patiently: Patiently) -> None:
    batch: list[dict[str, Any]] = []
    try:
        for reply in replies:
            if isinstance(reply, MayHang) or callable(reply):
                await _send(stream, batch)
                batch = []
                if isinstance(reply, MayHang):
                    await patiently(reply)
                else:
                    await trio.to_thread.run_sync(reply)
                if _has_left(stream):
                    raise _Left
                continue
            if reply is not None:
                batch.append(reply)
            if len(batch) >= _SLICE:
                await _send(stream, batch)
                batch = []
            else:
                await trio.lowlevel.checkpoint()
        batch.append({"end": True})
    except _Left:
        raise
    except Exception as error:
        plain = isinstance(error, OSError) and error.filename is None and error.strerror
        failure: dict[str, Any] = {"error": plain or str(error)}
        refused = isinstance(error, CowfsError)
        log.log(logging.INFO if refused else logging.WARNING, "a request was not done: %s", error)
        if isinstance(error, CowfsError):
            failure = _failure(error)
        batch.append(failure)
    finally:
        if isinstance(replies, Generator):
            replies.close()
    await _send(stream, batch)


R = TypeVar("R")


def in_main_thread(call: Callable[[], R]) -> R:
    """Run *call* in the thread that serves the filesystem. Call it from a thread that does long work."""
    return trio.from_thread.run_sync(call)


def _has_left(stream: trio.SocketStream) -> bool:
    """Whether the client has disconnected, so that long work can be given up."""
    try:
        return not stream.socket._sock.recv(1, MSG_PEEK | MSG_DONTWAIT)  # type: ignore[attr-defined]
    except BlockingIOError:
        return False
    except OSError:
        return True


def _is_closed(stream: trio.SocketStream) -> bool:
    """Whether the client has closed its end completely, not only for writing."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), 0)
    return bool(poll.poll(0))


async def _send(stream: trio.SocketStream, replies: list[dict[str, Any]]) -> None:
    # Not send_all(): if it fails, error and traceback reference each other, and keep the whole answer.
    rest = memoryview(b"".join(json.dumps(reply).encode() + b"\n" for reply in replies))
    try:
        while rest:
            rest = rest[await stream.socket.send(rest) :]
    except OSError:
        raise _Left from None


async def _line(connection: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """Return the first line, and the descriptors passed with it."""
    data = b""
    fds = array("i")
    while not data.endswith(b"\n") and len(data) < _REQUEST_MAX:
        more, ancillary, _, _ = await connection.recvmsg(4096, CMSG_SPACE(fds.itemsize), MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not more:
            break
        data += more
    return data, list(fds)
