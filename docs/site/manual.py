"""For Sphinx: a page for each manual page, made by mandoc(1)."""

import re
import subprocess
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_MANUAL = Path(__file__).parents[1] / "man"
_PAGES = Path(__file__).parent / "man"
_XREF = re.compile(r'<a class="Xr">([\w.-]+)\((\d)\)</a>')


class ManualPage(SphinxDirective):
    """``{manual} NAME.SECTION``: the text of a manual page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        page = _MANUAL / self.arguments[0]
        self.env.note_dependency(str(page))
        done = subprocess.run(
            ["mandoc", "-T", "html", "-O", "fragment", page], check=True, capture_output=True, text=True
        )
        body = done.stdout[done.stdout.index("<section") :]
        body = re.sub(r'<table class="foot">.*', "", body, flags=re.DOTALL)
        body = re.sub(r"(</?)h(\d)", lambda tag: f"{tag[1]}h{int(tag[2]) + 1}", body)
        return [nodes.raw("", f'<div class="manual">{_XREF.sub(_reference, body)}', format="html")]


def _reference(found: re.Match[str]) -> str:
    name, section = found.groups()
    if not (_MANUAL / f"{name}.{section}").exists():
        return f"{name}({section})"
    return f'<a class="Xr" href="{name}.{section}.html">{name}({section})</a>'


def _write_pages(_app: Sphinx) -> None:
    _PAGES.mkdir(exist_ok=True)
    pages = sorted(page for page in _MANUAL.iterdir() if page.suffix[1:].isdigit())
    for old in _PAGES.glob("*.md"):
        if not (_MANUAL / old.stem).exists():
            old.unlink()
    for page in pages:
        text = f"# {page.stem}({page.suffix[1:]})\n\n```{{manual}} {page.name}\n```\n"
        target = _PAGES / f"{page.name}.md"
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("manual", ManualPage)
    app.connect("config-inited", lambda app, _config: _write_pages(app))
    return {"parallel_read_safe": True}
