"""A board under test: for tests of applications on core 0 and of firmware on core 1, without a board and without root.

The pytest plugin has the fixture `board`; `open_board` is the same without pytest.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from inco_trio.simulation.guest import Guest, GuestError
    from inco_trio.testing.board import Board, Core0, Core1, Faults, Proxy, open_board
    from inco_trio.testing.carriers import ProxyDied
    from inco_trio.testing.history import Happening, NotificationMissing

__all__ = [
    "Board",
    "Core0",
    "Core1",
    "Faults",
    "Guest",
    "GuestError",
    "Happening",
    "NotificationMissing",
    "Proxy",
    "ProxyDied",
    "open_board",
]

_PLACE_OF = {
    "Board": "testing.board",
    "Core0": "testing.board",
    "Core1": "testing.board",
    "Faults": "testing.board",
    "Guest": "simulation.guest",
    "GuestError": "simulation.guest",
    "Happening": "testing.history",
    "NotificationMissing": "testing.history",
    "Proxy": "testing.board",
    "ProxyDied": "testing.carriers",
    "open_board": "testing.board",
}


def __getattr__(name: str) -> object:
    # Imported when they are first used: the plugin is loaded by each pytest that finds it.
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"inco_trio.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value
