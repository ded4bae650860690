"""Report which process changes what, to the watchers of the mount and to the record in its store.

While somebody watches or records, some of the handlers that pyfuse3 calls are replaced by others, which call
the original and report the result. Otherwise there is no check and no cost.

The process that makes a change is examined after the change and before the answer. Until then it waits,
whatever signal it gets, so its number cannot be reused.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import stat
import time
from collections.abc import Callable
from typing import Any

import trio

from cowfs.fuse import libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.beyond import written_by
from cowfs.fuse.feeds import Feed
from cowfs.fuse.handlers import HandlerTable
from cowfs.fuse.libfuse import Message
from cowfs.fuse.paths import Place, join
from cowfs.fuse.recorder import Recorder
from cowfs.linux.files import RENAME_EXCHANGE
from cowfs.linux.processes import Process, Processes
from cowfs.overlay.node import APART, Node
from cowfs.overlay.overlay import Overlay
from cowfs.store.format.records import OPERATIONS

log = logging.getLogger(__name__)

_BURST_NS = 1_000_000_000
"""How often a process's writes to a file are reported to a watcher. The last write is also reported."""
_LOOK = 0.25
"""Seconds between two searches for writes that have ended."""
_SAVE = 1.0
"""Seconds between two saves of the record."""
_BITS = {name: 1 << number for number, name in enumerate(OPERATIONS)}


class Observer:
    """Reports to the watchers of a mount, and records for ``cowfs blame``."""

    def __init__(
        self,
        handlers: HandlerTable,
        adapter: Adapter,
        fs: Overlay,
        in_trio: Callable[[Callable[[], object]], None],
    ) -> None:
        self._handlers = handlers
        self._replaced: dict[str, Any] = {}
        """The handlers that are replaced by those of an observer, by name."""
        self.adapter = adapter
        self._nodes = fs.nodes
        self._fs = fs
        self._processes = Processes()
        self.recorder: Recorder | None = None
        """The recorder, if there is one."""
        self._wanted = trio.Event()
        self.feed = Feed(in_trio, self._watched)
        self.feed.settle = self._end_bursts
        self._bursts: dict[Node, dict[int, _Burst]] = {}
        self._lent: dict[int, tuple[Process | None, int]] = {}
        """Files that the kernel writes itself: who opened them, and when they were changed last."""
        self._last: Process | None = None
        """Who made the last change."""

    def record(self, recorder: Recorder) -> None:
        """Record from now on."""
        self.recorder = recorder
        self._watched()

    def _watched(self) -> None:
        """Start observing when somebody watches, and stop when nobody does."""
        wanted = bool(self.feed.watchers) or self.recorder is not None
        if wanted and not self._replaced:
            self._replaced = self._handlers.replace(_observing(copy.copy(self._handlers), self))
            libfuse.observe_inodes(wanted=True)
            self._wanted.set()
        elif self._replaced and not wanted:
            self._handlers.replace(self._replaced)
            libfuse.observe_inodes(wanted=False)
            self._replaced = {}
            self._wanted = trio.Event()
            self._processes.close()
        self._note(0, 0, 0)
        self.adapter.lend(wanted=not wanted)
        if not self.feed.watchers:
            self._bursts.clear()
            self._lent.clear()

    def _note(self, ino: int, pid: int, uid: int) -> bool:
        """Note who changes what; return whether the same process made the last change."""
        noted = libfuse.note(ino, pid, uid)
        if self.recorder is not None:
            self.recorder.adds(noted)
        return noted >= libfuse.IS_SAME

    async def run(self) -> None:
        """Save the record regularly, and report the ends of writes, until cancelled."""
        saved = time.monotonic()
        while True:
            await self._wanted.wait()
            await trio.sleep(_LOOK if self.feed.watchers else _SAVE)
            try:
                self._end_bursts(time.monotonic_ns() - _BURST_NS)
                if self.recorder is not None and time.monotonic() - saved >= _SAVE:
                    saved = time.monotonic()
                    self.recorder.save()
            except Exception:
                log.exception("changes are not reported")

    def close(self) -> None:
        """Save new records. Call it before the store is closed."""
        if self.recorder is not None:
            self.recorder.close()
        self._processes.close()

    # --- the changes

    def _who(self, pid: int, uid: int, ino: int = 0) -> Process | None:
        """Return the process that makes a change now; *ino* is the inode of a change that may continue."""
        if uid == libfuse.KERNEL_UID:
            self._note(0, 0, 0)
            return None
        if not self._note(ino if self.recorder is not None and not self.feed.watchers else 0, pid, uid):
            self._look(pid, uid)
        return self._last

    def _look(self, pid: int, uid: int) -> None:
        self._last = self._processes.look_at(pid, uid) or Process(0, uid, "", (), "")
        libfuse.identify(*self._processes.known_by(pid, uid))

    def named(
        self, operation: str, ctx: Any, place: Place, node: Node | None, to: Place | None = None
    ) -> None:
        """Report that a name was created, removed or renamed."""
        is_kept = _is_kept(place[0])
        goes_on = operation == "create" and node is not None and is_kept
        process = self._who(ctx.pid, ctx.uid, node.ino if goes_on and node is not None else 0)
        if self.recorder is not None and is_kept:
            self.recorder.named(_BITS[operation], process, node, place, to)
        if self.feed.watchers:
            self.feed.tell(operation, process, join(place), None if to is None else join(to))

    def created(self, ctx: Any, parent: int, name: bytes, ino: int) -> None:
        """Report that a file was created. Raises nothing."""
        try:
            directory, node = self._nodes.get(parent), self._nodes.get(ino)
            if self.feed.watchers or self.recorder is None or node is None or not _is_kept(node):
                self.named("create", ctx, (directory, name), node)
                return
            if not self._note(ino, ctx.pid, ctx.uid):
                self._look(ctx.pid, ctx.uid)
            self.recorder.created(self._last, directory, name, node)
        except Exception:
            log.exception("a change is not reported")

    def changed(self, operation: str, pid: int, uid: int, node: Node | None) -> None:
        """Report that a file was changed."""
        place = None if node is None else self._place(node)
        if node is None or place is None:  # it has no name any more, so nobody can ask about it
            return
        is_kept = _is_kept(node)
        process = self._who(pid, uid, node.ino if is_kept else 0)
        if self.recorder is not None and is_kept:
            self.recorder.changed(_BITS[operation], process, node, place)
        if self.feed.watchers:
            if operation == "write":
                self._written(node, process, place)
            else:
                self.feed.tell(operation, process, join(place))

    def _place(self, node: Node) -> Place | None:
        return self._nodes.place(node) if node is not self._nodes.root else (None, b"")

    def leaves(self, node: Node | None, moved: bool = False) -> None:
        """Note that a file is about to lose its name, or has lost it."""
        if node is None:
            return
        if node in self._bursts:
            self._end_burst(node)
        if self.recorder is not None:
            self.recorder.closes(node, moved=moved)

    def reverted(self, path: bytes) -> None:
        """Report a revert, which is not a request; names may have changed."""
        if self.recorder is not None:
            self.recorder.forget()
        if self.feed.watchers:
            self.feed.tell("revert", None, path)

    # --- writes, as reported to watchers

    def _written(self, node: Node, process: Process | None, place: Place) -> None:
        """Report the first write, then once a second, and after the last write."""
        bursts = self._bursts.setdefault(node, {})
        burst = bursts.get(id(process))
        if burst is not None:
            burst.goes_on = True
            return
        bursts[id(process)] = _Burst(process, place, time.monotonic_ns())
        self.feed.tell("write", process, join(place))

    def _end_bursts(self, begun_before: int | None = None) -> None:
        for node in list(self._bursts):
            self._end_burst(node, begun_before)

    def _end_burst(self, node: Node, begun_before: int | None = None) -> None:
        bursts = self._bursts[node]
        for key, burst in list(bursts.items()):
            if begun_before is not None and burst.told > begun_before:
                continue
            place = self._place(node) or burst.place if burst.goes_on else None
            if place is not None:
                self.feed.tell("write", burst.process, join(place))
            if place is not None and begun_before is not None:
                burst.told, burst.goes_on = time.monotonic_ns(), False
            else:
                del bursts[key]
        if not bursts:
            del self._bursts[node]

    # --- files that the kernel itself writes

    def opened(self, fh: int, flags: int, ctx: Any, node: Node | None) -> None:
        """Note that a file was opened that the kernel may write without a request."""
        if node is not None and flags & os.O_ACCMODE != os.O_RDONLY and self.adapter.lends(node):
            self._lent[fh] = self._who(ctx.pid, ctx.uid), self._fs.stat(node).st_ctime_ns

    def closing(self, fh: int) -> None:
        """Note that a file is about to be closed."""
        process, changed = self._lent.pop(fh)
        node = self.adapter.node_of(fh)
        place = None if node is None else self._place(node)
        if node is not None and place is not None and self._fs.stat(node).st_ctime_ns != changed:
            self.feed.tell("write", process, join(place))

    @property
    def lent(self) -> dict[int, Any]:
        """The files that the kernel itself may write, by their numbers."""
        return self._lent


class _Burst:
    """A series of writes of one process to one file."""

    __slots__ = ("goes_on", "place", "process", "told")

    def __init__(self, process: Process | None, place: Place, told: int) -> None:
        self.process = process
        self.place = place
        """Where the file is, should the kernel forget it before the burst ends."""
        self.told = told
        """When that was reported last (monotonic_ns)."""
        self.goes_on = False
        """Whether it has written since."""


# --- the handlers


def _is_kept(node: Node | None) -> bool:
    """Whether the store keeps changes to *node*, and so may keep a record of them."""
    return node is None or not node.ino & APART


def _observing(plain: HandlerTable, observer: Observer) -> dict[str, Any]:
    """Return handlers that call those in *plain* and report to the observer what they did."""
    families = _making, _taking, _writing, _changing
    handlers = {name: it for family in families for name, it in family(plain, observer).items()}
    return {name: _named(name, getattr(plain, name), handler) for name, handler in handlers.items()}


def _named(name: str, plain: Any, handler: Any) -> Any:
    handler = functools.wraps(plain)(handler)
    handler.__name__ = name
    return handler


def _guarded(call: Callable[..., None]) -> Callable[..., None]:
    """Log a failure of *call*, so that it does not become the answer to a request."""

    def guarded(*args: Any) -> None:
        try:
            call(*args)
        except Exception:
            log.exception("a change is not reported")

    return guarded


def _making(plain: HandlerTable, observer: Observer) -> dict[str, Any]:
    nodes = observer._nodes
    named = _guarded(observer.named)
    opened, watchers = _guarded(observer.opened), observer.feed.watchers
    created, plain_create = observer.created, plain.create

    def maker(operation: str) -> Any:
        make = getattr(plain, operation)

        async def handler(parent: int, name: bytes, *args: Any) -> Any:
            entry = await make(parent, name, *args)
            named(operation, args[-1], (nodes.get(parent), name), nodes.get(entry.st_ino))
            return entry

        return handler

    async def mknod(parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        entry = await plain.mknod(parent, name, mode, rdev, ctx)
        if stat.S_ISREG(mode):
            created(ctx, parent, name, entry.st_ino)
        else:
            named("mknod", ctx, (nodes.get(parent), name), nodes.get(entry.st_ino))
        return entry

    async def create(parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        info, entry = await plain_create(parent, name, mode, flags, ctx)
        created(ctx, parent, name, entry.st_ino)
        if watchers:
            opened(info.fh, flags, ctx, nodes.get(entry.st_ino))
        return info, entry

    async def link(inode: int, parent: int, name: bytes, ctx: Any) -> Any:
        node = nodes.get(inode)
        before = None if node is None else nodes.place(node)
        entry = await plain.link(inode, parent, name, ctx)
        place = (nodes.get(parent), name)
        if before is None:
            named("link", ctx, place, node)
        else:
            named("link", ctx, before, node, place)
        return entry

    makers = {operation: maker(operation) for operation in ("mkdir", "symlink")}
    return {**makers, "mknod": mknod, "create": create, "link": link}


def _taking(plain: HandlerTable, observer: Observer) -> dict[str, Any]:
    nodes = observer._nodes
    named, leaves = _guarded(observer.named), _guarded(observer.leaves)

    def child(parent: int, name: bytes) -> Node | None:
        directory = nodes.get(parent)
        return nodes.child(directory, name) if directory is not None and directory.is_dir else None

    def taker(method: str, operation: str) -> Any:
        take = getattr(plain, method)

        async def handler(parent: int, name: bytes, ctx: Any) -> None:
            node = child(parent, name)
            leaves(node)
            await take(parent, name, ctx)
            leaves(node)  # it may have been written to meanwhile
            named(operation, ctx, (nodes.get(parent), name), node)

        return handler

    async def rename(old: int, name: bytes, new: int, to: bytes, flags: int, ctx: Any) -> None:
        concerned = child(old, name), child(new, to)
        for node in concerned:
            leaves(node, True)
        await plain.rename(old, name, new, to, flags, ctx)
        for node in concerned:
            leaves(node, True)
        operation = "exchange" if flags & RENAME_EXCHANGE else "rename"
        named(operation, ctx, (nodes.get(old), name), concerned[0], (nodes.get(new), to))

    return {"unlink": taker("unlink", "remove"), "rmdir": taker("rmdir", "rmdir"), "rename": rename}


def _writing(plain: HandlerTable, observer: Observer) -> dict[str, Any]:
    """Return the handlers write and setattr, which have a short path for a call that continues another, and
    read, as which the other requests that write arrive.
    """
    nodes, changed, goes_on = observer._nodes, _guarded(observer.changed), libfuse.goes_on

    def write(fh: int, off: int, buf: bytes) -> Any:
        bits = goes_on()
        if bits < 0:
            return first_write(fh, off, buf)
        answer = plain.write(fh, off, buf)
        return written(answer) if bits else answer

    async def written(answer: Any) -> Any:
        """Add a write to the last record, if the write succeeds."""
        recorder = observer.recorder
        record = None if recorder is None else recorder.last
        result = await answer
        if recorder is not None and record is not None:
            recorder.wrote(record)
        return result

    def setattr_(inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        if goes_on() < 0:
            return first_setattr(inode, attr, fields, fh, ctx)
        return plain.setattr(inode, attr, fields, fh, ctx)

    async def first_write(fh: int, off: int, buf: bytes) -> int:
        pid, uid, _ = libfuse.request()
        if fh & libfuse.UNOPENED:
            node = nodes.get(fh ^ libfuse.UNOPENED)
        else:
            node = observer.adapter.node_of(fh)
        written = await plain.write(fh, off, buf)
        # No process: the kernel writes what mmap(2) changed, or the caller is in another PID namespace.
        changed("write", pid, uid if pid else libfuse.KERNEL_UID, node)
        return written

    async def first_setattr(inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        entry = await plain.setattr(inode, attr, fields, fh, ctx)
        operation = _of(fields)
        if operation:
            changed(operation, ctx.pid, ctx.uid, nodes.get(inode))
        return entry

    def read(fh: int, off: int, size: int) -> Any:
        if fh != libfuse.BEYOND:
            return plain.read(fh, off, size)
        asked = libfuse.message()
        ino = written_by(asked)
        answer = plain.read(fh, off, size)
        return answer if ino is None else beyond(asked, ino, answer)

    async def beyond(asked: Message, ino: int, answer: Any) -> Any:
        result = await answer
        if result and not any(result):  # nothing was left to copy
            return result
        changed("write", asked.pid, asked.uid if asked.pid else libfuse.KERNEL_UID, nodes.get(ino))
        return result

    return {"write": write, "setattr": setattr_, "read": read}


def _changing(plain: HandlerTable, observer: Observer) -> dict[str, Any]:
    nodes, lent, watchers = observer._nodes, observer.lent, observer.feed.watchers
    changed, opened = _guarded(observer.changed), _guarded(observer.opened)
    closing = _guarded(observer.closing)

    async def setxattr(inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        await plain.setxattr(inode, name, value, ctx)
        changed("setxattr", ctx.pid, ctx.uid, nodes.get(inode))

    async def removexattr(inode: int, name: bytes, ctx: Any) -> None:
        await plain.removexattr(inode, name, ctx)
        changed("removexattr", ctx.pid, ctx.uid, nodes.get(inode))

    async def open_(inode: int, flags: int, ctx: Any) -> Any:
        info = await plain.open(inode, flags, ctx)
        node = nodes.get(inode)
        if flags & os.O_TRUNC:
            changed("truncate", ctx.pid, ctx.uid, node)
        if watchers:
            opened(info.fh, flags, ctx, node)
        return info

    def release(fh: int) -> Any:
        if fh in lent:
            closing(fh)
        return plain.release(fh)

    return {"setxattr": setxattr, "removexattr": removexattr, "open": open_, "release": release}


def _of(fields: Any) -> str:
    """Return the name of the operation that a SETATTR makes; "" if it changes nothing that is reported."""
    if fields.update_size:
        return "truncate"
    if fields.update_uid or fields.update_gid:
        return "chown"
    if fields.update_mode:
        return "chmod"
    return "utimes" if fields.update_mtime or fields.update_atime else ""
