"""Tests of which users the control socket and its clients trust, with processes of other users."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from inco_trio.control.client import Client
from inco_trio.control.follower import converse
from inco_trio.control.server import Peer
from inco_trio.errors import IncoError, PermissionDeniedError, ProtocolError
from inco_trio.linux.process import overflow_uid

STRANGER = 12345
"""A user ID that belongs neither to root nor to the user who runs the tests. It needs no account."""


@contextmanager
def listening_as(user: int, path: Path) -> Iterator[None]:
    """Run a process as `user`. The process listens at `path` and sends an invalid greeting to each client."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o777)
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(user, user, user)
            listener.listen()  # The kernel stores the credentials of the process that calls listen(2).
            os.write(done, b"1")
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError):
                    connection.sendall(b"not a greeting\n")
        finally:
            os._exit(0)
    os.close(done)
    listener.close()
    try:
        assert os.read(ready, 1) == b"1"
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def connect_blocking(path: Path) -> None:
    with Client(path):
        pass


def connect_with_trio(path: Path) -> None:
    async def connected() -> None:
        async with converse(path):
            pass

    trio.run(connected)


clients = pytest.mark.parametrize("connect", [connect_blocking, connect_with_trio], ids=["blocking", "trio"])


@pytest.mark.netns
@clients
def test_a_client_refuses_a_socket_of_another_user(tmp_path: Path, connect: Callable[[Path], None]) -> None:
    path = tmp_path / "control.sock"
    with listening_as(STRANGER, path), pytest.raises(PermissionDeniedError) as caught:
        connect(path)
    assert str(caught.value) == (
        f"{path}: the server runs as uid {STRANGER}: neither root nor this user nor the owner of {tmp_path} "
        "(remove the socket, or run this command as that user)"
    )


@pytest.mark.netns
@clients
@pytest.mark.parametrize("whose", ["this user", "owner of the directory"])
def test_a_client_trusts_its_own_user_and_the_owner_of_the_directory(
    tmp_path: Path, connect: Callable[[Path], None], whose: str
) -> None:
    path = tmp_path / "control.sock"
    user = os.geteuid() if whose == "this user" else STRANGER
    os.chown(tmp_path, user, -1)
    with listening_as(user, path), pytest.raises(ProtocolError):  # The client has read the invalid greeting.
        connect(path)


@pytest.mark.netns
@clients
def test_a_client_refuses_the_overflow_user(tmp_path: Path, connect: Callable[[Path], None]) -> None:
    path = tmp_path / "control.sock"
    os.chown(tmp_path, overflow_uid(), -1)
    with listening_as(overflow_uid(), path), pytest.raises(IncoError, match=f"runs as uid {overflow_uid()}"):
        connect(path)


def test_the_overflow_user_does_not_own_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", overflow_uid)
    assert [Peer(1, user).is_owner for user in (0, overflow_uid(), STRANGER)] == [True, False, False]


def test_the_overflow_user_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert overflow_uid.__wrapped__() == 65534
