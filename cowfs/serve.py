"""The commands that the control socket of a mounted union answers."""

from __future__ import annotations

import base64
import os
import select
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cowfs.changes.lowers import must_not_wait
from cowfs.errors import UsageError
from cowfs.faults import Faults
from cowfs.fuse.control import Replies
from cowfs.fuse.feeds import Watcher
from cowfs.fuse.observer import Observer
from cowfs.overlay.uncover import Stale
from cowfs.store.format import records
from cowfs.store.format.header import said_of, volatile_above
from cowfs.store.served import disk_space
from cowfs.store.served.store import Store
from cowfs.types import Change
from cowfs.union import Union

if TYPE_CHECKING:
    from cowfs.changes.merged import Merged

R = TypeVar("R")
_PIECE = 1 << 18
ATTRIBUTES = (
    *("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"),
    *("st_blocks", "st_blksize", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)
"""Of what the answer to ``version`` tells, in this order: the first arguments of AttrData."""


def commands(
    union: Union,
    more: Callable[[], dict[str, Any]],
    stop_waiting_soon: Callable[[], None] = lambda: None,
    ask_again: Callable[[Stale], None] = lambda _: None,
    observer: Observer | None = None,
    faults: Faults | None = None,
) -> Mapping[str, Any]:
    """Return what the control socket of this union answers.

    *more* adds to ``info``. *stop_waiting_soon* is called when the mount is about to be detached, and
    *ask_again*, in a thread, with the kernel's outdated cache entries. *observer* knows which process
    changes what; *faults* are the injected faults.
    """

    def info(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {**union.info(), **more()}

    def diff(request: dict[str, Any]) -> Replies:
        from cowfs.changes.render import to_json
        from cowfs.live_diff import steps
        from cowfs.store.format.checkpoints import between

        wanted = between(union.store.layers, union.store.upper, request.get("since"), request.get("until"))
        lost = disk_space.unsaved(union.store)
        if lost:
            yield {"said": f"{union.store.path}: {lost}"}
        if union.options.volatile:
            yield {"said": said_of(union.options.volatile)}
        times = bool(request.get("directory_times"))
        within = [base64.b64decode(path) for path in request.get("within") or ()]
        for step in steps(union.overlay, wanted, directory_times=times, within=within):
            yield {"change": to_json(step)} if isinstance(step, Change) else step

    answers = {
        "info": info,
        "diff": diff,
        **_of_the_store(union),
        **_of_taking_back(union, ask_again, observer),
        **_of_the_whole_store(union),
        **_of_the_end(union, stop_waiting_soon),
        "fault": lambda request: _of_faults(faults, request),
    }
    return answers if observer is None else {**answers, **_of_changes(union, observer)}


def _of_faults(faults: Faults | None, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the commands that set faults, or crash the daemon."""
    if faults is None:
        raise UsageError("no faults can be asked for on this mount", "mount it with -o fault=none")
    if request.get("crash"):
        faults.crash()
    faults.replace([str(fault) for fault in request.get("faults", [])])
    yield {}


def _of_taking_back(
    union: Union, ask_again: Callable[[Stale], None], observer: Observer | None
) -> Mapping[str, Any]:
    """Return the commands that revert changes and handle checkpoints."""

    def take_back(request: dict[str, Any]) -> Replies:
        from cowfs.take_back import told

        changes = request.get("what") in {"revert", "undo"} and not request.get("dry_run")
        with closing(told(union, request, ask_again)) as steps:
            for step in steps:
                if observer is None or not changes or not isinstance(step, dict):
                    pass
                elif "path" in step and not step["why_not"]:
                    observer.reverted(base64.b64decode(step["path"]))
                yield step

    def checkpoint(request: dict[str, Any]) -> Replies:
        from cowfs.take_back import checkpoints

        return checkpoints(union, request, ask_again)

    def checkpoints(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        from cowfs.store.format.checkpoints import listed

        yield from listed(union.store.layers, union.store.upper)

    def above_deleted(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        from cowfs.store.format.checkpoints import is_above_deleted

        yield {"above_deleted": is_above_deleted(union.store.layers, union.store.upper)}

    def lower(request: dict[str, Any]) -> Replies:
        from cowfs.modules import told

        return told(union, request, ask_again)

    answers = {"take_back": take_back, "checkpoint": checkpoint, "checkpoints": checkpoints}
    return {**answers, "above_deleted": above_deleted, "lower": lower}


def _of_the_whole_store(union: Union) -> Mapping[str, Any]:
    """Return the commands that resize, move or copy the store."""

    def grow(request: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.offline.grow import grow_open_store

        size = yield from _told(grow_open_store(union.store, request["size"]))
        yield {"size": size}

    def persist(request: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.offline.persist import persist as steps

        given = (request[what] for what in ("fd", "name", "path", "size"))
        size = yield from _told(steps(union.store, *given))
        yield partial(_watch, union, request["fd"], request["name"])
        yield {"size": size}

    def backup(request: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.offline.backup import backup_image

        size = yield from _told(backup_image(union.store, request["fd"]))
        yield {"size": size}

    def trim(_: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.offline.shrink import trim_open_store

        freed = yield from _told(trim_open_store(union.store))
        yield {"freed": freed}

    return {"grow": grow, "persist": persist, "backup": backup, "trim": trim}


def _of_the_end(union: Union, stop_waiting_soon: Callable[[], None]) -> Mapping[str, Any]:
    """Return the commands that write changes to disk: before others read the store, and before an unmount."""

    def hold(request: dict[str, Any]) -> Replies:
        """Make all requests wait while the client, at the other end of a socket, reads the store."""
        from cowfs.changes.checkpoint import stand_still

        lent = yield from stand_still(union.store, union.overlay)
        _wait_for(request["fd"])
        yield {"lent": lent}

    def sync(_: dict[str, Any]) -> Replies:
        yield union.overlay.upper.sync
        yield {}

    def saw_lowers(request: dict[str, Any]) -> Replies:
        when = int(request["when"])
        if not union.store.read_only:
            yield lambda: union.store.saw_lowers(when)
        yield {}

    def leave(request: dict[str, Any]) -> Replies:
        if request.get("lazy"):
            stop_waiting_soon()
        union.may_be_lost = request["force"]
        if not union.may_be_lost:
            yield lambda: _try_to_save(union.store)
            lost = disk_space.unsaved(union.store)
            if lost:
                yield {"unsaved": f"{union.store.path}: {lost}"}
                return
        if union.release_pipe >= 0:
            os.close(union.release_pipe)
        union.release_pipe = os.dup(request["fd"]) if "fd" in request else -1
        yield {}

    return {"hold": hold, "sync": sync, "saw_lowers": saw_lowers, "leave": leave}


def _watch(union: Union, directory: int, name: str) -> None:
    """From now on, watch the file of a store that was moved to *name* in *directory*."""
    with suppress(OSError):
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            union.whereabouts.store_is_at(fd)
        finally:
            os.close(fd)


_LONGEST_SILENCE = 60_000
"""Milliseconds of silence after which a client for whom we wait may be dead, or stopped."""


def _wait_for(fd: int) -> None:
    """Report that all requests wait; return when the client closes the socket, or is silent for long."""
    with suppress(OSError):
        os.write(fd, b"h")
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(_LONGEST_SILENCE) and os.read(fd, 100):
            pass


def _of_the_store(union: Union) -> Mapping[str, Any]:
    """Return the commands that tell what is in the store, and why."""

    def du(_: dict[str, Any]) -> Replies:
        from cowfs.changes.du import usage

        must_not_wait(union.overlay.base)
        store, total = union.store, 0
        if union.options.volatile:
            yield {"said": said_of(union.options.volatile)}
        fs = union.overlay
        lowers, others = list(fs.base), store.layers.beside(store.upper)
        how: dict[str, Any] = {"frozen": list(fs.frozen), "others": others}
        for used in usage(store.layer, store.upper, store.notebook, lowers, store.xattr_prefix, **how):
            if used is None:
                yield None
            else:
                total += used.size
                path = base64.b64encode(used.path).decode()
                yield {"path": path, "reason": used.reason, "size": used.size, "directory": used.is_dir}
        if store.kind == "image" or store.path == "memory":
            yield {"path": "", "reason": "overhead", "size": max(store.taken - total, 0)}

    def explain(request: dict[str, Any]) -> Replies:
        from cowfs.changes.explain import explain as explanation

        must_not_wait(union.overlay.base)
        fs, store = union.overlay, union.store
        path = base64.b64decode(request["path"])
        frozen = list(zip((one.name for one in store.frozen), fs.frozen, strict=True))
        lowers, prefix = list(fs.base), store.xattr_prefix
        answer = yield from explanation(store.layer, store.upper, lowers, prefix, fs.index, path, frozen)
        yield {**answer, "volatile": volatile_above(union.options.volatile or (), path)}

    def version(request: dict[str, Any]) -> Replies:
        """Yield a checkpoint's attributes at a path, then its content in pieces."""
        must_not_wait(union.overlay.base)
        found = at(request).version(base64.b64decode(request["path"]))
        if found is None:
            return
        yield {"attr": [getattr(found.attr, name) for name in ATTRIBUTES]}
        if request.get("content"):
            content = found.read()
            for start in range(0, len(content), _PIECE):
                yield {"data": base64.b64encode(content[start : start + _PIECE]).decode()}

    def files(request: dict[str, Any]) -> Replies:
        must_not_wait(union.overlay.base)
        for path in at(request).files(base64.b64decode(request["path"])):
            yield {"path": base64.b64encode(path).decode()}

    def at(request: dict[str, Any]) -> Merged:
        from cowfs.changes.merged import Merged
        from cowfs.overlay.stack import Stack
        from cowfs.store.format.checkpoints import as_layers, between

        store = union.store
        layers = between(store.layers, store.upper, None, str(request["at"])).newer
        return Merged(Stack([*as_layers(store.layer, layers), *union.overlay.base], union.overlay.format))

    return {"du": du, "explain": explain, "version": version, "files": files}


def _of_changes(union: Union, observer: Observer) -> Mapping[str, Any]:
    """Return the commands that report changes as they happen, and who made them."""

    def watch(_: dict[str, Any]) -> Watcher:
        return observer.feed.watch()

    def blame(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if observer.recorder is not None:
            contents = observer.recorder.contents()
        else:
            contents = _recorded(union.store)
        for content in contents:
            yield {"batch": base64.b64encode(content).decode()}

    return {"watch": watch, "blame": blame}


def _recorded(store: Store) -> Iterator[bytes]:
    """Yield what was recorded in a store before it was mounted. Raises StoreError if nothing was."""
    with closing(records.read(store.layer)) as found:
        yield from found.contents()


def _try_to_save(store: Store) -> None:
    with suppress(OSError):
        store.save()


def _told(steps: Generator[Callable[[], None] | str, None, R]) -> Generator[Any, None, R]:
    """Turn the progress of a long command's steps into replies."""
    try:
        while True:
            step = next(steps)
            yield {"said": step} if isinstance(step, str) else step
    except StopIteration as end:
        result: R = end.value
        return result
    finally:
        steps.close()
