"""``cowfs run``: run a command as root of a namespace where a union is mounted, or is the root."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs.cli import mount, umount
from cowfs.cli import options as mount_options
from cowfs.cli.ending import Ending, complete_interrupted
from cowfs.cli.output import warn
from cowfs.cli.sandbox import Part, Sandbox
from cowfs.errors import MountFailure, SystemFailure, UsageError
from cowfs.exports.target import remove
from cowfs.layers import beneath
from cowfs.linux import mounts, offspring, privileges, programs, seccomp, user_namespace
from cowfs.linux.guard import Abandoned, Guard
from cowfs.linux.signals import ASKS_TO_END, unblock

_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_PRIVATE = "cowfs-run-"
"""How the names of our directories begin."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_FOUND, _NOT_RUN = 127, 126
"""Exit codes of sh(1)."""

DESCRIPTION = "Run COMMAND as root on a merged tree; then commit, keep or discard what it has changed."
EPILOG = """\
With --root, COMMAND has the merged tree of ROOT as its root directory, and sees nothing else. ROOT is / (to
try a command on this system), a directory, or an image. Filesystems mounted in ROOT can be changed in the
same way; those that are read-only stay read-only. /proc and /sys are the system's, and /dev has the usual
devices. When COMMAND exits, processes that it left running are killed. On a terminal, cowfs then lists the
changes and asks what to do with them; --commit, --discard and --keep answer beforehand. Without a terminal
and an answer, the changes stay in the store, or are discarded if there is none.

--commit makes all changes in ROOT, which must be a directory; if it is interrupted, the next `cowfs run`
completes it. A file that has changed in ROOT meanwhile is a conflict: cowfs lists it, overwrites nothing, and
keeps the changes. Those of a filesystem mounted in ROOT at etc/x are kept in the store STORE.mounts/etc%2Fx.

Without --root, the merged tree is at MOUNTPOINT, which only COMMAND sees. It is unmounted at the end.

For an ordinary user, COMMAND is root of a user namespace: it may do what root may do, to the files of the
user and in the merged tree. Other users and groups exist there if /etc/subuid and /etc/subgid assign some
to the user and newuidmap(1) is installed (apt install uidmap). Otherwise all files are shown as owned by
root, and changing an owner has no effect.

options for -o: those of `cowfs mount`; COMMAND is root even without fakeroot

examples:
  cowfs run --root / -- make install                look, then commit or discard
  cowfs run --root / --commit -- sh install.sh
  cowfs run --root root.sqsh --store changes -- apt-get install hello
  cowfs run root.sqsh tree --store changes -- cp -a /etc/skel tree/root

Exit codes: that of COMMAND; 127 it is not found; 126 it cannot be run; 125 it has run, and not all of its
changes were committed or kept; without having run it: 1 usage error; 2 system error; 32 mount failed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.usage = (
        "cowfs run --root ROOT [OPTIONS] -- COMMAND [ARGUMENT...]\n"
        "       cowfs run [OPTIONS] LOWER[:LOWER...] MOUNTPOINT [OPTIONS] -- COMMAND [ARGUMENT...]"
    )
    mount.add_layers(parser, optional=True)
    parser.add_argument("--root", metavar="IMAGE|DIR|/", help="the root directory of COMMAND")
    answer = parser.add_mutually_exclusive_group()
    answer.add_argument("--commit", action="store_true", help="make the changes in ROOT, or in LOWER")
    answer.add_argument("--discard", action="store_true", help="discard the changes")
    answer.add_argument("--keep", metavar="STORE", help="write the changes to a new store")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite files in conflict")
    parser.set_defaults(command=[], foreground=False, debug="")


def run(args: argparse.Namespace) -> int:
    """Mount, run the command, ask what to do with its changes, do it, and unmount."""
    _check(args)
    pipes = _pipes()
    is_all_there = _enter()
    complete_interrupted(_lower(args), force=args.force)
    try:
        return _run(args, pipes, is_all_there=is_all_there)
    except Abandoned:
        os._exit(128 + signal.SIGKILL)


def _run(args: argparse.Namespace, pipes: list[int], *, is_all_there: bool) -> int:
    since = beneath.now()
    with _private_directory() as private, ExitStack() as guards:
        if not os.access(os.environ.get("XDG_RUNTIME_DIR", "/none"), os.W_OK):
            os.environ["XDG_RUNTIME_DIR"] = private  # for the daemon's socket
        prepare = (lambda: None) if is_all_there else _chown_ignorer()
        sandbox = Sandbox(args, private) if args.root else None
        parts = sandbox.parts if sandbox is not None else []
        try:
            if sandbox is not None:
                sandbox.build()
            else:
                parts.append(_mounted(args))
            ending = Ending(args, parts, since)
            ending.look_at_stores()
            code = _wait(args.command, prepare, sandbox, pipes, guards)
            ending.decide()
        finally:
            if sandbox is not None:
                sandbox.close(_unmount)
            elif parts:
                _unmount(args.mountpoint)
    return ending.finish() or code


def _pipes() -> list[int]:
    """Return the inherited pipes besides the standard streams, as from ``<(...)`` of a shell, or from make.

    The command gets no other descriptors, because it could leave its root through a directory.
    """
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of this listing, closed by now
            if fd > 2 and os.get_inheritable(fd) and stat.S_ISFIFO(os.fstat(fd).st_mode):
                found.append(fd)
    return found


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that exclude each other."""
    if not args.command:
        raise UsageError("no command given: cowfs run --root / -- COMMAND", "see `cowfs run --help`")
    args.options = _without_fakeroot(args.options)
    if args.root is not None and args.lower is not None:
        raise UsageError(f"--root and {args.lower} exclude each other", "cowfs run --root ROOT -- COMMAND")
    if args.root is None and (args.lower is None or args.mountpoint is None):
        raise UsageError("no root given", "cowfs run --root / -- COMMAND, or LOWER MOUNTPOINT")
    mount_options.must_have_name(args.keep, "--keep ")
    has_store = args.store not in {None, "memory"}
    if has_store and args.keep:
        raise UsageError("--store and --keep: both say where the changes are kept", "leave one of them out")
    if has_store and args.discard and os.path.lexists(args.store):
        raise UsageError(
            f"--discard: {args.store} already exists, and keeps its changes",
            "leave out --store, or use `cowfs revert`",
        )
    if args.keep and os.path.lexists(args.keep):
        raise UsageError(f"--keep {args.keep}: already exists", "give another name, or --store to add to it")
    lower = _lower(args)
    if args.commit and not os.path.isdir(lower):
        raise UsageError(f"--commit: {lower} is not a directory, so it cannot be changed", "use --keep STORE")
    if args.commit and os.statvfs(lower).f_flag & os.ST_RDONLY:
        raise UsageError(f"--commit: {lower} is mounted read-only", "use --keep STORE")


def _without_fakeroot(given: list[str]) -> list[str]:
    """Return the options of all ``-o`` without fakeroot: the command is root anyway. UsageError."""
    mount_options.parse(given)
    kept = ([word for word in mount_options.split(text) if word != "fakeroot"] for text in given)
    return [",".join(map(_escaped, words)) for words in kept if words]


def _escaped(word: str) -> str:
    """Return a word as :func:`cowfs.cli.options.split` reads it."""
    return word.replace("\\", "\\\\").replace(",", "\\,")


def _chown_ignorer() -> Callable[[], None]:
    try:
        return seccomp.chown_ignorer()
    except OSError as error:
        raise SystemFailure(f"{error.strerror}", "as root: apt install libseccomp2") from None


def _lower(args: argparse.Namespace) -> str:
    """Return the path or URL of the lower; if there are several, as on the command line."""
    if args.root is not None:
        return str(args.root)
    lowers = mount_options.split_lowers(args.lower)
    return lowers[0] if len(lowers) == 1 else str(args.lower)


def _mounted(args: argparse.Namespace) -> Part:
    """Mount the union for the command; return it with its mountpoint."""
    is_new = bool(args.store) and args.store != "memory" and not os.path.lexists(args.store)
    if args.commit or args.keep or args.discard:
        mount.mounted(args)
    else:
        mount.run(args)
    return Part(_lower(args), args.mountpoint, b"", args.store or "memory", is_new)


@contextmanager
def _private_directory() -> Iterator[str]:
    """Yield an empty directory for the mounts, and remove it when nothing is mounted any more. First remove
    those of runs that were killed.

    It is not a tempfile.TemporaryDirectory, which each daemon, being a fork of this process, would remove at
    its exit, with everything mounted in it.
    """
    _remove_abandoned()
    private, lock = _locked_directory()
    try:
        yield private
    finally:
        os.close(lock)
        with suppress(OSError):
            mounts.umount2(private, mounts.MNT_DETACH)
        if not os.path.ismount(private):
            remove(private)


def _locked_directory() -> tuple[str, int]:
    """Create a directory; return it with a descriptor whose lock says that somebody uses it."""
    while True:
        private = tempfile.mkdtemp(prefix=f"{_PRIVATE}{os.getpid()}-")
        lock = os.open(private, _DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(private):
            return private, lock
        os.close(lock)  # taken for an abandoned one before it was locked


def _remove_abandoned() -> None:
    """Remove the directories that nobody uses of our runs that were killed.

    Asks no filesystem that is mounted there: it may be another user's, and hang.
    """
    with suppress(OSError):
        above = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ways = beneath.guarded(above)
            for name in map(os.fsencode, os.listdir(above)):
                if name.startswith(_PRIVATE.encode()) and not _is_running(name):
                    _remove_if_abandoned(above, name, ways)
        finally:
            os.close(above)


def _is_running(name: bytes) -> bool:
    """Whether there is a process with the number in the *name* of a directory.

    A run in a sandbox sees the directories of the runs outside, but not their locks.
    """
    pid = os.fsdecode(name).removeprefix(_PRIVATE).partition("-")[0]
    return pid.isdecimal() and os.path.exists(f"/proc/{pid}")


def _remove_if_abandoned(above: int, name: bytes, ways: beneath.Ways) -> None:
    with suppress(OSError):
        fd = ways.open(above, name, _DIRECTORY)
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                beneath.remove_tree(above, name, ways)
        finally:
            os.close(fd)


def _enter() -> bool:
    """Become root, in a new mount namespace; return whether users other than root can own files."""
    if os.geteuid() == 0:
        mounts.unshare_slave()
        return True
    try:
        user_namespace.become_root()
        privileges.hide()  # otherwise the command could reach the system through /proc/PID/root
    except OSError as error:
        raise SystemFailure(
            f"cannot create a user namespace: {error.strerror}",
            "the system forbids them: see kernel.unprivileged_userns_clone and user.max_user_namespaces",
        ) from None
    return _others_are_there()


def _others_are_there() -> bool:
    return sum(count for _, _, count in user_namespace.ranges("uid")) > 1


def _wait(
    command: list[str],
    prepare: Callable[[], object],
    sandbox: Sandbox | None,
    pipes: list[int],
    guards: ExitStack,
) -> int:
    """Run a command, and wait for its end; return its exit code as sh(1) does.

    Only the command reacts to signals of the terminal. In a sandbox, processes that it leaves running are
    killed. If this process is killed before *guards* ends, all processes are, and all is unmounted.
    """
    before = [signal.getsignal(number) for number in _FROM_TERMINAL]
    for number in _FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    spared = offspring.become_subreaper()
    code = None
    try:
        guard = Guard(
            lambda begin: _start(command, (begin, prepare), sandbox, pipes),
            (lambda: None) if sandbox is None else lambda: _end_all(set()),
        )
        guards.callback(guard.end)
        code = guard.wait()
    finally:
        if code is None:  # this process or the guard was killed
            _end_all(spared)
        for number, handler in zip(_FROM_TERMINAL, before, strict=True):
            signal.signal(number, signal.SIG_IGN)  # drops one that is pending, because it is blocked
            signal.signal(number, handler)
    return 128 + signal.SIGKILL if code is None else code


def _end_all(spared: set[int]) -> None:
    ended, left = offspring.end_all(spared)
    if ended:
        warn(f"ended processes that the command left running: {', '.join(ended)}")
    if left:
        warn(f"processes that the command left running cannot be ended: {', '.join(left)}")


def _start(
    command: list[str],
    prepare: Iterable[Callable[[], object]],
    sandbox: Sandbox | None,
    pipes: list[int],
) -> subprocess.Popen[bytes] | int:
    """Start a command; return the process, or the exit code if it cannot be run. It first calls *prepare*."""

    def become() -> None:
        for number in _FROM_TERMINAL:
            signal.signal(number, signal.SIG_DFL)
        for number in ASKS_TO_END:
            signal.signal(number, signal.SIG_DFL)
        unblock()
        if sandbox is not None:
            sandbox.enter()
        for step in prepare:
            step()

    environment = programs.given_environment()
    if sandbox is not None:
        environment = sandbox.environment(environment, all_there=_others_are_there())
    try:
        return subprocess.Popen(
            command,
            env=environment,
            preexec_fn=become,  # noqa: PLW1509 - one thread
            pass_fds=pipes,
        )
    except subprocess.SubprocessError:  # become() has failed; the exception does not say why
        warn(f"{command[0]}: cannot be run: its root directory cannot be entered")
        return _NOT_RUN
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) or _is_nowhere(command[0], environment, sandbox)
        warn(f"{command[0]}: {os.strerror(errno.ENOENT) if missing else error.strerror}")
        return _NOT_FOUND if missing else _NOT_RUN


def _is_nowhere(name: str, environment: dict[bytes, bytes], sandbox: Sandbox | None) -> bool:
    """Whether no directory of PATH has the command.

    (execve(2) fails with EACCES if any is not searchable.)
    """
    if "/" in name:
        return False
    root = sandbox.path if sandbox is not None else ""
    searched = os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath))).split(os.pathsep)
    return not any(os.path.lexists(f"{root}{place}/{name}" if place else name) for place in searched)


def _unmount(mountpoint: str) -> None:
    arguments = argparse.Namespace(mountpoint=mountpoint, lazy=False, force=False, timeout=600.0)
    try:
        umount.run(arguments)
    except MountFailure as failure:
        warn(f"{failure.message}: still used by processes that the command left running")
        arguments.lazy = True
        with suppress(MountFailure):
            umount.run(arguments)
