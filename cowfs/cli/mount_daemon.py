"""The daemon that ``cowfs mount`` starts: open the union, mount it, and serve it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from cowfs.cli import options as mount_options
from cowfs.cli.background import Reporter
from cowfs.cli.log import Log
from cowfs.cli.mount_trust import fuse_options, verified_lowers
from cowfs.cli.output import warn
from cowfs.errors import StoreError
from cowfs.linux import helper_process
from cowfs.linux.sockets import remove_dead
from cowfs.url.names import is_url

if TYPE_CHECKING:
    from cowfs.fuse.daemon import Daemon, MountRequest
    from cowfs.fuse.observer import Observer
    from cowfs.fuse.owners import OwnerMap
    from cowfs.fuse.rings import Rings
    from cowfs.store.served.store import Store
    from cowfs.union import UnionOptions

_log = logging.getLogger(__name__)

_STACK = 1 << 20
"""The stack of a thread in bytes; small, because the address space may be limited."""


def serve(
    union_options: UnionOptions,
    mountpoint: str,
    given: mount_options.Options,
    reporter: Reporter,
    daemon_log: Log,
    owner_map: OwnerMap | None = None,
) -> int:
    from cowfs.formats.squashfs.source import open_unchecked
    from cowfs.formats.verified import belonging, require, root_hash_of
    from cowfs.fuse.rings import rings_for
    from cowfs.linux.privileges import drop
    from cowfs.url.opened import held_open

    os.umask(0)
    threading.stack_size(_STACK)
    remove_dead()  # before the daemon is confined
    rings = rings_for(given.values.get("io_uring", "auto"), warn)
    compared = verified_lowers(union_options)
    needed = [file for low, by in compared.items() for file in belonging(low, by)]
    with held_open(
        [*union_options.lowers, *needed], given.by_url
    ) as begin_to_fetch:  # they start programs, which a confined daemon cannot
        drop(has_rings=rings is not None)  # before there are threads: opening the store starts some
        try:
            confine = _unshare(union_options, mountpoint)
            begin_to_fetch()
            require({low: root_hash_of(low, by, open_unchecked) for low, by in compared.items()})
            request = partial(_request, union_options, mountpoint, given, owner_map)
            _mount_and_serve(union_options, request, given, reporter, daemon_log, confine, rings)
        finally:
            helper_process.end()
    return 0


def _mount_and_serve(
    union_options: UnionOptions,
    requested: Callable[[], MountRequest],
    given: mount_options.Options,
    reporter: Reporter,
    daemon_log: Log,
    confine: Callable[[], None],
    rings: Rings | None,
) -> None:
    from cowfs.cli.own_files import forbid_lookups
    from cowfs.faults import install
    from cowfs.fuse.daemon import Daemon
    from cowfs.fuse.observer import Observer
    from cowfs.fuse.tasks import describe_tasks
    from cowfs.linux.sleep import Disks
    from cowfs.serve import commands
    from cowfs.store.served.fullness import watch
    from cowfs.trace import trace
    from cowfs.union import open_union

    union = open_union(union_options, warn)
    try:
        request = requested()
        daemon = Daemon(union.overlay, request, rings)
        disks = Disks([*_paths(union_options.lowers), union_options.store])
        forbid_lookups(request.mountpoint)
        trace(given.debug, union, daemon)
        faults = install(given.faults, union.store, daemon.adapter)
        observer = Observer(daemon.handlers, daemon.adapter, union.overlay, daemon.loop.in_trio)
        if "blame" in given.flags:
            _record(union.store, observer)
        daemon_log.explain_when_asked(describe_tasks)
        daemon.mount()  # from here on no path may be followed that could lead into the mount
        try:
            union.store.mounted_as(daemon.dev)
            confine()  # and now none leads there
            facts = _facts(daemon, request, daemon_log)
            daemon.serve(
                commands(union, facts, daemon.stop_waiting_soon, daemon.ask_again, observer, faults),
                reporter.ready,
                watch(union.store, union.whereabouts),
                also=[observer.run],
                after_pause=disks.reopen_after_sleep,
            )
        finally:
            daemon.close()
            observer.close()
    finally:
        union.close(heeds_signals=True)


def _facts(daemon: Daemon, request: MountRequest, daemon_log: Log) -> Callable[[], dict[str, Any]]:
    """Return what ``cowfs info`` shows of the mount."""
    options = [*request.options, *(["fakeroot"] if request.fakeroot else [])]
    mounted = {"mountpoint": request.mountpoint, "options": sorted(options)}
    return lambda: {
        **mounted,
        "log": daemon_log.facts(),
        "transport": daemon.transport(),
        **daemon.adapter.figures(),
    }


def _request(
    union: UnionOptions, mountpoint: str, given: mount_options.Options, owner_map: OwnerMap | None
) -> MountRequest:
    """Return how to mount."""
    from cowfs.fuse.daemon import MountRequest

    return MountRequest(
        mountpoint,
        given.values.get("fsname") or _source(union, mountpoint),
        frozenset(fuse_options(given, union)),
        acl="noacl" not in given.flags,
        fakeroot=union.fakeroot,
        passthrough="off"
        if "blame" in given.flags or given.faults
        else given.values.get("passthrough", "auto"),
        owner_map=owner_map,
        sees_all=bool(given.faults),
    )


def _record(store: Store, observer: Observer) -> None:
    """Start to record which programs make changes. If that fails, warn, and mount without it."""
    from cowfs.fuse.recorder import Recorder
    from cowfs.store.format.records import open_or_make

    why = ""
    try:
        records, said = open_or_make(store.layer, store.size)
        if said:
            warn(f"{said}; started a new one")
        observer.record(Recorder(records, store.path))
    except StoreError as error:
        why = str(error)
    except OSError as error:
        why = f"{store.path}: {error.strerror}"
    if why:
        warn(f"changes are not recorded: {why}")
        _log.warning("changes are not recorded: %s", why)


def _unshare(union: UnionOptions, mountpoint: str) -> Callable[[], None]:
    """Enter a mount namespace, leaving a helper outside; return a function that confines the daemon.

    Does nothing for users, who cannot confine a daemon. A daemon that was handed a mount has no helper that
    could unmount it, so it keeps access to all files; so does one whose root cannot be exchanged.
    """
    from cowfs.cli.helper_requests import HelperRequests
    from cowfs.linux import confine
    from cowfs.store.format.foreign import upper_of
    from cowfs.store.served.presence import watched

    if os.geteuid() != 0 or mountpoint.startswith("/dev/fd/") or not confine.is_possible():
        return lambda: None
    store = union.store if union.work else upper_of(union.store)
    HelperRequests(mountpoint, watched(store, union.lowers)).start()
    try:
        confine.unshare()
    except OSError as error:
        _log.info("the daemon is not confined: it cannot have its own mount namespace: %s", error.strerror)
        helper_process.end()
        return lambda: None

    def confine_daemon() -> None:
        try:
            confine.confine()
        except OSError as error:
            _log.info("the daemon is not confined: %s", error.strerror)

    return confine_daemon


def _paths(lowers: Iterable[str]) -> list[str]:
    return [lower for lower in lowers if not is_url(lower)]


def _source(union: UnionOptions, mountpoint: str) -> str:
    """Return what mount(8) shows as the source: the lowers, as on the command line.

    Programs look up sources that are paths, and e2fsck does too. So none may lead into the mount.
    """
    if any(
        f"{os.path.realpath(low)}/".startswith(f"{mountpoint.rstrip('/')}/") for low in _paths(union.lowers)
    ):
        return "cowfs"
    return mount_options.join_lowers(union.lowers, union.data_only)
