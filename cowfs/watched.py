"""Watches a mount: its changes as they happen."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

from cowfs.client import ask, checked_answer, find_mount, from_root, the_mount
from cowfs.errors import CowfsError, MountFailure, SystemFailure
from cowfs.jsontext import get_path, put_path

Replies = Generator[dict[str, Any], None, None]


class Event(NamedTuple):
    """A change of a mounted tree."""

    time: str
    """ISO 8601, UTC."""
    operation: str
    """One of those that ``cowfs watch --help`` lists."""
    path: bytes
    to: bytes | None
    """The other path of a rename, exchange or link."""
    process: dict[str, Any] | None
    """Who made it: ``pid``, ``uid``, ``program``, ``command``, ``cgroup``, ``unit`` and ``container``; None
    if the kernel wrote for a mapping, and for ``revert``."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the object that ``cowfs watch --json`` prints, without ``version``."""
        entry: dict[str, Any] = {"time": self.time, "operation": self.operation}
        put_path(entry, "path", self.path)
        if self.to is not None:
            put_path(entry, "to", self.to)
        return entry | {"process": self.process}


class Events:
    """The changes of a mount from now on, each once and in order. To take the next one waits for it."""

    ended = "died"
    """Why there are no more: the tree was ``unmounted``, its daemon has ``died``, or the reader was too
    ``slow``."""
    failure: CowfsError | None = None
    """What is known of a daemon that has died."""

    def __init__(
        self, mountpoint: str, dev: str, replies: Iterator[dict[str, Any]], paths: Sequence[str]
    ) -> None:
        from cowfs.changes.select import pattern

        self.mountpoint = mountpoint
        self._dev = dev
        self._replies = replies
        self._patterns = [pattern(os.fsencode(from_root(path, mountpoint))) for path in paths]

    def __iter__(self) -> Iterator[Event]:
        for reply in self._until_the_end():
            with checked_answer(self.mountpoint):
                event = _event(reply)
            if self._is_wanted(event):
                yield event

    def _until_the_end(self) -> Iterator[dict[str, Any]]:
        try:
            for reply in self._replies:
                if "ended" in reply:
                    self.ended = str(reply["ended"])
                    return
                yield reply
        except MountFailure as failure:
            self.failure = failure
        found = find_mount(self.mountpoint)
        if found is None or found.dev != self._dev:
            self.ended, self.failure = "unmounted", None

    def _is_wanted(self, event: Event) -> bool:
        places = [event.path] if event.to is None else [event.path, event.to]
        return not self._patterns or any(each.match(place) for each in self._patterns for place in places)


@contextmanager
def watch(mountpoint: str, paths: Sequence[str] = ()) -> Iterator[Events]:
    """Watch a mount, or what is at *paths* and below in it, which may be globs; misses nothing from now on.

    Never slows the mount: who reads so slowly that 4 MiB wait is cut off. Blocks until the daemon watches.
    Raises MountFailure if there is no mount or its daemon cannot be asked, SystemFailure if it is too old.
    """
    found = the_mount(mountpoint)
    replies = cast(Replies, ask(found.dev, "watch", timeout=None))
    try:
        try:
            begun = next(replies, {})
        except CowfsError as failure:
            if failure.message.startswith("unknown command"):
                raise SystemFailure(
                    f"{mountpoint}: its daemon is an older cowfs, which cannot be watched", "mount it again"
                ) from None
            raise
        if "watching" not in begun:
            raise MountFailure(f"{mountpoint}: the daemon sent an invalid reply", "mount it again")
        yield Events(os.fsdecode(found.mountpoint), found.dev, replies, paths)
    finally:
        with suppress(ValueError):  # another thread waits for the next one, until the mount ends
            replies.close()


def _event(reply: dict[str, Any]) -> Event:
    to = get_path(reply, "to") if "to" in reply else None
    process = reply["process"]
    if process is not None and not isinstance(process, dict):
        raise TypeError(process)
    return Event(str(reply["time"]), str(reply["operation"]), get_path(reply, "path"), to, process)
