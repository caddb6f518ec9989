"""inco-trio carries inter-core interrupts between the cores of an AMP board, or of its simulation.

As a library::

    config = inco_trio.Config("rpmsg4000", inco_trio.read_board("udrv.json").signals)
    async with inco_trio.open_proxy(config) as proxy:
        await proxy.send("redun_notify_irq")
        with proxy.events() as events:
            async for event in events:
                print(event.signal.name)

`inco_trio.cli` is the command line; `inco_trio.aio` is the asyncio API.
"""

from __future__ import annotations

# Define this here instead of importing it from typing: that import would take longer than importing this module.
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
    from inco_trio.notification import Notification
    from inco_trio.proxy.fleet import Proxies, open_proxies
    from inco_trio.proxy.proxy import Proxy, open_proxy, serve
    from inco_trio.proxy_status import RecorderStatus, RivalStatus, SignalStatus, Status, TaskStatus
    from inco_trio.signals import Direction, Signal, builtin_signals
    from inco_trio.stats import Stats

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
    "RecorderStatus",
    "ResourceError",
    "RivalStatus",
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

# Each module is imported when one of its names is first used (PEP 562). `inco-trio check` never imports Trio.
_NAMES_OF = {
    "config": ("Board", "Config", "read_board"),
    "cores.core": ("Arrival",),
    "cores.core0": ("Core0",),
    "cores.core1": ("Core1",),
    "notification": ("Notification",),
    "proxy.fleet": ("Proxies", "open_proxies"),
    "proxy.proxy": ("Proxy", "open_proxy", "serve"),
    "signals": ("Direction", "Signal", "builtin_signals"),
    "stats": ("Stats",),
    "proxy_status": ("RecorderStatus", "RivalStatus", "SignalStatus", "Status", "TaskStatus"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
"""The module that defines each name in `__all__`, except for the names from the module `errors`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
