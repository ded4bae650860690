"""Draw a treemap of a store as SVG: nested rectangles whose areas are proportional to the sizes.

The layout is squarified: Bruls, Huizing and van Wijk, "Squarified treemaps", 2000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape as xml

from cowfs.changes.paths import join
from cowfs.changes.render import escape
from cowfs.store.format.sizes import format_size

_WIDTH, _HEIGHT = 1200.0, 800.0
_HEAD = 16.0
"""Height in pixels of the line with a directory's name."""
_LEAST = 3.0
"""Width in pixels below which a rectangle is not drawn."""
_COLOURS = {
    "new": "#8bc48a",
    "changed": "#f0c36d",
    "metadata": "#9fc5e8",
    "whiteouts": "#e06666",
    "directories": "#cccccc",
}


_MOST = 20_000
"""The most areas in memory. Beyond that, the smaller half of the files becomes one area per directory."""


_REST = b"/"
"""The area of the files that have no area of their own: a name that no file can have."""


@dataclass(slots=True)
class _Item:
    name: bytes
    size: int = 0
    reason: str = "directories"
    children: dict[bytes, _Item] | None = None
    rest: Counter[str] | None = None
    """Bytes of the files in it that have no area of their own, by reason."""
    count: int = 0
    """How many these are."""


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


class Areas:
    """The areas of a treemap. Holds a bounded number of them, however many files are added."""

    def __init__(self) -> None:
        self._root = _Item(b"")
        self._held = 0
        self._least = 0
        """Files of so many bytes have no area of their own."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added that takes space."""
        return not self._root.size

    def add(self, path: bytes, reason: str, size: int) -> None:
        """Add what an inode takes."""
        item = self._root
        item.size += size
        for name in path.split(b"/") if path else ():
            if item.children is None:
                item.children = {}
            below = item.children.get(name)
            if below is None:
                below = item.children[name] = _Item(name)
                self._held += 1
            item = below
            item.size += size
        item.reason = reason
        if self._held > _MOST:
            sizes = sorted(item.size for _, item in self._all())
            self._least = max(self._least, sizes[len(sizes) // 2])
            self._fold()

    def _fold(self) -> None:
        """Put the small ones of each directory together."""
        for above, item in reversed([*self._all()]):  # what is in a directory comes before it
            if item.size <= self._least and above.children is not None:
                del above.children[item.name]
                rest, own = item.rest or Counter[str](), item.size - _below(item)
                rest[item.reason] += own
                above.rest = (above.rest or Counter()) + rest
                above.count += item.count or 1
        self._held = sum(1 for _ in self._all())

    def _all(self) -> Iterator[tuple[_Item, _Item]]:
        """Yield each but the root, with the directory that it is in; a directory before its contents."""
        waiting = [self._root]
        while waiting:
            above = waiting.pop()
            for item in (above.children or {}).values():
                yield above, item
                waiting.append(item)

    def picture(self, least: float = _LEAST) -> str:
        """Return an SVG image; it leaves out rectangles thinner than *least* pixels."""
        self._fold()
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT + 30:.0f}" '
            'font-family="sans-serif" font-size="11">'
        ]
        lines += _drawn(self._root, b"", _Box(0, 0, _WIDTH, _HEIGHT), least)
        lines += _legend()
        return "\n".join([*lines, "</svg>", ""])


def _below(item: _Item) -> int:
    """Return how much of the size of a directory is what is in it."""
    return sum(child.size for child in (item.children or {}).values()) + (item.rest or Counter()).total()


def _drawn(item: _Item, path: bytes, box: _Box, least: float) -> Iterator[str]:
    waiting = [(item, path, box)]
    while waiting:
        item, path, box = waiting.pop()
        if box.width < least or box.height < least:
            continue
        smaller = f"{item.count} smaller files, " if item.name == _REST else ""
        title = f"{escape(path) or '/'}: {smaller}{format_size(item.size)}, {item.reason}"
        yield (
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
            f'fill="{_COLOURS.get(item.reason, "#ffffff")}" stroke="#555555" stroke-width="0.5">'
            f"<title>{xml(title)}</title></rect>"
        )
        has_head = box.height > 2 * _HEAD
        letters = int(box.width / 6.5) - 1
        if has_head and letters > 2:
            name = f"{item.count} smaller" if item.name == _REST else escape(item.name) or "/"
            shown = name if len(name) <= letters else name[: letters - 1] + "…"
            yield f'<text x="{box.x + 3:.1f}" y="{box.y + 12:.1f}">{xml(shown)}</text>'
        if item.children or item.rest:
            head = _HEAD if has_head else 1
            inside = _Box(box.x + 2, box.y + head, box.width - 4, box.height - head - 2)
            children = sorted(_inside(item), key=lambda child: -child.size)
            places = _squarified([child.size for child in children], inside)
            for child, place in zip(children, places, strict=False):  # items of size 0 get no place
                here = path if child.name == _REST else join(path, child.name)
                waiting.append((child, here, place))


def _inside(item: _Item) -> Iterator[_Item]:
    yield from (item.children or {}).values()
    if item.rest:
        reason, _ = item.rest.most_common(1)[0]
        yield _Item(_REST, item.rest.total(), reason, count=item.count)


def _squarified(sizes: list[int], box: _Box) -> Iterator[_Box]:
    """Divide a box in proportion to *sizes*, the largest first, into parts as square as possible."""
    start = 0
    while start < len(sizes):
        total = sum(sizes[start:])
        if total <= 0 or box.width <= 0 or box.height <= 0:
            return
        area = box.width * box.height / total
        short = min(box.width, box.height)
        end, worst = start + 1, _ratio(sizes[start : start + 1], area, short)
        while end < len(sizes):
            ratio = _ratio(sizes[start : end + 1], area, short)
            if ratio > worst:
                break
            end, worst = end + 1, ratio
        row = sizes[start:end]
        thick = sum(row) * area / short
        along = 0.0
        for size in row:
            length = size * area / thick if thick else 0.0
            if box.width >= box.height:
                yield _Box(box.x, box.y + along, thick, length)
            else:
                yield _Box(box.x + along, box.y, length, thick)
            along += length
        if box.width >= box.height:
            box = _Box(box.x + thick, box.y, box.width - thick, box.height)
        else:
            box = _Box(box.x, box.y + thick, box.width, box.height - thick)
        start = end


def _ratio(row: list[int], area: float, short: float) -> float:
    """Return the worst ratio of the sides in a row of rectangles."""
    total = sum(row) * area
    if total <= 0 or min(row) <= 0:
        return float("inf")
    return max(short * short * max(row) * area / total**2, total**2 / (short * short * min(row) * area))


def _legend() -> Iterator[str]:
    x = 4.0
    for reason, colour in _COLOURS.items():
        yield f'<rect x="{x:.0f}" y="{_HEIGHT + 10:.0f}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 16:.0f}" y="{_HEIGHT + 20:.0f}">{reason}</text>'
        x += 110
