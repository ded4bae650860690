"""Open, walk and change damaged images with the engine, with limits on time and memory.

    python -m tests.ext3.exercise --start N --count N IMAGE...

Exit 0: nothing happened. Whatever else happens names the image and the number of the damage first.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import logging
import os
import resource
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cowfs.formats.ext3.image import Image
from cowfs.layers.ext3 import Ext3Layer
from tests.ext3.damage import Target, damaged
from tests.support import sanitized

SLOW = 5.0
"""Seconds of processor time for one image."""
REFUSED = {errno.EINVAL, errno.EUCLEAN, errno.EOPNOTSUPP, errno.EBADMSG, errno.EIO}
"""The errors that opening may raise. ENOMEM is not one of them, because memory must be limited."""
SERVED = REFUSED | {
    errno.EROFS, errno.ENOSPC, errno.ENODATA, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENOTEMPTY, errno.EMLINK, errno.EFBIG, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ERANGE,
    errno.ENAMETOOLONG, errno.ESTALE,
}  # fmt: skip
_NAMES, _VISITED = 150, 40
"""The maximum number of names to visit at a time, in all and in one directory."""
_BYTES = 1 << 20


def exercise(data: bytes, seed: int, *, left: bool = False) -> int:
    """Use an image in every way; return the number of names, or -1 if it was refused.

    What a dead process has *left* may have been recovered before more of it is found to be damaged.
    """
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        try:
            image = Image(fd, "image", commit_seconds=0, read_only=seed % 8 == 7, cache_bytes=2 << 20)
        except OSError as error:
            assert error.errno in REFUSED, error
            may_write = left and seed % 8 != 7
            assert may_write or os.pread(fd, len(data) + 1, 0) == data, "refused, and written to"
            return -1
        layer = Ext3Layer(image)
        try:
            count = _Walk(layer).everything()
        except BaseException:
            image.abandon()
            raise
        _try(layer.close)
        if seed % 8 == 7:
            assert os.pread(fd, len(data) + 1, 0) == data, "read-only, and written to"
        return count
    finally:
        os.close(fd)


def _try(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except OSError as error:
        if error.errno not in SERVED:
            raise
        return None


def impossible(name: bytes) -> bool:
    """Return a name that no program or kernel could create."""
    return b"/" in name or b"\0" in name or name in {b".", b"..", b""}


class _Walk:
    def __init__(self, layer: Ext3Layer) -> None:
        self.layer = layer
        self.count = 0

    def everything(self) -> int:
        """Read everything, change everything, read again."""
        layer = self.layer
        layer.statfs()
        self.walk(self.look)
        self.walk(self.change)
        _try(layer.sync)
        self.walk(self.look)
        self.walk(self.remove)
        _try(self.make, layer.root)
        _try(layer.image.checkpoint)
        layer.statfs()
        return self.count

    def walk(self, visit: Any) -> None:
        """Yield every name, up to a limit, because directories may contain themselves."""
        pending, seen, count = [self.layer.root], set(), 0
        while pending and count < _NAMES:
            directory = pending.pop()
            if directory in seen:
                continue
            seen.add(directory)
            names = [name for name, _ in _try(self.layer.readdir, directory) or []]
            for name in names:
                assert not impossible(name), name
            for name in names[:_VISITED]:
                count += 1
                found = _try(self.layer.lookup, directory, name)
                if found is not None:
                    key, attr = found
                    if stat.S_ISDIR(attr.st_mode):
                        pending.append(key)
                    _try(visit, directory, name, key, attr.st_mode)
        self.count += count

    def look(self, _directory: Any, _name: bytes, key: Any, mode: int) -> None:
        """Read everything."""
        layer = self.layer
        _try(layer.handle, key)
        for name in _try(layer.listxattr, key) or []:
            _try(layer.getxattr, key, name)
        if stat.S_ISLNK(mode):
            _try(layer.readlink, key)
        if stat.S_ISREG(mode):
            file = layer.open(key, os.O_RDONLY)
            size = file.stat().st_size
            for offset in (0, size // 2, max(size - 5000, 0)):
                _try(file.pread, 70_000, offset)
            if size < _BYTES:
                _try(lambda: list(file.segments(size)))
            file.close()

    def change(self, directory: Any, name: bytes, key: Any, mode: int) -> None:
        """Change it in every way."""
        layer = self.layer
        _try(layer.chmod, key, 0o640)
        _try(layer.utimens, key, 1, 2)
        _try(layer.setxattr, key, b"trusted.test", b"x" * (self.count * 37 % 700))
        _try(layer.link, key, layer.root, b"link%d" % self.count)
        _try(layer.rename, (directory, name), (directory, b"new" + name[:200]), 0, key)
        if stat.S_ISREG(mode):
            file = _try(layer.open, key, os.O_RDWR)
            if file is not None:
                _try(file.pwrite, b"written" * 2000, self.count * 1000 % 300_000)
                _try(file.truncate, self.count * 777 % 20_000)
                _try(file.fsync, False)
                file.close()
        if stat.S_ISDIR(mode):
            _try(self.make, key)
        self.count += 1

    def make(self, directory: Any) -> None:
        """Create files of all types."""
        layer = self.layer
        key, file = layer.create(directory, b"made", 0o600, 0, 0)
        _try(file.pwrite, b"data" * 30_000, 0)
        file.close()
        _try(layer.mkdir, directory, b"directory" * 20, 0o755, 0, 0)
        _try(layer.symlink, directory, b"symlink", b"target" * 50, 0, 0)
        _try(layer.mknod, directory, b"whiteout", stat.S_IFCHR, 0, 0, 0)
        _try(layer.unlink, directory, b"made", key)
        _try(layer.forget, key)

    def remove(self, directory: Any, name: bytes, key: Any, mode: int) -> None:
        """Remove everything."""
        remove = self.layer.rmdir if stat.S_ISDIR(mode) else self.layer.unlink
        with suppress(OSError):
            remove(directory, name, key if self.count % 3 == 0 else None)
        _try(self.layer.forget, key)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--start", type=int, default=0, help="the first damage")
    parser.add_argument("--count", type=int, default=1000, help="damages, spread over the images")
    parser.add_argument("--left", action="store_true", help="their journals are to be replayed")
    parser.add_argument("--as-is", action="store_true", help="the images are damaged already: do one each")
    parser.add_argument("--memory", type=int, default=256, help="MiB of memory to allocate at most")
    options = parser.parse_args(arguments)
    # Not RLIMIT_AS: malloc reserves address space for each thread without using memory.
    if sanitized.ENGINE is None:  # AddressSanitizer maps terabytes
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory << 20, options.memory << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    if options.as_is:
        for path in options.images:
            print(f"{path.name}: {exercise(path.read_bytes(), 0)} names", flush=True)
        return 0
    targets = [Target(path.name, path.read_bytes()) for path in options.images]
    for target in targets:
        if exercise(target.data, 0) <= 0:
            print(f"{target.name}: cannot be served undamaged", file=sys.stderr)
            return 2
    done = refused = 0
    for seed in range(options.start, options.start + options.count):
        target = targets[seed % len(targets)]
        print(f"{target.name}: damage {seed}", flush=True)  # the last line names the cause
        faulthandler.dump_traceback_later(4 * SLOW, exit=True)
        begin = time.process_time()
        try:
            refused += exercise(damaged(target, seed), seed, left=options.left) < 0
        except BaseException:
            print(f"{target.name}: damage {seed}:", file=sys.stderr)
            raise
        took = time.process_time() - begin
        if took > SLOW:
            print(f"{target.name}: damage {seed}: took {took:.1f} s", file=sys.stderr)
            return 1
        done += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{done} damaged images, {refused} of them refused when opened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
