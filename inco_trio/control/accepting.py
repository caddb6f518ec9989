"""Accept clients, even while no descriptor is free."""

from __future__ import annotations

import trio

from inco_trio.problems import Problems
from inco_trio.proxy.supervise import TRANSIENT

__all__ = ["accept"]

ACCEPT_AGAIN = 0.1
"""Pause in seconds after a failed accept(2)."""


async def accept(listener: trio.SocketListener, subject: str, problems: Problems) -> trio.SocketStream:
    """Accept a client. While no descriptor is free, log the problem once and retry.

    trio.serve_listeners would log a traceback for each attempt.
    """
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            problems.failed(subject, f"cannot accept a client: {error.strerror}; retrying")
            await trio.sleep(ACCEPT_AGAIN)
        else:
            problems.well(subject)
            return stream
