"""The treemap of any number of files has a limited number of areas."""

from __future__ import annotations

import re

from cowfs.changes.treemap import Areas


def test_many_small_files_are_one_area_for_each_directory() -> None:
    areas = Areas()
    for number in range(50_000):
        areas.add(b"d%d/f%d" % (number % 10, number), "new", 4096)
    areas.add(b"d0/large", "changed", 1 << 30)
    picture = areas.picture()
    told = re.findall(r"<title>(\S+): ([0-9]+) smaller files, ([0-9.]+) MiB, new<", picture)
    assert sorted(told) == [(f"d{number}", "5000", "19.5") for number in range(10)]
    assert "<title>d0/large: 1 GiB, changed<" in picture
    assert "<title>d1: 19.5 MiB, " in picture
