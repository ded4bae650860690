"""List the changes of a mounted union step by step, while its requests are served."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from cowfs.changes import diff
from cowfs.changes.composite import Above, above
from cowfs.fuse.control import MayHang, in_main_thread
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.layers.slow import SlowLayer
from cowfs.overlay.overlay import Overlay
from cowfs.store.format.checkpoints import Range, as_layers
from cowfs.types import Change, DirEntry

_SLICE = 0.02
"""Seconds that a thread works before it reports what it has found."""


def steps(
    overlay: Overlay, between: Range, *, directory_times: bool = False, within: Iterable[bytes] = ()
) -> Iterator[Change | MayHang | None]:
    """Yield the changes *between* two trees, and other items of :data:`cowfs.fuse.control.Replies`.

    These are all changes, or those :func:`cowfs.changes.diff.diff` lists *within* some paths.

    If a lower may wait for other machines or programs, a thread does the work. It calls the other layers in
    the main thread, to which they belong.
    """
    if between.is_empty:
        return
    upper, root, index = above(
        (overlay.upper, overlay.root.upper) if between.has_upper else None,
        as_layers(overlay.upper, between.newer),
        overlay.format,
        overlay.index,
    )
    how: dict[str, Any] = {"directory_times": directory_times, "within": within}
    below: list[LowerLayer] = list(as_layers(overlay.upper, between.older))
    if not any(layer.waits for layer in overlay.base):
        yield from _all(overlay, Above(upper, root, index), [*below, *overlay.base], how)
        return
    upper = cast(UpperLayer, _InMainThread(upper))
    lowers = [layer.inner if isinstance(layer, SlowLayer) else _lower(layer) for layer in overlay.base]
    found = _all(overlay, Above(upper, root, index), [*map(_lower, below), *lowers], how)
    batch: list[Change | None] = [None]
    while batch:
        batch = []
        yield MayHang(functools.partial(_work, found, batch))
        yield from batch


def _all(
    overlay: Overlay, new: Above, lowers: list[LowerLayer], how: dict[str, Any]
) -> Iterator[Change | None]:
    return diff.steps(new.layer, new.root, lowers, overlay.options.xattr_prefix, index=new.links, **how)


def _work(found: Iterator[Change | None], batch: list[Change | None]) -> None:
    """Move some of *found* to *batch*; nothing if there is no more."""
    end = time.monotonic() + _SLICE
    for step in found:
        batch.append(step)
        if time.monotonic() > end:
            return


def _lower(layer: LowerLayer) -> LowerLayer:
    return cast(LowerLayer, _InMainThread(layer))


class _InMainThread:
    """A layer whose methods are called in the main thread, whichever thread calls them."""

    def __init__(self, layer: LowerLayer) -> None:
        self._layer = layer

    def pieces(self, directory: Key) -> Iterator[list[DirEntry]]:
        """Read each piece in the main thread."""
        found = self._layer.pieces(directory)
        while (some := _call(next, found, None)) is not None:
            yield some

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return functools.partial(_call, value) if callable(value) else value


def _call(method: Callable[..., Any], *arguments: Any) -> Any:
    return in_main_thread(functools.partial(method, *arguments))
