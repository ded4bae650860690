"""The application: the tree, and below it the details of the selected path."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import ScrollableContainer
from textual.widgets import Footer, Static, Tree

from cowfs.api import Done, Lowers
from cowfs.browse.dialogs import Help, Question
from cowfs.browse.source import Entry, Source, topmost
from cowfs.browse.tree import ChangesTree, More
from cowfs.changes.render import escape
from cowfs.errors import CowfsError, printable

_T = TypeVar("_T")
_NAMED = 5
"""How many paths a question or an answer names."""
_DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan", "#": "dim"}


def browse(what: str, lowers: Lowers, since: str | None, at: bytes = b"") -> None:
    """Browse the changes of a store or a mount, starting at the directory *at*, until the user quits.

    With *since*, only those after that checkpoint. Uses the whole terminal. CowfsError if the changes cannot
    be read.
    """
    said: list[str] = []
    source = Source(what, lowers, since, said.append)
    thread = ThreadPoolExecutor(1, "source")
    try:
        thread.submit(source.open).result()  # before the screen changes, so that an error is one plain line
        app = Browser(source, thread, said, at)
        app.run()
        if app.failure is not None:
            raise app.failure
    finally:
        source.stopped = True
        thread.submit(source.close)
        thread.shutdown()


class Browser(App[None]):
    """Shows the changes of one source."""

    CSS = """
    Screen { layout: vertical; }
    #title { height: 1; background: $primary; color: $text; }
    ChangesTree { height: 1fr; scrollbar-size: 1 1; background: $background; }
    #details { height: 1fr; border-top: solid $primary; scrollbar-size: 1 1; }
    #details:focus { border-top: solid $accent; }
    #text { width: auto; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "show('diff')", "Diff"),
        Binding("e", "show('explain')", "Explain"),
        Binding("r", "revert", "Revert"),
        Binding("u", "undo", "Undo"),
        Binding("R", "reload", show=False),
        Binding("escape", "to_tree", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q,ctrl+c", "quit", "Quit", key_display="q"),
    ]

    def __init__(self, source: Source, thread: ThreadPoolExecutor, said: list[str], at: bytes) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        """The exception that has ended it, if any."""
        self._source = source
        self._thread = thread
        self._said = said
        self._at = at
        self._shown = "diff"
        self._reading = True
        self._is_read = False
        self._busy = False

    def compose(self) -> ComposeResult:
        yield Static(id="title")
        yield ChangesTree()
        with ScrollableContainer(id="details"):
            yield Static(id="text")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        self.set_interval(0.2, self._tick)
        self._tree.focus()
        self._reload(self._at)

    @property
    def _tree(self) -> ChangesTree:
        return self.query_one(ChangesTree)

    async def _asked(self, call: Callable[[], _T]) -> _T:
        """Run *call* in the thread of the source, and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _tick(self) -> None:
        while self._said:
            self.notify(printable(self._said.pop(0)), severity="warning", markup=False)
        if self._reading:
            self._title(f"reading: {self._source.found} changes so far")

    def _title(self, state: str) -> None:
        # The state comes first, because a long path may be cut off.
        since = "" if not self._source.since else f" since {printable(self._source.since)}"
        self.screen_stack[0].query_one("#title", Static).update(
            Text(f"{state}: {printable(self._source.what)}{since}", no_wrap=True, overflow="ellipsis")
        )

    @work(exclusive=True, group="read")
    async def _reload(self, at: bytes) -> None:
        self._reading = True
        try:
            root = await self._asked(self._source.read)
        except (CowfsError, OSError) as error:
            self.failure = error
            self.exit()
            return
        finally:
            self._reading = False
        tree = self.screen_stack[0].query_one(ChangesTree)
        target = tree.fill(root, at)
        if not self._is_read:
            target.expand()
            self._is_read = True
        changes = "1 change" if root.count == 1 else f"{root.count or 'no'} changes"

        def go() -> None:  # later, because a node has no line before it is drawn
            tree.move_cursor(target)
            self._title(changes)
            self._describe(root.find(at))

        self.call_after_refresh(go)

    def on_tree_node_highlighted(self, event: Tree.NodeHighlighted[Entry | More]) -> None:
        if isinstance(event.node.data, Entry):
            self._describe(event.node.data)

    def on_tree_node_selected(self, event: Tree.NodeSelected[Entry | More]) -> None:
        if isinstance(event.node.data, Entry) and not event.node.allow_expand:
            self.query_one("#details").focus()

    @work(exclusive=True, group="describe")
    async def _describe(self, entry: Entry) -> None:
        await asyncio.sleep(0.05)  # skips the paths between when the user moves quickly
        ask = self._source.explain if self._shown == "explain" else self._source.diff
        try:
            said = await self._asked(lambda: ask(entry))
        except (CowfsError, OSError) as error:
            said = _reason(error)
        screen = self.screen_stack[0]
        text = Text(no_wrap=True)
        for line in said.split("\n"):
            text.append(line + "\n", _DIFF_STYLES.get(line[:1], "") if self._shown == "diff" else "")
        screen.query_one("#text", Static).update(text)
        screen.query_one("#details").scroll_home(animate=False)

    def action_show(self, what: str) -> None:
        """Show the diff, or the explanation."""
        self._shown = what
        if self._tree.selected is not None:
            self._describe(self._tree.selected)

    def action_mark(self) -> None:
        """Mark the selected path and everything below it."""
        self._tree.toggle_mark()

    def action_to_tree(self) -> None:
        """Go back to the tree."""
        self._tree.focus()

    def action_help(self) -> None:
        """List the keys."""
        self.push_screen(Help())

    def action_reload(self) -> None:
        """Read the changes again."""
        if not self._reading and not self._busy:
            self._reload(self._here())

    def _here(self) -> bytes:
        return b"" if self._tree.selected is None else self._tree.selected.path

    @work(group="revert")
    async def action_revert(self) -> None:
        """Revert the marked paths, or else the selected one, if the user agrees."""
        tree, selected = self._tree, self._tree.selected
        wanted = topmost(tree.marked.values()) or ([] if selected is None else [selected])
        count = sum(entry.count for entry in wanted)
        if not count or self._busy or self._reading:
            return
        names = [escape(entry.path) or "everything" for entry in wanted[:_NAMED]]
        more = [f"and {len(wanted) - _NAMED} more"] if len(wanted) > _NAMED else []
        changes = "1 change" if count == 1 else f"{count} changes"
        question = "\n".join([f"Revert {changes}?", "", *names, *more, "", "y: yes   n: no"])
        if await self.push_screen_wait(Question(question)):
            tree.unmark()
            paths = [entry.path for entry in wanted]
            await self._take_back(lambda: self._source.revert(paths), "reverted", "u undoes it")

    @work(group="revert")
    async def action_undo(self) -> None:
        """Undo the last revert."""
        if not self._busy and not self._reading:
            await self._take_back(self._source.undo, "brought back", "")

    async def _take_back(self, call: Callable[[], list[Done]], word: str, hint: str) -> None:
        here = self._here()
        self._busy = True
        try:
            done = await self._asked(call)
        except (CowfsError, OSError) as error:
            self.notify(_reason(error), severity="error", markup=False, timeout=15)
            done = None
        finally:
            self._busy = False
        if done is not None:
            self._answer(done, word, hint)
        self._reload(here)

    def _answer(self, done: list[Done], word: str, hint: str) -> None:
        failed = [each for each in done if each.why_not]
        count = len(done) - len(failed)
        if count or not failed:
            text = f"{count} {word}" if count else f"nothing was {word}"
            self.notify(f"{text}; {hint}" if count and hint else text, markup=False)
        if failed:
            lines = [f"{escape(each.path) or '/'}: {printable(each.why_not)}" for each in failed[:_NAMED]]
            more = [f"and {len(failed) - _NAMED} more"] if len(failed) > _NAMED else []
            self.notify("\n".join([*lines, *more]), severity="error", markup=False, timeout=15)


def _reason(error: CowfsError | OSError) -> str:
    return str(error) if isinstance(error, CowfsError) else printable(error.strerror or str(error))
