#!/usr/bin/env python3
"""Type the commands of the documents on a system where cowfs is installed, as a newcomer does. Needs root.

It prints each command, and how its answer differs from the document's: sizes and dates are the machine's.
It fails if a command fails that the document does not show failing.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.guides import AS_NOBODY, ROOT, Command, run, section

_TREE = "root/etc/apt root/etc/cron.daily root/usr/doc/bash root/data root/var/www"
_FILES = "resolv.conf hostname motd services conf apt/list"
_LOWER = (
    f"mkdir -p {_TREE}; for name in {_FILES}; do echo 1 >root/etc/$name; done; "
    "echo x >root/data/old; echo x >root/usr/doc/bash/README"
)
_IMAGE = f"{_LOWER}; mksquashfs root sysrcd.dat -quiet -no-progress"

PATIENCE = 1800.0
_MOUNT = "cowfs mount root.sqsh merged"
_NOT_HERE = ("echo Y", "cowfs top", "dpkg", "file:")
"""The machine's parameter, what runs until Ctrl-C, a package that is not here, and an answer of getfattr."""
_TAKING = (
    "cowfs export sysrcd.bs --to squashfs", "cowfs export /mnt --to tar --whiteouts",
    "cowfs export /mnt --to rsync",
    "cowfs apply sysrcd.bs /srv/root-copy --dry", "cowfs apply sysrcd.bs /srv/root-copy --backup",
    "cowfs apply --undo", "cowfs export STORE --to overlayfs", "cowfs export STORE --to patch",
    "cowfs rebase", "cowfs mount changes.srm",
)  # fmt: skip


class Typed(NamedTuple):
    """Commands of a document, and what has to be there before the first."""

    document: str
    prepare: str
    commands: list[Command]


def _from(document: str, first: str, last: str, prepare: str) -> Typed:
    """The commands of a document from one to another."""
    wanted = [command for command in section(document, first, last) if not command.line.startswith(_NOT_HERE)]
    return Typed(document, prepare, wanted)


def _lines(document: str, prepare: str, *beginnings: str) -> Typed:
    """The commands without a prompt that begin so, as root, with the store that they are about."""
    lines = [line.strip() for line in (ROOT / document).read_text().splitlines() if line.startswith("    ")]
    wanted = [line.replace("STORE", "sysrcd.bs") for line in lines if line.startswith(beginnings)]
    return Typed(document, prepare, [Command(line, is_root=True) for line in wanted])


def _file(document: str, name: str) -> str:
    """A shell command by which nobody writes a file as a document shows it."""
    text = "\n".join(section(document, f"cat {name}", f"cat {name}")[0].answer)
    return f"{AS_NOBODY} sh -c {shlex.quote(f'printf %s {shlex.quote(text)} >{name}')}"


def everything() -> list[Typed]:
    """Everything that a bare system can do."""
    srv, mnt, media = (f"mount -t tmpfs -o mode=755 t /{name}" for name in ("srv", "mnt", "media"))
    quick, readme, rescue = "docs/quickstart.md", "README.md", "docs/rescue-system.md"
    users, taking = "docs/unprivileged-testing.md", "docs/taking-changes-elsewhere.md"
    alive = f"{mnt}; mkdir /mnt/merged; {srv}; cd /srv; {_IMAGE}"
    of_nobody = f"{srv}; cd /srv; {_LOWER}; mkdir merged; chown -R 65534:65534 ."
    inserted = (
        f"{srv}; {mnt}; {media}; cd /srv; mkdir -p /media/stick /media/cdrom /mnt/system; {_IMAGE}; "
        "mv sysrcd.dat /media/cdrom; echo 2 >root/etc/motd; "
        "mksquashfs root /media/cdrom/sysrcd-new.dat -quiet -no-progress"
    )
    used = (
        "cowfs create /media/stick/sysrcd.bs 64; "
        "cowfs mount /media/cdrom/sysrcd.dat /mnt/system --store /media/stick/sysrcd.bs; "
        "cp /media/stick/sysrcd.bs copy.bs; cowfs umount /mnt/system"
    )
    changed = (
        f"{srv}; {mnt}; cd /srv; {_IMAGE}; cowfs create sysrcd.bs 64; cp -a root root-copy; cp -a root COPY; "
        "cp sysrcd.dat old.sfs; cowfs mount old.sfs /mnt --store sysrcd.bs; rm /mnt/data/old; "
        "echo 2 >/mnt/etc/conf; cowfs umount /mnt; echo 3 >root/etc/motd; "
        "mksquashfs root new.sfs -quiet -no-progress"
    )
    image = f"{AS_NOBODY} mksquashfs root root.sqsh -quiet -no-progress"
    by_root = "mksquashfs root root.sqsh -quiet -no-progress"
    return [
        _from(
            quick, "mksquashfs /etc", "umount kernel", f"{srv}; cd /srv; {_LOWER}; mount --bind root/etc /etc"
        ),
        _from(
            quick, "mkdir -p root/etc", f"{_MOUNT} --store changes.bs", f"{srv}; cd /srv; chown 65534:65534 ."
        ),
        _from(readme, "cowfs create", "cowfs check", alive),
        _from(readme, "cowfs persist", "cowfs persist", f"{alive}; cowfs mount sysrcd.dat /mnt/merged"),
        _from(rescue, "sysresccd-backstore create", "umount /mnt/system", inserted),
        _from(rescue, "cowfs mount /media/cdrom/sysrcd.dat", "cowfs rebase", f"{inserted}; {used}"),
        _from(users, f"{_MOUNT} --store changes", "getfattr", f"{of_nobody}; {image}"),
        _from(users, "cowfs mount /etc merged", "echo x", of_nobody),
        _from(users, "cowfs mount /var merged", "cowfs umount", of_nobody),
        _from(users, by_root, "cowfs run", f"{of_nobody}; tar -cf packages.tar root"),
        _from(users, f"{by_root} -all-root", "unshare", f"{of_nobody}; {_file(users, 'install.sh')}"),
        _lines(taking, changed, *_TAKING),
    ]


def main() -> int:
    """Run all; return 1 if a command did not end as its document says."""
    bad = 0
    for part in everything():
        print(f"== {part.document}", flush=True)
        quiet = f"{{ {part.prepare}; }} >/dev/null 2>&1"
        for command, (status, said) in zip(part.commands, run(quiet, part.commands, PATIENCE), strict=True):
            wrong = (status != 0) != command.fails
            bad += wrong
            print("FAILS " if wrong else "      ", "#" if command.is_root else "$", command.line, flush=True)
            if wrong or not command.is_answered_by(said):
                print(*(f"        says:     {line}" for line in said[:9]), sep="\n")
                print(*(f"        document: {line}" for line in command.answer[:9]), sep="\n", flush=True)
    print(f"commands that do not end as their document says: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
