"""Count requests by the kernel's names for them. The counters are in ``request_stats.c``."""

from __future__ import annotations

from typing import Any

from cowfs.fuse import libfuse
from cowfs.fuse.protocol import Opcode

_KNOWN = frozenset(Opcode)


def _name(opcode: int) -> str:
    if opcode in _KNOWN:
        return Opcode(opcode).name
    return f"OPCODE_{opcode}" if opcode else "OTHER"


def counted() -> dict[str, Any]:
    """Return the counts since the mount, for ``cowfs info``.

    If they are not available, ``requests`` is None, and ``no_requests`` says why.
    """
    found = libfuse.counted()
    if isinstance(found, str):
        return {"requests": None, "no_requests": found}
    operations = {
        _name(opcode): {"count": count, "errors": errors, "total_ns": ns, "durations_ns": ranges}
        for opcode, count, errors, ns, ranges in found.operations
    }
    under_way = [{"operation": _name(opcode), "ns": ns} for opcode, ns in found.under_way]
    return {
        "requests": {
            "operations": operations,
            "under_way": under_way,
            "direct_reads": found.direct_reads,
        }
    }
