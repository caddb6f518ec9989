"""Core 0 as applications see it: write trigger files and watch state files."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack

import trio

from inco_trio.cores.core import Core, in_background
from inco_trio.cores.watch import OverflowedError, Watch, trigger
from inco_trio.errors import IncoError, UnknownSignalError
from inco_trio.signals import Direction, Signal

__all__ = ["Core0"]


class Core0(Core):
    """Simulated applications on core 0, for use as `async with Core0(builtin_signals(Path("/run/irq"))):`.

    Entering the block raises PermissionDeniedError, ResourceError, and ProxyNotFoundError if a directory is missing. A
    later error cancels the block and is raised in an ExceptionGroup.
    """

    def __init__(self, signals: Iterable[Signal]) -> None:
        super().__init__("core 0")
        self.overflows = 0
        """Number of inotify queue overflows. After an overflow, notifications may be missing from the streams."""
        self._signals = {signal.name: signal for signal in signals}

    async def _start(self, resources: AsyncExitStack) -> None:
        watch = Watch()
        resources.callback(watch.close)
        inbound = (signal for signal in self._signals.values() if signal.direction is Direction.INBOUND)
        watch.follow(inbound, self._report)

        async def read() -> None:
            while True:
                await watch.wait_readable()
                watch.drain()

        await resources.enter_async_context(in_background(read))

    def _report(self, what: Signal | IncoError) -> None:
        if isinstance(what, Signal):
            self._arrive(what.name)
        elif isinstance(what, OverflowedError):
            self.overflows += 1
        else:
            raise what

    def _check_name(self, name: str) -> None:
        self._signal(name, Direction.INBOUND)

    def _signal(self, name: str, direction: Direction) -> Signal:
        known = {each.name: each for each in self._signals.values() if each.direction is direction}
        if name not in known:
            names = ", ".join(known) or "none"
            raise UnknownSignalError(f"{name}: not an {direction.value} signal of core 0 (expected one of: {names})")
        return known[name]

    async def send(self, name: str) -> None:
        """Write the trigger file of an outbound signal, as an application does.

        Raises UnknownSignalError, ProxyNotFoundError if the file is missing, PermissionDeniedError and ResourceError.
        """
        signal = self._signal(name, Direction.OUTBOUND)
        self._check_open()
        trigger(signal.path)
        await trio.lowlevel.checkpoint()
