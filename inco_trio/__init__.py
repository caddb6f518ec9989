"""inco-trio: carries inter-core interrupts between the cores of an AMP board, and of its simulation.

    async with inco_trio.open_proxy(inco_trio.Config("rpmsg4000", inco_trio.read_board("udrv.json").signals)) as proxy:
        await proxy.send("redun_notify_irq")
        with proxy.events() as events:
            async for event in events:
                print(event.signal.name)

The command line is `inco_trio.commands`; asyncio callbacks are in `inco_trio.aio`.
"""

from __future__ import annotations

from inco_trio.config import Board, Config, read_board
from inco_trio.errors import (
    ClosedError,
    ConfigError,
    IncoError,
    LinkMissing,
    PermissionRefused,
    ResourceRefused,
    UnknownSignal,
    UsageError,
)
from inco_trio.proxy import Notification, Proxy, open_proxy, serve
from inco_trio.signals import Direction, Signal, builtin_signals
from inco_trio.stats import Stats

__all__ = [
    "Board",
    "ClosedError",
    "Config",
    "ConfigError",
    "Direction",
    "IncoError",
    "LinkMissing",
    "Notification",
    "PermissionRefused",
    "Proxy",
    "ResourceRefused",
    "Signal",
    "Stats",
    "UnknownSignal",
    "UsageError",
    "builtin_signals",
    "open_proxy",
    "read_board",
    "serve",
]
