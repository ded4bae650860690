"""Load the daemon's program files before its mount may hide them.

A daemon that asks its own mount for a file hangs. A union on /usr covers Python, its modules, the sources
that a traceback shows, and e2fsprogs; other systems have them elsewhere. So everything is loaded before the
mount, and programs that the daemon starts do not see the mount.
"""

from __future__ import annotations

import ctypes
import importlib
import linecache
import logging
import pkgutil
import sys
import time
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any

import cowfs
from cowfs.store.e2fsprogs import tools

_NOT_OURS = ("cowfs.browse", "cowfs.cli", "cowfs.formats.ext3.build_engine", "cowfs.pytest_plugin")
"""Modules that no daemon needs. Loading textual and pytest would double the time of a mount."""
_OTHERS = (
    "encodings.idna",
    "encodings.ascii",
    "encodings.latin_1",
    "concurrent.futures.thread",
    "unicodedata",
)
"""Modules that the standard library and trio import on first use."""
_LIBRARIES = ("libgcc_s.so.1", "libseccomp.so.2")
"""Libraries that are loaded by name later: pthread_exit(3) loads the first."""


def forbid_lookups(mountpoint: str) -> None:
    """From now on, look up no program file by name, because this process is about to mount over them."""
    load_all()
    _show_no_sources()
    tools.hide(mountpoint)


@cache
def load_all() -> None:
    """Load every module and library that a daemon may need. A second call does nothing."""
    for module in pkgutil.walk_packages(cowfs.__path__, "cowfs."):
        if not module.name.startswith(_NOT_OURS):
            with suppress(ImportError):  # if the engine was not built, its first use reports it
                importlib.import_module(module.name)
    for name in _OTHERS:
        with suppress(ImportError):
            importlib.import_module(name)
    for library in _LIBRARIES:
        with suppress(OSError):
            ctypes.CDLL(library)
    time.localtime()  # reads the time zone
    linecache.cache.clear()  # sources that attrs keeps for debuggers: nobody will read them
    assert cowfs.__version__, "looks among the packages that are installed"


def _show_no_sources() -> None:
    """Write tracebacks without source lines, so that no source file is read."""

    def none(filename: str, module_globals: dict[str, Any] | None = None) -> list[str]:
        del filename, module_globals
        return []

    linecache.getlines = none
    linecache.cache.clear()
    sys.excepthook = _say
    sys.unraisablehook = lambda failure: _say(failure.exc_type, failure.exc_value, failure.exc_traceback)


def _say(kind: type[BaseException], failure: BaseException | None, where: TracebackType | None) -> None:
    logging.getLogger("cowfs").error("unhandled exception", exc_info=(kind, failure, where))  # type: ignore[arg-type]
