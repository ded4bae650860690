"""An upper layer whose Nth call fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cowfs.layers.base import UpperLayer

ALLOCATES = frozenset(
    {"create", "mkdir", "symlink", "mknod", "link", "rename", "setxattr", "pwrite", "truncate", "copy_in"}
)
CALLS = ALLOCATES | {
    *("lookup", "stat", "readdir", "pieces", "names", "readlink", "listxattr", "getxattr", "open", "handle"),
    *(
        "unlink",
        "rmdir",
        "chmod",
        "chown",
        "utimens",
        "removexattr",
        "pread",
        "try_pread",
        "fsync",
        "open_directory",
    ),
}


@dataclass
class Fault:
    """The call that fails, and its error."""

    code: int
    at: int
    """The number of the failing call, from 1; 0 for none."""
    for_good: bool = False
    """Whether every later call fails too, like on a lost disk."""
    calls: frozenset[str] = CALLS
    armed: bool = False
    count: int = 0
    hit: list[str] = field(default_factory=list)

    def check(self, name: str) -> None:
        """Count a call; raise the error if it is the failing one."""
        if not self.armed or name not in self.calls:
            return
        self.count += 1
        if self.count == self.at or (self.for_good and 0 < self.at < self.count):
            self.hit.append(name)
            raise OSError(self.code, os.strerror(self.code), f"{name}, call {self.count}")


class Faulty:
    """A layer or file whose calls all go through a :class:`Fault`."""

    def __init__(self, inner: Any, fault: Fault) -> None:
        self._inner = inner
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in CALLS or not callable(value):
            return value
        return self._checked(name, value)

    def _checked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._fault.check(name)
            result = call(*args, **kwargs)
            if name == "open":
                return Faulty(result, self._fault)
            if name == "create":
                key, file = result
                return key, Faulty(file, self._fault)
            return result

        return checked

    def fileno(self) -> int:
        """Return -1, so that copies use calls that can fail here."""
        return -1 if hasattr(self._inner, "pwrite") else int(self._inner.fileno())


def faulty(fault: Fault) -> Callable[[UpperLayer], UpperLayer]:
    """What wraps an upper layer."""

    def wrap(layer: UpperLayer) -> UpperLayer:
        wrapped: Any = Faulty(layer, fault)
        return wrapped  # type: ignore[no-any-return]

    return wrap
