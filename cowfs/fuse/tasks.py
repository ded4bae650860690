"""What the tasks of the daemon are doing, to find the cause of a hang."""

from __future__ import annotations

from collections.abc import Iterator

import trio

_roots: list[trio.lowlevel.Task] = []


def note_root() -> None:
    """Note that this is trio's thread."""
    root = trio.lowlevel.current_root_task()
    _roots[:] = [] if root is None else [root]


def describe_tasks() -> Iterator[str]:
    """Yield lines: the name of each task, then where it waits, innermost call last.

    Any thread may call it; it raises an exception if a task changes meanwhile. Yields nothing before
    :func:`note_root`.
    """
    waiting = list(_roots)
    while waiting:
        task = waiting.pop()
        yield f"task {task.name}:"
        for frame, line in task.iter_await_frames():
            yield f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
        for nursery in task.child_nurseries:
            waiting += nursery.child_tasks
