"""Wrap a lower layer whose calls may wait for other machines or programs, for callers that must not wait.

Until a union is served, calls are made directly. From then on (:meth:`SlowLayer.serve`), the layer returns
the answers in the current :class:`Answers`, and raises :class:`NotYet` for a question without an answer. The
caller then asks the question in a thread, and repeats the whole operation with the answer. This works
because a failed operation leaves nothing behind. So while cowfs waits for a lower, it holds no lock, and no
operation is half done (docs/adr/0025-slow-lowers.md).
"""

from __future__ import annotations

import errno
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar, cast

from cowfs.errors import os_error
from cowfs.layers.base import File, Key, LowerLayer
from cowfs.layers.read_only import ReadOnlyFile
from cowfs.types import Attr, DirEntry, FileHandle, FsStats
from cowfs.url.waiting import WouldWait, at_once

R = TypeVar("R")
InBackground = Callable[[int, Callable[[], None]], None]
log = logging.getLogger(__name__)

_CLOSING = 3.0
"""Seconds that the end of the union waits for a lower to close its files."""
_SMALL = 64 << 10
"""A file up to this size is read when it is opened …"""
_SMALL_TOGETHER = 32 << 20
"""… unless this many bytes of a layer's files wait to be read."""
_AGAIN = 1.0
"""Seconds in which the kernel has read again what it could not read ahead."""
_NONE = {errno.ENODATA, errno.EOPNOTSUPP}
_MOST_VALUES = 32
"""How many attributes are read along with their names."""


class NotYet(Exception):
    """There is no answer yet: ask the question in a thread first.

    It is no OSError, so that nothing takes it for an error of the layer.
    """

    def __init__(self, question: Question) -> None:
        super().__init__(question.method)
        self.question = question


class Question(NamedTuple):
    """A call of a slow layer."""

    layer: SlowLayer
    method: str
    arguments: tuple[Any, ...]

    def ask(self, more: Iterable[bytes] = ()) -> Learnt:
        """Return the answer, and answers to the likely next questions.

        Blocks; any thread may call it. If this is a lookup, also look up the names *more*.
        """
        learnt: Learnt = {}
        self._learn(learnt)
        if self.method == "lookup":
            for name in more:
                self._replace(arguments=(self.arguments[0], name))._learn(learnt)
        return learnt

    def _learn(self, learnt: Learnt) -> None:
        if self in learnt:
            return
        answer = learnt[self] = self._answer()
        if isinstance(answer.error, OSError) and self.method == "getxattr":
            self._learn_of_others(answer.error)
        if answer.error is not None:
            return
        if self.method == "listxattr":
            (key,) = self.arguments
            for name in answer.value[:_MOST_VALUES]:
                Question(self.layer, "getxattr", (key, name))._learn(learnt)
            Question(self.layer, "handle", (key,))._learn(learnt)  # for a copy-up
        elif self.method == "lookup" and answer.value is not None:
            key, attr = answer.value
            is_directory = stat.S_ISDIR(attr.st_mode)  # may be opaque; a file may be a whiteout or a metacopy
            if stat.S_ISREG(attr.st_mode) or (is_directory and self.layer.has_notes):
                Question(self.layer, "listxattr", (key,))._learn(learnt)

    def _learn_of_others(self, failure: OSError) -> None:
        """If the inode lacks this xattr, find out whether it has any: programs ask for several (ls -l)."""
        if failure.errno in _NONE:
            key = self.arguments[0]
            names = Question(self.layer, "listxattr", (key,))._answer()
            if names.value == []:
                self.layer.bare[key] = failure

    def _answer(self) -> Answer:
        try:
            return Answer(self.layer.do(self.method, self.arguments), None)
        except Exception as error:
            return Answer(None, error.with_traceback(None))


class Answer(NamedTuple):
    """What a layer returned or raised."""

    value: Any
    error: Exception | None


Learnt = dict[Question, Answer]
_at_hand: ContextVar[Answers | None] = ContextVar("answers", default=None)


class Answers:
    """The answers of slow layers for one request of the user *uid*. Always :meth:`close` it."""

    __slots__ = ("_known", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self._known: Learnt = {}

    def add(self, learnt: Learnt) -> None:
        self._known.update(learnt)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Make the layers use these answers in this task, during the block."""
        before = _at_hand.get()
        _at_hand.set(self)
        try:
            yield
        finally:
            _at_hand.set(before)  # no reset(): a request may have moved to another thread, with its context

    def to(self, question: Question) -> Answer | None:
        """Return the answer if it is known. An open file is returned only once."""
        if question.method != "open":
            return self._known.get(question)
        answer = self._known.pop(question, None)
        if answer is not None and answer.error is None:
            answer.value.owner = self.uid
        return answer

    def close(self) -> None:
        """Close the open files that were not used."""
        for question in [question for question in self._known if question.method == "open"]:
            answer = self.to(question)
            if answer is not None and answer.error is None:
                answer.value.close()


class SlowLayer:
    """A :class:`LowerLayer` in front of *inner*, whose methods any thread may call at any time."""

    generation: int | None = None
    waits = True
    has_descriptors = True

    def __init__(self, inner: LowerLayer, *, knows_at_once: bool = False) -> None:
        """*knows_at_once*: it respects :func:`cowfs.url.waiting.at_once`, so cached data needs no thread."""
        self.inner = inner
        self.knows_at_once = knows_at_once
        self.name = inner.name
        self.root: Key = inner.root
        self.dev = inner.dev
        self.has_notes = False
        """Whether the union reads the attributes of directories: layers below are to be hidden by them."""
        self.bare: dict[Key, OSError] = {}
        """The inodes in use without attributes, and the answer to a request for one."""
        self._files: set[SlowFile] = set()
        self._room = _SMALL_TOGETHER
        self._counting = threading.Lock()
        self._in_background: InBackground | None = None

    @property
    def data_only(self) -> bool:
        return self.inner.data_only

    @data_only.setter
    def data_only(self, value: bool) -> None:
        self.inner.data_only = value

    def serve(self, in_background: InBackground) -> None:
        """From now on, never wait. *in_background* makes a call later, in a thread of a user."""
        self._in_background = in_background

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._in_background is None:
            return self.do(method, arguments)
        question = Question(self, method, arguments)
        answers = _at_hand.get()
        answer = None if answers is None else answers.to(question)
        if answer is None and self.knows_at_once:
            try:
                return at_once(self._do_at_once, method, arguments)
            except WouldWait:
                pass
        if answer is None:
            raise NotYet(question)
        if answer.error is not None:
            raise answer.error.with_traceback(None)
        return answer.value

    def do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the layer. Blocks; any thread may call it."""
        result = getattr(self.inner, method)(*arguments)
        if method == "names" and callable(result):
            return result()
        if method != "open":
            return result
        file = SlowFile(self, result)
        self._files.add(file)
        return file

    def _do_at_once(self, method: str, arguments: tuple[Any, ...]) -> Any:
        result = getattr(self.inner, method)(*arguments)
        if method == "names" and callable(result):
            raise WouldWait
        if method != "open":
            return result
        file = SlowFile(self, result)
        answers = _at_hand.get()
        if answers is not None:
            file.owner = answers.uid
        self._files.add(file)
        return file

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        return cast("tuple[Key, Attr] | None", self._ask("lookup", directory, name))

    def stat(self, key: Key) -> Attr:
        return cast(Attr, self._ask("stat", key))

    def readdir(self, directory: Key) -> list[DirEntry]:
        return list(self._ask("readdir", directory))

    def pieces(self, directory: Key) -> Iterator[list[DirEntry]]:
        yield self.readdir(directory)

    def names(self, directory: Key) -> list[bytes]:
        return list(self._ask("names", directory))

    def readlink(self, key: Key) -> bytes:
        return cast(bytes, self._ask("readlink", key))

    def listxattr(self, key: Key) -> list[bytes]:
        return [] if key in self.bare else list(self._ask("listxattr", key))

    def getxattr(self, key: Key, name: bytes) -> bytes:
        if key in self.bare:
            raise self.bare[key].with_traceback(None)
        return cast(bytes, self._ask("getxattr", key, name))

    def open(self, key: Key, flags: int) -> SlowFile:
        return cast(SlowFile, self._ask("open", key, flags))

    def statfs(self) -> FsStats:
        return cast(FsStats, self._ask("statfs"))

    def handle(self, key: Key) -> FileHandle | None:
        return cast("FileHandle | None", self._ask("handle", key))

    def handle_ino(self, handle: FileHandle) -> int | None:
        """Return the layer's answer, which does not block."""
        return self.inner.handle_ino(handle)

    def forget(self, key: Key) -> None:
        self.bare.pop(key, None)
        self.inner.forget(key)

    def take_room(self, size: int) -> bool:
        """Reserve memory for bytes read ahead, and return whether there is enough. A negative *size* frees
        it."""
        with self._counting:
            if size > self._room:
                return False
            self._room -= size
            return True

    def dismiss(self, file: SlowFile) -> None:
        """Close an unused file in a thread."""
        if self._in_background is None:
            file.close_now()
        else:
            self._in_background(file.owner, file.close_now)

    def let_go(self, file: SlowFile) -> bool:
        """Whether the caller is the one that must close a file."""
        try:
            self._files.remove(file)
        except KeyError:
            return False
        return True

    def close(self) -> None:
        """Close all files. After some seconds, give up, log that, and leave them open until the process
        exits.
        """
        thread = threading.Thread(target=self._close, name=f"closes {self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread available
            self._close()
            return
        thread.join(_CLOSING)
        if thread.is_alive():
            log.warning("%s does not answer; its open files stay open until the daemon exits", self.name)
            _unclosed.append(self)

    def _close(self) -> None:
        for file in list(self._files):
            file.close_now()
        self.inner.close()


_unclosed: list[SlowLayer] = []


def must_stay_open() -> bool:
    """Whether the process must exit without closing its files, because that could block forever."""
    return bool(_unclosed)


class SlowFile(ReadOnlyFile):
    """An open file of a slow layer. Only threads read its data; ``close`` does not wait."""

    __slots__ = ("_closed", "_content", "_failed", "_inner", "_layer", "_writing", "owner")

    def __init__(self, layer: SlowLayer, inner: File) -> None:
        """May block."""
        super().__init__(inner.stat())
        self._layer = layer
        self._inner = inner
        self._writing = threading.Lock()
        self._closed = False
        self.owner = 0
        """The user for whom it was opened."""
        self._failed: tuple[range, float, tuple[Any, ...]] | None = None
        """Which bytes did not come in time, and when that was known."""
        self._content: bytes | None = None
        """All of a small file, until it has been read to its end."""
        size = self._attr.st_size
        if 0 < size <= _SMALL and not layer.knows_at_once and layer.take_room(size):
            with suppress(OSError):  # the read reports it
                self._content = inner.pread(size + 1, 0)
            if self._content is None or len(self._content) != size:
                self._content = None
                layer.take_room(-size)

    def pread(self, size: int, offset: int) -> bytes:
        failed = self._failed
        if failed is not None and offset in failed[0] and time.monotonic() < failed[1] + _AGAIN:
            raise TimeoutError(*failed[2])  # else the program would wait twice
        try:
            return self._inner.pread(size, offset)
        except TimeoutError as error:
            self._failed = range(offset, offset + size), time.monotonic(), error.args
            raise

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """Return data that was already read, or is cached; else None. For the main thread."""
        content = self._content
        if content is None and self._layer.knows_at_once:
            try:
                return at_once(self._inner.try_pread, size, offset)
            except WouldWait:
                return None
        if content is None:
            return None
        if offset + size >= len(content):
            self._drop_content()
        return content[offset : offset + size]

    @property
    def knows_at_once(self) -> bool:
        """Whether :meth:`pread` respects :func:`cowfs.url.waiting.at_once`."""
        return self._layer.knows_at_once

    def _drop_content(self) -> None:
        if self._content is not None:
            self._layer.take_room(-len(self._content))
            self._content = None

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the whole file as one run, because finding holes may wait. :meth:`copy_to` finds them."""
        if end > start:
            yield start, end

    def descriptor(self) -> int:
        """Return the descriptor of the inner file, for counting; -1 if it has none."""
        return self._inner.fileno()

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy like the layer's file. Once this file is closed, stop writing and raise EBADF."""
        if size != 0:
            self._inner.copy_to(cast(File, _Target(self, target)), size)

    def write_to(self, call: Callable[..., R], *arguments: object) -> R:
        """Make *call*, unless this file is closed or closing. A close during the call waits for it."""
        with self._writing:
            if self._closed:
                raise os_error(errno.EBADF)
            return call(*arguments)

    def close(self) -> None:
        """Stop reading from the file, and stop writing what was read."""
        with self._writing:
            done, self._closed = self._closed, True
        self._drop_content()
        if not done:
            self._layer.dismiss(self)

    def close_now(self) -> None:
        """Close the inner file. May block."""
        self._closed = True
        if self._layer.let_go(self):
            with suppress(OSError):  # the lower is dead
                self._inner.close()


class _Target:
    """The target of a copy from a slow file. It stops a hanging copy from writing once it was given up."""

    def __init__(self, source: SlowFile, target: File) -> None:
        self._source = source
        self._target = target

    def pwrite(self, data: bytes, offset: int) -> int:
        return self._source.write_to(self._target.pwrite, data, offset)

    def truncate(self, size: int) -> None:
        self._source.write_to(self._target.truncate, size)

    def fileno(self) -> int:
        """Return -1: all writes go through :meth:`pwrite`."""
        return -1


def unwrapped(layer: LowerLayer) -> LowerLayer:
    """Return the inner layer of a slow one, else *layer*; for threads and callers that may wait."""
    return layer.inner if isinstance(layer, SlowLayer) else layer
