"""Test applications of core 0 and firmware of core 1 together with a real proxy, without hardware or root.

The pytest plugin provides the fixture `inco_board`. Without pytest, use `open_board`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from inco_trio.simulation.guest import Guest, GuestError
    from inco_trio.testing.board import Board, BoardCore0, BoardCore1, BoardFaults, BoardProxy, open_board
    from inco_trio.testing.carriers import ProxyDiedError
    from inco_trio.testing.happenings import Happening, NotificationMissingError

__all__ = [
    "Board",
    "BoardCore0",
    "BoardCore1",
    "BoardFaults",
    "BoardProxy",
    "Guest",
    "GuestError",
    "Happening",
    "NotificationMissingError",
    "ProxyDiedError",
    "open_board",
]

_MODULES = {
    **dict.fromkeys(("Guest", "GuestError"), "simulation.guest"),
    **dict.fromkeys(("Happening", "NotificationMissingError"), "testing.happenings"),
    "ProxyDiedError": "testing.carriers",
}


def __getattr__(name: str) -> object:
    # Import names only when they are used, because pytest loads this package in every test run.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"inco_trio.{_MODULES.get(name, 'testing.board')}"), name)
    globals()[name] = value
    return value
