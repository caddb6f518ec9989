"""A board under test: for tests of applications on core 0 and of firmware on core 1, without a board and without root.

The pytest plugin has the fixture `inco_board`; `open_board` is the same without pytest.
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

_PLACE_OF = {
    "Board": "testing.board",
    "BoardCore0": "testing.board",
    "BoardCore1": "testing.board",
    "BoardFaults": "testing.board",
    "Guest": "simulation.guest",
    "GuestError": "simulation.guest",
    "Happening": "testing.happenings",
    "NotificationMissingError": "testing.happenings",
    "BoardProxy": "testing.board",
    "ProxyDiedError": "testing.carriers",
    "open_board": "testing.board",
}


def __getattr__(name: str) -> object:
    # Imported when first used: pytest loads the plugin wherever the package is installed.
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"inco_trio.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value
