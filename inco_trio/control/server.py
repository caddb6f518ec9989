"""The control socket server, which accepts clients within quotas. See docs/control.md."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

import trio

from inco_trio.control.accepting import accept
from inco_trio.control.feed import Feed, Reload, Served
from inco_trio.linux.process import overflow_uid
from inco_trio.linux.sockets import peer_of
from inco_trio.problems import Problems

if TYPE_CHECKING:
    from inco_trio.control.answering import Connection

__all__ = ["Control", "Peer"]

logger = logging.getLogger(__name__)

CLIENTS_MAX = 256
RESERVED = 32
"""Number of connections that are reserved for root and the user of the proxy."""
USER_MAX = 64
"""Maximum number of connections of any other user."""
FAREWELL = 0.1
"""Time in seconds for which clients can still read their queued events when the server closes."""


class Peer:
    """The process and the user of a client."""

    def __init__(self, process: int, user: int) -> None:
        self.process = process
        self.user = user

    @classmethod
    def of(cls, stream: trio.SocketStream) -> Peer:
        """Return the process and the user of the client, as reported by the kernel."""
        return cls(*peer_of(stream.socket))

    @property
    def is_owner(self) -> bool:
        """Whether the peer runs as root or as the user of this process.

        The overflow user ID never counts: in a user namespace, every unmapped user has it.
        """
        return self.user in (0, os.geteuid()) and self.user != overflow_uid()


class Control:
    """The server of the control socket. It reports on `served` and accepts clients on the socket `listener`."""

    def __init__(self, served: Served, listener: socket.socket, reload: Reload) -> None:
        self.feed = Feed(served)
        """The `notifications.Listener` to which the proxies report events."""
        self.closed = trio.Event()
        """Set once `serve` has returned."""
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._boot = os.urandom(8).hex()
        self._reload = reload
        self._clients: set[Connection] = set()
        self._limits = Problems()
        """The limits that each user has reached. Each one is logged once, so that a flood does not fill the log."""
        self._accepting, self._ending = trio.CancelScope(), trio.CancelScope()

    async def serve(self) -> None:
        """Answer clients until `close` is called."""
        try:
            with self._ending:
                async with trio.open_nursery() as clients:
                    with self._accepting:
                        await self._accept(clients)
        finally:
            self.closed.set()

    def close(self) -> None:
        """End `serve`, but let clients read their queued events for up to FAREWELL seconds."""
        self._accepting.cancel()
        self._ending.deadline = trio.current_time() + FAREWELL
        for client in self._clients:
            client.end()

    async def _accept(self, clients: trio.Nursery) -> None:
        problems = Problems()
        while True:
            clients.start_soon(self._serve_client, await accept(self._listener, "control", problems))

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        # Import `answering` lazily, because most proxies never have a client.
        from inco_trio.control.answering import Connection

        client = Connection(stream, Peer.of(stream), self.feed, self._boot, self._reload)
        try:
            async with stream:
                if refusal := self._refusal(client):
                    self._report(client, "refused a client", refusal)
                    await client.refuse(refusal)
                else:
                    self._clients.add(client)
                    await client.run()
                    if client.fault:
                        self._report(client, "closed the connection of a client", client.fault)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The client has closed the connection.
        except* Exception:
            logger.exception("control socket: internal error: this is a bug in inco-trio; please report it")
        finally:
            self._clients.discard(client)
            if not any(other.peer.user == client.peer.user for other in self._clients):
                for what in ("refused a client", "closed the connection of a client"):
                    self._limits.forget((client.peer.user, what))

    def _report(self, client: Connection, what: str, reason: str) -> None:
        """Log that a user has reached a limit. Do not log it again until the user has closed all connections."""
        peer = client.peer
        if self._limits.said((peer.user, what)) is None:
            text = f"{what} of user {peer.user} (pid {peer.process}): {reason}"
            # One person can have many user IDs (subuid(5)), and can use a different process for each connection.
            self._limits.failed((peer.user, what), text, "control", cause=what)

    def _refusal(self, client: Connection) -> str | None:
        """Return the quota that a client exceeds, or None.

        Clients that were refused, or that have closed their connections, do not count.
        """
        clients = self._clients | {client}
        if self._over_quota(client, clients) is None:
            return None
        gone = {other for other in clients if other.gone}
        for other in gone:
            other.end()
        return self._over_quota(client, clients - gone)

    @staticmethod
    def _over_quota(client: Connection, clients: set[Connection]) -> str | None:
        if client.peer.is_owner:
            return f"{CLIENTS_MAX} clients are connected already" if len(clients) > CLIENTS_MAX else None
        others = [other.peer.user for other in clients if not other.peer.is_owner]
        if others.count(client.peer.user) > USER_MAX:
            return f"{USER_MAX} clients of user {client.peer.user} are connected already"
        if len(others) > CLIENTS_MAX - RESERVED or len(clients) > CLIENTS_MAX:
            return f"{len(clients) - 1} clients are connected already"
        return None
