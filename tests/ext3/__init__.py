"""Test the in-process ext3 engine with power cuts, kills, damage, full disks, and the kernel."""

from tests.support import sanitized

if sanitized.ENGINE is not None:
    sanitized.load()
