"""``cowfs create``: create a store."""

from __future__ import annotations

import argparse

from cowfs.cli import options
from cowfs.cli.output import counted, note, progress_line, shares
from cowfs.errors import UsageError
from cowfs.linux.files import is_device

NAME = "create"

DESCRIPTION = """\
Create a store: a file that holds an ext3 filesystem, in which the changes made through a mount are kept.
STORE must not exist. All SIZE MiB are allocated now, so that the disk cannot run out of space for the store
later. Root is not needed. If the command fails or is interrupted, it leaves nothing behind.
STORE may also be an empty block device, which the store then takes as a whole.
"""
EPILOG = """\
SIZE is in MiB unless it has a unit: 256, 256M and 262144K are the same; 2G is 2048. The minimum is 16;
on FAT filesystems the maximum is 4095.

examples:
  cowfs create sysrcd.bs 512                        create a 512 MiB store
  cowfs mount root.squashfs /mnt --store sysrcd.bs  use it
  cowfs create --luks secret.bs 512                 create an encrypted store
  cowfs create /dev/sdb2                            create a store on a partition

Exit codes: 0 success; 1 usage error; 2 a program is missing; 32 the store could not be created.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("store", metavar="STORE", help="the file to create, such as sysrcd.bs")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", help="its size in MiB, or with a unit: 512M, 2G; not for a device"
    )
    parser.add_argument(
        "--luks", action="store_true", help="encrypt it with LUKS, which asks for a passphrase (root only)"
    )


def run(args: argparse.Namespace) -> int:
    """Create the store."""
    from cowfs.client import require_answers
    from cowfs.store.format.sizes import format_size, parse_size
    from cowfs.store.offline.create import create_on_device, create_store

    options.must_have_name(args.store)
    options.must_precede(NAME, args.store, args.size)
    require_answers([args.store])
    on_device = is_device(args.store)
    if args.size is None and not on_device:
        raise UsageError(f"{args.store}: no size given", "512 or 512M is 512 MiB")
    if args.size is not None and on_device:
        raise UsageError(f"{args.store}: is a device, which has its own size", "leave the size out")
    key = _key(args) if args.luks else None
    with progress_line() as show:
        if on_device:
            size = create_on_device(args.store, key=key, share=shares(show))
        else:
            size = parse_size(args.size)
            create_store(args.store, size, key=key, share=shares(show), tick=counted(show, size))
    if key is not None:
        note(f"{args.store}: created an empty encrypted store in {format_size(size)}")
    else:
        note(f"{args.store}: created an empty {format_size(size)} store")
    return 0


def _key(args: argparse.Namespace) -> bytes:
    from cowfs.cli.encrypted import new_key
    from cowfs.store.served.luks import must_be_possible

    must_be_possible(args.store)
    return new_key(args.store, args.key_file)
