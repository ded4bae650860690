"""The in-process ext3 engine against power cuts, kills, damage, full disks, and the kernel."""
