"""Open the encrypted stores on a command line, and ask for their passphrases."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cowfs.cli.output import warn
from cowfs.errors import StoreError, SystemFailure, UsageError, printable
from cowfs.linux import programs

_NAMES = ("store", "what")
"""The arguments of subcommands that may be a store."""
_MAKE_STORES = {"create", "persist", "restore"}
_TAGS = ("LABEL=", "UUID=", "PARTLABEL=", "PARTUUID=")
_OPTION = "store="


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[None]:
    """Open the encrypted stores among the arguments, and replace each by its decrypted device. Blocks."""
    with ExitStack() as stack:
        if args.subcommand not in _MAKE_STORES:
            for name in _NAMES:
                value = getattr(args, name, None)
                if isinstance(value, str):
                    value = found(value)
                    if args.subcommand == "grow" and args.size is not None:
                        _extend(args, value)
                    setattr(args, name, _opened(value, args.key_file, stack))
            if any(_OPTION in given for given in _options(args)):
                _open_in_options(args, stack)
        yield


def _extend(args: argparse.Namespace, store: str) -> None:
    """Extend the file of an encrypted store to the requested size, which the filesystem in it will fill."""
    from cowfs.store.format.sizes import parse_size
    from cowfs.store.served import luks

    if not _may_be(store) or not os.path.isfile(store) or not luks.is_encrypted(store):
        return
    more = args.size.startswith("+")
    size = parse_size(args.size[more:]) + (os.path.getsize(store) if more else 0)
    luks.extend(store, size)
    args.size = None


def _options(args: argparse.Namespace) -> list[str]:
    options = getattr(args, "options", None)
    return options if isinstance(options, list) else []


def _open_in_options(args: argparse.Namespace, stack: ExitStack) -> None:
    from cowfs.cli.options import parse
    from cowfs.cli.remount import is_asked_for

    if is_asked_for(args.options):  # mount(8) repeats the options of fstab; the store is open
        return
    given = parse(args.options).values
    store = given.get("store", "")
    device = _opened(found(store), args.key_file or given.get("key_file"), stack)
    if device != store:
        args.options = [*args.options, f"{_OPTION}{device}"]


def _opened(store: str, key_file: str | None, stack: ExitStack) -> str:
    if store in {"", "memory"} or not _may_be(store):
        return store
    from cowfs.store.format.sniff import split_subdir
    from cowfs.store.served import luks

    image, name = split_subdir(store)
    if not luks.is_encrypted(image):
        return store

    def key(number: int) -> bytes | None:
        if key_file is not None:
            return read_key(key_file) if number == 0 else None
        if number:
            warn(f"{image}: wrong passphrase; try again")
        return ask(f"Passphrase for {image}: ", image)

    device = stack.enter_context(luks.opened(image, key))
    return os.path.join(device, name) if name else device


def found(store: str) -> str:
    """Return the device for LABEL=NAME or UUID=NAME, as in fstab(5), and any other name unchanged."""
    if not store.startswith(_TAGS) or os.path.lexists(store):
        return store
    import subprocess

    program = programs.find("findfs")
    if program is None:
        raise SystemFailure(f"{store}: findfs is not installed", "apt install util-linux")
    done = subprocess.run(
        [program, store],
        capture_output=True,
        check=False,
        env=programs.environment(),
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise StoreError(f"{store}: no such device", "blkid lists them")
    return os.fsdecode(done.stdout.rstrip(b"\n"))


def _may_be(store: str) -> bool:
    """Whether *store* may be examined. A mount may not, because its daemon may not answer."""
    from cowfs.client import find_mount

    return find_mount(store) is None


def new_key(path: str, key_file: str | None) -> bytes:
    """Return the passphrase for a new volume: from the file, or else typed twice."""
    if key_file is not None:
        return read_key(key_file)
    first = ask(f"New passphrase for {path}: ", path)
    if not first:
        raise UsageError("the passphrase is empty", "give one, or a key file: --key-file FILE")
    if ask("Repeat it: ", path) != first:
        raise UsageError("the passphrases differ", "try again")
    return first


def ask(prompt: str, path: str) -> bytes:
    """Ask for a passphrase on the terminal. UsageError if there is none. Blocks."""
    import getpass

    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        raise UsageError(
            f"{path}: is encrypted, and there is no terminal to ask for the passphrase",
            "give a key file: --key-file FILE (- is standard input), or -o key_file=FILE",
        ) from None
    try:
        return os.fsencode(getpass.getpass(printable(prompt)))
    except EOFError:
        raise UsageError(
            f"{path}: no passphrase was given", "give it, or a key file: --key-file FILE"
        ) from None


def read_key(path: str) -> bytes:
    """Return the content of a key file; - is standard input. StoreError, UsageError."""
    from cowfs.linux.files import open_ordinary
    from cowfs.store.served.luks import MOST_KEY

    try:
        if path == "-":
            key = sys.stdin.buffer.read(MOST_KEY + 1)
        else:
            with open(open_ordinary(path, os.O_RDONLY), "rb") as file:
                key = file.read(MOST_KEY + 1)
    except OSError as error:
        raise StoreError(f"{path}: the key file cannot be read: {error.strerror}") from None
    if not key or len(key) > MOST_KEY:
        raise UsageError(f"{path}: not a key file: {'empty' if not key else 'too large'}", "give another one")
    return key
