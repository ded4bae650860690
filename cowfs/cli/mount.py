"""``cowfs mount``: merge and mount."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowfs.cli import options as mount_options
from cowfs.cli.background import Reporter, leave, open_log, run_in_background, set_up_log
from cowfs.cli.lacking import LEAST_FILES, too_few_files
from cowfs.cli.output import warn
from cowfs.errors import MountFailure, SystemFailure, UsageError
from cowfs.linux import outside
from cowfs.linux.programs import find
from cowfs.linux.sockets import remove_dead

if TYPE_CHECKING:
    from cowfs.assemble import UnionOptions
    from cowfs.fuse.rings import Rings
    from cowfs.store.store import Store

_log = logging.getLogger(__name__)

NAME = "mount"
_STACK = 1 << 20
"""Bytes of a thread: what is reserved for it counts where address space is limited."""

_EPILOG = """\
LOWER is a squashfs image or a directory. Several are stacked, the leftmost on top; a colon in a
name is written \\: .

The store is where changes go: an image made by `cowfs create`, a directory (made if it is missing),
or `memory`, which is the default, and is lost at the unmount (`cowfs persist` keeps it).

options for -o:
{options}
  suid, nosuid, dev, nodev, exec, noexec, noatime, sync … as for mount(8)

examples:
  cowfs mount /live/sysrcd.dat /mnt --store /live/sysrcd.bs
  cowfs mount /usr:/opt/base /mnt --store ~/changes
  mount -t cowfs -o store=/live/sysrcd.bs /live/sysrcd.dat /mnt
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        NAME,
        help="merge a lower with a store, and mount the result",
        description="Merge read-only layers with a writable store and mount the result at MOUNTPOINT.",
        epilog=_EPILOG.format(options=mount_options.describe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lower", metavar="LOWER[:LOWER...]", help="image or directory, leftmost on top")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    parser.add_argument("--store", metavar="FILE|DIR|memory", help="where changes are kept")
    parser.add_argument(
        "--engine",
        choices=mount_options.ENGINES,
        help="who reads and writes images: we (auto and process), or the kernel (root only)",
    )
    parser.add_argument(
        "--force-lower", action="store_true", help="use the store though it was made for another lower"
    )
    parser.add_argument("-o", metavar="OPTS", dest="options", action="append", default=[], help="see below")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Mount; return when the mount answers, or with -f when it has been unmounted."""
    from cowfs.assemble import UnionOptions, check_mountpoint, check_places
    from cowfs.layers.slow import must_not_be_touched

    given = mount_options.parse(args.options)
    lowers = mount_options.split_lowers(args.lower)
    if not lowers:
        raise UsageError("no lower layer is given", "the first argument is LOWER[:LOWER...]")
    store = args.store or given.values.get("store", "memory")
    union = UnionOptions(
        lowers=tuple(os.path.abspath(lower) for lower in lowers),
        store=store if store == "memory" else os.path.abspath(store),
        engine=args.engine or given.values.get("engine", "auto"),
        force_lower=args.force_lower or "force_lower" in given.flags,
        size=given.size,
        offsets=given.offsets,
        fakeroot="fakeroot" in given.flags,
    )
    if len(union.offsets) > len(lowers):
        raise UsageError(
            f"offset={given.values['offset']}: {len(union.offsets)} offsets, {len(lowers)} lower layers",
            "give one for each lower",
        )
    if union.fakeroot and "allow_other" in given.flags:
        raise UsageError(
            "fakeroot checks no permissions: with allow_other every user would be root inside",
            "leave one of them out",
        )
    if union.fakeroot and os.geteuid() == 0:
        raise UsageError(
            "fakeroot is for users: root is denied nothing as it is, and lets others in",
            "mount as a user, or leave it out",
        )
    _check_system()
    _raise_file_limit()
    mountpoint = check_mountpoint(args.mountpoint)
    _check_permission(mountpoint, given)
    log = given.values.get("log")
    if log:
        log = os.path.abspath(log)
        _check_log(log)

    def daemon(reporter: Reporter) -> int:
        set_up_log(log, foreground=args.foreground)
        # Not before: to look at a lower may be to wait, and who waits for us shall be able to leave.
        check_places(mountpoint, union)
        return _serve(union, mountpoint, given, reporter)

    if args.foreground:
        code = daemon(Reporter(-1))
        if must_not_be_touched():
            leave(code)
    else:
        code = run_in_background(daemon, _handed_over(mountpoint))
    if store == "memory" and not args.foreground and "ro" not in given.flags:
        warn("changes are kept in memory, lost at the unmount (--store keeps them)")
    return code


def _check_log(path: str) -> None:
    """SystemFailure when the log cannot be written: said here, where somebody reads it."""
    try:
        os.close(open_log(path))
    except OSError as error:
        raise SystemFailure(
            f"{path}: cannot be the log: {error.strerror}", "give the path of a file that may be written to"
        ) from None


def _check_system() -> None:
    """SystemFailure when FUSE cannot be had, and what to do about it."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError:
        raise SystemFailure("/dev/fuse: there is none", "load the module: modprobe fuse") from None
    except OSError as error:
        raise SystemFailure(
            f"/dev/fuse: {error.strerror}", "let everybody use it: chmod 666 /dev/fuse, as root"
        ) from None
    if os.geteuid() != 0 and find("fusermount3") is None:
        raise SystemFailure(
            "fusermount3: not found; without root nothing is mounted without it", "apt install fuse3"
        )
    if os.geteuid() != 0 and not os.path.exists("/etc/mtab"):  # a bare container, a Debian not yet booted
        raise SystemFailure(
            "/etc/mtab: there is none; without it fusermount3 cannot unmount",
            "as root: ln -s /proc/self/mounts /etc/mtab",
        )


def _handed_over(mountpoint: str) -> list[int]:
    """Return the descriptor in a mountpoint /dev/fd/N, which somebody else has mounted already."""
    number = mountpoint.removeprefix("/dev/fd/")
    return [int(number)] if number != mountpoint and number.isdigit() else []


def _check_permission(mountpoint: str, given: mount_options.Options) -> None:
    """MountFailure for what fusermount3 would refuse, before a store is made for nothing."""
    if os.geteuid() == 0:
        return
    if os.path.isdir(mountpoint) and not os.access(mountpoint, os.W_OK):
        raise MountFailure(
            f"{mountpoint}: only its owner, or root, may mount there: Permission denied",
            "choose a directory of your own",
        )
    if "allow_other" in given.flags and not _others_may_be_allowed():
        raise MountFailure(
            f"{mountpoint}: allow_other is only for root here",
            "add the line user_allow_other to /etc/fuse.conf, or leave out allow_other",
        )


def _others_may_be_allowed() -> bool:
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


def _serve(
    union_options: UnionOptions, mountpoint: str, given: mount_options.Options, reporter: Reporter
) -> int:
    from cowfs.fuse.rings import rings_for
    from cowfs.linux.privileges import give_up

    os.umask(0)
    threading.stack_size(_STACK)
    remove_dead()  # while we may see who is where
    rings = rings_for(given.values.get("io_uring", "auto"), warn)
    give_up(has_rings=rings is not None)  # before there are threads: opening the store starts some
    try:
        shut_in = _step_aside(union_options, mountpoint)
        _mount_and_serve(union_options, mountpoint, given, reporter, shut_in, rings)
    finally:
        outside.end()
    return 0


def _mount_and_serve(
    union_options: UnionOptions,
    mountpoint: str,
    given: mount_options.Options,
    reporter: Reporter,
    shut_in: Callable[[Store], None],
    rings: Rings | None,
) -> None:
    from cowfs import assemble
    from cowfs.cli.own_files import need_no_more
    from cowfs.fuse.daemon import Daemon, MountRequest
    from cowfs.linux.sleep import Disks
    from cowfs.store.room import watch

    union = assemble.open_union(union_options, warn)
    try:
        request = MountRequest(
            mountpoint,
            _source(union_options.lowers, mountpoint),
            frozenset(_fuse_options(given, union_options)),
            acl="noacl" not in given.flags,
            fakeroot=union_options.fakeroot,
            passthrough=given.values.get("passthrough", "auto"),
        )
        daemon = Daemon(union.overlay, request, rings)
        disks = Disks([*union_options.lowers, union_options.store])
        options = [*request.options, *(["fakeroot"] if request.fakeroot else [])]
        more = {"mountpoint": mountpoint, "options": sorted(options)}
        need_no_more(mountpoint)
        daemon.mount()  # from here on no path may be followed that could lead into the mount
        try:
            shut_in(union.store)  # and none leads anywhere
            daemon.serve(
                assemble.commands(
                    union,
                    lambda: {**more, "transport": daemon.transport(), **daemon.adapter.figures()},
                    daemon.lose_patience,
                ),
                reporter.ready,
                watch(union.store),
                after_pause=disks.look_after_sleep,
            )
        finally:
            daemon.close()
    finally:
        union.close(heeds_signals=True)


def _step_aside(union: UnionOptions, mountpoint: str) -> Callable[[Store], None]:
    """Leave for mounts of our own, with a process that stays here; return what shuts us in there.

    For root alone, who may mount anywhere. Who has been handed a mount has nobody to unmount it, and all in
    reach, as has whoever's root cannot be exchanged.
    """
    from cowfs.cli.errands import Errands
    from cowfs.linux import confine

    if os.geteuid() != 0 or mountpoint.startswith("/dev/fd/") or not confine.is_possible():
        return lambda _: None
    Errands(mountpoint, [*union.lowers, *([] if union.store == "memory" else [union.store])]).start()
    try:
        confine.step_aside()
    except OSError as error:
        _log.info("goes on with all files in reach: no mounts of its own: %s", error.strerror)
        outside.end()
        return lambda _: None

    def shut_in(store: Store) -> None:
        try:
            confine.shut_in([store.place[0]] if store.place else [])
        except OSError as error:
            _log.info("goes on with all files in reach: %s", error.strerror)

    return shut_in


def _source(lowers: Sequence[str], mountpoint: str) -> str:
    """Return what mount(8) shows as the source: the lowers, as they are written on the command line.

    Programs look for sources that are paths, e2fsck too, which we start: they must not lead into the mount.
    """
    if any(f"{os.path.realpath(lower)}/".startswith(f"{mountpoint.rstrip('/')}/") for lower in lowers):
        return "cowfs"
    return mount_options.join_lowers(lowers)


def _fuse_options(given: mount_options.Options, union: UnionOptions) -> set[str]:
    options = set(given.fuse)
    if "ro" in given.flags:
        options.add("ro")
    is_root = os.geteuid() == 0
    if ("allow_other" in given.flags or is_root) and "noallow_other" not in given.flags:
        options.add("allow_other")
    if "fakeroot" in given.flags:
        options -= {"suid", "dev"}
        options |= {"nosuid", "nodev"}
    if is_root:  # libfuse's default is nosuid,nodev; mount(8)'s is not
        wanted = [option for option in ("suid", "dev") if not options & {option, f"no{option}"}]
        forbidden = _forbidden(union) if wanted else {}
        options |= {option for option in wanted if f"no{option}" not in forbidden}
        left_out = [f"no{option}" for option in wanted if f"no{option}" in forbidden]
        if left_out:
            why = forbidden[left_out[0]]
            hint = ",".join(option.removeprefix("no") for option in left_out)
            warn(f"mounted {','.join(left_out)}: {why} (-o {hint} if you trust it)")
    return options


def _forbidden(union: UnionOptions) -> dict[str, str]:
    """Return why ``nosuid`` and ``nodev`` must hold: others than root made, or can change, what is mounted.

    Whoever can change an image, a store or the way to it could give themselves a set-user-ID program of
    root's, or a device.
    """
    from cowfs.linux.trust import mount_forbids, who_can_change

    why: dict[str, str] = {}
    for path in (*union.lowers, *([] if union.store == "memory" else [union.store])):
        there = path if os.path.lexists(path) else os.path.dirname(path)  # a store that will be made
        reason = who_can_change(there)
        if reason is not None:
            return dict.fromkeys(("nosuid", "nodev"), reason)
        for option in mount_forbids(there):
            why.setdefault(option, f"{path} is on a filesystem that is mounted {option}")
    return why


def _raise_file_limit() -> None:
    """Take as many descriptors as we may: an unlinked open file needs one each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < LEAST_FILES:
        raise too_few_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
