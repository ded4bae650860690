"""Compile ``cowfs.formats.ext3._engine``, for setup.py."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from cffi import FFI

HERE = Path("cowfs/formats/ext3")  # relative to the root of the project, as setuptools wants sources
SOURCES = [
    "io",
    "cache",
    "operation",
    "journal",
    "commit",
    "replay",
    "redo_log",
    "redo",
    "redo_read",
    "alloc",
    "inode",
    "lazy_free",
    "data",
    "free_data",
    "dir",
    "htree",
    "xattr",
    "give_back",
    "host_space",
    "unsynced",
    "track",
    "nowait",
    "super",
    "open",
    "engine",
    "names",
    "sync",
]


CFLAGS = tuple(shlex.split(os.environ.get("COWFS_CFLAGS", "")))
"""More flags for the compiler: scripts/setup --test sets -Werror."""


def builder(here: Path = HERE, flags: tuple[str, ...] = ()) -> FFI:
    """Return the builder of the module from the sources in *here*. engine.h declares its interface."""
    declarations = (here / "engine.h").read_text()
    ffi = FFI()
    ffi.cdef(re.sub(r"^#(?!define).*$", "", declarations, flags=re.MULTILINE))
    ffi.set_source(
        "cowfs.formats.ext3._engine",
        '#include "engine.h"',
        sources=[str(here / f"{name}.c") for name in SOURCES],
        depends=sorted(map(str, here.glob("*.h"))),
        include_dirs=[str(here)],
        libraries=["ext2fs"],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", *CFLAGS, *flags],
        extra_link_args=list(flags),
    )
    return ffi
