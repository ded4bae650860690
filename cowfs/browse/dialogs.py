"""The dialogs over the tree: a question, and the help."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

_STYLE = """
{0} {{ align: center middle; }}
{0} > VerticalScroll {{
    width: auto; max-width: 90%; height: auto; max-height: 90%; padding: 0 1; border: round $accent;
    background: $surface;
}}
{0} Static {{ width: auto; max-width: 100%; }}
"""

_HELP = """\
Up, Down        go to the previous, next path
Right, Left     open a directory; close it, or go to its parent
Enter           open a directory, or scroll the text about a file
Escape          back to the tree
Tab             switch between the tree and the text about the path

d               show the differences of the selected path
e               explain which layer the path comes from, and why
Space           mark the path and everything below it, or unmark it
r               revert the marked paths, or else the selected one
u               undo the last revert
R               read the changes again
q               quit

A added   M modified   D deleted   R renamed   * marked
(3) after a directory: changes below it"""


class Question(ModalScreen[bool]):
    """Asks a question: *y* means yes, every other key no."""

    DEFAULT_CSS = _STYLE.format("Question")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,q,escape,enter,ctrl+c", "dismiss(False)"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        yield VerticalScroll(Static(Text(self._text)))


class Help(ModalScreen[None]):
    """Lists the keys."""

    DEFAULT_CSS = _STYLE.format("Help")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter,space,ctrl+c", "dismiss(None)")
    ]

    def compose(self) -> ComposeResult:
        yield VerticalScroll(Static(Text(_HELP)))
