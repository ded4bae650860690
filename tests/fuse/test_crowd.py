"""Tasks that wait for the same thing continue a few at a time."""

from __future__ import annotations

import trio
import trio.testing

from cowfs.fuse.crowd import Crowd


async def test_others_are_served_while_a_crowd_goes_on() -> None:
    """16,000 opens of a file during its copy-up would otherwise block the mount for seconds."""
    crowd, gone, most = Crowd(), 0, 0

    async def waiter() -> None:
        nonlocal gone
        await crowd.wait()
        gone += 1

    async def other() -> None:
        nonlocal most
        while gone < 500:
            before = gone
            await trio.lowlevel.checkpoint()
            most = max(most, gone - before)

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(waiter)
        await trio.testing.wait_all_tasks_blocked()
        assert gone == 0 and crowd.is_waited_for
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        crowd.set()
    assert gone == 500 and most <= 16
    assert not crowd.is_waited_for
    await crowd.wait()  # at once


async def test_who_is_cancelled_keeps_nobody_waiting() -> None:
    """An interrupted request may be the one that should wake the next."""
    crowd, gone = Crowd(), 0
    scopes = [trio.CancelScope() for _ in range(200)]

    async def waiter(scope: trio.CancelScope) -> None:
        nonlocal gone
        with scope:
            await crowd.wait()
        gone += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(waiter, scope)
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes[::7]:
                scope.cancel()
            crowd.set()
            for scope in scopes[::3]:
                scope.cancel()
    assert gone == 200
