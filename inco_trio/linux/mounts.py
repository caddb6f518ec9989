"""Watch for mounts and unmounts in this process's mount namespace (proc_pid_mounts(5))."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import trio

__all__ = ["Mounts"]

PAUSE = 0.0002
"""Seconds to pause for each checked file after a change. The checks then use about a tenth of the CPU."""


class Mounts:
    """A watcher for mounts and unmounts in this process's mount namespace. Without /proc, it reports no changes.

    `run` calls each of `followers` after a change. A follower returns how many files it will check. Raises OSError.
    """

    def __init__(self) -> None:
        self.followers: set[Callable[[], int]] = set()
        self._fds: list[int] = []
        self._scope = trio.CancelScope()
        # poll(2) reports a change once for each descriptor, as POLLPRI. Trio can wait only for POLLIN, which an epoll
        # descriptor reports. `_missed` reports a change that occurs before Trio waits. Do not use poll(2) for this,
        # because it fails with EINVAL while RLIMIT_NOFILE is too low.
        self._waited = select.epoll()
        try:
            self._missed = select.epoll()
        except BaseException:
            self._waited.close()
            raise
        try:
            for watch in (self._waited.register, self._missed.register):
                self._fds.append(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
                watch(self._fds[-1], select.EPOLLPRI)
        except FileNotFoundError:
            pass  # /proc is not mounted.
        except BaseException:
            self.close()
            raise

    async def run(self) -> None:
        """Call the followers after each change until `stop` is called."""
        with self._scope:
            while True:
                await self._wait()
                files = sum(follower() for follower in tuple(self.followers))
                await trio.sleep(PAUSE * files)

    async def _wait(self) -> None:
        """Wait until a filesystem has been mounted or unmounted since the last call."""
        with trio.CancelScope() as waiting:
            # Trio calls `_end_if_missed` after the wait below has begun.
            trio.lowlevel.current_trio_token().run_sync_soon(self._end_if_missed, waiting)
            await trio.lowlevel.wait_readable(self._waited.fileno())
            if not self._missed.closed:
                self._missed.poll(0)

    def _end_if_missed(self, waiting: trio.CancelScope) -> None:
        if self._waited.closed or self._missed.poll(0):
            waiting.cancel()

    async def stop(self) -> None:
        self._scope.cancel()

    def close(self) -> None:
        self._waited.close()
        self._missed.close()
        while self._fds:
            os.close(self._fds.pop())
