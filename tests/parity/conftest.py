"""Run each test of a mount with both transports."""

from __future__ import annotations

from tests.support import transport

pytest_generate_tests = transport.parametrize_transport
