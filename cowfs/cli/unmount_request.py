"""Ask the daemon of a mount to write all changes, and wait for its report."""

from __future__ import annotations

import json
import os
import select

from cowfs.cli.output import warn
from cowfs.client import Silent, ask, owner_of
from cowfs.errors import CowfsError, MountFailure, StoreError


class UnmountRequest:
    """A pipe through which the daemon reports how it released the store, after it has closed its socket."""

    def __init__(self, dev: str, mountpoint: str, timeout: float, *, force: bool, lazy: bool = False) -> None:
        """Make the daemon write everything to disk.

        Blocks. With *lazy*, it gives up requests that hang. MountFailure if the disk refuses a write, unless
        *force*. Silent if it takes more than *timeout* seconds, unless *force* or *lazy*. A dead daemon, one
        of an older cowfs, and one of another user, which gets no pipe, report nothing.
        """
        self._mountpoint = mountpoint
        self._force = force
        self._answers = False
        self._answer = b""
        self._reading, writing = os.pipe()
        try:
            ours = owner_of(dev) == os.geteuid()
            for reply in ask(dev, "leave", timeout, writing if ours else -1, _go_on, force=force, lazy=lazy):
                if "unsaved" in reply:
                    raise _Refused(reply["unsaved"])
                self._answers = ours
        except Silent:
            if not (force or lazy):
                raise
        except (CowfsError, OSError):
            pass
        except _Refused as refused:
            raise MountFailure(
                f"{mountpoint}: not unmounted, because some changes could not be saved: {refused}",
                "fix the cause, such as a full disk, and unmount again; --force discards what is not saved",
            ) from None
        finally:
            os.close(writing)

    def has_answered(self) -> bool:
        """Whether the daemon has reported how the store was released. Does not block."""
        if not self._answer and select.select([self._reading], [], [], 0)[0]:
            self._answer = os.read(self._reading, 65536)
        return bool(self._answer)

    def finish(self) -> None:
        """Call it when the daemon has ended or reported.

        StoreError if something was not saved, unless *force*.
        """
        if not self._answers:
            return
        said = self._answer or os.read(self._reading, 65536)
        failure = json.loads(said).get("error") if said else "the daemon exited before everything was saved"
        if failure and self._force:
            warn(f"{self._mountpoint}: unmounted, but: {failure}")
        elif failure:
            raise StoreError(f"{self._mountpoint}: unmounted, but: {failure}")


class _Refused(Exception):
    pass


def _go_on(_: Silent) -> None:
    """Wait on for a daemon that seems to hang: it answered a moment ago."""
