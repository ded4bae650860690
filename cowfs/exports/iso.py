"""Write a bootable ISO: a copy of another one with a new root image, made by xorriso.

The volume descriptor (ECMA-119, 8.4) is at sector 16, with the modification date at byte 830. Boot loaders
search for a disc by that date (GRUB calls it the UUID), so the copy keeps it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import subprocess
from contextlib import ExitStack
from typing import NamedTuple

from cowfs.errors import SystemFailure, UsageError
from cowfs.formats.squashfs.recognise import MAGIC
from cowfs.linux import programs
from cowfs.linux.files import open_ordinary

_SECTOR = 2048
_NO_SECTOR = 1 << 32
_DATE = 16 * _SECTOR + 830
_FILE = re.compile(r"File data lba: +\d+ , +(\d+) , +\d+ , +\d+ , (.*)")
_CHECKSUMS = ("sha512", "sha256", "sha1", "md5")
_HINT = "give the ISO of a live system, as FILE[:PATH]"
IMAGE = "image"


class Base(NamedTuple):
    """An ISO, and the path of the root image in it."""

    fd: int
    image: str
    """The path of the root image in the ISO."""
    files: frozenset[str]
    date: str
    """The modification date of the volume, in xorriso's format; empty if it has none."""


def open_base(where: str, stack: ExitStack) -> Base:
    """Open an ISO, ``FILE[:PATH]``, until *stack* is closed. PATH is optional if the ISO has one squashfs.

    UsageError if it is not such an ISO; SystemFailure without xorriso.
    """
    path, _, image = where.rpartition(":") if not os.path.exists(where) else (where, "", "")
    try:
        fd = open_ordinary(path or where, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"--base {where}: {error.strerror}", _HINT) from None
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise UsageError(f"--base {where}: not a file", _HINT)
    report = ["-indev", f"/proc/self/fd/{fd}", "-find", "/", "-type", "f", "-exec", "report_lba"]
    done = _run(report, [fd])
    if done.returncode or os.pread(fd, 5, 0x8001) != b"CD001":  # xorriso takes other files for blank discs
        raise UsageError(f"--base {where}: not an ISO image", _HINT)
    lines = done.stdout.decode(errors="surrogateescape").splitlines()
    named = [(_unquoted(match[2]), int(match[1])) for match in map(_FILE.fullmatch, lines) if match]
    found = {name: sector for name, sector in named if name.startswith("/") and sector < _NO_SECTOR}
    images = [name for name, sector in found.items() if os.pread(fd, 4, sector * _SECTOR) == MAGIC]
    if image:
        image = "/" + image.strip("/")
        if image not in found:
            raise UsageError(f"--base {where}: no such file in the ISO", "it has " + _list(images))
    elif not images:
        raise UsageError(f"--base {where}: has no squashfs image", "name the root image: FILE:PATH")
    elif len(images) > 1:
        raise UsageError(f"--base {where}: which file is the root image?", f"give FILE:PATH; {_list(images)}")
    date = os.pread(fd, 16, _DATE).decode("ascii", "replace")
    return Base(fd, image or images[0], frozenset(found), date if date.isdecimal() else "")


def write(fd: int, base: Base, scratch: int, made: int) -> None:
    """Write a copy of *base* to *fd*, with the file IMAGE in *scratch* as its root image. Blocks.

    Updates the checksum files beside the root image. *made*, the time of creation, is in seconds since the
    epoch. SystemFailure if xorriso fails.
    """
    changed = {base.image: IMAGE}
    for name in _CHECKSUMS:
        beside = f"{os.path.splitext(base.image)[0]}.{name}"
        if beside in base.files:
            changed[beside] = name
            text = f"{_digest(scratch, name)}  {os.path.basename(base.image)}\n"
            with open(_new(name, scratch), "wb") as file:
                file.write(os.fsencode(text))
    command = ["-abort_on", "FAILURE", "-indev", f"/proc/self/fd/{base.fd}"]
    command += ["-outdev", f"stdio:/proc/self/fd/{fd}", "-boot_image", "any", "replay"]
    for path, name in changed.items():
        os.chmod(name, 0o444, dir_fd=scratch)
        os.utime(name, (made, made), dir_fd=scratch)
        command += ["-rm", path, "--", "-map", f"/proc/self/fd/{scratch}/{name}", path]
        command += ["-chown", "0", path, "--", "-chgrp", "0", path, "--"]
        for time in ("b", "c"):
            command += ["-alter_date", time, f"={made}", path, "--"]
    if base.date:
        command += ["-volume_date", "uuid", base.date]
    done = _run([*command, "-commit"], [fd, base.fd, scratch], made)
    if done.returncode:
        raise SystemFailure(f"xorriso failed: {_reason(done.stderr)}")


def new_image(scratch: int) -> int:
    """Create the image that :func:`write` reads; return its descriptor, for writing."""
    return _new(IMAGE, scratch)


def _new(name: str, directory: int) -> int:
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)


def _run(command: list[str], fds: list[int], made: int = 0) -> subprocess.CompletedProcess[bytes]:
    program = programs.find("xorriso")
    if program is None:
        raise SystemFailure("xorriso is not installed", "apt install xorriso")
    environment = programs.environment() | {"SOURCE_DATE_EPOCH": str(made)}
    return subprocess.run(
        [program, "-no_rc", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        pass_fds=fds,
        env=environment,
    )


def _reason(said: bytes) -> str:
    lines = said.decode(errors="replace").splitlines()
    told = [line for line in lines if "FAILURE" in line or "FATAL" in line] or lines[-1:]
    return told[0].partition(" : ")[2].strip() or told[0] if told else "it gave no reason"


def _digest(scratch: int, name: str) -> str:
    with open(os.open(IMAGE, os.O_RDONLY | os.O_CLOEXEC, dir_fd=scratch), "rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _unquoted(word: str) -> str:
    try:
        return "".join(shlex.split(word))
    except ValueError:
        return word


def _list(names: list[str]) -> str:
    return ", ".join(names) or "no squashfs"
