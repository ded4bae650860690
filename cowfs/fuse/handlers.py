"""Answer requests: turn a handler's exceptions into errnos, and retry what may still succeed."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from cowfs.errors import NoRoom, NotYetFree
from cowfs.fuse import libfuse
from cowfs.fuse.failure import errno_of
from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.threads import Threads
from cowfs.layers.slow import Answers, NotYet
from cowfs.overlay.overlay import Overlay

log = logging.getLogger(__name__)
_MOST_RELIEFS = 8
"""How often a call is retried after a commit freed space that other requests then took."""

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Handlers")


def failure_of(error: BaseException, name: str) -> FUSEError:
    """Return the answer to the kernel for an exception of the handler *name*."""
    return error if isinstance(error, FUSEError) else FUSEError(errno_of(error, name))


def _done_or_failed(error: Exception, name: str) -> Any:
    """Return what the handler *name* has done before an exception, or raise the answer to the kernel."""
    if isinstance(error, NoRoom) and error.answer:
        return error.answer
    raise failure_of(error, name) from None


def sync(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a plain method a request handler: its exceptions become errnos."""

    async def handler(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            if not self._may_succeed(error):
                raise failure_of(error, method.__name__) from None
            failure = error

        async def again() -> R:
            return method(self, *args, **kwargs)

        return await self._again(again, failure, method.__name__, _user_of(args))

    functools.update_wrapper(handler, method)
    return handler


def async_(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], *, changes: bool = False
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a method that may await a request handler."""

    async def handler(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if changes and self._pressed[0]:
            await self._relieve(_user_of(args))
        try:
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            if not self._may_succeed(error):
                raise failure_of(error, method.__name__) from None
            failure = error
        again = functools.partial(method, self, *args, **kwargs)
        return await self._again(again, failure, method.__name__, _user_of(args))

    functools.update_wrapper(handler, method)
    return handler


def changing(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a method that changes something a request handler. If many changes are pending, the handler first
    writes them to disk."""
    return async_(method, changes=True)


class Said(NamedTuple):
    """Details of a request that pyfuse3 does not pass on."""

    clears: bool | None
    """Whether the request clears set-ID bits, because the caller lacks CAP_FSETID; None: the kernel does not
    say.
    """
    pid: int
    uid: int
    """The caller's user ID, or :data:`cowfs.fuse.libfuse.KERNEL_UID`."""
    flags: int
    """Of a write: the flags of the open file. Of a setattr: what to set (FATTR_*)."""


_new = tuple.__new__  # faster than with field names


def told(
    method: Callable[Concatenate[S, Said, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a method a request handler that gets the details which pyfuse3 does not pass on.

    They are in the request's message, which exists only until the first await.
    """

    async def handler(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        said: Said = _new(Said, self._said())
        if self._pressed[0]:
            await self._relieve(said.uid)
        try:
            return await method(self, said, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            if not self._may_succeed(error):
                done: R = _done_or_failed(error, method.__name__)
                return done
            failure = error
        again = functools.partial(method, self, said, *args, **kwargs)
        return await self._again(again, failure, method.__name__, _user_of(args))

    functools.update_wrapper(handler, method)
    return handler


def _user_of(args: Sequence[Any]) -> int:
    """Return the calling user, from the context among a handler's last arguments."""
    for argument in reversed(args):
        uid = getattr(argument, "uid", None)
        if isinstance(uid, int):
            return uid
    return 0


class Handlers(pyfuse3.Operations):
    """The base of all handlers. The functions above make those of :class:`cowfs.fuse.adapter.Adapter`."""

    def __init__(self, fs: Overlay, loop: RequestLoop) -> None:
        super().__init__()
        self._fs = fs
        self._loop = loop
        self._threads = Threads(loop)
        self._pressed = fs.upper.pressed
        loop.hurry = fs.upper.hurry

    def _may_succeed(self, error: Exception, *, gave_way: bool = False, reliefs: int = 0) -> bool:
        """Whether to retry a call that failed with *error* and left nothing behind."""
        if isinstance(error, NotYet) or (not gave_way and self._may_get_room(error)):
            return True
        return (isinstance(error, NotYetFree) and reliefs < _MOST_RELIEFS) or self._made_room(error)

    async def _relieve(self, uid: int, *, for_room: bool = False) -> None:
        """Write the store's pending changes to disk; others are served meanwhile."""
        try:
            await self._threads.run(lambda: self._fs.upper.relieve(for_room), self._threads.syncs, uid)
        except OSError as failure:
            if for_room:
                raise
            log.debug("the store cannot be written to disk: %s", failure)  # the next change reports it

    def _may_get_room(self, error: Exception) -> bool:
        """Whether there may be space for a failed call once the requests that have arrived are handled.

        The kernel may send a FORGET of a removed file after requests that came later (fuse_dev_do_read() in
        fs/fuse/dev.c).
        """
        return isinstance(error, OSError) and error.errno == errno.ENOSPC and self._loop.has_next_request()

    async def _again(
        self, call: Callable[[], Coroutine[Any, Any, R]], error: Exception, name: str, uid: int
    ) -> R:
        """Retry *call*, which failed with *error*, until it succeeds or nothing is left to try."""
        answers = Answers(uid)
        gave_way = False
        reliefs = 0
        await self._loop.step_aside()  # the answers at hand belong to a task
        try:
            while True:
                try:
                    if isinstance(error, NotYet):
                        await self._threads.ask(error.question, answers)
                    elif not gave_way:
                        gave_way = True
                        await self._loop.serve_others()
                    if isinstance(error, NotYetFree):
                        reliefs += 1
                        await self._relieve(uid, for_room=True)
                    with answers.at_hand():
                        return await call()
                except Exception as failure:
                    if not self._may_succeed(failure, gave_way=gave_way, reliefs=reliefs):
                        done: R = _done_or_failed(failure, name)
                        return done
                    error = failure
        finally:
            answers.close()

    def _made_room(self, error: Exception) -> bool:
        """Make space for a call that failed for lack of it; return whether to retry. It left nothing
        behind."""
        if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
            return False
        try:
            return self._fs.host.make_room()
        except Exception:
            log.exception("the store cannot grow")
            return False

    _said: Callable[[], Iterable[Any]] = staticmethod(libfuse.said)
    """Return the details of the request that has just arrived: the fields of :class:`Said`."""


class HandlerTable(pyfuse3.Operations):
    """The handlers that pyfuse3 calls, by name: those of an adapter, until :meth:`replace` puts others there.

    The class of the adapter stays as it is: once ``__class__`` of an object has been assigned, Python takes
    longer for each of its attributes.
    """

    def __init__(self, adapter: Handlers) -> None:
        super().__init__()
        for name in dir(pyfuse3.Operations):
            if not name.startswith("_"):
                setattr(self, name, getattr(adapter, name))

    def replace(self, handlers: Mapping[str, Any]) -> dict[str, Any]:
        """Put *handlers* in the place of those with the same names; return those."""
        replaced = {name: getattr(self, name) for name in handlers}
        vars(self).update(handlers)
        return replaced
