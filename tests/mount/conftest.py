"""Run the tests of mounts with both transports."""

from __future__ import annotations

from tests.support import transport

pytest_generate_tests = transport.parametrize_transport
