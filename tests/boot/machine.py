"""A virtual machine that boots a Debian kernel from disks that the test has made."""

from __future__ import annotations

import codecs
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

QEMU = "qemu-system-x86_64"
TIMEOUT = 400.0
"""Seconds for a whole run: many times what it takes on an idle machine (TCG, no KVM).

The time in which the machine waits for a processor does not count, so that other programs cannot end a run.
"""


class Failed(AssertionError):
    """The machine did not do what the test expects. The message has the path and the end of its log."""


class Machine:
    """A run of qemu, from power-on to power-off.

    *log* receives the output of the serial console. *test* is a shell script that the guest's process 1 runs
    (see images.py); :meth:`said` returns what it prints after ``TEST``. Without a *kernel*, the firmware
    boots from a disc.
    """

    def __init__(
        self,
        kernel: Path | None,
        initramfs: Path,
        log: Path,
        *,
        options: str = "",
        test: str = "",
        devices: Sequence[str] = (),
        memory: int = 512,
    ) -> None:
        self.log = log
        self._text = ""
        self._grown = threading.Condition()
        self._closed = False
        self._waited = 0
        self._monitor_path = log.with_suffix(".monitor")
        script = log.with_suffix(".sh")
        script.write_text(test)
        command = self._command(kernel, initramfs, script, options, devices, memory)
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            ["nice", "-n", "5", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _command(
        self,
        kernel: Path | None,
        initramfs: Path,
        script: Path,
        options: str,
        devices: Sequence[str],
        memory: int,
    ) -> list[str]:
        # On a busy machine without KVM the timer is late, and the kernel's check of it panics.
        line = f"console=ttyS0 quiet panic=1 no_timer_check {options}"
        loaded = ("-kernel", str(kernel), "-initrd", str(initramfs), "-append", line)
        return [
            *(QEMU, "-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"),
            *("-smp", "2", "-m", str(memory), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", *(loaded if kernel is not None else ("-boot", "d"))),
            *("-serial", "stdio", "-monitor", f"unix:{self._monitor_path},server=on,wait=off"),
            *("-fw_cfg", f"name=opt/test,file={script}"),
            *("-device", "qemu-xhci,id=usb", "-device", "virtio-scsi-pci,id=scsi"),
            *devices,
        ]

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None and hasattr(error, "add_note") and not isinstance(error, Failed):
            error.add_note(self._tail())

    def close(self) -> None:
        """Stop the machine if it runs, and remove its files."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self._monitor_path.unlink(missing_ok=True)

    def _read(self) -> None:
        assert self.process.stdout
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        with self.log.open("wb") as log:
            while data := os.read(self.process.stdout.fileno(), 65536):
                log.write(data)
                log.flush()
                with self._grown:
                    self._text += decode(data).replace("\r", "")
                    self._grown.notify_all()
        with self._grown:
            self._closed = True
            self._grown.notify_all()

    def _tail(self) -> str:
        lines = self._text.splitlines()[-40:]
        return f"--- the end of {self.log} ---\n" + "\n".join(lines)

    def _fail(self, why: str) -> Failed:
        return Failed(f"{why}\n{self._tail()}")

    @property
    def text(self) -> str:
        """Return the console output so far."""
        return self._text

    def wait_for(self, pattern: str, seconds: float = TIMEOUT) -> re.Match[str]:
        """Wait until the console shows *pattern*."""
        left = self._clock(seconds)
        with self._grown:
            while not (match := re.search(pattern, self._text)):
                if self._closed:
                    raise self._fail(f"the machine has stopped without {pattern!r}")
                if not self._grown.wait(min(left(), 5)) and left() <= 0:
                    raise self._fail(f"not within {seconds:g} s: {pattern!r}")
        return match

    def wait(self, seconds: float = TIMEOUT) -> Machine:
        """Wait until the machine is off; stop it if it does not power off."""
        left = self._clock(seconds)
        while self.process.poll() is None:
            if left() <= 0:
                self.close()
                raise self._fail(f"not off after {seconds:g} s")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(max(min(left(), 5), 0))
        self._reader.join()
        if "Kernel panic" in self._text:
            self.close()
            raise self._fail("the kernel panicked")
        return self

    def _clock(self, seconds: float) -> Callable[[], float]:
        """Return a function that tells how many of these seconds are left."""
        began, before = time.monotonic(), self._held_up()
        return lambda: seconds - (time.monotonic() - began) + (self._held_up() - before)

    def _held_up(self) -> float:
        """Return how long the thread that waited longest for a processor has done so (proc(5), schedstat)."""
        for thread in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                self._waited = max(self._waited, int(thread.read_text().split()[1]))
        return self._waited / 1e9

    def cut_power(self) -> None:
        """Stop it as a power cut does: the guest's memory is lost."""
        self.process.kill()
        self.process.wait()

    def type(self, line: str) -> None:
        """Type a line at the console."""
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def monitor(self, command: str) -> str:
        """Send a command to qemu's monitor; return its reply."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._monitor_path))
            connection.settimeout(20)
            told = b""
            while b"(qemu)" not in told:
                told += connection.recv(4096)
            connection.sendall(command.encode() + b"\n")
            told = b""
            while b"(qemu)" not in told:
                told += connection.recv(4096)
        assert b"rror" not in told, told.decode()
        return told.decode()

    def said(self, key: str) -> str:
        """Return the last value that the guest's test printed as ``TEST key: value``."""
        found = re.findall(rf"TEST {re.escape(key)}: (.*)$", self._text, re.MULTILINE)
        if not found:
            raise self._fail(f"the test in the machine did not say {key!r}")
        return str(found[-1])

    def shows(self, *patterns: str) -> None:
        """Fail unless the console shows each of the patterns."""
        for pattern in patterns:
            if not re.search(pattern, self._text):
                raise self._fail(f"the console does not show {pattern!r}")


def hard_disk(image: Path, name: str, *more: str) -> list[str]:
    """A fixed disk (virtio-blk)."""
    return [*_drive(image, name, *more), "-device", f"virtio-blk-pci,drive={name}"]


def stick(image: Path, name: str, *more: str, plugged: bool = True) -> list[str]:
    """A USB stick. If not *plugged*, :func:`plug` plugs it in later. *more* is ``readonly=on`` to lock it."""
    return [*_drive(image, name, *more), *(["-device", _usb(name)] if plugged else [])]


def plug(machine: Machine, name: str) -> None:
    """Plug a stick in."""
    machine.monitor(f"device_add {_usb(name)}")


def unplug(machine: Machine, name: str) -> None:
    """Pull a stick out."""
    machine.monitor(f"device_del {name}")


def _usb(name: str) -> str:
    return f"usb-storage,bus=usb.0,removable=on,id={name},drive={name}"


def nvme(image: Path, name: str) -> list[str]:
    """An NVMe disk."""
    return [*_drive(image, name), "-device", f"nvme,serial={name},drive={name}"]


def sd_card(image: Path, name: str) -> list[str]:
    """A card in a built-in reader. Its size must be a power of two."""
    drive = _drive(image, name, cache="writeback")  # writing through block by block takes a minute
    return [*drive, "-device", "sdhci-pci", "-device", f"sd-card,drive={name}"]


def sata(image: Path, name: str) -> list[str]:
    """A hard disk at the AHCI controller."""
    return [*_drive(image, name), "-device", f"ide-hd,bus=ide.0,drive={name}"]


def scsi_disk(image: Path, name: str) -> list[str]:
    """A hard disk at the SCSI controller (virtio)."""
    return [*_drive(image, name), "-device", f"scsi-hd,bus=scsi.0,drive={name}"]


def disc(image: Path, name: str) -> list[str]:
    """A CD in a SCSI drive."""
    return [*_drive(image, name, "media=cdrom", "readonly=on"), "-device", f"scsi-cd,bus=scsi.0,drive={name}"]


def empty_drive(name: str) -> list[str]:
    """An empty SCSI CD drive; :func:`put_in` inserts a disc."""
    drive = f"if=none,id={name},media=cdrom,readonly=on"
    return ["-drive", drive, "-device", f"scsi-cd,bus=scsi.0,id={name},drive={name}"]


def put_in(machine: Machine, name: str, image: Path) -> None:
    """Insert a disc into a drive."""
    machine.monitor(f"change {name} {image} raw")


def _drive(image: Path, name: str, *more: str, cache: str = "writethrough") -> list[str]:
    # Data that the guest has flushed is on disk; other data may be lost.
    options = ["if=none", f"id={name}", "format=raw", f"cache={cache}", f"file={image}", *more]
    return ["-drive", ",".join(options)]
