"""The header of an encrypted store is anybody's word, and root's cryptsetup reads it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import StoreError
from cowfs.store.e2fsprogs import tools
from cowfs.store.format.sniff import LUKS
from cowfs.store.served import luks
from tests.support.system import needs_root


@needs_root
def test_no_plugin_that_a_header_names_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them logs in to a server that the header names."""
    volume, tried = tmp_path / "volume", []
    volume.write_bytes(LUKS.ljust(1 << 20, b"\0"))

    def run(command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
        tried.append((command, how))
        return subprocess.CompletedProcess(command, 2, b"", b"")

    monkeypatch.setattr(luks, "must_be_possible", lambda path: None)
    monkeypatch.setattr(tools, "run", run)
    with pytest.raises(StoreError, match="wrong passphrase"), luks.opened(str(volume), lambda _: b"x"):
        pass
    assert len(tried) == 3
    for command, how in tried:
        assert list(command[:2]) == ["cryptsetup", "--disable-external-tokens"] and how["work"] > 0


def test_a_program_that_works_without_end_is_stopped() -> None:
    assert tools.run(["sh", "-c", "while :; do :; done"], work=1).returncode < 0
