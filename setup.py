"""The parts in C; all else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from glob import glob

from setuptools import Extension, setup


def says(*command: str, text: str = "") -> str | None:
    """Return what a command prints; None when it fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return None if done.returncode else done.stdout


def has_header(name: str) -> bool:
    """Whether the compiler finds a header."""
    if not shutil.which(compiler[0]):
        return True  # the missing compiler is reported
    flags = [
        f"-I{sysconfig.get_path('include')}",
        *shlex.split(says("pkg-config", "--cflags", "fuse3") or ""),
    ]
    text = f"#if !__has_include(<{name}>)\n#error\n#endif\n"
    return says(*compiler, *flags, "-E", "-xc", "-", text=text) is not None


def what_is_missing() -> Iterator[tuple[str, str]]:
    """Yield what it takes to compile and is not there, and what of Debian's has it."""
    if not shutil.which(compiler[0]):
        yield f"a C compiler ({compiler[0]})", "gcc libc6-dev"
    elif not has_header("stdio.h"):
        yield "the headers of the C library", "libc6-dev"
    else:
        if not has_header("Python.h"):
            yield "the headers of Python", "python3-dev"
        if not has_header("ext2fs/ext2fs.h"):
            yield "the headers of libext2fs", "libext2fs-dev"
    if not shutil.which("pkg-config"):
        yield "pkg-config", "pkg-config libfuse3-dev"
    elif says("pkg-config", "--exists", "fuse3 >= 3.14") is None or not has_header("fuse3/fuse_lowlevel.h"):
        yield "libfuse 3.14 or later with its headers", "libfuse3-dev"
    elif says("pkg-config", "--exists", "liburing >= 2.3") is None or not has_header("liburing.h"):
        yield "liburing 2.3 or later with its headers", "liburing-dev"


compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
missing = list(what_is_missing())
if missing:
    names = ", ".join(what for what, _ in missing)
    packages = " ".join(package for _, package in missing)
    sys.exit(f"cowfs cannot be compiled without {names} (Debian: apt-get install {packages})")

# An interpreter that was linked with an rpath hands it on to what it links: a directory of the machine
# that built it, where libraries would be looked for first wherever ours is installed.
settings = sysconfig.get_config_vars()
for name in ("LDSHARED", "LDCXXSHARED"):
    words = shlex.split(str(settings.get(name) or ""))
    settings[name] = shlex.join(word for word in words if not word.startswith("-Wl,-rpath"))

setup(
    ext_modules=[
        Extension(
            "cowfs.fuse._libfuse",
            sorted(glob("cowfs/fuse/*.c")),
            depends=sorted(glob("cowfs/fuse/*.h")),
            extra_compile_args=[
                "-D_FILE_OFFSET_BITS=64",
                "-Wall",
                "-Wextra",
                *shlex.split(os.environ.get("COWFS_CFLAGS", "")),
                *shlex.split(says("pkg-config", "--cflags", "fuse3") or ""),
            ],
            extra_link_args=shlex.split(says("pkg-config", "--libs", "fuse3", "liburing") or ""),
        )
    ],
    cffi_modules=["cowfs/formats/ext3/build_engine.py:builder"],
)
