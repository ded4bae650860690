"""Injected faults, requested with ``-o fault=``, or by programs while it is mounted."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cowfs.changes.select import pattern
from cowfs.errors import UsageError
from cowfs.fuse import faulty
from cowfs.fuse.adapter import Adapter
from cowfs.store.served.crash import must_be_possible, rehearse
from cowfs.store.served.store import Store

NONE = "none"
"""Instead of a fault: there are none yet."""
OPERATIONS = frozenset(faulty.OPERATIONS.values()) | frozenset(faulty.OTHERS)
_HINT = "PATTERN:OPERATION:EFFECT[:AFTER=N][:TIMES=N], as in *.conf:write:ENOSPC:AFTER=3"


@dataclass(slots=True)
class Fault:
    """A requested fault."""

    path: re.Pattern[bytes]
    operation: str
    """``*``: any."""
    code: int = 0
    delay: float = 0.0
    """Seconds."""
    crashes: bool = False
    after: int = 0
    """How many of these requests succeed first."""
    times: int | None = None
    """How many fail after that; None: all."""
    met: int = 0


def parse(text: str) -> Fault:
    """Return the fault that PATTERN:OPERATION:EFFECT[:AFTER=N][:TIMES=N] means. UsageError."""
    words = re.split(r"(?<!\\):", text)
    if len(words) < 3:
        raise UsageError(f"fault={text}: not a fault", _HINT)
    name, operation, effect, *rest = words
    if operation != "*" and operation not in OPERATIONS:
        known = ", ".join(sorted(OPERATIONS))
        raise UsageError(f"fault={text}: unknown operation {operation!r}", f"give * or one of {known}")
    fault = Fault(pattern(os.fsencode(name.replace("\\:", ":")) if name != "*" else b""), operation)
    if effect == "CRASH":
        fault.crashes = True
    elif found := re.fullmatch(r"DELAY=(\d{1,6}(?:\.\d{1,6})?)", effect):
        fault.delay = float(found[1])
    else:
        code = getattr(errno, effect, None) if effect.startswith("E") else None
        if not isinstance(code, int):
            hint = "give an errno (ENOSPC, EIO …), DELAY=SECONDS or CRASH"
            raise UsageError(f"fault={text}: unknown effect {effect!r}", hint)
        if code == errno.ENOSYS:  # the kernel would never send such a request again
            raise UsageError(f"fault={text}: ENOSYS would last until the unmount", "give EOPNOTSUPP")
        fault.code = code
    for word in rest:
        counted = re.fullmatch(r"(AFTER|TIMES)=(\d{1,12})", word)
        if counted is None:
            raise UsageError(f"fault={text}: {word!r} is neither AFTER=N nor TIMES=N", _HINT)
        if counted[1] == "AFTER":
            fault.after = int(counted[2])
        else:
            fault.times = int(counted[2])
    return fault


def parse_all(texts: Sequence[str]) -> list[Fault]:
    """Return the faults of several options."""
    return [parse(text) for text in texts if text != NONE]


def may_crash(texts: Sequence[str]) -> bool:
    """Whether a crash is requested, or may be requested while it is mounted."""
    return NONE in texts or any(fault.crashes for fault in parse_all(texts))


class Faults:
    """The faults of a mount."""

    def __init__(self, texts: Sequence[str], store: Store) -> None:
        self._store = store
        self._may_crash = may_crash(texts) and store.kind != "directory"
        self._faults = parse_all(texts)

    def replace(self, texts: Sequence[str]) -> None:
        """Replace all faults by these. UsageError."""
        faults = parse_all(texts)
        if any(fault.crashes for fault in faults):
            self._must_know_crashes()
        self._faults = faults

    def meet(self, operation: str, paths: Collection[bytes]) -> tuple[int, float]:
        """See :class:`cowfs.fuse.faulty.Faults`."""
        delay = 0.0
        for fault in self._faults:
            if fault.operation not in {"*", operation} or not any(map(fault.path.match, paths)):
                continue
            fault.met += 1
            if fault.met <= fault.after or (
                fault.times is not None and fault.met > fault.after + fault.times
            ):
                continue
            if fault.crashes:
                self.crash()
            if fault.code:
                return fault.code, 0.0
            delay += fault.delay
        return 0, delay

    def synced(self) -> None:
        """Keep the current state of the store in a later crash."""
        if self._may_crash:
            rehearse(self._store)

    def crash(self) -> None:
        """Exit as in a power cut: unsynced changes are lost. Does not return. UsageError if not possible."""
        self._must_know_crashes()
        os.kill(os.getpid(), signal.SIGKILL)

    def _must_know_crashes(self) -> None:
        if self._store.kind == "directory":
            must_be_possible(self._store.path)
        if not self._may_crash:
            raise UsageError("a crash must be prepared for at the mount", "mount it with -o fault=none")


def install(texts: Sequence[str], store: Store, adapter: Adapter) -> Faults | None:
    """Inject the requested faults into requests; None if none are requested."""
    if not texts:
        return None
    faults = Faults(texts, store)
    faulty.install(adapter, faults)
    return faults
