"""The topics of a gateway: `<prefix>/<board>/<inbound|outbound>/<signal>`, and those beside them."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

__all__ = ["Topics", "level", "name_of"]

_OF_MQTT = frozenset("/+#%")
"""What has a meaning in a topic filter (MQTT 5, 4.7), and the sign of what stands for it."""


def level(name: str) -> str:
    """A topic level that stands for `name`: as in a URL, `%` and two digits stand for what no level can have.

    No name of a board or a signal leads out of its level, or into a wildcard.
    """
    return "".join(
        char
        if char.isprintable() and char not in _OF_MQTT
        else "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogateescape"))
        for char in name
    )


def name_of(level: str) -> str:
    """The name that a topic level stands for."""
    return unquote_to_bytes(level).decode(errors="surrogateescape")


class Topics:
    """Those of one board."""

    def __init__(self, prefix: str, board: str) -> None:
        self._board = f"{prefix}/{level(board)}"
        self.status = f"{self._board}/status"
        self.counters = f"{self._board}/counters"
        self._send = f"{self._board}/send/"
        self.sends = f"{self._send}+"
        """The filter of all that may be sent."""

    def notification(self, direction: str, signal: str) -> str:
        """Where a notification is published."""
        return f"{self._board}/{direction}/{level(signal)}"

    def signal_of(self, topic: str) -> str:
        """The signal that a topic of `sends` names."""
        return name_of(topic.removeprefix(self._send))
