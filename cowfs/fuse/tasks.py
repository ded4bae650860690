"""What the tasks of the daemon are doing, to find the cause of a hang."""

from __future__ import annotations

from collections.abc import Iterator

import trio


def describe_tasks() -> Iterator[str]:
    """Yield lines: the name of each task, then where it waits, innermost call last.

    Call it from trio's thread. Yields nothing if trio does not run.
    """
    try:
        root = trio.lowlevel.current_root_task()
    except RuntimeError:
        return
    waiting = [root] if root is not None else []
    while waiting:
        task = waiting.pop()
        yield f"task {task.name}:"
        for frame, line in task.iter_await_frames():
            yield f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
        for nursery in task.child_nurseries:
            waiting += nursery.child_tasks
