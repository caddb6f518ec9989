"""Helpers for Trio: nurseries that raise errors unwrapped, and work that lets other tasks run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import TypeVar

import trio

from inco_trio import real_clock
from inco_trio.errors import IncoError, unwrapped

__all__ = ["in_turns", "plain_nursery", "read_aside", "starting_and_stopping"]

T = TypeVar("T")

TURN = 0.004
"""Seconds after which long work lets other tasks run."""


async def in_turns(steps: Generator[object, None, None]) -> None:
    """Run all `steps`, and let other tasks run every few milliseconds."""
    with contextlib.closing(steps):
        end = real_clock.monotonic() + TURN
        for _ in steps:
            if real_clock.monotonic() >= end:
                await trio.lowlevel.checkpoint()
                end = real_clock.monotonic() + TURN


async def read_aside(read: Callable[[], T]) -> T:
    """Call `read` in a thread and return its result. In the event loop, reading files would delay notifications."""
    try:
        return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
    except RuntimeError:  # No thread can be started: read in the event loop.
        return read()


@contextlib.asynccontextmanager
async def plain_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises an IncoError unchanged instead of in an ExceptionGroup."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except* IncoError as group:
        failure = unwrapped(group)
    if failure is not None:
        raise failure


@contextlib.asynccontextmanager
async def starting_and_stopping(
    start: Callable[[trio.Nursery], None], stop: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Run the tasks that `start` starts while the block runs. Then await `stop`, shielded from cancellation.

    An exception in the block is raised unchanged. Exceptions in tasks are raised in an ExceptionGroup.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                start(nursery)
                yield
            except BaseException as error:  # noqa: BLE001
                # Raise the error below, outside the nursery, which would wrap it in a group.
                cancelled, failure = _split_cancelled(error)
                if cancelled is not None:
                    raise cancelled from None
            finally:
                with trio.CancelScope(shield=True):
                    await stop()
    except BaseExceptionGroup as group:
        if failure is not None:
            raise BaseExceptionGroup("the proxy and the block that used it failed", [failure, group]) from None
        raise
    if failure is not None:
        raise failure


def _split_cancelled(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Split `error` into the cancellation, which the nursery must receive, and all other errors."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)
    return (error, None) if isinstance(error, trio.Cancelled) else (None, error)
