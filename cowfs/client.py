"""Talking to the daemon of a mount."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from cowfs.errors import CowfsError, MountFailure, UsageError
from cowfs.linux.files import absolute, is_image
from cowfs.linux.fuse import FSTYPE, LISTED
from cowfs.linux.idle import Idleness
from cowfs.linux.mount_table import MountInfo, mount_of, mountinfo
from cowfs.linux.safe_paths import is_same_file
from cowfs.linux.sockets import connect_control

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MOST_LINKS = 40
"""The most symbolic links that the kernel follows (path_resolution(7))."""
VIEW_FSTYPE = "fuse.cowfs-store"
"""The type of a store that its daemon shows (cowfs.fuse.view)."""


def find_mount(path: str) -> MountInfo | None:
    """Return the cowfs mount whose mountpoint is *path*; None if there is none.

    SystemFailure as :func:`cowfs.linux.files.absolute`. Silent if the way leads through a mount of cowfs
    whose daemon is stopped, or does not answer.
    """
    # Do not access the last component: it may be the root of a mount whose daemon is dead, or hangs.
    for _ in range(_MOST_LINKS):
        directory, name = os.path.split(absolute(path))
        directory = _real_path(directory)
        found = mount_of(os.path.join(directory, name))
        if found is not None:
            return found if found.fstype == FSTYPE else None
        try:
            path = os.path.join(directory, os.readlink(os.path.join(directory, name)))
        except OSError:
            break
    return None


def _real_path(path: str) -> str:
    """Do os.path.realpath(), but raise Silent instead of waiting for a daemon of cowfs."""
    mounts = list(mountinfo())
    if all(mount.fstype != FSTYPE for mount in mounts):
        return os.path.realpath(path)
    return _walk(path, mounts, set()) or os.path.realpath(path)


def _walk(path: str, mounts: list[MountInfo], untouched: set[bytes]) -> str | None:
    """Follow the links of a path; Silent if it leads to or through a mount whose daemon does not answer.

    Return where it leads: None if that is to a mountpoint in *untouched*, or if there are too many links.
    """
    ours = {mount.mountpoint: mount.dev for mount in mounts if mount.fstype == FSTYPE}
    place, names, links = "/", path.split("/")[::-1], 0
    while names:
        name = names.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            place = os.path.dirname(place)
            continue
        place = os.path.join(place, name)
        mountpoint = os.fsencode(place)
        if mountpoint in untouched:
            return None
        if mountpoint in ours:
            _require_answer(ours[mountpoint])
            continue
        try:
            target = os.readlink(place)
        except OSError:  # no link
            continue
        links += 1
        if links > _MOST_LINKS:
            return None
        names += target.split("/")[::-1]
        place = "/" if target.startswith("/") else os.path.dirname(place)
    return place


def require_answers(paths: Iterable[str]) -> None:
    """Silent if one of the paths leads to or through a mount of cowfs whose daemon is stopped, or does not
    answer: whoever touches it waits. The daemons of other filesystems are not touched.
    """
    mounts = list(mountinfo())
    served = [mount for mount in mounts if mount.fstype.startswith("fuse")]
    others = {mount.mountpoint for mount in served if mount.fstype != FSTYPE}
    if any(mount.fstype == FSTYPE for mount in served):
        for path in paths:
            _walk(absolute(path), mounts, others)


def _require_answer(dev: str) -> None:
    """Silent if the daemon of the mount ``major:minor`` does not answer, as far as this user may ask it."""
    try:
        facts_of(dev)
    except Silent:
        raise
    except MountFailure:  # it is dead, or another user's: then nobody waits, or nobody knows
        return


def mount_above(path: str) -> tuple[str, str] | None:
    """Return the mountpoint of the cowfs mount that contains *path*, and the path from there; None if none
    does.

    Follows symbolic links on the way, but not one at the end.
    """
    if find_mount(path) is not None:
        return path, ""
    directory, name = os.path.split(os.path.abspath(path))
    place, way = _real_path(directory), name
    while True:
        if find_mount(place) is not None:
            return place, way
        above, name = os.path.split(place)
        if above == place:
            return None
        place, way = above, os.path.join(name, way)


def from_root(path: str, mountpoint: str) -> str:
    """Return a path relative to the root of the tree; it may begin with the mountpoint."""
    below = mountpoint.rstrip("/") + "/"
    return path[len(below) :] if f"{path}/".startswith(below) and path.startswith("/") else path


def the_mount(path: str) -> MountInfo:
    """Return the cowfs mount whose mountpoint is *path*; MountFailure if there is none."""
    found = find_mount(path)
    if found is None:
        raise MountFailure(f"{path}: not a cowfs mountpoint", _where_instead(path))
    return found


def mount_first(path: str, other: str, command: str) -> MountInfo:
    """Do :func:`the_mount`; UsageError if the next argument of *command*, *other*, is the mountpoint."""
    if find_mount(path) is None and find_mount(other) is not None:
        raise UsageError(f"{path}: the mountpoint comes first", f"cowfs {command} {other} {path}")
    return the_mount(path)


def _where_instead(path: str) -> str:
    """Return a hint: the mountpoint of the mount that contains *path*, or whose store it is, if any."""
    above = mount_above(path)
    if above is not None:
        return f"it is inside the mount at {above[0]}: give that"
    mount = mount_with_store(path)
    if mount is not None:
        return f"its mountpoint is {os.fsdecode(mount.mountpoint)}: give that"
    return LISTED


class Dead(MountFailure):
    """There is no daemon any more."""


def mount_with_store(path: str) -> MountInfo | None:
    """Return the mount at *path*, or the one with the store *path*; None if no daemon answers for it."""
    found = find_mount(path)
    if found is not None or not is_image(path):
        return found
    patience = Patience(each=5.0, in_all=10.0)
    for mount in mountinfo():
        if mount.fstype == FSTYPE:
            try:
                info = os.stat(path)
                if owner_of(mount.dev) not in {0, os.geteuid(), info.st_uid}:
                    continue  # whose daemon may claim any store
                store = patience.facts_of(mount.dev)["store"]
                if store["kind"] == "image" and is_same_file(store["path"], info):
                    return mount
            except (CowfsError, OSError):
                continue
    return None


class Patience:
    """Asks many daemons, and limits the total time for those of one user, of which many may not answer."""

    def __init__(self, each: float, in_all: float) -> None:
        """Both times are in seconds."""
        self._each = each
        self._left: dict[int, float] = {}
        self._in_all = in_all

    def facts_of(self, dev: str) -> dict[str, Any]:
        """Do :func:`facts_of`. Raises Silent, too, if this user's daemons have taken too long already."""
        owner = owner_of(dev)
        left = self._left.get(owner, self._in_all)
        if left <= 0:
            raise Silent(
                f"{name_of(dev)}: not asked, because other daemons of uid {owner} do not answer",
                "cowfs umount -l removes those",
            )
        begun = time.monotonic()
        try:
            return facts_of(dev, timeout=min(self._each, left))
        finally:
            self._left[owner] = left - (time.monotonic() - begun)


class Silent(MountFailure):
    """The daemon exists, but does not answer."""


def _give_up(silence: Silent) -> None:
    raise silence


def facts_of(
    dev: str, timeout: float | None = 60.0, if_hung: Callable[[Silent], None] = _give_up
) -> dict[str, Any]:
    """Return the facts that the daemon of the mount ``major:minor`` sends: its ``pid``, which the kernel
    vouches for, ``mountpoint``, ``store`` with ``kind`` and ``path``, and more.

    Raises MountFailure if it does not answer, or its answer makes no sense. *if_hung*: see :func:`ask`.
    """
    facts = next(ask(dev, "info", timeout=timeout, if_hung=if_hung), {})
    store = facts.get("store")
    named = [facts.get("mountpoint"), *map(store.get, ("kind", "path"))] if isinstance(store, dict) else [0]
    if type(facts.get("pid")) is not int or not all(isinstance(name, str) for name in named):
        raise _bad_answer(name_of(dev))
    return facts


def ask(
    dev: str,
    command: str,
    timeout: float | None = 60.0,
    fd: int = -1,
    if_hung: Callable[[Silent], None] = _give_up,
    **arguments: Any,
) -> Iterator[dict[str, Any]]:
    """Send a command to the daemon of the mount ``major:minor`` and yield its replies.

    *timeout* is in seconds, for each reply; *fd* is sent along. If the daemon does not even begin to answer,
    and does nothing else, calls *if_hung* once, before the timeout; the default raises its argument.

    A pid in a reply is the pid of the daemon. Raises MountFailure if no daemon answers, Silent if it takes
    too long or is stopped, CowfsError with its message if the command fails.
    """
    with _connected(dev, timeout, fd) as (connection, pid, place):
        request = json.dumps({"command": command, **arguments}).encode() + b"\n"
        with suppress(BrokenPipeError, ConnectionResetError):  # it has sent the reason, and has exited
            socket.send_fds(connection, [request], [fd] if fd >= 0 else [])
        with _Doubt(dev, pid, place, if_hung) as doubt:
            yield from replies(connection, pid, place, doubt)


def must_take_requests(dev: str) -> None:
    """MountFailure if the mount ``major:minor`` has no daemon any more, or one that this user may not ask;
    Silent if it is stopped.
    """
    with _connected(dev, 60.0) as (_, pid, place):
        deadline = time.monotonic() + _STOPPED
        while _is_stopped(pid):
            if time.monotonic() > deadline:
                raise _stopped(pid, place)
            time.sleep(_STOPPED / 4)


@contextmanager
def _connected(dev: str, timeout: float | None, fd: int = -1) -> Iterator[tuple[socket.socket, int, str]]:
    """Yield a connection to the daemon of a mount, the daemon's pid, and the mountpoint."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        owner, place = owner_of(dev), name_of(dev)
        _refuse_other_users(place, owner, fd)
        try:
            pid = _connect_soon(connection, dev, owner)
        except OSError as error:
            raise _unreachable(place, error) from None
        yield connection, pid, place


_NEW = 0.5
"""How many seconds a daemon may take from the mount to its control socket."""


def _connect_soon(connection: socket.socket, dev: str, owner: int) -> int:
    """Connect to a daemon that may just have mounted; return its pid. Raises what connect_control() does."""
    deadline = time.monotonic() + _NEW
    while True:
        try:
            return connect_control(connection, dev, owner)
        except (FileNotFoundError, PermissionError):  # it is in none yet, and one place is another user's
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _unreachable(place: str, error: OSError) -> MountFailure:
    """Return why no daemon can be asked, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        return Dead(f"{place}: the daemon is dead", f"remove the mount: cowfs umount {place}")
    if isinstance(error, FileNotFoundError):
        hint = f"run this where it was mounted, as the same user; or remove it: umount {place}"
        return MountFailure(f"{place}: cannot find the daemon's control socket", hint)
    return MountFailure(f"{place}: cannot connect to the daemon: {error.strerror}", "try again, or as root")


def replies(
    connection: socket.socket, pid: int, place: str, doubt: _Doubt | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the replies of the daemon *pid* (0: unknown) of the mount at *place*. Raises what ask() does."""
    raw = _Patient(connection, pid, place, doubt)
    with io.BufferedReader(raw) as lines, suppress(ConnectionResetError):
        while line := lines.readline(_LONGEST_REPLY):
            reply = _parse(line, place)
            if reply.get("end"):
                return
            if "error" in reply:
                raise _failure(reply)
            if pid and "pid" in reply:
                reply["pid"] = pid
            yield reply
            raw.begun = time.monotonic()
    hint = f"if the daemon is dead, remove the mount: cowfs umount {place}"
    raise MountFailure(f"{place}: the daemon exited in the middle of a reply", hint)


_STOPPED = 2.0
"""How many seconds a daemon may be stopped: longer is noticed before its timeout."""
_AT_DISK = 5.0
"""How many seconds one wait for a disk may take. A slow one needs seconds to empty its cache."""


class _Doubt:
    """Finds out whether a daemon that does not reply is only slow: then it replies to another client, or does
    something.
    """

    def __init__(self, dev: str, pid: int, place: str, if_hung: Callable[[Silent], None]) -> None:
        self._dev = dev
        self._pid = pid
        self._place = place
        self._if_hung = if_hung
        self._other: socket.socket | None = None
        self._idle: Idleness | None = None
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._other is not None:
            self._other.close()

    def end(self) -> None:
        """It replies."""
        self._is_over = True

    def grow(self) -> None:
        """It has not replied for a while. Does not block."""
        if self._is_over:
            return
        if self._other is None or self._idle is None:
            self._idle = Idleness(self._pid)
            self._other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._other.setblocking(False)
            with suppress(OSError, MountFailure):  # BlockingIOError: too many clients wait already
                connect_control(self._other, self._dev, owner_of(self._dev))
                self._other.send(b'{"command": "reply"}\n')  # there is none of this name: it says so
            return
        seconds = self._idle.seconds()
        with suppress(OSError):  # BlockingIOError: no reply yet
            self._other.recv(1)
            self._is_over = True
        if not self._is_over and seconds >= (_AT_DISK if self._idle.is_at_disk else _STOPPED):
            self._is_over = True
            why = f"the daemon (pid {self._pid}) does not answer, and does nothing"
            hint = "it may wait for a disk, a server or a program: its log may show which; try again later"
            if self._idle.is_at_disk:
                why = f"the daemon (pid {self._pid}) does not answer: it waits for a disk"
                hint = "dmesg may show what the disk does; try again later"
            self._if_hung(Silent(f"{self._place}: {why}", hint))


class _Patient(io.RawIOBase):
    """The replies of a daemon. Raises Silent if a reply takes the connection's timeout, or while it is
    stopped.
    """

    def __init__(self, connection: socket.socket, pid: int, place: str, doubt: _Doubt | None = None) -> None:
        self._connection = connection
        self._pid = pid
        self._place = place
        self._doubt = doubt
        self.begun = time.monotonic()
        """When the wait for the next reply began."""

    def readable(self) -> bool:
        """Always True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See :class:`io.RawIOBase`."""
        timeout = self._connection.gettimeout()
        runs = time.monotonic()
        poll = select.poll()  # select(2) handles the first 1024 descriptors only
        poll.register(self._connection, select.POLLIN)
        while True:
            came = poll.poll(_STOPPED / 4 * 1000)
            now = time.monotonic()
            if timeout is not None and now - self.begun >= timeout:
                why = f"the daemon (pid {self._pid}) has not answered within {timeout:g} s"
                raise Silent(f"{self._place}: {why}", "its log may show what it waits for; try again later")
            if came:
                if self._doubt is not None:
                    self._doubt.end()
                return self._connection.recv_into(buffer)
            if not _is_stopped(self._pid):
                runs = now
            elif now - runs >= _STOPPED:
                raise _stopped(self._pid, self._place)
            if self._doubt is not None:
                self._doubt.grow()


def _stopped(pid: int, place: str) -> Silent:
    return Silent(f"{place}: the daemon (pid {pid}) is stopped", f"kill -CONT {pid} continues it")


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped or traced, as far as /proc shows it (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in {b"T", b"t"}
    except OSError:
        return False


_LONGEST_REPLY = 16 << 20
"""Bytes of a line, so that another user's daemon cannot fill our memory."""


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad_answer(place) from None
    if not isinstance(reply, dict):
        raise _bad_answer(place)
    return reply


def _failure(reply: dict[str, Any]) -> CowfsError:
    """Return the failure that a daemon reports as an exception; its exit code is never 0."""
    failure = CowfsError(str(reply["error"]), str(reply.get("hint", "")))
    code = reply.get("exit_code")
    if type(code) is int and 0 < code < 128:
        failure.exit_code = code
    return failure


@contextmanager
def checked_answer(place: str) -> Iterator[None]:
    """Raise MountFailure for a malformed answer of the mount at *place*: another user's daemon may send
    anything.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise _bad_answer(place) from None


def record_batches(replies: Iterable[dict[str, Any]], place: str) -> Iterator[bytes]:
    """Yield the contents of the records in the answer to ``blame`` of the mount at *place*. MountFailure."""
    for reply in replies:
        with checked_answer(place):
            content = base64.b64decode(reply["batch"], validate=True)
        yield content


def _bad_answer(place: str) -> MountFailure:
    hint = "it may be another version of cowfs, or the user who mounted it is not honest"
    return MountFailure(f"{place}: the daemon sent an invalid reply", hint)


def name_of(dev: str) -> str:
    """Return where *dev* is mounted, for messages."""
    return next((os.fsdecode(mount.mountpoint) for mount in mountinfo() if mount.dev == dev), dev)


def owner_of(dev: str) -> int:
    """Return the user who mounted *dev*, according to the kernel (fuse_show_options in fs/fuse/inode.c)."""
    for mount in mountinfo():
        if mount.dev == dev:
            for option in mount.super_options.split(","):
                if option.startswith("user_id="):
                    return int(option.removeprefix("user_id="))
    raise MountFailure(f"the mount {dev} no longer exists", LISTED)


def _refuse_other_users(place: str, owner: int, fd: int) -> None:
    """MountFailure unless this user may talk to *owner*'s daemon, and send it *fd* if there is one."""
    me = os.geteuid()
    if me not in {0, owner}:
        raise MountFailure(
            f"{place}: this mount belongs to another user (uid {owner})", "run this as that user, or as root"
        )
    if fd >= 0 and me != owner:
        raise MountFailure(
            f"{place}: this mount belongs to another user (uid {owner}), who gets none of your files",
            "run this as that user",
        )


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 if it cannot be seen."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0
