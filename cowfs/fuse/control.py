"""The control socket: how ``cowfs info``, ``umount`` and ``diff`` talk to the daemon of a mount.

One JSON object a line. A request names its ``command``; the answer is any number of lines, the last of
them ``{"end": true}`` or ``{"error": "…"}``. Only root and the owner of the daemon are answered.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import trio

from cowfs.linux.sockets import control_address, peer_of

log = logging.getLogger(__name__)

Replies = Iterator[dict[str, Any] | None]
"""None where there is nothing to say yet, but requests of the filesystem may want their turn."""
Command = Callable[[dict[str, Any]], Replies]
_REQUEST_MAX = 65536
_SLICE = 64


async def serve(dev: str, commands: Mapping[str, Command]) -> None:
    """Answer requests for the mount with this ``major:minor`` until cancelled."""
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
        await listener.bind(control_address(dev))
        listener.listen(8)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # no descriptor is free
                    log.warning("a request on the control socket was not accepted: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(_talk, trio.SocketStream(connection), commands)


async def _talk(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    async with stream:
        try:
            _, uid = peer_of(stream.socket._sock)  # type: ignore[attr-defined]
            if uid not in {0, os.geteuid()}:
                await _send(stream, [{"error": "only root and the owner of the mount are answered"}])
                return
            request = json.loads(await _line(stream))
            command = commands.get(request.get("command"))
            if command is None:
                await _send(stream, [{"error": f"unknown command {request.get('command')!r}"}])
                return
            await _answer(stream, command(request))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left
        except Exception:
            log.exception("a request on the control socket failed")


async def _answer(stream: trio.SocketStream, replies: Replies) -> None:
    batch: list[dict[str, Any]] = []
    try:
        for reply in replies:
            if reply is not None:
                batch.append(reply)
            if len(batch) >= _SLICE:
                await _send(stream, batch)
                batch = []
            else:
                await trio.lowlevel.checkpoint()
        batch.append({"end": True})
    except Exception as error:
        log.warning("a request on the control socket failed: %s", error)
        batch.append({"error": str(error)})
    await _send(stream, batch)


async def _send(stream: trio.SocketStream, replies: list[dict[str, Any]]) -> None:
    await stream.send_all(b"".join(json.dumps(reply).encode() + b"\n" for reply in replies))


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _REQUEST_MAX:
        more = await stream.receive_some(4096)
        if not more:
            break
        data += more
    return data
