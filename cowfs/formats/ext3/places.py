"""Find the paths of inodes, for messages."""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from cowfs.formats.ext3.directory import INO, parse, type_of

_ROOT = 2


def places(
    wanted: set[int], listing: Callable[[int], Iterable[bytes]], stopped: Callable[[], bool]
) -> Iterator[bytes]:
    """Yield a path from the root for each of the *wanted* inodes.

    Blocks; it may search the whole image. *listing* yields what x3_readdir returns for a directory, and
    raises OSError if it cannot be read. The search ends when *stopped* returns true.
    """
    wanted = set(wanted)
    directories = deque([(_ROOT, b"")])
    seen = {_ROOT}
    while directories and wanted and not stopped():
        directory, path = directories.popleft()
        try:
            for name, value in chain.from_iterable(map(parse, listing(directory))):
                ino = value & INO
                if ino in wanted:
                    wanted.remove(ino)
                    yield path + name
                if type_of(value) == stat.S_IFDIR and ino not in seen:
                    seen.add(ino)
                    directories.append((ino, path + name + b"/"))
        except OSError:
            continue
