"""Supervision of a task: restart the task after a failure, with back-off."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from inco_trio.backoff import Backoff
from inco_trio.counters import Counters
from inco_trio.problems import Problems

__all__ = ["TRANSIENT", "Health", "supervise"]

TRANSIENT = frozenset({
    errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.EINTR,
    errno.ENETDOWN, errno.ENODEV, errno.ENXIO,
})  # fmt: skip
"""Error numbers after which a task is restarted. Any other error is a bug and ends the proxy."""


class Health:
    """The state of a task, as reported in the log and by `status`."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.backoff = Backoff()
        self.restarts = 0
        self.last_problem: str | None = None
        self._problems = Problems()

    @property
    def problem(self) -> str | None:
        return self._problems.said(self.task)

    def failed(self, problem: str) -> None:
        """Set the current problem, and log it if it is new."""
        self.last_problem = problem
        self._problems.failed(self.task, problem)

    def well(self) -> None:
        """Clear the current problem: the task has recovered."""
        if self._problems.well(self.task):
            self.backoff.reset()


async def supervise(health: Health, task: Callable[[Health], Awaitable[None]], counters: Counters) -> None:
    """Run `task` until it returns. After an OSError in TRANSIENT, pause and restart the task."""
    while True:
        try:
            return await task(health)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            health.failed(f"{error.strerror}; restarting the task")
            counters.restarts += 1
            health.restarts += 1
        await trio.sleep(health.backoff.next())
