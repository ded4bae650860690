"""``cowfs mount``: merge layers, and mount the result."""

from __future__ import annotations

import argparse
import logging
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from cowfs.cli import options as mount_options
from cowfs.cli import remount
from cowfs.cli.background import Reporter, leave, run_in_background
from cowfs.cli.limits import LEAST_FILES, must_have_address_space, too_few_files
from cowfs.cli.log import open_log, set_up_log
from cowfs.cli.mount_daemon import serve
from cowfs.cli.output import warn
from cowfs.client import require_answers
from cowfs.errors import MountFailure, StoreError, SystemFailure, UsageError
from cowfs.linux.files import is_read_only_device
from cowfs.linux.limits import take_all_descriptors
from cowfs.linux.programs import find
from cowfs.url.names import check, is_url, place

if TYPE_CHECKING:
    from cowfs.fuse.owners import OwnerMap
    from cowfs.union import UnionOptions

_log = logging.getLogger(__name__)

DESCRIPTION = "Merge read-only layers with a writable store and mount the result at MOUNTPOINT."
_EPILOG = """\
LOWER is a squashfs image, in a file, on a block device or at a URL, a tar or zip archive, an ISO 9660
image, or a directory. If there are several, the leftmost is on top. Write a colon in a name as \\: .

Changes are written to the store: an image made by `cowfs create`, a directory (created if missing), or
`memory`, the default. Changes in memory are lost at unmount, unless `cowfs persist` saves them first.

options for -o:
{options}
  relatime, noatime, strictatime, nodiratime: when reading a file updates its time of access (relatime)
  suid, nosuid, dev, nodev, exec, noexec, sync …: see mount(8)

topics for --debug and the environment variable COWFS_DEBUG, separated by commas:
{topics}
  They are written to the log: the terminal with -f, the file of -o log=FILE, or the system log.

examples:
  cowfs mount /live/sysrcd.dat /mnt --store /live/sysrcd.bs
  cowfs mount /usr:/opt/base /mnt --store ~/changes
  mount -t cowfs -o store=/live/sysrcd.bs /live/sysrcd.dat /mnt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.epilog = _EPILOG.format(options=mount_options.describe(), topics=mount_options.describe_topics())
    add_layers(parser)
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("--debug", metavar="TOPICS", default="", help="log what the daemon does (see below)")


def add_layers(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments: the layers, and the mountpoint, which may be *optional*."""
    count = "?" if optional else None
    parser.add_argument(
        "lower",
        metavar="LOWER[:LOWER...]",
        nargs=count,
        help="an image or a directory; the leftmost is on top",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs=count, help="an existing directory")
    parser.add_argument("--store", metavar="FILE|DIR|memory", help="where to keep changes")
    parser.add_argument(
        "--engine",
        choices=mount_options.ENGINES,
        help="engine for images: cowfs itself (auto, process) or the kernel (root only)",
    )
    parser.add_argument(
        "--force-lower", action="store_true", help="use the store even if it belongs to another lower"
    )
    parser.add_argument(
        "--verify",
        metavar="HASH|FILE",
        help="verify the lower image by its dm-verity tree: a root hash, or the signer's certificate",
    )
    parser.add_argument("-o", metavar="OPTS", dest="options", action="append", default=[], help="see below")


def run(args: argparse.Namespace) -> int:
    """Mount; return when the mount answers, or with -f when it has been unmounted."""
    code, union = mounted(args)
    is_told = union is not None and union.store == "memory" and not _is_read_only(args)
    if is_told and not (args.foreground or getattr(args, "quiet", False)):
        how = "-o store=FILE" if mount_options.is_by_options(args) else "--store"
        warn(f"changes are kept in memory and are lost at unmount (use {how} to keep them)")
    return code


def mounted(args: argparse.Namespace, *, hides_store: bool = False) -> tuple[int, UnionOptions | None]:
    """Mount; return the exit code, and the options of the new union, None for a remount.

    A caller that *hides_store* makes sure that no process reaches the store through the mount, so the store
    may be inside the lower.
    """
    if remount.is_asked_for(args.options):
        return remount.remount(args.mountpoint, args.options), None
    given = mount_options.parse(args.options)
    given.debug |= mount_options.parse_topics(args.debug) | mount_options.parse_topics(
        os.environ.get("COWFS_DEBUG", "")
    )
    union = _union_options(args, given)
    here = ""
    with suppress(FileNotFoundError):  # it was removed; absolute paths do not need it
        here = os.getcwd()

    @contextmanager
    def look() -> Iterator[None]:
        with mount_options.own_spelling(args):
            mount_options.refuse_bare_colon(mount_options.split_lowers(args.lower), here)
            yield

    code = start(
        union,
        args.mountpoint,
        given,
        foreground=args.foreground,
        around=look,
        hides_store=hides_store,
        # Otherwise the command removes a decrypted device, or forgives a failure.
        is_last=not union.store.startswith("/dev/") and not mount_options.is_nofail(args.options),
    )
    return code, union


def _is_read_only(args: argparse.Namespace) -> bool:
    return "ro" in mount_options.parse(args.options).flags


def _is_writable(store: str) -> bool:
    return os.access(store, os.W_OK) and not is_read_only_device(os.stat(store))


def start(
    union: UnionOptions,
    where: str,
    given: mount_options.Options,
    *,
    foreground: bool,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    owner_map: OwnerMap | None = None,
    hides_store: bool = False,
    is_last: bool = False,
) -> int:
    """Mount a union at *where*; return when the mount answers, or in the *foreground* when it is unmounted.

    *is_last*: see :func:`run_in_background`. The daemon enters the context *around* before it first accesses
    a lower.
    """
    from cowfs.layers.slow import must_stay_open
    from cowfs.mountpoint import check_mountpoint, check_places, hides_its_store, is_automounted

    _check_system()
    _raise_file_limit()
    must_have_address_space()
    local = [path for path in (*union.lowers, union.store) if path != "memory" and not is_url(path)]
    require_answers([where, *local])
    mountpoint = check_mountpoint(where)
    _check_permission(mountpoint, given)
    log = given.values.get("log")
    mount_options.must_have_name(log, "log=")
    if log:
        log = os.path.abspath(log)
        os.close(open_log(log))  # the daemon opens it again, but here the user sees an error

    def daemon(reporter: Reporter) -> int:
        daemon_log = set_up_log(log, foreground=foreground)
        # After the fork, because access to a lower may block, and the waiting parent must be interruptible.
        with around():
            if not hides_store:
                check_places(mountpoint, union)
                if hides_its_store(mountpoint, union):
                    warn(f"{mountpoint} is the store, too: the mount hides the files in it")
            return serve(union, mountpoint, given, reporter, daemon_log, owner_map)

    if foreground:
        code = daemon(Reporter(-1))
        if must_stay_open():
            leave(code)
        return code
    return run_in_background(
        daemon, _handed_over(mountpoint), is_last=is_last, own_session=not is_automounted(mountpoint)
    )


def _must_be_on_a_device(store: str) -> None:
    """Raise StoreError if a missing store would be created in /dev, which is in memory."""
    from cowfs.store.disks.block_device import split

    split(os.path.abspath(store))


def _union_options(args: argparse.Namespace, given: mount_options.Options) -> UnionOptions:
    """Return what to merge, and how. UsageError for options that exclude each other."""
    from cowfs.union import UnionOptions

    lowers, data_only = mount_options.split_layers(args.lower)
    if args.verify:
        given.values["verify"] = args.verify
    for url in filter(is_url, lowers):
        check(url)
    _ = given.by_url  # raises UsageError now if it is invalid
    engine = args.engine or given.values.get("engine", "auto")
    if engine == "kernel" and any(map(is_url, lowers)):
        raise UsageError("engine=kernel: the kernel cannot read by URL", "leave it out")
    if not lowers:
        raise UsageError("no lower layer given", "the first argument is LOWER[:LOWER...]")
    store = args.store or given.values.get("store", "memory")
    if "subdir" in given.values:
        store = _of_several(store, given.values["subdir"])
    if store.startswith("/dev/") and not os.path.lexists(store):
        _must_be_on_a_device(store)
    union = UnionOptions(
        lowers=tuple(map(place, lowers)),
        store=store if store == "memory" else os.path.abspath(store),
        engine=engine,
        force_lower=args.force_lower or "force_lower" in given.flags,
        size=given.size,
        memory_subdir=given.values.get("subdir", "") if store == "memory" else "",
        offsets=mount_options.find_offsets(given.offsets, lowers),
        verify=_verify(given, lowers, engine),
        data_only=data_only,
        atime=given.atime,
        fakeroot="fakeroot" in given.flags,
        whiteouts=(given.values.get("whiteouts", "auto"),) * (len(lowers) - data_only),
        volatile=given.volatile,
        may_crash=_may_crash(given.faults, store),
        read_only="ro" in given.flags and os.path.lexists(store) and not _is_writable(store),
    )
    if len(union.offsets) > len(lowers):
        raise UsageError(
            f"offset={given.values['offset']}: {len(union.offsets)} offsets for {len(lowers)} lower layers",
            "give one for each lower",
        )
    if union.fakeroot and "allow_other" in given.flags:
        raise UsageError(
            "fakeroot and allow_other exclude each other: every user would be root in the mount",
            "remove one of them",
        )
    if union.fakeroot and os.geteuid() == 0:
        raise UsageError(
            "fakeroot is for ordinary users: root needs no fakeroot",
            "mount as an ordinary user, or remove fakeroot",
        )
    return union


def _may_crash(faults: list[str], store: str) -> bool:
    """Return whether a crash is among the faults. UsageError for an invalid fault or an impossible crash."""
    if not faults:
        return False
    from cowfs.faults import may_crash, parse_all
    from cowfs.store.served.crash import must_be_possible

    if any(fault.crashes for fault in parse_all(faults)):
        must_be_possible(store)
    return may_crash(faults)


def _verify(given: mount_options.Options, lowers: Sequence[str], engine: str) -> tuple[str, ...]:
    """Return what verifies each lower: a root hash, or a file. UsageError if a lower cannot be verified."""
    verify = given.verify
    if len(verify) > len(lowers):
        raise UsageError(
            f"verify={given.values['verify']}: {len(verify)} for {len(lowers)} lower layers",
            "give one for each lower",
        )
    if any(verify) and engine == "kernel":
        raise UsageError("verify: the kernel would read unverified data", "leave engine=kernel out")
    for lower, by in zip(lowers, verify, strict=False):
        if by and not is_url(lower) and os.path.isdir(lower):
            raise UsageError(f"{lower}: a directory has no hash tree", "remove verify for it")
    return verify


def _of_several(store: str, name: str) -> str:
    """Return the path of the store *name* in a directory of stores, which is created if it must be a
    directory.
    """
    from cowfs.store.format.sniff import looks_like_image, subdir

    whole = subdir(store, name)
    if store != "memory" and not os.path.lexists(store):
        if looks_like_image(store):
            raise StoreError(f"{store}: no such store", f"cowfs create {store} 256 creates one of 256 MiB")
        with suppress(OSError):  # opening the store reports it
            os.mkdir(store, 0o700)
    return whole


def _check_system() -> None:
    """SystemFailure, with a hint, if FUSE is not available."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError:
        raise SystemFailure(
            "/dev/fuse: not found; is the fuse module loaded?", "as root: modprobe fuse"
        ) from None
    except OSError as error:
        raise SystemFailure(f"/dev/fuse: {error.strerror}", "as root: chmod 666 /dev/fuse") from None
    if os.geteuid() != 0 and find("fusermount3") is None:
        raise SystemFailure("fusermount3: not found; ordinary users need it to mount", "apt install fuse3")
    if os.geteuid() != 0 and not os.path.exists("/etc/mtab"):  # a minimal container, or an unbooted Debian
        raise SystemFailure(
            "/etc/mtab: not found; fusermount3 cannot unmount without it",
            "as root: ln -s /proc/self/mounts /etc/mtab",
        )


def _handed_over(mountpoint: str) -> list[int]:
    """Return the descriptor in a mountpoint /dev/fd/N, which the caller has mounted already."""
    number = mountpoint.removeprefix("/dev/fd/")
    return [int(number)] if number != mountpoint and number.isdecimal() else []


def _check_permission(mountpoint: str, given: mount_options.Options) -> None:
    """MountFailure for what fusermount3 would refuse, before a store is created in vain."""
    if os.geteuid() == 0:
        return
    if os.path.isdir(mountpoint) and not os.access(mountpoint, os.W_OK):
        raise MountFailure(
            f"{mountpoint}: Permission denied: only its owner or root can mount there",
            "choose a directory that you own",
        )
    if "allow_other" in given.flags and not _others_may_be_allowed():
        raise MountFailure(
            f"{mountpoint}: only root may use allow_other on this system",
            "add the line user_allow_other to /etc/fuse.conf, or remove allow_other",
        )


def _others_may_be_allowed() -> bool:
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


def _raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit: an unlinked open file needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < LEAST_FILES:
        raise too_few_files()
    take_all_descriptors()
