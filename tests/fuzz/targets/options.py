"""Mount options, sizes, offsets, names of lowers, and the options of sysresccd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.cli import options
from cowfs.errors import UsageError
from cowfs.store.format.sizes import format_size, parse_size
from cowfs.url.names import place
from tests.fuzz.driver import Run, Target


def _one(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    with suppress(UsageError):
        given = options.parse([text])
        assert given.size is None or given.size >= 0
        assert all(offset >= options.AUTO for offset in given.offsets)
    with suppress(UsageError):
        format_size(parse_size(text))
    with suppress(UsageError):
        options.parse_offsets(text)
    with suppress(UsageError):
        lowers = tuple(map(place, options.split_lowers(text)))
        assert options.split_lowers(options.join_lowers(lowers)) == lowers


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    return [
        b"store=memory,size=256M,ro,noatime,x-a", b"engine=process,offset=4K:0:17,fakeroot",
        b"sloppy,what=ever",
        b"a\\,b,c\\\\d", b"/one:/two\\:three", b"/one::/two", b"17G", b"64kib", b"offset=1:2",
    ]  # fmt: skip


TARGET = Target(_run, _seeds, ("cowfs.cli.options", "cowfs.store.format.sizes"), largest=6_000)
