"""What can go wrong, as exceptions that carry the process's exit code.

::

    CowfsError                 something the user can be told in one line
    ├── UsageError             the command line is wrong                     exit 1
    ├── SystemFailure          a system resource is missing or refused       exit 2
    ├── InternalError          a bug in cowfs                                exit 4
    └── MountFailure           the mount, the image or the store is refused  exit 32
        ├── LayerError         a lower layer cannot be used
        ├── StoreError         a store cannot be used
        │   └── StoreBusy      somebody else uses the store
        └── WrongLower         the store belongs to another lower

The codes are those of mount(8). Below the command line the core itself raises only :class:`OSError`
with an errno: that is what a filesystem answers with.
"""

from __future__ import annotations

import os

EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_INTERNAL = 4
EXIT_MOUNT = 32


_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str) -> str:
    """Return *text* on one line, without characters that control a terminal.

    Names and headers come from images, stores and servers that others made. What Python calls not printable
    (control and formatting characters, bytes that are not UTF-8) becomes an escape as in a string literal.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8 (os.fsdecode)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return _SHORT.get(character) or character.encode("unicode_escape", "surrogatepass").decode()


def os_error(code: int, *names: object) -> OSError:
    """Return an OSError with this errno, and the text for it."""
    return OSError(code, os.strerror(code), *names)


class NoRoom(OSError):
    """ENOSPC or the like."""

    written = 0
    """How many bytes of a write had room, and have been written …"""
    answer = 0
    """… and what write(2) returns then; 0: the error."""


class NotYetFree(NoRoom):
    """ENOSPC for a caller that must not wait for the disk: freed blocks can be used after the next commit."""


class CowfsError(Exception):
    """A failure that one line explains: ``what: why`` and, as *hint*, what to do about it."""

    exit_code = EXIT_MOUNT

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return printable(f"{self.message} ({self.hint})" if self.hint else self.message)


class UsageError(CowfsError):
    """The command line, or an option of it, is wrong."""

    exit_code = EXIT_USAGE


class SystemFailure(CowfsError):
    """The system lacks or refuses something: a device, a program, memory, a privilege."""

    exit_code = EXIT_SYSTEM


class InternalError(CowfsError):
    """cowfs itself is wrong."""

    exit_code = EXIT_INTERNAL


class MountFailure(CowfsError):
    """The mount was refused."""


class LayerError(MountFailure):
    """A lower layer is missing, damaged, foreign or unreadable."""


class StoreError(MountFailure):
    """A store is missing, damaged, foreign or not writable."""


class StoreBusy(StoreError):
    """A store is in use by somebody else."""


class WrongLower(MountFailure):
    """The store was made for another lower layer than the one given."""
