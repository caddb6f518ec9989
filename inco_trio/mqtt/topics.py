"""The topics of a gateway: `<prefix>/<board>/<inbound|outbound>/<signal>`, status, counters and requests."""

from __future__ import annotations

import base64
import hashlib
from urllib.parse import unquote_to_bytes

from inco_trio.signals import Direction

__all__ = ["Topics", "client_id", "level", "name_of"]

_OF_MQTT = frozenset("/+#%")
"""Characters with a special meaning in topic filters (MQTT 5, 4.7), and the escape character."""


def level(name: str) -> str:
    """Encode `name` as a topic level: replace each byte that a level cannot contain with `%XX`, as in a URL."""
    return "".join(
        char
        if char.isprintable() and char not in _OF_MQTT
        else "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogateescape"))
        for char in name
    )


def name_of(level: str) -> str:
    """Decode a topic level that `level` has encoded."""
    return unquote_to_bytes(level).decode(errors="surrogateescape")


def client_id(topic: str) -> str:
    """Return the client identifier of the process that publishes below `topic`.

    It consists of 23 letters, digits and `-`: brokers may refuse longer identifiers and other characters (MQTT 5,
    3.1.3.1).
    """
    digest = hashlib.sha256(topic.encode(errors="surrogateescape")).digest()
    return f"inco-trio-{base64.b32encode(digest).decode()[:13].lower()}"


class Topics:
    """The topics of one board."""

    def __init__(self, prefix: str, board: str) -> None:
        self._board = f"{prefix}/{level(board)}"
        self.client_id = client_id(self._board)
        self.status = f"{self._board}/status"
        self.counters = f"{self._board}/counters"
        self._send = f"{self._board}/send/"
        self._notifications: dict[tuple[Direction | None, str], str] = {}
        self.sends = f"{self._send}+"
        """The topic filter that matches all requests to send a signal."""

    def notification(self, direction: Direction | None, signal: str) -> str:
        key = direction, signal
        if (topic := self._notifications.get(key)) is None:
            name = "" if direction is None else direction.value
            topic = self._notifications[key] = f"{self._board}/{name}/{level(signal)}"
        return topic

    def send(self, signal: str) -> str:
        return f"{self._send}{level(signal)}"

    def signal_of(self, topic: str) -> str | None:
        """Return the signal that a request with this topic names, or None if the topic does not match `sends`."""
        signal = topic.removeprefix(self._send)
        return None if signal == topic or "/" in signal else name_of(signal)
