"""Where the sockets of daemons are."""

from __future__ import annotations

import pytest

from cowfs.linux import sockets


def test_roots_of_namespaces_do_not_share_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in /tmp would belong to the first of them, and keep all others out."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(sockets, "ranges", lambda _: [(0, 1234, 1), (1, 100000, 65536)])
    assert sockets.control_directories(0) == ["/run/cowfs", "/run/user/1234/cowfs", "/tmp/cowfs-1234"]
    monkeypatch.setattr(sockets, "ranges", lambda _: [(0, 0, 4294967295)])
    assert sockets.control_directories(1234)[-1] == "/tmp/cowfs-1234"
