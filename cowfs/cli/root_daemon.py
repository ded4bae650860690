"""Serve the root filesystem of a system that boots from cowfs.

It does what `cowfs mount` does, and protects the daemon from being killed before the processes that use it.
It runs in its own root, which is never below the mount that it serves (see cowfs-boot.sh), and returns when
the new root answers. Messages for the user go to standard error, one per line. The last one says why the root
was refused.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cowfs.cli.background import Reporter, run_in_background
from cowfs.cli.log import Log, set_up_log
from cowfs.cli.options import ENGINES, parse_volatile
from cowfs.errors import CowfsError, StoreError, WrongLower, printable
from cowfs.fuse.daemon import Daemon, MountRequest
from cowfs.fuse.observer import Observer
from cowfs.fuse.rings import rings_for
from cowfs.fuse.tasks import describe_tasks
from cowfs.fuse.view import View, open_view
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import loop_devices, mounts, programs
from cowfs.linux.sleep import Disks
from cowfs.overlay.aufs import written_through
from cowfs.serve import commands
from cowfs.store.e2fsprogs import tools
from cowfs.store.format.copy_detection import torn_copy
from cowfs.store.format.identity import identify_lower
from cowfs.store.format.sizes import format_size
from cowfs.store.format.sniff import subdir
from cowfs.store.format.superblock import read_superblock
from cowfs.store.offline.info import store_info
from cowfs.store.served import luks
from cowfs.store.served.allocate import take_room
from cowfs.store.served.fullness import watch
from cowfs.store.served.image import is_copy, open_file
from cowfs.union import Union, UnionOptions, open_union

_SYS_MOVE_MOUNT = 429
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_STACK = 1 << 20
"""The stack of a thread in bytes. Stacks that exist when memory is locked are locked completely."""
_NEARLY_FULL = 4 << 20
"""A store with fewer free bytes counts as full. It is enough for a package manager's lock and log."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="root-daemon", description="Serve the root of a system that boots from cowfs."
    )
    parser.add_argument("--image", required=True)
    parser.add_argument("--store", required=True, help="an image, or memory")
    parser.add_argument("--subdir", help="the name of a store in the store")
    parser.add_argument("--mode", choices=("rw", "ro"), default="rw", help="whether the store can be written")
    parser.add_argument("--below", action="append", default=[], help="a store on read-only media, as a layer")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what reads and writes images")
    parser.add_argument(
        "--volatile", help="directories whose changes are not kept (default: as the store says)"
    )
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--show-store", required=True, help="where the filesystem of the store is shown")
    parser.add_argument("--show-below", required=True, help="a directory to show those of --below in")
    parser.add_argument("--log", required=True)
    parser.add_argument("--pid-file", required=True)
    args = parser.parse_args()
    try:
        with at_console(args.store) as args.store:
            return start(args)
    except CowfsError as error:
        print(f"cowfs: {error}", file=sys.stderr)
        mounts_taken_away(args)
        return error.exit_code


@contextmanager
def at_console(store: str) -> Iterator[str]:
    """Open an encrypted store, with a passphrase from the console; yield its decrypted device."""
    if store == "memory" or not luks.is_encrypted(store):
        yield store
        return

    def key(number: int) -> bytes | None:
        with open("/dev/console", "r+b", buffering=0) as console:
            again = (
                "wrong passphrase; again: " if number else f"passphrase for {store} (none: do not use it): "
            )
            return ask_at(console.fileno(), printable(f"cowfs: {again}")) or None

    with luks.opened(store, key) as device:
        yield device


def ask_at(terminal: int, prompt: str) -> bytes:
    """Print a prompt, and return the line typed at the terminal, which does not echo it. Blocks."""
    before = termios.tcgetattr(terminal)
    hidden = [*before[:3], (before[3] | termios.ICANON) & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
    try:
        os.write(terminal, prompt.encode())
        return os.read(terminal, 4096).rstrip(b"\r\n")
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        os.write(terminal, b"\r\n")


def start(args: argparse.Namespace) -> int:
    """Serve the store; return when the new root answers."""
    lowers: tuple[str, ...] = (args.image,)
    store: str = args.store
    if store != "memory":
        check(store, writable=args.mode == "rw")
        lowers = (*stores_below(args, judge(args)), args.image)
        if args.mode == "ro":
            lowers, store = (show_read_only(store, args.show_store, args.subdir), *lowers), "memory"
        else:
            fill_holes(store)
            store = of_several(store, args.subdir)
    volatile = None if args.volatile is None else parse_volatile(args.volatile)
    of_several("memory", args.subdir)  # raises for an invalid name
    union = UnionOptions(
        lowers=lowers,
        store=store,
        memory_subdir=(args.subdir or "") if store == "memory" else "",
        engine=args.engine,
        volatile=volatile,
    )

    def daemon(reporter: Reporter) -> int:
        log = set_up_log(args.log, foreground=False)
        return serve(union, args, reporter, log)

    return run_in_background(daemon, stays=True)


def check(store: str, *, writable: bool) -> None:
    """Check that *store* is a store; repair one that was not cleanly unmounted, showing the output."""
    fd = open_file(store, read_only=not writable)
    try:
        superblock = read_superblock(fd, store)
        state = superblock.state
        if state == "clean" or not writable:
            return
        if superblock.needs_recovery and is_copy(fd, store):
            raise torn_copy(store)
        with open("/dev/console", "r+b", buffering=0) as console:
            told = printable(f"cowfs: {store}: {state}: e2fsck checks and repairs it")
            console.write(f"{told}\r\n".encode())
            tools.replay(fd)  # before e2fsck, which knows nothing of the redo log
            command = [tools.program("e2fsck"), "-p", "-C", "0", tools.place(fd)]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=False, pass_fds=[fd],
                env=programs.environment(),
            )  # fmt: skip
    finally:
        os.close(fd)
    if done.returncode & ~(tools.FSCK_CORRECTED | 2):
        raise CowfsError(
            f"{store}: the store is damaged and needs manual repair",
            f"copy the file, then run on the copy: e2fsck -f {store}",
        )
    print(printable(f"{store}: {state}; repaired by e2fsck"), file=sys.stderr)


def fill_holes(store: str) -> None:
    """Allocate the missing space of a store whose file has holes; warn if the disk has not enough."""
    fd = open_file(store)
    try:
        if said := take_room(fd, store):
            print(printable(f"WARNING: {said}"), file=sys.stderr)
    finally:
        os.close(fd)


def of_several(store: str, name: str | None) -> str:
    """Return the path of the store *name* in a store; without a name, that store itself."""
    return subdir(store, name) if name else store


def judge(args: argparse.Namespace) -> list[str]:
    """Refuse a store of another image or format, before anything is written to it.

    Returns the fingerprints of the stores below it, the topmost first; usually none.
    """
    store, lower = of_several(args.store, args.subdir), identify_lower(args.image)
    try:
        facts = store_info(store)
    except StoreError:
        if not args.subdir or args.mode == "ro":
            raise
        return []  # opening the store creates it, or reports what is wrong
    if facts["format"] not in {"overlayfs", "aufs", "none yet"}:
        if facts["problem"]:
            raise CowfsError(facts["problem"])
        raise CowfsError(
            f"{store}: the store has the {facts['format']} format", f"cowfs info {store} tells more"
        )
    made_for = facts["lowers"]
    if made_for and made_for[-1]["fingerprint"] != lower.fingerprint:
        other = f"{made_for[-1]['path']} ({made_for[-1]['description']})"
        raise WrongLower(
            f"{store} belongs to {other}, not to this root image",
            "boot with that image, or transfer the store: cowfs rebase",
        )
    return [below["fingerprint"] for below in made_for[:-1]]


def stores_below(args: argparse.Namespace, wanted: list[str]) -> list[str]:
    """Mount the stores of --below that have these fingerprints; return their upper directories."""
    found: dict[str, tuple[str, str]] = {}
    for number, store in enumerate(args.below if wanted else ()):
        place = os.path.join(args.show_below, str(number))
        os.makedirs(place, exist_ok=True)
        with suppress(CowfsError):
            upper = show_read_only(store, place)
            found[identify_lower(upper).fingerprint] = upper, store
    uppers = []
    for fingerprint in wanted:
        if fingerprint not in found:
            raise WrongLower(
                f"{args.store} is based on a store on read-only media, which was not found",
                "attach the disk that it is on, and boot again",
            )
        upper, store = found[fingerprint]
        uppers.append(upper)
        print(printable(f"{args.store} is based on {store}"), file=sys.stderr)
    return uppers


def show_read_only(store: str, place: str, name: str | None = None) -> str:
    """Mount a read-only store; return its upper directory, which becomes a lower.

    With a *name*, that is the upper of the store of that name in it.
    """
    facts = store_info(of_several(store, name))
    is_aufs = facts["format"] == "aufs"
    if not facts["lowers"] and not is_aufs:
        raise CowfsError(
            f"{store}: not a store that holds changes (format: {facts['format']})",
            f"cowfs info {store} tells more",
        )
    loop, device = loop_devices.attach_loop(store, readonly=True)
    options = {"noload": None} if facts["state"] == "needs recovery" else {}
    try:
        root = mounts.detached_mount("ext3", device, options, readonly=True)
    except OSError as error:
        raise CowfsError(
            f"{store}: the kernel cannot mount it: {error.strerror}", "for details see dmesg"
        ) from None
    finally:
        os.close(loop)
    attach(root, place)
    os.close(root)
    return place if is_aufs else os.path.join(place, name or "", "upper")


def serve(options: UnionOptions, args: argparse.Namespace, reporter: Reporter, log: Log) -> int:
    os.umask(0)
    threading.stack_size(_STACK)
    # No key press and no ulimit may end a root. Do this before starting threads, which inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for number in (signal.SIGQUIT, signal.SIGTSTP, signal.SIGALRM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    union = open_union(options, lambda said: print(printable(said), file=sys.stderr))
    try:
        mountpoint = os.path.realpath(args.mountpoint)
        allowed = frozenset({"allow_other", "suid", "dev"})
        request = MountRequest(mountpoint, args.image, allowed, stay_on_sigterm=True)
        rings = rings_for("auto", lambda said: print(printable(f"WARNING: {said}"), file=sys.stderr))
        daemon = Daemon(union.overlay, request, rings)
        log.explain_when_asked(describe_tasks)
        more = {"mountpoint": "/", "options": sorted(request.options)}
        daemon.mount()
        view: View | None = None
        try:
            view = show(union, args.show_store, in_another=bool(args.subdir))
            tell_room(union)
            protect_from_kill()
            Path(args.pid_file).write_text(f"{os.getpid()}\n")
            observer = Observer(daemon.handlers, daemon.adapter, union.overlay, daemon.loop.in_trio)
            answers = commands(
                union,
                lambda: {
                    **more,
                    "log": log.facts(),
                    "transport": daemon.transport(),
                    **daemon.adapter.figures(),
                },
                observer=observer,
            )
            disks = Disks([args.image, args.store])
            also = [observer.run, *([view.serve] if view else [])]
            union.whereabouts.mounts_move = True
            look = watch(union.store, union.whereabouts)
            daemon.serve(answers, reporter.ready, look, also=also, after_pause=disks.reopen_after_sleep)
        finally:
            if view:
                view.close()
            daemon.close()
    finally:
        mounts_taken_away(args)
        union.close()
    return 0


def show(union: Union, place: str, *, in_another: bool) -> View | None:
    """Show the filesystem of the store at *place*; return the object that serves it, None if the kernel does.

    For a store that is *in_another*, show only its own directory.
    """
    layer = written_through(union.store.layer)
    try:
        if os.listdir(place):  # a store on read-only media is already shown there, as a lower
            return None
        if not isinstance(layer, DirectoryLayer):
            return open_view(layer, place)
        if in_another:  # a part of a detached mount, which needs Linux 6.15
            attach(clone := mounts.private_clone(layer.root.fd), place)
            os.close(clone)
        else:
            attach(layer.root.fd, place)
    except (CowfsError, OSError) as error:
        print(printable(f"WARNING: the store cannot be shown: {error}"), file=sys.stderr)
    return None


def tell_room(union: Union) -> None:
    store = union.store
    room = f"{format_size(store.free)} of {format_size(store.size)} are free"
    if store.free < _NEARLY_FULL:
        print(printable(f"WARNING: the store is full: {room} (cowfs grow makes it larger)"), file=sys.stderr)
    elif store.path != "memory":
        print(printable(f"{store.path}: {room}"), file=sys.stderr)


def protect_from_kill() -> None:
    """Protect this process from being killed, at shutdown or when memory runs out."""
    # systemd spares processes whose name begins with @ (systemd.io/ROOT_STORAGE_DAEMONS).
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45])
    ctypes.memmove(start, b"@", 1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    # Keep code and data in memory, and of later allocations only the used pages, not whole stacks. Do not set
    # PR_SET_IO_FLUSHER: the kernel would then not kill other processes to get memory for this one.
    libc.mlockall(_MCL_CURRENT)
    libc.mlockall(_MCL_FUTURE | _MCL_ONFAULT)


def attach(mount: int, directory: str) -> None:
    """Attach a detached mount at *directory*. CowfsError."""
    if libc.syscall(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(directory), _MOVE_MOUNT_F_EMPTY_PATH):
        raise CowfsError(f"{directory}: cannot show the store there: {os.strerror(ctypes.get_errno())}")


def mounts_taken_away(args: argparse.Namespace) -> None:
    for place in (args.show_store, *(os.path.join(args.show_below, str(n)) for n in range(len(args.below)))):
        with suppress(OSError):
            mounts.umount2(place, mounts.MNT_DETACH)


if __name__ == "__main__":
    sys.exit(main())
