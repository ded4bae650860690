"""``cowfs export``: write the changes in another format."""

from __future__ import annotations

import argparse
import os

from cowfs.cli import options
from cowfs.cli.output import Tally, progress_line, warn
from cowfs.errors import UsageError

EXIT_PARTIAL = 64

DESCRIPTION = """\
Write the changes, or with --merged the whole tree, to FILE in a format that other programs read.
At the end FILE is complete, or does not exist.
"""
EPILOG = """\
FORMAT is one of
  squashfs   a module to stack on the same root (.srm, .sb, .sfs), or the whole root as a new image
  tar        an archive with extended attributes (pax); gnutar: without them, for old programs
  oci        a directory: a container image, of the changes on --base or alone
  overlayfs  a directory: an upperdir for the kernel's overlayfs
  iso        a live ISO (--base) whose root image is replaced by the whole tree
  patch      a patch for git apply, with binary files
  rsync      a list for rsync --from0 --files-from
  restic     a list for restic backup --files-from-raw

A deleted file is written as a whiteout: a device 0:0 (overlayfs), a file .wh.NAME (aufs, oci), or for tar
a name in FILE.deleted (list), where each ends with a NUL. A renamed directory comes with all its contents.
FILE can be - (standard output), except for squashfs and directories.

Two exports of the same store are identical. If SOURCE_DATE_EPOCH is set, no time in FILE is later than that.

examples:
  cowfs export sysrcd.bs --to squashfs changes.srm
  cowfs export /mnt --to squashfs --whiteouts aufs changes.sb
  cowfs export sysrcd.bs --merged --to squashfs --compression xz new-root.sfs
  cowfs export /mnt --to tar --whiteouts list c.tar
  cd ROOT && xargs -0a ../c.tar.deleted rm -rf -- && tar --acls --xattrs --xattrs-include='*' -xpf ../c.tar
  cowfs export /mnt --to oci --base debian:12 image; skopeo copy oci:image containers-storage:mine
  cowfs export sysrcd.bs --to iso --base systemrescue.iso --compression xz my-rescue.iso
  cowfs export /mnt --to rsync list
  rsync -aHAXS --from0 --files-from=list --delete-missing-args --force /mnt/ COPY-OF-THE-ROOT/

Exit codes: 0 FILE is complete; 64 FILE is complete, but its format cannot hold some of the changes, which
standard error lists; 1 usage error; 2 it could not be written; 32 the store or the lower cannot be used.
Times rounded to seconds are reported, but are not an error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", metavar="STORE|MOUNTPOINT")
    parser.add_argument("file", metavar="FILE", help="the file to create; a directory for oci, overlayfs")
    parser.add_argument("--to", metavar="FORMAT", required=True, help="the format, see below")
    parser.add_argument("--merged", action="store_true", help="write the whole tree, not only the changes")
    parser.add_argument(
        "--whiteouts",
        metavar="STYLE",
        default="",
        help="format of whiteouts: overlayfs, aufs, oci, list",
    )
    parser.add_argument(
        "--base",
        metavar="FILE[:NAME]",
        default="",
        help="with oci: the OCI layout to put the layer on; with iso: the ISO to change",
    )
    parser.add_argument("--tag", default="latest", help="with oci: name of the image (latest)")
    parser.add_argument("--compression", default="gzip", help="with squashfs, iso: gzip, xz, zstd, lz4, lzo")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")
    options.add_trust(parser, "with overlayfs: make")
    options.add_opening(parser)


def run(args: argparse.Namespace) -> int:
    """Write the export, and report what the format cannot hold."""
    from cowfs.api import How, export
    from cowfs.exports.squashfs import COMPRESSIONS
    from cowfs.linux.limits import take_all_descriptors
    from cowfs.store.e2fsprogs.signals import cleaned_up

    if args.compression not in COMPRESSIONS:
        raise UsageError(f"--compression {args.compression}: unknown", "known: " + ", ".join(COMPRESSIONS))
    how = How(
        args.to, args.merged, args.whiteouts, args.base, args.tag, args.compression, args.force, _latest()
    )
    lowers = options.lowers_to_open(args)
    take_all_descriptors()  # each directory on the way to a path uses one
    with cleaned_up(), progress_line() as progress:
        tally = Tally(progress, "paths")

        def tick(_: bytes, length: int) -> None:
            tally.add(not length, length)

        losses = export(
            args.what, args.file, how, lowers, trust=args.trust, tell=warn, tick=tick, expect=tally.expect
        )
    for line in losses:
        warn(f"{args.file}: {line}")
    return EXIT_PARTIAL if losses.is_partial else 0


def _latest() -> int | None:
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UsageError(f"SOURCE_DATE_EPOCH={text}: not a number of seconds", "unset it")
    return int(text)
