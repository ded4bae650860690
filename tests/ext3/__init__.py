"""The in-process ext3 engine against power cuts, kills, damage, full disks, and the kernel."""

from tests.support import sanitized

if sanitized.ENGINE is not None:
    sanitized.load()
