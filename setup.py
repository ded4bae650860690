"""The parts in C; all else is in pyproject.toml."""

import shlex
import subprocess

from setuptools import Extension, setup


def pkg_config(*arguments: str) -> list[str]:
    """Return what pkg-config says of a library."""
    return shlex.split(
        subprocess.run(["pkg-config", *arguments], check=True, capture_output=True, text=True).stdout
    )


setup(
    ext_modules=[
        Extension(
            "cowfs.fuse._libfuse",
            ["cowfs/fuse/_libfuse.c"],
            extra_compile_args=["-D_FILE_OFFSET_BITS=64", *pkg_config("--cflags", "fuse3")],
            extra_link_args=pkg_config("--libs", "fuse3"),
        )
    ],
    cffi_modules=["cowfs/formats/ext3/build_engine.py:builder"],
)
