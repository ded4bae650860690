"""What is mounted is tested with both ways that requests come by."""

from __future__ import annotations

from tests.support import transport

pytest_generate_tests = transport.parametrize_transport
