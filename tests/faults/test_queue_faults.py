"""Tests in which queues overflow, limits are reached, and system calls fail."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.control.client import client_of
from inco_trio.simulation.world import Peer
from netns.fixtures import Consumer, StartProxy
from netns.hang import HANG
from tests.faults.conftest import Board
from tests.faults.processes import INOTIFY, injected, packet_socket, wait_stopped


def test_an_inotify_queue_overflow_sends_each_trigger(board: Board) -> None:
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    wait_stopped(board.proxy.pid)
    # Each trigger causes two events: a write and a close.
    for _ in range(room // 2 + 100):
        board.applications.trigger("out_a")
    board.applications.trigger("out_b")
    os.kill(board.proxy.pid, signal.SIGCONT)
    board.wire.wait_seen("out_b")
    board.proxy.wait_log("overflowed")
    assert board.proxy.counters()["overflowed"] == 1
    assert board.wire.seen["out_a"] > room // 2 - 100
    board.works()
    assert board.wire.seen["out_b"] == 2


def test_frames_dropped_by_the_kernel_are_counted(
    only_net_raw: None, proxy: StartProxy, core1: Peer, irq_dir: Path, watch: Callable[[Path], Consumer]
) -> None:
    # Without CAP_NET_ADMIN, the proxy cannot enlarge its receive queue.
    running = proxy("--irq-dir", irq_dir)
    sent = 20_000
    wait_stopped(running.pid)
    for _ in range(sent):
        core1.send(b"ihub_reset_irq")
    os.kill(running.pid, signal.SIGCONT)
    while True:
        counters = running.counters()
        if counters["received"] + counters["dropped"] >= sent:
            break
    assert counters["received"] + counters["dropped"] == sent
    assert counters["dropped"] > 0
    while (delivered := running.counters()["delivered"]) < counters["received"]:
        pass
    assert delivered == counters["received"]
    assert "frames dropped" in running.log
    # Do not compare the number of closes that were seen so far: the kernel can merge two of them while another test
    # reads /proc/PID/fd of the proxy.
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"ihub_reset_irq")
    resets.wait(1)


def test_a_lack_of_descriptors_while_running_loses_nothing(board: Board) -> None:
    hard = resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE, (0, hard))
    for _ in range(3):
        board.core1.send(b"in_a")
        board.applications.trigger("out_a")
    board.proxy.wait_log("Too many open files")
    board.wire.wait(
        lambda: board.wire.seen["out_a"] == 3, "out_a has not been sent, although sending needs no descriptor"
    )
    resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE, (hard, hard))
    board.applications.wait(
        lambda: board.applications.closes["in_a"] >= 3, "pending notifications have not been delivered"
    )
    board.proxy.wait_log("works again")
    assert board.applications.closes["in_a"] == 3
    assert board.proxy.log.count("cannot write: Too many open files") == 1


def test_a_client_waits_until_there_are_descriptors(board: Board) -> None:
    client = client_of(board.proxy.pid)
    assert client is not None
    client.close()
    hard = resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE, (0, hard))
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(HANG)
        late.connect(str(client.path))
        board.proxy.wait_log("control: cannot accept a client: Too many open files")
        resource.prlimit(board.proxy.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert b'"protocol": 1' in late.recv(1024)
    board.proxy.wait_log("control: works again")
    assert "Traceback" not in board.proxy.log
    board.works()


@pytest.mark.parametrize("limit", range(5, 14))
def test_a_lack_of_descriptors_at_start_is_an_error(
    python_runs_under: Callable[..., None],
    proxy: StartProxy,
    irq_dir: Path,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Coverage needs free descriptors when the process exits, and prints a traceback without them.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    python_runs_under("prlimit", f"--nofile={limit}")
    running = proxy("--irq-dir", irq_dir, ready=False)
    assert running.wait() == 71
    assert "Too many open files" in running.log or "limit reached" in running.log
    assert "Traceback" not in running.log


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_inotify_instances", "raise fs.inotify.max_user_instances"),
        ("max_inotify_watches", "raise fs.inotify.max_user_watches"),
    ],
)
def test_inotify_limits_at_start_are_named(
    python_runs_under: Callable[..., None], proxy: StartProxy, irq_dir: Path, setting: str, said: str
) -> None:
    # A user namespace has its own inotify limits (namespaces(7)).
    script = f'echo 0 > /proc/sys/user/{setting} && exec "$@"'
    python_runs_under("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    running = proxy("--irq-dir", irq_dir, ready=False)
    assert running.wait() == 71
    assert said in running.log
    assert len(running.log.splitlines()) == 1


@pytest.mark.parametrize(
    ("fault", "task"),
    [
        ("recvfrom:error=ENOMEM:when=1", "receive"),
        ("readv:error=ENOMEM:when=1..3", "triggers"),
    ],
)
def test_a_task_that_fails_is_restarted(board: Board, fault: str, task: str) -> None:
    descriptor = packet_socket(board.proxy.pid) if task == "receive" else INOTIFY
    with injected(board.proxy.pid, descriptor, fault):
        board.core1.send(b"in_a")
        board.applications.trigger("out_a")
        board.applications.wait(lambda: board.applications.closes["in_a"] > 0, "in_a has not been delivered")
        board.wire.wait_seen("out_a")
        board.proxy.wait_log(f"{task}: Cannot allocate memory; restarting the task")
        board.proxy.wait_log(f"{task}: works again")
    board.works()
    assert board.proxy.log.count("Cannot allocate memory") == 1
    assert board.proxy.log.count("works again") == 1
    assert board.proxy.counters()["restarts"] == (3 if task == "triggers" else 1)


@pytest.mark.parametrize("error", ["EIO", "ENOMEM"])
def test_a_failed_send_loses_nothing(board: Board, error: str) -> None:
    with injected(board.proxy.pid, packet_socket(board.proxy.pid), f"sendto:error={error}:when=1..4"):
        for name in ("out_a", "out_b", "out_a"):
            board.applications.trigger(name)
        board.wire.wait(lambda: len(board.wire.order) >= 3, "pending notifications have not been sent")
    assert board.wire.order == ["out_a", "out_b", "out_a"]
    board.works()


def test_a_failed_read_in_a_batch_loses_nothing(board: Board) -> None:
    wait_stopped(board.proxy.pid)
    for _ in range(4):
        board.core1.send(b"in_a")
    # The first read gets a lone frame. In the batch that follows, two reads succeed and the third read fails.
    with injected(board.proxy.pid, packet_socket(board.proxy.pid), "recvfrom:error=ENOMEM:when=4"):
        os.kill(board.proxy.pid, signal.SIGCONT)
        board.core1.send(b"in_b")
        board.applications.wait(lambda: board.applications.closes["in_b"] > 0, "in_b has not been delivered")
    assert board.applications.closes["in_a"] == 4


def test_a_programming_error_ends_the_process(board: Board) -> None:
    with injected(board.proxy.pid, INOTIFY, "readv:error=EBADF:when=1"):
        board.applications.trigger("out_a")
        assert board.proxy.wait() == 70
    assert "Traceback" in board.proxy.log
    assert "Bad file descriptor" in board.proxy.log
