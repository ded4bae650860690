"""Attacks of one user on the other users of a mount: ``python attacks.py NAME MOUNT NUMBER SECONDS``.

Each attack is a function of the mountpoint and the number of this attacker, and is called repeatedly until
the time is over. Errors about limits (EMFILE, ENOSPC...) are ignored.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BIG_FILES, FILES = 64, 2000
"""The numbers of files in the lower: ``big/N`` of 1 MiB, and ``files/N``."""
DEPTH = 2000
PIECES = 6000
TOO_MANY = {errno.EMFILE, errno.ENFILE, errno.EMLINK, errno.ENOSPC, errno.EDQUOT, errno.E2BIG}

counter = itertools.count()
kept: dict[str, int] = {}


def in_threads(count: int, call: Callable[[int], object]) -> None:
    """Call *call* in *count* threads at once, ignoring OSError."""

    def guarded(number: int) -> None:
        with suppress(OSError):
            call(number)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def touch(path: str, flags: int = 0) -> int:
    """Create or open a file; return its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)


def own(at: str, number: int) -> str:
    """Return this attacker's directory, after creating it if needed."""
    path = f"{at}/attackers/{number}"
    os.makedirs(path, exist_ok=True)
    return path


def once(name: str, make: Callable[[], int]) -> int:
    """Return the result of the first call with this *name*."""
    if name not in kept:
        kept[name] = make()
    return kept[name]


# --- the attacks


def copy_ups(at: str, number: int) -> None:
    """Let many threads wait for the copy-up of a few large files, and truncate them."""

    def go(thread: int) -> None:
        os.close(os.open(f"{at}/big/{(number + thread // 4 * 8) % BIG_FILES}", os.O_RDWR))

    in_threads(64, go)
    for name in range(number, BIG_FILES, 8):
        with suppress(OSError):
            os.truncate(f"{at}/big/{name}", 1 << 20)


def one_file(at: str, number: int) -> None:
    """Open and read one large file in all threads."""

    def go(thread: int) -> None:
        fd = os.open(f"{at}/big/0", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 1 << 20, 0)
        os.close(fd)

    in_threads(32, go)


def absent(at: str, number: int) -> None:
    """Look up names that do not exist."""
    for name in range(100):
        with suppress(OSError):
            os.stat(f"{at}/files/{number}-{next(counter)}-{name}")


def parallel_absent(at: str, number: int) -> None:
    """Look up names that do not exist, in a thousand threads."""
    in_threads(125, lambda thread: absent(at, number * 1000 + thread))


def locks(at: str, number: int) -> None:
    """Take locks of all kinds, which wait for each other."""
    path = f"{own(at, 0)}/locked"

    def go(thread: int) -> None:
        with open(path, "ab") as file:
            if thread % 2:
                fcntl.flock(file, fcntl.LOCK_EX)
            for place in range(100):
                with suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * place)

    in_threads(32, go)


def deep(at: str, number: int) -> None:
    """Create, walk, rename and remove a tree that is thousands of levels deep."""
    top = own(at, number)
    chain = [os.open(top, os.O_RDONLY)]
    for _ in range(DEPTH):
        with suppress(FileExistsError):
            os.mkdir("d", dir_fd=chain[-1])
        chain.append(os.open("d", os.O_RDONLY, dir_fd=chain[-1]))
        if len(chain) > 40:
            os.close(chain.pop(0))
    bottom = chain[-1]
    for step in range(200):
        os.rename("d", f"r{step}", src_dir_fd=chain[0], dst_dir_fd=chain[0])
        os.rename(f"r{step}", "d", src_dir_fd=chain[0], dst_dir_fd=chain[0])
        os.stat("../../..", dir_fd=bottom)
        os.close(os.open(f"f{step}", os.O_CREAT | os.O_WRONLY, dir_fd=bottom))
        os.unlink(f"f{step}", dir_fd=bottom)
    for fd in chain:
        os.close(fd)
    here = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.listdir(below)
        os.close(here)
        here = below
    for _ in range(DEPTH):
        above = os.open("..", os.O_RDONLY, dir_fd=here)
        os.close(here)
        os.rmdir("d", dir_fd=above)
        here = above
    os.close(here)


def xattrs(at: str, number: int) -> None:
    """Set and remove the largest extended attributes, and many of them."""
    path = f"{own(at, number)}/file"
    fd = once("file", lambda: touch(path))
    for step in range(50):
        with suppress(OSError):
            os.setxattr(fd, f"user.{step}", b"x" * random.choice((1, 200, 3000, 65536)))
        with suppress(OSError):
            os.setxattr(f"{at}/files/{step}", "user.x", b"y" * 60000)
    for name in os.listxattr(fd):
        os.getxattr(fd, name)
        os.removexattr(fd, name)


def hard_links(at: str, number: int) -> None:
    """Create ten thousand links to a file and remove them."""
    top = own(at, number)
    os.close(touch(f"{top}/0"))
    names = 10_000
    for name in range(1, names):
        try:
            os.link(f"{top}/{name - 1}", f"{top}/{name}")
        except OSError as error:
            if error.errno not in TOO_MANY:
                raise
            names = name
            break
        os.chmod(f"{top}/{name // 2}", 0o600 | name & 7)
    for name in range(names):
        os.unlink(f"{top}/{name}")


def lower_links(at: str, number: int) -> None:
    """Change and rename hard links of the lower."""
    for name in range(number, FILES, 8):
        with suppress(OSError):
            os.chmod(f"{at}/links/{name}", 0o600 | next(counter) & 7)
        with suppress(OSError):
            os.rename(f"{at}/links/{name}", f"{at}/links/x{name}")
        with suppress(OSError):
            os.rename(f"{at}/links/x{name}", f"{at}/links/{name}")


def fsyncs(at: str, number: int) -> None:
    """Write and sync from many threads."""
    top = own(at, number)

    def go(thread: int) -> None:
        fd = touch(f"{top}/{thread}")
        for _ in range(5):
            os.pwrite(fd, b"x" * 5000, 0)
            os.fsync(fd)
        os.close(fd)
        directory = os.open(top, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    in_threads(16, go)


def mapped(at: str, number: int) -> None:
    """Write through mappings."""
    fd = touch(f"{own(at, number)}/mapped")
    os.ftruncate(fd, 8 << 20)
    with mmap.mmap(fd, 8 << 20) as memory:
        for _ in range(10):
            for place in range(0, 8 << 20, 4096):
                memory[place] = random.randrange(256)
            memory.flush()
    os.close(fd)


def synchronous(at: str, number: int) -> None:
    """Write with O_SYNC."""
    top = own(at, number)

    def go(thread: int) -> None:
        fd = touch(f"{top}/{thread}", os.O_SYNC if thread % 2 else os.O_DSYNC)
        for place in range(20):
            os.pwrite(fd, b"x" * 4096, place << 12)
        os.close(fd)

    in_threads(8, go)


def large_writes(at: str, number: int) -> None:
    """Write, truncate and remove files of some megabytes."""
    path = f"{own(at, number)}/large"
    fd = touch(path)
    with suppress(OSError):
        for place in range(8):
            os.pwrite(fd, bytes(1 << 20), place << 20)
    os.ftruncate(fd, 4096)
    os.ftruncate(fd, 0)
    os.close(fd)
    os.unlink(path)


def interrupts(at: str, number: int) -> None:
    """Interrupt requests with many signals."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for step in range(500):
            with suppress(OSError):
                fd = touch(f"{own(at, number)}/file")
                os.pwrite(fd, b"text", 0)
                os.fsync(fd)
                os.close(fd)
                os.stat(f"{at}/files/{step}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def opendirs(at: str, number: int) -> None:
    """Open directories thousands of times, and hardly read them."""
    fds = []
    with suppress(OSError):
        for step in range(3000):
            fds.append(os.open(f"{at}/files" if step % 2 else at, os.O_RDONLY | os.O_DIRECTORY))
            if step % 100 == 0:
                with os.scandir(fds[-1]) as found:
                    next(found)
    for fd in fds:
        os.close(fd)


def listings(at: str, number: int) -> None:
    """List large directories while names change."""
    name = f"{at}/attackers/{number}-{next(counter)}"
    os.close(touch(name))
    os.listdir(f"{at}/files")
    os.listdir(f"{at}/attackers")
    os.unlink(name)


def renames(at: str, number: int) -> None:
    """Rename and exchange files and directories, also of the lower, back and forth."""
    top = own(at, number)
    for name in ("a", "b"):
        os.close(touch(f"{top}/{name}"))
        os.makedirs(f"{top}/d{name}", exist_ok=True)
    exchange = ctypes.CDLL(None).renameat2
    for step in range(100):
        os.rename(f"{top}/a", f"{top}/da/a")
        os.rename(f"{top}/da/a", f"{top}/a")
        exchange(-100, f"{top}/a".encode(), -100, f"{top}/db".encode(), 2)
        exchange(-100, f"{top}/a".encode(), -100, f"{top}/db".encode(), 2)
        lower = f"{at}/files/{number + 8 * step}"
        os.rename(lower, f"{lower}-moved")
        os.rename(f"{lower}-moved", lower)
    os.rename(f"{at}/folders/{number}", f"{at}/folders/x{number}")
    os.rename(f"{at}/folders/x{number}", f"{at}/folders/{number}")


def strangers(at: str, number: int) -> None:
    """Connect to possible control sockets."""
    for place in ("/run/cowfs", f"/run/user/{os.getuid()}/cowfs"):
        for path in Path(place).glob("*") if os.access(place, os.R_OK) else ():
            with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
                connection.connect(os.fspath(path))
                connection.send(b'{"command": "in')
    device = os.stat(at).st_dev
    for name in (f"{os.major(device)}:{os.minor(device)}", "x"):
        for address in (f"\0cowfs/{name}", f"/run/cowfs/{name}"):
            with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
                connection.connect(address)
                connection.send(b'{"command": "in')
    with suppress(OSError):
        ctypes.CDLL(None).umount2(at.encode(), 2)
    time.sleep(0.001)


def other_calls(at: str, number: int) -> None:
    """Call ioctl, poll, fallocate, lseek and copy_file_range."""
    fd = touch(f"{own(at, number)}/file")
    for place in range(0, 4 << 20, 64 << 10):
        os.pwrite(fd, b"x", place)
    lower = os.open(f"{at}/big/{number}", os.O_RDONLY)
    for _ in range(200):
        for call in (
            lambda: fcntl.ioctl(fd, 0x5401, bytes(64)),
            lambda: fcntl.ioctl(fd, 0x80086601, bytes(8)),
            lambda: select.select([fd], [fd], [fd], 0),
            lambda: os.posix_fallocate(fd, 0, 1 << 16),
            lambda: os.lseek(fd, random.randrange(4 << 20), random.choice((os.SEEK_DATA, os.SEEK_HOLE))),
            lambda: os.lseek(lower, 1, os.SEEK_HOLE),
            lambda: os.copy_file_range(lower, fd, 1 << 16, 0, 0),
        ):
            with suppress(OSError):
                call()
    os.close(lower)
    os.close(fd)


def pieces(at: str, number: int) -> None:
    """Search a file of very many extents for holes."""

    def make() -> int:
        fd = touch(f"{own(at, number)}/pieces")
        for place in range(PIECES):
            os.pwrite(fd, b"x", place << 13)
        return fd

    fd = once("pieces", make)
    for _ in range(100):
        os.lseek(fd, (PIECES - 1000) << 13, os.SEEK_DATA)
        os.lseek(fd, random.randrange(PIECES) << 13, os.SEEK_HOLE)


def open_files(at: str, number: int) -> None:
    """Open as many files as possible at the same time."""
    fds = []
    with suppress(OSError):
        for name in range(FILES):
            fds.append(os.open(f"{at}/files/{name}", os.O_RDONLY))
    for fd in fds:
        os.close(fd)


def held_names(at: str, number: int) -> None:
    """Remove files that are held with O_PATH, of which the daemon knows nothing."""
    fds = []
    with suppress(OSError):
        for _ in range(FILES):
            name = f"{own(at, number)}/{next(counter)}"
            os.close(touch(name))
            fds.append(os.open(name, os.O_PATH))
            os.unlink(name)
    for fd in fds:
        os.close(fd)


def walks(at: str, number: int) -> None:
    """Walk the whole tree."""
    for _, _, _ in os.walk(at):
        pass


def creations(at: str, number: int) -> None:
    """Create and remove files of all types."""
    top = own(at, number)
    for step in range(200):
        name = f"{top}/{step}"
        os.symlink("x" * 4000, name)
        os.unlink(name)
        os.mkdir(name)
        os.rmdir(name)
        os.mkfifo(name)
        os.unlink(name)


ATTACKS: dict[str, Callable[[str, int], None]] = {
    attack.__name__: attack
    for attack in (
        *(copy_ups, one_file, absent, parallel_absent, locks, deep, xattrs, hard_links, lower_links, fsyncs),
        *(mapped, synchronous, large_writes, interrupts, opendirs, listings, renames, strangers),
        *(other_calls, pieces, open_files, held_names, walks, creations),
    )
}


def main(name: str, at: str, number: int, seconds: float) -> None:
    """Run the attack until the time is over; print how often it ran."""
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end:
        try:
            ATTACKS[name](at, number)
        except OSError as error:
            if error.errno not in TOO_MANY:
                raise
        rounds += 1
    print(rounds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
