"""Clients that no standard program provides: small system calls on many files, timed in the process.

``client.py JOB NAMES`` works on the paths in the file NAMES (separated by NUL), relative to the working
directory, and prints the seconds it took and a result. It imports only the standard library, and runs with
``python -I -S``.
"""

import hashlib
import os
import subprocess
import sys
import time


def append(paths: list[bytes]) -> str:
    """Append one byte to each file."""
    for path in paths:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"+")
        os.close(fd)
    return str(len(paths))


def read(paths: list[bytes]) -> str:
    """Read each file; return the number of bytes and a digest of all data."""
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while data := os.read(fd, 1 << 17):
            digest.update(data)
            total += len(data)
        os.close(fd)
    return f"{total} {digest.hexdigest()}"


def skim(paths: list[bytes]) -> str:
    """Read each file and ignore the data; return the number of bytes."""
    total = 0
    buffer = bytearray(1 << 20)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while size := os.readv(fd, [buffer]):
            total += size
        os.close(fd)
    return str(total)


def random(names: list[bytes]) -> str:
    """Read 4 KiB of the first of *names* at each offset that follows; return their number and a digest."""
    digest = hashlib.blake2b(digest_size=16)
    fd = os.open(names[0], os.O_RDONLY)
    for place in names[1:]:
        digest.update(os.pread(fd, 4096, int(place)))
    os.close(fd)
    return f"{len(names) - 1} {digest.hexdigest()}"


def chown(paths: list[bytes]) -> str:
    """Change the owner and group of each file to 1234, without following symbolic links."""
    for path in paths:
        os.chown(path, 1234, 1234, follow_symlinks=False)
    return str(len(paths))


def fsync(paths: list[bytes]) -> str:
    """Create each file with 4 KiB of data, and sync it to disk before the next."""
    for path in paths:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, path.ljust(4096, b"."))
        os.fsync(fd)
        os.close(fd)
    return str(len(paths))


def fill(names: list[bytes]) -> str:
    """Create a file with the name and size in *names*, each MiB filled with its number, and sync it."""
    name, size = names[0], int(names[1])
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for number in range(size >> 20):
        os.write(fd, (b"%016d" % number) * (1 << 16))
    os.fsync(fd)
    os.close(fd)
    return str(size)


def rewrite(names: list[bytes]) -> str:
    """Write 4 KiB of the first of *names* at each of the offsets that follow, and sync it to disk."""
    fd = os.open(names[0], os.O_RDWR)
    for place in names[1:]:
        os.pwrite(fd, place.ljust(4096, b"#"), int(place))
    os.fsync(fd)
    os.close(fd)
    return str(len(names) - 1)


def make_names(names: list[bytes]) -> str:
    """Create files in a directory, list it with attributes, and remove every second file."""
    directory, count = names[0], int(names[1])
    for number in range(count):
        os.close(os.open(b"%s/name %d" % (directory, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    with os.scandir(directory) as entries:
        listed = sum(entry.stat(follow_symlinks=False).st_size == 0 for entry in entries)
    for number in range(0, count, 2):
        os.unlink(b"%s/name %d" % (directory, number))
    return str(listed)


def create(names: list[bytes]) -> str:
    """Create small files, 50 in each directory, below the first of *names*; the second is their number."""
    top, count = names[0], int(names[1])
    os.mkdir(top)
    for number in range(count):
        if number % 50 == 0:
            os.mkdir(b"%s/%d" % (top, number // 50))
        fd = os.open(b"%s/%d/%d" % (top, number // 50, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, (b"%d " % number).ljust(1024, b"."))
        os.close(fd)
    return str(count)


def mkdir(names: list[bytes]) -> str:
    """Create directories."""
    for name in names:
        os.mkdir(name)
    return str(len(names))


def rename(names: list[bytes]) -> str:
    """Add ``-renamed`` to each of *names*."""
    for name in names:
        os.rename(name, name + b"-renamed")
    return str(len(names))


def chmod(names: list[bytes]) -> str:
    """Make each of *names* readable by its owner only."""
    for name in names:
        os.chmod(name, 0o400)
    return str(len(names))


def enter_chroot() -> None:
    """Mount /dev and /proc in this directory and make it the root. Needs its own mount namespace."""
    for arguments in (["--bind", "/dev", "dev"], ["-t", "proc", "proc", "proc"]):
        subprocess.run(["mount", *arguments], check=True)
    os.chroot(".")
    os.chdir("/")


def chroot(scripts: list[bytes]) -> str:
    """Run a script with sh; return the last line that it prints."""
    # Only what programs find in any root, nothing from the environment outside.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
    environment["DEBIAN_FRONTEND"] = "noninteractive"
    argv = [b"/bin/sh", b"-ec", scripts[0]]
    done = subprocess.run(argv, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the script exited with {done.returncode}: {done.stdout.decode(errors='replace')[-200:]}")
    return (done.stdout.decode(errors="replace").splitlines() or [""])[-1]


JOBS = {
    "append": append,
    "read": read,
    "skim": skim,
    "random": random,
    "chown": chown,
    "fsync": fsync,
    "fill": fill,
    "rewrite": rewrite,
    "names": make_names,
    "create": create,
    "mkdir": mkdir,
    "rename": rename,
    "chmod": chmod,
    "chroot": chroot,
}
PREPARATIONS = {"chroot": enter_chroot}
"""Functions to call before the timed part."""


def main(job: str, names: str) -> None:
    """Do *job* on the paths listed in *names*."""
    with open(names, "rb") as file:
        paths = file.read().split(b"\0")
    if job in PREPARATIONS:
        PREPARATIONS[job]()
    begin = time.perf_counter()
    result = JOBS[job](paths)
    print(f"{time.perf_counter() - begin:.6f} {result}")


if __name__ == "__main__":
    main(*sys.argv[1:])
