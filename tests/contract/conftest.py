"""Fixtures with layers to test against the contract."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.layers.base import UpperLayer
from tests.contract.factories import LOWERS, UPPERS, Kind


def _choose(kind: Kind, *, rootless: bool = False) -> Kind:
    if kind.privileged and not rootless and os.geteuid() != 0:
        pytest.skip("needs root: owners, devices, trusted xattrs")
    return kind


@pytest.fixture(params=LOWERS, ids=str)
def lower_kind(request: pytest.FixtureRequest) -> Kind:
    """Every kind of readable layer."""
    return _choose(request.param)


@pytest.fixture(params=UPPERS, ids=str)
def upper_kind(request: pytest.FixtureRequest) -> Kind:
    """Every kind of writable layer."""
    kind: Kind = request.param
    return _choose(kind, rootless=kind.rootless)


@pytest.fixture
def upper(upper_kind: Kind, nobody_path: Path, tmp_path: Path) -> Iterator[UpperLayer]:
    """An empty layer to write to."""
    place = tmp_path if upper_kind.privileged else nobody_path
    assert upper_kind.upper
    with upper_kind.upper(place) as layer:
        yield layer
