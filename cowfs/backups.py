"""Copy stores: back up a store, even one in use, as it is at one moment; and restore it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from threading import Thread

from cowfs.client import ask, facts_of, mount_with_store
from cowfs.errors import MountFailure, StoreError, UsageError
from cowfs.exports.target import must_be_elsewhere, new_directory, new_file
from cowfs.linux import trust
from cowfs.linux.mount_table import MountInfo
from cowfs.offline_changes import Tell, must_be_there
from cowfs.store.e2fsprogs import tools
from cowfs.store.format.sniff import split_subdir
from cowfs.store.format.superblock import read_superblock
from cowfs.store.offline.backup import copy_image, finish_copy
from cowfs.store.offline.copy_tree import TreeCopy
from cowfs.store.served import lock
from cowfs.store.served.image import open_file
from cowfs.store.served.open import open_store

Tick = Callable[[int], None]
"""Is told how many bytes were copied."""
_ALIVE = 0.5
"""Seconds between two signs of life to a daemon that waits."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def backup(
    what: str,
    target: str,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    progress: Tell = lambda _: None,
    tick: Tick = lambda _: None,
) -> None:
    """Copy a store, or the store of a mount in use, to *target*, as it is at one moment.

    The copy is a store: a directory if the store is one, else a file. An existing one is replaced only with
    *force*. *tell* gets warnings, *progress* what the daemon has done, *tick* numbers of bytes copied. At the
    end *target* is complete or does not exist. Blocks. Raises CowfsError, and OSError with the path of what
    cannot be copied.
    """
    mount = mount_with_store(what)
    if mount is not None:
        _refuse_inside(target, mount.dev)
        store = facts_of(mount.dev)["store"]
        must_be_elsewhere(target, [str(store["path"])])
        if store["kind"] == "directory":
            _mounted_directory(mount, target, force, tell, tick)
        else:
            _mounted_image(what, mount, target, force, progress)
        return
    must_be_there(what)
    must_be_elsewhere(target, [what])
    _copy(what, target, force, tell, tick)


def restore(
    source: str,
    target: str,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    tick: Tick = lambda _: None,
) -> None:
    """Check a store made by :func:`backup` and copy it to *target*; with *force* it replaces an unused image.

    At the end *target* is complete, or as it was before. Otherwise as :func:`backup`.
    """
    must_be_there(source)
    must_be_elsewhere(target, [source])
    with ExitStack() as stack:
        if mount_with_store(target) is not None:
            raise UsageError(f"{target}: is mounted", "unmount it first, or give another name")
        if force and os.path.isfile(target):
            fd = open_file(target)
            stack.callback(os.close, fd)
            lock.lock(fd, target)
            lock.refuse_mounted_image(fd, target)
        _copy(source, target, force, tell, tick, is_checked=True)


def _copy(path: str, target: str, force: bool, tell: Tell, tick: Tick, *, is_checked: bool = False) -> None:
    """Copy a store that nobody writes to meanwhile."""
    with closing(open_store(path, read_only=True, progress=tell)) as store, ExitStack() as stack:
        if store.is_apart or (store.is_aufs and store.kind == "directory"):
            raise StoreError(f"{path}: is another program's store", "copy it with cp -a")
        if store.kind == "directory":
            source = os.open(path, _DIRECTORY)
            stack.callback(os.close, source)
            _must_say_the_truth(source, path)
            known, there = store.layer.stat(store.layer.root), os.fstat(source)
            if (known.st_dev, known.st_ino) != (there.st_dev, there.st_ino):
                raise StoreError(f"{path}: was replaced by another directory", "try again")
            fd = stack.enter_context(new_directory(target, force=force))
            for size in TreeCopy(source, fd).run():
                tick(size)
            return
        image = split_subdir(os.path.abspath(path))[0]
        superblock = read_superblock(store.fd, image)
        is_clean = superblock.state == "clean" and not superblock.needs_recovery
        if is_checked and (not is_clean or tools.fsck(store.fd, image, "-f", "-n")[0]):
            raise StoreError(f"{path}: is damaged, or not whole", f"for details see cowfs check -n {path}")
        fd = stack.enter_context(new_file(target, force=force))
        for size in copy_image(store.fd, fd):
            tick(size)
        if not is_clean:
            tools.recover(fd, target, tell, "-f", sound=False)
        elif not is_checked and tools.fsck(fd, target, "-f", "-n")[0]:
            tell(f"{path}: is damaged, and so is the copy (cowfs check repairs either)")
        finish_copy(fd, target)
        _give_owner(fd, os.fstat(store.fd))


def _mounted_image(what: str, mount: MountInfo, target: str, force: bool, tell: Tell) -> None:
    facts = facts_of(mount.dev)
    with new_file(target, force=force) as fd:
        for reply in ask(mount.dev, "backup", timeout=None, fd=fd):
            if "said" in reply:
                tell(f"{what}: {reply['said']}")
        superblock = read_superblock(fd, target)  # the daemon's word alone is not enough
        if superblock.state != "clean" or superblock.uuid != facts["store"].get("uuid"):
            raise MountFailure(f"{what}: the daemon did not copy its store", "see its log")


def _mounted_directory(mount: MountInfo, target: str, force: bool, tell: Tell, tick: Tick) -> None:
    facts = facts_of(mount.dev)["store"]
    path = str(facts["path"])
    if facts.get("moved"):
        raise StoreError(f"{path}: {facts['moved']}", "put it back, or unmount first")
    if not os.path.isdir(os.path.join(path, "upper")):
        raise StoreError(f"{path}: is another program's store", "unmount it, and copy it with cp -a")
    try:
        source = os.open(path, _DIRECTORY)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be opened: {error.strerror}", "run this where it was mounted"
        ) from None
    try:
        if f"user_id={os.fstat(source).st_uid}" not in mount.super_words and os.geteuid() == 0:
            raise StoreError(f"{path}: belongs to another user than the mount", "name the store itself")
        _must_say_the_truth(source, path)
        with new_directory(target, force=force) as fd:
            copy = TreeCopy(source, fd)
            for size in copy.run():
                tick(size)
            with _held(mount, tell) as alive:
                for size in copy.run():
                    alive()
                    tick(size)
    finally:
        os.close(source)


class _Asking(Thread):
    """Waits for the answer to ``hold``, which comes when the hold is over."""

    def __init__(self, dev: str, end: socket.socket) -> None:
        super().__init__(daemon=True)
        self._dev = dev
        self._end = end
        self.failure: Exception | None = None
        self.lent = ""
        """The files that the kernel itself continued to write."""

    def run(self) -> None:
        try:
            for reply in ask(self._dev, "hold", timeout=None, fd=self._end.fileno()):
                self.lent = str(reply.get("lent", ""))
        except Exception as failure:
            self.failure = failure
        finally:
            self._end.close()


@contextmanager
def _held(mount: MountInfo, tell: Tell) -> Iterator[Callable[[], None]]:
    """Make all users of a mount wait; yield a function that must be called now and then.

    MountFailure if they cannot be made to wait, or went on too early.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    asking = _Asking(mount.dev, its)
    asking.start()
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _ALIVE:
            last = now
            with suppress(OSError):
                ours.send(b".", socket.MSG_DONTWAIT)

    with ours:
        is_held = bool(ours.recv(1))
        if is_held:
            yield alive
            try:
                is_held = bool(ours.recv(1, socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except OSError:  # the daemon is gone, and has not read our last message
                is_held = False
    asking.join()
    if asking.failure is not None:
        raise asking.failure
    if not is_held:
        raise MountFailure(
            f"{os.fsdecode(mount.mountpoint)}: did not wait until the copy was complete", "try again"
        )
    if asking.lent:
        tell(f"{asking.lent}: open, and written by the kernel itself (passthrough): may be of a later moment")


def _refuse_inside(target: str, dev: str) -> None:
    with suppress(OSError):
        here = os.stat(os.path.dirname(os.path.abspath(target))).st_dev
        if f"{os.major(here)}:{os.minor(here)}" == dev:
            raise UsageError(f"{target}: is inside the mount that is copied", "choose a path outside of it")


def _must_say_the_truth(directory: int, path: str) -> None:
    """StoreError if root would make files with owners and modes that another user's filesystem invents."""
    who = trust.who_serves(os.fstat(directory))
    if who is not None and os.geteuid() == 0:
        raise StoreError(f"{path}: is on a filesystem served by uid {who}", "run this as that user")


def _give_owner(fd: int, info: os.stat_result) -> None:
    """Give a copy to the owner of the image: what others have made does not become root's."""
    if os.geteuid() == 0:
        who = trust.who_serves(info)
        os.fchown(fd, info.st_uid if who is None else who, info.st_gid)
