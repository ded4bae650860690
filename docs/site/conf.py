"""The documentation site: `make docs` makes it of the pages in docs/, the manual and the docstrings."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

project = "cowfs"
author = "the cowfs authors"
copyright = "the cowfs authors. MIT licence"
version = release = version_of("cowfs")

extensions = ["myst_parser", "sphinx.ext.autodoc", "manual", "layers"]
root_doc = "docs/site/index"
include_patterns = ["*.md", "docs/*.md", "docs/*/*.md", "docs/*/*/*.md"]
exclude_patterns = ["docs/README.md"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# A docstring names what its reader of the source can find; most of that is no page here.
nitpicky = False

html_theme = "furo"
html_title = "cowfs"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["cowfs.css"]
html_theme_options = {"navigation_with_keys": True}

_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def _relink(_app: Sphinx, page: str, source: list[str]) -> None:
    """Let links lead to pages of the site; a link to a directory or a source file becomes its name."""
    here = (ROOT / page).parent

    def replaced(link: re.Match[str]) -> str:
        target, place = link[1], link[2] or ""
        if "://" in target:
            return link[0]
        path = ROOT / target[1:] if target[0] == "/" else (here / target).resolve()
        if path == ROOT / "docs/README.md":
            path = HERE / "index.md"
        if path.parent == ROOT / "docs/man":
            path = HERE / "man" / f"{path.name}.md"
        if path.suffix not in {".md", ".png", ".svg", ".gif"} or path.is_relative_to(ROOT / "tests"):
            return "]{.path}"
        return f"](/{path.relative_to(ROOT)}{place})"

    source[0] = _LINK.sub(replaced, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _relink)
