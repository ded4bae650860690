"""For Sphinx: pictures of layers, drawn from a few words."""

from html import escape

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_LEFT, _CELL, _ROW, _GAP = 84, 118, 34, 10


class Layers(SphinxDirective):
    """A picture of a merged tree above its layers.

    Each line of the content is a layer, the topmost first: ``LABEL: NAME NAME! -NAME``. ``NAME!`` is another
    version of a name, ``-NAME`` a whiteout. What is merged is worked out from them, and drawn on top.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        layers = []
        for line in self.content:
            label, _, words = line.partition(":")
            layers.append((label.strip(), words.split()))
        return [nodes.raw("", _drawn(layers), format="html")]


def _drawn(layers: list[tuple[str, list[str]]]) -> str:
    names = sorted({word.strip("-!") for _, words in layers for word in words})
    top_of: dict[str, tuple[int, str]] = {}
    for number, (_, words) in enumerate(layers):
        for word in words:
            top_of.setdefault(word.strip("-!"), (number, word))
    merged = [word for _, word in top_of.values() if not word.startswith("-")]
    width, height = _LEFT + len(names) * _CELL, (len(layers) + 1) * (_ROW + _GAP) + _GAP
    parts = [f'<svg class="layers" role="img" aria-label="layers" viewBox="0 0 {width} {height}">']
    for row, (label, words) in enumerate([("merged", merged), *layers]):
        top = _GAP + row * (_ROW + _GAP)
        parts.append(f'<text class="label" x="4" y="{top + _ROW / 2 + 5}">{escape(label)}</text>')
        size = f'width="{len(names) * _CELL - 4}" height="{_ROW}" rx="4"'
        parts.append(f'<rect class="layer" x="{_LEFT}" y="{top}" {size}/>')
        for word in words:
            name = word.strip("-!")
            is_seen = row == 0 or top_of[name][0] == row - 1
            left = _LEFT + names.index(name) * _CELL
            parts.append(_cell(name, _kind(word) + ("" if is_seen else " hidden"), left, top))
    return "".join([*parts, "</svg>"])


def _kind(word: str) -> str:
    return "whiteout" if word.startswith("-") else "changed" if word.endswith("!") else "plain"


def _cell(name: str, kind: str, left: int, top: int) -> str:
    width = _CELL - 12
    box = f'x="{left + 4}" y="{top + 4}" width="{width}" height="{_ROW - 8}" rx="3"'
    centre = f'x="{left + 4 + width / 2}" y="{top + _ROW / 2 + 4}"'
    return f'<g class="{kind}"><rect {box}/><text class="name" {centre}>{escape(name)}</text></g>'


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("layers", Layers)
    return {"parallel_read_safe": True}
