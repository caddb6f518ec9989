from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from inco_trio.errors import InvalidArgumentError
from inco_trio.notify import check_notification_fd, notify_ready, notify_reloaded, notify_reloading, notify_stopping
from netns.hang import HANG


@pytest.fixture(autouse=True)
def no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)


def test_s6_gets_one_newline_and_the_end_of_file() -> None:
    read, write = os.pipe()
    notify_ready(write)
    assert [os.read(read, 10), os.read(read, 10)] == [b"\n", b""]
    os.close(read)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write)


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_gets_ready_and_stopping(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(HANG)
        manager.bind(f"\0{name}" if abstract else name)
        notify_ready(None)
        notify_stopping()
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_systemd_learns_the_result_of_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(HANG)
        manager.bind(f"{tmp_path}/notify")
        before = time.monotonic_ns() // 1000
        notify_reloading()
        reloading, clock = manager.recv(100).decode().splitlines()
        assert reloading == "RELOADING=1"
        # systemd ignores a READY=1 that is older than this time.
        assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        notify_reloaded(None)
        assert manager.recv(100) == b"READY=1\nSTATUS="
        notify_reloaded("u.json: \udcff")
        assert manager.recv(100) == b"READY=1\nSTATUS=reload refused, keeping the old configuration: u.json: ?"


@pytest.mark.parametrize("address", ["", "x" * 200, "relative", "@" * 200, "vsock:2:1", "/proc/self/x", "\udcff"])
def test_an_unusable_notify_socket_is_one_warning(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify_reloading()
    assert [line.startswith("cannot report RELOADING=1 to $NOTIFY_SOCKET (") for line in caplog.messages] == [
        True
    ] * bool(address)
    assert not any("\n" in line for line in caplog.messages)


def test_a_supervisor_that_does_not_read_does_not_block_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("inco_trio.notify.TIMEOUT", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        while not caplog.messages:
            notify_reloading()
    assert caplog.messages == [f"cannot report RELOADING=1 to $NOTIFY_SOCKET ('{tmp_path}/notify'): timed out"]


def test_without_a_supervisor_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    notify_ready(None)
    notify_stopping()
    assert caplog.messages == []


def test_a_missing_supervisor_does_not_stop_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    read, write = os.pipe()
    os.close(read)
    notify_ready(write)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"descriptor {write}: Broken pipe" in caplog.messages[0]
    assert f"READY=1 to $NOTIFY_SOCKET ('{tmp_path}/gone')" in caplog.messages[1]


def test_a_valid_descriptor_is_not_inherited_by_children() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    check_notification_fd(write)
    assert not os.get_inheritable(write)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("fd", [-1, 0, 2, 1_000_000, 2**40])
def test_an_invalid_descriptor_is_refused(fd: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^--notification-fd {fd}: [^\n]+$"):
        check_notification_fd(fd)


def test_a_read_only_descriptor_is_refused() -> None:
    with Path("/dev/null").open("rb") as readable, pytest.raises(InvalidArgumentError, match="for reading only"):
        check_notification_fd(readable.fileno())
