"""Count what an export cannot express in its format."""

from __future__ import annotations

from collections.abc import Iterator

from cowfs.changes.render import escape

_NAMED = 3


class Losses:
    """The paths that lose something, by kind of loss."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[bytes]]] = {}
        self.is_partial = False
        """Whether anything is missing, rather than only less exact."""

    def add(self, what: str, path: bytes, *, exact: bool = True) -> None:
        """Note that *path* loses something. If not *exact*, it is exported, and only less exact."""
        count, named = self._found.get(what, (0, []))
        if len(named) < _NAMED:
            named.append(path)
        self._found[what] = count + 1, named
        self.is_partial |= exact

    def __iter__(self) -> Iterator[str]:
        """Yield a line for each kind: what, how many, and the first few paths."""
        for what, (count, named) in self._found.items():
            paths = ", ".join(escape(path) or "/" for path in named)
            yield f"{what}: {count} ({paths}{', …' if count > len(named) else ''})"
