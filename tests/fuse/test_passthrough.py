"""If the kernel refuses passthrough, the daemon reads and writes the file."""

from __future__ import annotations

import errno
import os

import pytest

from cowfs.fuse import libfuse
from cowfs.fuse.passthrough import Passthrough
from tests.support.direct import Direct


@pytest.fixture
def passthrough(fs: Direct, monkeypatch: pytest.MonkeyPatch) -> Passthrough:
    """Return the adapter of a store in memory, with a kernel that has passthrough."""
    monkeypatch.setattr(libfuse, "why_no_passthrough", lambda: "")
    made = Passthrough(fs.fs.upper, "auto")
    monkeypatch.setattr(made, "_why", "")
    return made


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ELOOP, "the store's filesystem is itself on another one"),
        (errno.EPERM, "the daemon lacks the privileges of the system's root"),
        (errno.ENOMEM, ""),
    ],
)
def test_the_kernel_refuses(
    fs: Direct, passthrough: Passthrough, monkeypatch: pytest.MonkeyPatch, code: int, why: str
) -> None:
    asked = []

    def refuse(descriptor: int) -> int:
        asked.append(descriptor)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libfuse, "lend", refuse)
    for _ in range(2):
        handle = fs.open("file", os.O_RDWR)
        assert not passthrough.opened(handle, os.O_RDWR)
        passthrough.closed(handle)
        fs.fs.release_handle(handle)
    assert len(asked) == (1 if why else 2)  # for ever, or only this time
    assert passthrough.why_not() == why
    assert len(passthrough) == 0
