"""Tasks and their failures: restart of a failed leg, with back-off, and the one nursery that a block runs beside."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator

import trio

from inco_trio.errors import IncoError
from inco_trio.status import Counters

__all__ = [
    "TRANSIENT",
    "Backoff",
    "Health",
    "Problems",
    "board_name",
    "in_turns",
    "plain_nursery",
    "starting_and_stopping",
    "supervise",
    "working_for",
]

logger = logging.getLogger(__name__)

TRANSIENT = frozenset({
    errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.EINTR,
    errno.ENETDOWN, errno.ENODEV, errno.ENXIO,
})  # fmt: skip
"""What is tried again, and a leg restarted for. Anything else is a programming error and ends the proxy."""


board_name: contextvars.ContextVar[str] = contextvars.ContextVar("inco_trio.board", default="")
"""The board that a task works for, where a process has many; the log has it."""


@contextlib.contextmanager
def working_for(board: str) -> Iterator[None]:
    """Have the log name `board` while the block runs."""
    token = board_name.set(board)
    try:
        yield
    finally:
        board_name.reset(token)


TURN = 0.004
"""Seconds after which a long piece of work lets other tasks run."""


class Backoff:
    """Growing pauses, capped and jittered, in seconds.

    The cap is what a user waits at most, beyond the cause itself, for a service that was mended.
    """

    FIRST = 0.005
    CAP = 0.08

    def __init__(self) -> None:
        self._pause = self.FIRST

    def next(self) -> float:
        """The next pause."""
        pause = self._pause * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load, hides nothing
        self._pause = min(self._pause * 2, self.CAP)
        return pause

    def reset(self) -> None:
        """Start from the first pause again, after a success."""
        self._pause = self.FIRST


class Problems:
    """What is wrong, said once each: `failed` and `well` log once a change of what is known by `key`."""

    def __init__(self) -> None:
        self._said: dict[object, str] = {}

    def failed(self, key: object, problem: str, what: object = None, event: str = "problem") -> None:
        """Log `problem` of `what`, by default the key, unless it was the last thing said of it."""
        if self._said.get(key) != problem:
            self._said[key] = problem
            logger.warning("%s: %s", key if what is None else what, problem, extra={"event": event})

    def well(self, key: object, what: object = None) -> bool:
        """It works; returns whether it did not before."""
        if self._said.pop(key, None) is None:
            return False
        logger.info("%s: works again", key if what is None else what, extra={"event": "works"})
        return True

    def said(self, key: object) -> str | None:
        """What is wrong, if anything is."""
        return self._said.get(key)

    def forget(self, key: object) -> None:
        """It does not matter any more."""
        self._said.pop(key, None)


class Health:
    """What a leg says of itself."""

    def __init__(self, leg: str) -> None:
        self.leg = leg
        self.backoff = Backoff()
        self.restarts = 0
        self.last_problem: str | None = None
        self._problems = Problems()

    @property
    def problem(self) -> str | None:
        """What was said to be wrong, until it works again."""
        return self._problems.said(self.leg)

    def failed(self, problem: str) -> None:
        """Log `problem`, unless it was the last thing said."""
        self.last_problem = problem
        self._problems.failed(self.leg, problem)

    def well(self) -> None:
        """The leg does its work."""
        if self._problems.well(self.leg):
            self.backoff.reset()


async def in_turns(steps: Generator[object, None, None]) -> None:
    """Run all of `steps`, letting other tasks run between two of them every few milliseconds."""
    with contextlib.closing(steps):
        end = time.monotonic() + TURN
        for _ in steps:
            if time.monotonic() >= end:
                await trio.lowlevel.checkpoint()
                end = time.monotonic() + TURN


async def supervise(health: Health, leg: Callable[[Health], Awaitable[None]], counters: Counters) -> None:
    """Run `leg` until it returns; after an OSError of the kinds in TRANSIENT run it again, after a pause."""
    while True:
        try:
            return await leg(health)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            health.failed(f"{error.strerror}; restarted")
            counters.restarts += 1
            health.restarts += 1
        await trio.sleep(health.backoff.next())


@contextlib.asynccontextmanager
async def plain_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery of which one error that can be said in a line comes out by itself."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except* IncoError as group:
        failure = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    if failure is not None:
        raise failure


@contextlib.asynccontextmanager
async def starting_and_stopping(
    start: Callable[[trio.Nursery], None], stop: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Run the tasks that `start` starts while the block runs, and `stop`, shielded, at its end.

    What the block raises is raised as it is, what a task raises in a group.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                start(nursery)
                yield
            except BaseException as error:  # noqa: BLE001
                # Raised again below, where no nursery puts it into a group.
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
    """What of `error` is a cancellation, which the nursery has to see, and what is not."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)
    return (error, None) if isinstance(error, trio.Cancelled) else (None, error)
