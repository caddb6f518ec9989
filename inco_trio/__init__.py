"""inco-trio: carries inter-core interrupts between the cores of an AMP board, and of its simulation.

As a library::

    async with inco_trio.open_proxy(inco_trio.Config("rpmsg4000", inco_trio.read_board("udrv.json").signals)) as proxy:
        await proxy.send("redun_notify_irq")
        with proxy.events() as events:
            async for event in events:
                print(event.signal.name)

The command line is `inco_trio.cli`; asyncio callbacks are in `inco_trio.aio`.
"""

from __future__ import annotations

# As typing.TYPE_CHECKING: typing takes longer to import than all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from inco_trio.config import Board, Config, read_board
    from inco_trio.cores.core import Arrival
    from inco_trio.cores.core0 import Core0
    from inco_trio.cores.core1 import Core1
    from inco_trio.errors import (
        BoardNotOpenError,
        ClosedError,
        ConfigError,
        IncoError,
        InvalidArgumentError,
        LinkNotFoundError,
        PermissionDeniedError,
        ProxyNotFoundError,
        ResourceError,
        UnknownSignalError,
    )
    from inco_trio.notifications import Notification
    from inco_trio.proxy.fleet import Proxies, open_proxies
    from inco_trio.proxy.proxy import Proxy, open_proxy, serve
    from inco_trio.proxy_status import SignalStatus, Stats, Status, TaskStatus
    from inco_trio.signals import Direction, Signal, builtin_signals

__all__ = [
    "Arrival",
    "Board",
    "BoardNotOpenError",
    "ClosedError",
    "Config",
    "ConfigError",
    "Core0",
    "Core1",
    "Direction",
    "IncoError",
    "InvalidArgumentError",
    "LinkNotFoundError",
    "Notification",
    "PermissionDeniedError",
    "Proxies",
    "Proxy",
    "ProxyNotFoundError",
    "ResourceError",
    "Signal",
    "SignalStatus",
    "Stats",
    "Status",
    "TaskStatus",
    "UnknownSignalError",
    "builtin_signals",
    "open_proxies",
    "open_proxy",
    "read_board",
    "serve",
]

# Imported when they are first used (PEP 562): `inco-trio check` needs no Trio.
_PLACES = {
    "config": ("Board", "Config", "read_board"),
    "cores.core": ("Arrival",),
    "cores.core0": ("Core0",),
    "cores.core1": ("Core1",),
    "errors": (
        "BoardNotOpenError",
        "ClosedError",
        "ConfigError",
        "IncoError",
        "LinkNotFoundError",
        "PermissionDeniedError",
        "ProxyNotFoundError",
        "ResourceError",
        "UnknownSignalError",
        "InvalidArgumentError",
    ),
    "proxy.fleet": ("Proxies", "open_proxies"),
    "notifications": ("Notification",),
    "proxy.proxy": ("Proxy", "open_proxy", "serve"),
    "signals": ("Direction", "Signal", "builtin_signals"),
    "proxy_status": ("SignalStatus", "Stats", "Status", "TaskStatus"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
