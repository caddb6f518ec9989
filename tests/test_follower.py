"""Tests of the control socket's Trio client, including tests against servers that are not proxies."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.control.follower import Conversation, converse
from inco_trio.control.protocol import Event, StatusRequest
from inco_trio.errors import IncoError, InvalidArgumentError, ProtocolError, ProxyNotFoundError

GREETING = b'{"protocol": 1, "name": "x", "pid": 1, "boot": "5f0c", "boards": []}\n'
LINK = b'{"event": "link", "running": true, "time": 1.5}\n'


def conversing(
    tmp_path: Path, answers: list[bytes], talk: Callable[[Conversation], object], clock: MockClock | None = None
) -> None:
    """Run `talk` with a server that sends one answer at the start and one for each line it receives, and then ends."""
    path = tmp_path / "control.sock"

    async def serve(listener: trio.SocketListener) -> None:
        async with await listener.accept() as stream:
            for answer in answers:
                await stream.send_all(answer)
                await stream.receive_some(1 << 16)

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.fspath(path))
            sock.listen()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, listener)
                async with converse(path) as (conversation, _):
                    await talk(conversation)  # type: ignore[misc]
                nursery.cancel_scope.cancel()

    try:
        trio.run(main, clock=clock)
    except* IncoError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        failure: BaseException | None = error
    else:
        failure = None
    if failure is not None:
        assert str(failure).startswith(f"{path}: ")
        raise failure


async def status(conversation: Conversation) -> None:
    assert (await conversation.request(StatusRequest())).status == ()
    assert [reply.event for reply in await conversation.read() if isinstance(reply, Event)] == ["link", "link"]


async def ask(conversation: Conversation) -> None:
    await conversation.request(StatusRequest())


def test_events_before_and_after_an_answer_are_kept(tmp_path: Path) -> None:
    conversing(tmp_path, [GREETING, LINK + b'{"sta', b'tus": []}\n' + LINK], _twice)


async def _twice(conversation: Conversation) -> None:
    # The server sends the second half of the answer only after the client has sent another line.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_more, conversation)
        await status(conversation)


async def _more(conversation: Conversation) -> None:
    await wait_all_tasks_blocked()
    await conversation.write(StatusRequest())


@pytest.mark.parametrize(
    ("answers", "kind", "text"),
    [
        ([b"nonsense\n"], ProtocolError, "not inco-trio"),
        ([b"[]\n"], ProtocolError, "not inco-trio"),
        ([b'{"hello": 1}\n'], ProtocolError, "not inco-trio"),
        ([GREETING, b'{"error": "unknown-request", "message": "what"}\n'], IncoError, "what"),
        ([b'{"error": "busy", "message": "256 clients"}\n'], IncoError, "256 clients"),
        ([GREETING], ProxyNotFoundError, "has ended"),
        ([], ProxyNotFoundError, "has ended"),
    ],
)
def test_a_server_that_is_not_a_proxy_is_an_error(
    tmp_path: Path, answers: list[bytes], kind: type[IncoError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        conversing(tmp_path, answers, ask)


def test_a_server_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProxyNotFoundError, match="does not answer"):
        conversing(tmp_path, [GREETING, b""], ask, MockClock(autojump_threshold=0))


def test_missing_proxy_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with converse(tmp_path / "nowhere"):
            pytest.fail("connected to a missing socket")

    with pytest.raises(ProxyNotFoundError, match="nowhere"):
        trio.run(main)
    assert not issubclass(ProxyNotFoundError, InvalidArgumentError)
