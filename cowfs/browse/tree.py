"""The tree of changes as a widget. A directory is filled when it is first opened."""

from __future__ import annotations

from itertools import islice
from typing import ClassVar, NamedTuple

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import Tree
from textual.widgets.tree import TreeNode

from cowfs.browse.source import Entry
from cowfs.changes.render import escape

_PAGE = 500
"""How many names of a directory are shown at first, and more at each request."""
_STYLES = {"A": "green", "M": "yellow", "D": "red", "R": "cyan"}


class More(NamedTuple):
    """A placeholder for the names of a directory from a given number on."""

    entry: Entry
    start: int


Node = TreeNode[Entry | More]


class ChangesTree(Tree[Entry | More]):
    """The changed paths. A reload keeps which of them are marked, and which directories are open."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "app.mark", "Mark", key_display="Space"),
        Binding("right", "open", show=False),
        Binding("left", "close", show=False),
    ]

    def __init__(self) -> None:
        super().__init__("")
        self.marked: dict[bytes, Entry] = {}
        self.guide_depth = 2

    @property
    def selected(self) -> Entry | None:
        """The entry under the cursor."""
        data = None if self.cursor_node is None else self.cursor_node.data
        return data if isinstance(data, Entry) else None

    def fill(self, root: Entry, at: bytes) -> Node:
        """Show new changes, with the same directories open; return the node of *at*, or the nearest above."""
        opened = [node.data.path for node in self._open_nodes(self.root) if isinstance(node.data, Entry)]
        marked = [root.find(path) for path in self.marked]
        self.marked = {each.path: each for each in marked if each.path in self.marked}
        self.root.data = root
        self.root.remove_children()
        self.root.set_label(self.label(root))
        self._grow(self.root)
        self.root.expand()
        for path in opened:
            self._reach(root.find(path)).expand()
        return self._reach(root.find(at))

    def _open_nodes(self, node: Node) -> list[Node]:
        found = [node] if node.is_expanded else []
        for child in node.children:
            found += self._open_nodes(child) if child.children else []
        return found

    def _reach(self, entry: Entry) -> Node:
        """Open all directories above *entry*; return its node, or the nearest if no page shows it yet."""
        node = self.root
        for step in [each for each in entry.ways()][-2::-1]:
            self._grow(node)
            child = next((each for each in node.children if each.data is step), None)
            if child is None:
                break
            node.expand()
            node = child
        self._grow(node)
        return node

    def _grow(self, node: Node, start: int = 0) -> None:
        entry = node.data.entry if isinstance(node.data, More) else node.data
        if not isinstance(entry, Entry) or (node.children and not start):
            return
        for child in islice(entry.children.values(), start, start + _PAGE):
            node.add(self.label(child), data=child, allow_expand=bool(child.children))
        left = len(entry.children) - start - _PAGE
        if left > 0:
            node.add_leaf(Text(f"... {left} more (Enter)"), data=More(entry, start + _PAGE))

    def label(self, entry: Entry) -> Text:
        """Return the label of an entry: plain text, whatever its name contains."""
        text = Text(no_wrap=True)
        marked = bool(self.marked) and any(each.path in self.marked for each in entry.ways())
        text.append("* " if marked else "  ", "bold magenta")
        change = entry.change
        if change is not None:
            text.append(f"{change.kind} ", _STYLES[change.kind])
        text.append((escape(entry.name) or "") + ("/" if entry.is_directory else ""))
        if change is not None and change.source is not None:
            text.append(f"  was {escape(change.source)}/", "cyan")
        if change is not None and change.what:
            text.append(f"  ({', '.join(change.what)})", "dim")
        if entry.children or not entry.path:
            text.append(f"  ({entry.count - (change is not None)})", "dim")
        return text

    def toggle_mark(self) -> None:
        """Mark the entry under the cursor, or unmark it; then move to the next."""
        entry = self.selected
        if entry is None or self.cursor_node is None:
            return
        if self.marked.pop(entry.path, None) is None:
            self.marked[entry.path] = entry
        self._relabel(self.cursor_node)
        self.action_cursor_down()

    def unmark(self) -> None:
        """Remove all marks."""
        self.marked.clear()
        self._relabel(self.root)

    def _relabel(self, node: Node) -> None:
        if isinstance(node.data, Entry):
            node.set_label(self.label(node.data))
        for child in node.children:
            self._relabel(child)

    def on_tree_node_expanded(self, event: Tree.NodeExpanded[Entry | More]) -> None:
        """Fill a directory when it is first opened."""
        self._grow(event.node)

    def on_tree_node_selected(self, event: Tree.NodeSelected[Entry | More]) -> None:
        """Replace the placeholder by the next names."""
        node = event.node
        if isinstance(node.data, More) and node.parent is not None:
            more, parent = node.data, node.parent
            node.remove()
            self._grow(parent, more.start)

    def action_open(self) -> None:
        """Open the directory, or go to its first entry."""
        node = self.cursor_node
        if node is None or not node.allow_expand:
            return
        if node.is_expanded:
            self.action_cursor_down()
        else:
            self._grow(node)  # now, because the next key may move into it
            node.expand()

    def action_close(self) -> None:
        """Close the directory, or go to its parent."""
        node = self.cursor_node
        if node is None:
            return
        if node.is_expanded and node.children:
            node.collapse()
        elif node.parent is not None:
            self.move_cursor(node.parent)
