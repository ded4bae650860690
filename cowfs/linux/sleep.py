"""Notice that the machine has slept (suspend, hibernation), and reopen disks afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress

from cowfs.linux import helper_process

_COUNT = "/sys/power/suspend_stats/success"


class Disks:
    """The disks that hold some files. After the machine has slept, they are opened before they are read.

    A USB stick that lost its power reports so to the first request. If that is a read-ahead, which the kernel
    does not retry, the kernel considers the removable disk changed (scsi_io_completion_action() in
    drivers/scsi/scsi_lib.c). All reads and writes then fail until some process opens the disk.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.devices = sorted({device for path in paths if (device := disk_of(path))})
        try:
            self._count = os.open(_COUNT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._count = -1
        self._slept = _slept(self._count)

    def reopen_after_sleep(self) -> None:
        """Open the disks if the machine has slept since the last call. Takes a few us if it has not."""
        slept = _slept(self._count)
        if slept == self._slept:
            return
        self._slept = slept
        elsewhere = helper_process.current()
        if elsewhere is not None:
            with suppress(OSError):
                elsewhere.ask("wake")
            return
        for device in self.devices:
            with suppress(OSError):  # users have no permission; and the disk may be unplugged
                os.close(os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def disk_of(path: str) -> str:
    """Return the device of the disk that a file is on; "" if it is on none, or on several."""
    try:
        number = os.stat(path).st_dev
        place = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}", strict=True)
    except OSError:
        return ""
    if os.path.exists(f"{place}/partition"):
        place = os.path.dirname(place)
    return "/dev/" + os.path.basename(place).replace("!", "/")


def _slept(count: int) -> tuple[bytes, int]:
    """Return values that change with each sleep: the kernel's count of suspends, and the seconds slept.

    A short sleep may add 0 seconds, and the kernel does not count a hibernation.
    """
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return os.pread(count, 32, 0) if count >= 0 else b"", round(seconds)
