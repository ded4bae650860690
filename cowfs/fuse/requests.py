"""Count requests by the kernel's names for them. The counters are in ``request_stats.c``."""

from __future__ import annotations

from typing import Any

from cowfs.fuse import libfuse

_NAMES = {
    1: "LOOKUP",
    2: "FORGET",
    3: "GETATTR",
    4: "SETATTR",
    5: "READLINK",
    6: "SYMLINK",
    8: "MKNOD",
    9: "MKDIR",
    10: "UNLINK",
    11: "RMDIR",
    12: "RENAME",
    13: "LINK",
    14: "OPEN",
    15: "READ",
    16: "WRITE",
    17: "STATFS",
    18: "RELEASE",
    20: "FSYNC",
    21: "SETXATTR",
    22: "GETXATTR",
    23: "LISTXATTR",
    24: "REMOVEXATTR",
    25: "FLUSH",
    26: "INIT",
    27: "OPENDIR",
    28: "READDIR",
    29: "RELEASEDIR",
    30: "FSYNCDIR",
    31: "GETLK",
    32: "SETLK",
    33: "SETLKW",
    34: "ACCESS",
    35: "CREATE",
    36: "INTERRUPT",
    37: "BMAP",
    38: "DESTROY",
    39: "IOCTL",
    40: "POLL",
    41: "NOTIFY_REPLY",
    42: "BATCH_FORGET",
    43: "FALLOCATE",
    44: "READDIRPLUS",
    45: "RENAME2",
    46: "LSEEK",
    47: "COPY_FILE_RANGE",
    50: "SYNCFS",
    51: "TMPFILE",
    52: "STATX",
    53: "COPY_FILE_RANGE_64",
}
"""enum fuse_opcode in linux/fuse.h."""


def _name(opcode: int) -> str:
    return _NAMES.get(opcode) or (f"OPCODE_{opcode}" if opcode else "OTHER")


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
