"""What goes on while the daemon is killed; ``python workloads.py NAME ROOT`` tells of each step on stdout.

Standard library only. Ends with exit code 0 as soon as the filesystem does not answer any more.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator

FILES = 160
SYNC_EVERY = 7
MARK = b"-- appended --\n"


def content(number: int) -> bytes:
    """What file *number* of the lower holds: some are empty, some larger than one request."""
    size = (0, 10, 5_000, 70_000, 300_000)[number % 5]
    return (b"%06d:" % number * (size // 7 + 1))[:size]


def fresh(number: int) -> bytes:
    """What the new file *number* shall hold."""
    return content(number)[::-1] + b"end"


def append(root: str) -> Iterator[str]:
    """Append to every file of the lower: each is copied up."""
    for number in range(FILES):
        fd = os.open(f"{root}/d{number % 9}/f{number}", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, MARK)
            if number % SYNC_EVERY == 0:
                os.fsync(fd)
        finally:
            os.close(fd)
        yield f"{'synced' if number % SYNC_EVERY == 0 else 'done'} {number}"


def untar(root: str) -> Iterator[str]:
    """New directories and files, as an archive is unpacked."""
    for number in range(FILES):
        folder = f"{root}/new/n{number % 7}"
        os.makedirs(folder, exist_ok=True)
        fd = os.open(f"{folder}/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            data = fresh(number)
            for start in range(0, len(data), 65536):
                os.write(fd, data[start : start + 65536])
            if number % SYNC_EVERY == 0:
                os.fsync(fd)
        finally:
            os.close(fd)
        yield f"{'synced' if number % SYNC_EVERY == 0 else 'done'} {number}"


def replace(root: str) -> Iterator[str]:
    """As editors save: a new file, synced, takes the place of the old one."""
    for number in range(FILES):
        path = f"{root}/d{number % 9}/f{number}"
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, fresh(number))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path + ".new", path)
        yield f"done {number}"


def shuffle(root: str) -> Iterator[str]:
    """Renames, removals and new attributes."""
    for number in range(FILES):
        path = f"{root}/d{number % 9}/f{number}"
        if number % 3 == 0:
            os.unlink(path)
        elif number % 3 == 1:
            os.rename(path, f"{root}/d{number % 9}/moved{number}")
        else:
            os.chmod(path, 0o600)
        yield f"done {number}"
    for number in range(9):
        os.rename(f"{root}/d{number}", f"{root}/m{number}")
        yield f"done {FILES + number}"


WORKLOADS = {"append": append, "untar": untar, "replace": replace, "shuffle": shuffle}


def main() -> None:
    name, root = sys.argv[1:]
    try:
        for said in WORKLOADS[name](root):
            print(said, flush=True)
    except OSError as error:
        if error.errno not in {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}:
            raise
    print("over", flush=True)


if __name__ == "__main__":
    main()
