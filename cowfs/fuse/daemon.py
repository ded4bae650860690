"""Mount, serve until unmounted or told to stop, and clean up."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import string
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import pyfuse3
import trio

from cowfs.errors import MountFailure, SystemFailure
from cowfs.fuse import control, libfuse
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.fakeroot import FakerootAdapter
from cowfs.fuse.handlers import HandlerTable
from cowfs.fuse.inode_limit import InodeLimit, most_inodes
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.owners import OwnerMap
from cowfs.fuse.quotas import bounds
from cowfs.fuse.reclaim import MemoryReclaimer
from cowfs.fuse.rings import Rings, why_not
from cowfs.fuse.tasks import note_root
from cowfs.linux import fuse, helper_process, programs
from cowfs.linux.files import syncfs
from cowfs.linux.mount_table import mount_of
from cowfs.linux.mounts import MNT_DETACH, drop_unused, unmount
from cowfs.linux.signals import hold_back, open_signals, take
from cowfs.linux.sockets import connect_manager, open_control_directory, sd_notify
from cowfs.overlay.overlay import Overlay

log = logging.getLogger(__name__)

Task = Callable[[], Awaitable[None]]
_PLAIN = frozenset(b"%s%s/._-+:=@" % (string.ascii_letters.encode(), string.digits.encode()))
_LONGEST_SOURCE = 2000
_NOW_AND_THEN = 5.0
"""Seconds between two regular checks."""
_TURN = 0.0005
"""Seconds after which a thread gives the GIL to the loop, which needs it several times for each request."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """The mountpoint and the options of a mount."""

    mountpoint: str
    fsname: str
    options: frozenset[str]
    """For libfuse: allow_other, ro, suid, dev …"""
    acl: bool = True
    fakeroot: bool = False
    """Whether the user who mounts is root inside."""
    stay_on_sigterm: bool = False
    passthrough: str = "auto"
    """Whether the kernel reads and writes files of the store by itself: auto, off."""
    owner_map: OwnerMap | None = None
    """Which owners are shown instead of those that the files have."""
    sees_all: bool = False
    """Whether the kernel sends a request for every open and every read."""


class Daemon:
    """One mounted union."""

    def __init__(self, fs: Overlay, request: MountRequest, rings: Rings | None = None) -> None:
        self._fs = fs
        self._request = request
        self._rings = rings
        self._without = why_not() if rings is None else ""
        self.loop = RequestLoop(rings)
        adapter = FakerootAdapter if request.fakeroot else Adapter
        shared = "allow_other" in request.options
        self.adapter: Adapter = adapter(
            fs,
            self.loop,
            acl=request.acl,
            bounds=bounds(shared=shared),
            passthrough=request.passthrough,
            owner_map=request.owner_map,
            sees_all=request.sees_all,
        )
        self._memory_reclaimer = MemoryReclaimer(fs)
        self._inode_limit = InodeLimit(fs.nodes, most_inodes(), self.loop.in_trio)
        self._mounted = False
        self.dev = ""
        self._control = -1
        self._outside = helper_process.current()
        self._asked = False
        """Whether the daemon itself ended the mount."""
        self._failure: MountFailure | None = None
        """Why there was no mount to serve."""

    def mount(self) -> None:
        """Attach the filesystem to its mountpoint; requests wait until :meth:`serve`.

        From here on, SIGTERM, SIGINT and SIGHUP stay blocked. :meth:`serve` handles them; afterwards only
        write-back and the release of the store remain, which another signal (from an impatient init, say)
        must not interrupt.
        """
        hold_back()
        options = set(self._request.options)
        if not self._request.fakeroot:
            options.add("default_permissions")
        self._control = _control_directory()
        connect_manager()
        handed_over = self._request.mountpoint.startswith("/dev/fd/")
        if handed_over or os.geteuid() != 0 or not self._mount_connection(options):
            source = {f"fsname={_escape(self._request.fsname)}", "subtype=cowfs"}
            options -= fuse.UNKNOWN_TO_LIBFUSE
            self._begin_session(self._request.mountpoint, source | options)
        self._mounted = True
        lacking = libfuse.lacks()
        if lacking is not None:
            log.warning(
                "cannot extend libfuse: the mount is slower, has no holes and applies umasks: %s",
                lacking,
            )
        if handed_over:
            return
        if not self.dev:
            found = mount_of(self._request.mountpoint)
            self.dev = found.dev if found is not None else ""
        if not self.dev:
            self.close()
            raise SystemFailure(
                f"{self._request.mountpoint}: mounted, but not listed in /proc/self/mountinfo"
            )

    def _mount_connection(self, options: set[str]) -> bool:
        """Mount with mount(2), directly or through the helper process; False if that is not permitted.

        Open the session first: the mount may hide files that libfuse and a new session need.
        """
        place = self._request.mountpoint
        source = os.fsdecode(_short(os.fsencode(self._request.fsname)))
        connection = fuse.open_connection()
        self._begin_session(f"/dev/fd/{connection}", set())
        try:
            if self._outside is None:
                fuse.mount_connection(connection, place, source, options)
            else:
                request = {"source": source, "options": sorted(options)}
                self.dev = self._outside.ask("mount", [connection], **request)["dev"]
        except OSError as error:
            pyfuse3.close(unmount=False)  # closes the connection too
            if error.errno == errno.EPERM and self._outside is None:
                return False
            raise MountFailure(f"{place}: cannot be mounted: {error.strerror}") from None
        return True

    @cached_property
    def handlers(self) -> HandlerTable:
        """The handlers that pyfuse3 calls: the adapter's, with tracing and fault injection."""
        if type(self.adapter) in {Adapter, FakerootAdapter}:  # tracing and fault injection must see all
            libfuse.answer_no_capability()
        if type(self.adapter) is Adapter:
            self.adapter.serve_inodes()
        return HandlerTable(self.adapter)

    def _begin_session(self, place: str, options: set[str]) -> None:
        with _stderr() as said:
            try:
                pyfuse3.init(self.handlers, place, options)
            except RuntimeError:
                raise _explain(said(), self._request.mountpoint) from None
        self.loop.attach()

    def serve(
        self,
        commands: Mapping[str, control.Command],
        ready: Callable[[], None],
        look: Callable[[], None] | None = None,
        also: Sequence[Task] = (),
        after_pause: Callable[[], None] | None = None,
    ) -> None:
        """Answer requests until the filesystem is unmounted, or SIGTERM or SIGINT ends it.

        Call *ready* once the mount has answered a first request, *look* every few seconds, and *after_pause*
        before a request that follows a pause in which the machine may have slept. The tasks in *also* start
        before *ready*, and are cancelled when the filesystem is unmounted. If one ends or fails, the others
        and the mount continue.
        """
        self.loop.after_pause = after_pause
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 5, 1000)  # collect the many nodes in small parts
        sys.setswitchinterval(_TURN)
        trio.run(self._main, commands, ready, look, also)
        if self._failure is not None:
            raise self._failure

    def stop_waiting_soon(self) -> None:
        """In a few seconds and from then on, give up requests that seem to hang: the mount is ending."""
        self.loop.stop_waiting_soon()

    def ask_again(self, stale: Iterable[tuple[int, bytes | None]]) -> None:
        """Make the kernel look up names in directories again, and (None) inodes. Blocks: call it in a
        thread."""
        for ino, name in stale:
            self.adapter.changed_within(ino)
            self.loop.ask_again(ino, name)

    def transport(self) -> str:
        """Describe how requests arrive, for ``cowfs info``."""
        if self._rings is None:
            return f"/dev/fuse; io_uring: {self._without}" if self._without else "/dev/fuse"
        refused = libfuse.rings_refused()
        return f"/dev/fuse ({refused})" if refused else f"io_uring, {self._rings.describe()}"

    def close(self) -> None:
        """Detach from the mountpoint if it is still mounted."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1
        libfuse.stop_inodes()
        if self._mounted:
            self._mounted = False
            pyfuse3.close(unmount=True)
            if self._outside is None:
                self._detach_dead()
            else:
                self._unmount_elsewhere(self._outside)

    def _unmount_elsewhere(self, elsewhere: helper_process.Outside) -> None:
        place = self._request.mountpoint
        try:
            # The helper forks to unmount, and looks without.
            was_there = elsewhere.ask("is_mounted")["is"] and elsewhere.ask("unmount")["was"]
        except OSError as error:  # the helper was killed: cowfs umount detaches the mount
            log.warning("%s: cannot be detached, if it is still mounted: %s", place, error.strerror)
            return
        if was_there and not self._asked:
            log.warning("the connection to the kernel was aborted: %s is detached", place)

    def _detach_dead(self) -> None:
        """Detach a mount that nobody serves any more."""
        found = mount_of(self._request.mountpoint)
        if found is None or found.dev != self.dev:
            return
        if not self._asked:
            log.warning("the connection to the kernel was aborted: %s is detached", self._request.mountpoint)
        if os.geteuid() == 0:
            with suppress(OSError):
                unmount(self._request.mountpoint, MNT_DETACH)
        else:
            program = programs.find("fusermount3") or "/usr/bin/fusermount3"
            command = [program, "-u", "-z", "--", self._request.mountpoint]
            subprocess.run(command, check=False, capture_output=True, env=programs.environment())

    async def _main(
        self,
        commands: Mapping[str, control.Command],
        ready: Callable[[], None],
        look: Callable[[], None] | None,
        also: Sequence[Task],
    ) -> None:
        note_root()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
            if self.dev and self._control >= 0:
                nursery.start_soon(self._serve_control, commands)
            for task in also:
                nursery.start_soon(_beside, task)
            nursery.start_soon(self._keep_few_inodes)
            nursery.start_soon(self._announce, ready)
            if "ro" not in self._request.options:
                self.adapter.go_on()
            nursery.start_soon(_now_and_then, self._memory_reclaimer.look)
            if look is not None:
                nursery.start_soon(_now_and_then, look)
            await self.loop.run()
            sd_notify("STOPPING=1")
            nursery.cancel_scope.cancel()

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Call *ready* once the mount answers."""
        if self.dev:
            try:
                await trio.to_thread.run_sync(self._answers, abandon_on_cancel=True)
            except OSError as error:
                if not self._asked:
                    self._asked = True
                    self._failure = MountFailure(
                        f"{self._request.mountpoint}: the root cannot be read: {error.strerror}",
                        "`cowfs check` tells whether the store is damaged",
                    )
                    self.loop.stop()
                return  # a mount that is ending refuses late requests
        sd_notify(f"READY=1\nMAINPID={os.getpid()}")
        ready()

    async def _keep_few_inodes(self) -> None:
        try:
            await self._inode_limit.keep_few(self.loop.connection(), self._drop_unused)
        except OSError as error:
            log.warning("cannot limit how many inodes the kernel keeps known: %s", error)

    def _drop_unused(self) -> None:
        if self._outside is not None:
            self._outside.ask("drop")
        else:
            drop_unused(self._request.mountpoint, self.dev)

    def _answers(self) -> None:
        if self._outside is not None:
            self._outside.ask("answers")
        else:
            os.stat(self._request.mountpoint)

    async def _serve_control(self, commands: Mapping[str, control.Command]) -> None:
        try:
            # First the FORGETs that have come: a command may need the space of what was deleted before it.
            await control.serve(self._control, self.dev, commands, self.loop.serve_others)
        except OSError as error:
            log.warning("no control socket: `cowfs info` and `diff` do not work on this mount: %s", error)

    async def _watch_signals(self) -> None:
        fd = open_signals()
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                number = take(fd)
                if number is None or number == signal.SIGHUP:
                    continue  # the terminal closed: a mount outlives it
                log.info("%s: unmounting", number.name)
                async with trio.open_nursery() as nursery:
                    if not self._request.stay_on_sigterm:
                        nursery.start_soon(self._watch_impatience, fd, nursery.cancel_scope)
                    await self._write_back()
                    nursery.cancel_scope.cancel()
                if not self._request.stay_on_sigterm:
                    break  # other signals wait until the process ends
        finally:
            os.close(fd)
        self._asked = True
        self.loop.stop()

    async def _watch_impatience(self, fd: int, waiting: trio.CancelScope) -> None:
        """Stop waiting for the kernel when another signal arrives."""
        while True:
            await trio.lowlevel.wait_readable(fd)
            number = take(fd)
            if number is not None and number != signal.SIGHUP:
                log.info("%s again: unmounting immediately", number.name)
                waiting.cancel()
                return

    async def _write_back(self) -> None:
        """Make the kernel write back the pages that it still holds, written through mmap."""

        def sync() -> None:
            if self._outside is not None:
                self._outside.ask("sync")
                return
            fd = os.open(self._request.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
            try:
                syncfs(fd)
            finally:
                os.close(fd)

        with trio.move_on_after(30):
            try:
                await trio.to_thread.run_sync(sync, abandon_on_cancel=True)
            except OSError as error:
                log.warning("could not write back changes before the unmount: %s", error)


def _control_directory() -> int:
    """Open the directory of the control socket before the mount may hide it; -1 if there is none."""
    try:
        return open_control_directory()
    except PermissionError as error:
        raise SystemFailure(
            f"{error.filename}: cannot create the control socket: {error.strerror}",
            "set XDG_RUNTIME_DIR to a directory that you own",
        ) from None
    except OSError as error:
        log.warning("no control socket: `cowfs info` and `diff` do not work on this mount: %s", error)
        return -1


async def _beside(task: Task) -> None:
    try:
        await task()
    except Exception:
        log.exception("a background task failed; the mount continues")


async def _now_and_then(look: Callable[[], None]) -> None:
    while True:
        await trio.sleep(_NOW_AND_THEN)
        try:
            look()
        except OSError as error:  # of the store: its users get the error
            log.debug("the store cannot be checked: %s", error)


def _escape(text: str) -> str:
    """Escape a value for libfuse's comma-separated options, for which pyfuse3 wants ASCII.

    fuse_opt.c reads a backslash and three octal digits. mount(2) takes a source of less than a page.
    """
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in _short(os.fsencode(text)))


def _short(source: bytes) -> bytes:
    return source if len(source) <= _LONGEST_SOURCE else source[:_LONGEST_SOURCE] + b"..."


def _explain(said: str, mountpoint: str) -> MountFailure:
    lines = [line for line in said.splitlines() if line.strip()]
    why = lines[-1].strip() if lines else "libfuse gave no reason"
    for prefix in ("fusermount3: ", "fuse: ", "mount: "):
        why = why.removeprefix(prefix)
    hint = ""
    if "user_allow_other" in why:
        hint = "add the line user_allow_other to /etc/fuse.conf, or remove allow_other"
    return MountFailure(f"{mountpoint}: cannot be mounted: {why}", hint)


@contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """Collect what libfuse and fusermount3 print, to put it into a message."""
    with os.fdopen(os.memfd_create("cowfs-said", os.MFD_CLOEXEC), "rb") as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)

        def said() -> str:
            sink.seek(0)
            return sink.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
