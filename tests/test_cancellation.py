"""Tests that cancel a proxy at each of its steps: no notification is lost and no resource is leaked."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from inco_trio import Config, Core1, Proxy, builtin_signals, open_proxy
from inco_trio.frame import decode, encode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, IN_MODIFY, Inotify, parse_events
from tests.support_steps import CancelAt

RESET, NOTIFY = "ihub_reset_irq", "redun_notify_irq"


@attrs.define
class Peer:
    """Core 1's socket and a watch on the state file, which outlive the proxies."""

    directory: Path
    socket: socket.socket
    inotify: Inotify

    def send(self) -> bool:
        try:
            self.socket.sendto(encode(RESET.encode(), bytes(6)), f"{self.directory}/core0")
        except OSError:
            return False
        return True

    def arrived(self) -> Counter[str]:
        """Return how many frames or state-file closes have arrived for each signal since the last call."""
        came: Counter[str] = Counter()
        while True:
            try:
                name = decode(self.socket.recv(2000))
            except BlockingIOError:
                break
            assert name is not None
            came[name.decode()] += 1
        buffer = memoryview(bytearray(1 << 16))
        for event in parse_events(buffer[: self.inotify.read_into(buffer)]):
            came[RESET] += bool(event.mask & IN_CLOSE_WRITE and event.name == b"message_4_state")
        return came


def open_files() -> set[str]:
    gc.collect()
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # The descriptor that iterdir() used is closed by now.
            found.add(f"{path.name} {path.readlink()}")
    return found


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    (tmp_path / "irq").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(f"{tmp_path}/core1")
        made = Peer(tmp_path, sock, Inotify())
        made.inotify.watch(str(tmp_path / "irq"), IN_CLOSE_WRITE | IN_MODIFY)
        try:
            yield made
        finally:
            made.inotify.close()


def test_cancelling_a_proxy_at_each_step_loses_nothing(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With TURN = 0, the reload yields to other tasks after each signal.
    monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
    config = Config(f"unix:{tmp_path}/core0,peer={tmp_path}/core1", builtin_signals(tmp_path / "irq"))
    fewer = attrs.evolve(config, signals=tuple(s for s in config.signals if s.name in (RESET, NOTIFY)))
    trigger = tmp_path / "irq/message_6_trig"

    def play(cancel: CancelAt) -> tuple[Counter[str], Counter[str]]:
        """Run the program; return the signals that must arrive and the signals that may arrive."""
        must: Counter[str] = Counter()
        may: Counter[str] = Counter()

        async def main() -> None:
            with cancel.scope:
                async with open_proxy(config) as proxy:
                    with proxy.events() as events:
                        must[RESET] += peer.send()
                        trigger.write_text("1")
                        must[NOTIFY] += 1
                        for _ in range(2):
                            await events.receive()
                        may[NOTIFY] += 1
                        await proxy.send(NOTIFY)
                        must[NOTIFY] += 1
                        may[NOTIFY] -= 1
                        trigger.write_text("1")
                        must[NOTIFY] += 1
                        await proxy.reload(fewer)
                        must[RESET] += peer.send()
                        await proxy.reload(config)
                        with trio.move_on_after(0.001):  # MockClock jumps to this deadline.
                            await proxy.wait_for(RESET)

        # The clock advances only while all tasks are waiting, so no deadline expires while a task can run.
        trio.run(main, clock=MockClock(autojump_threshold=0), instruments=[cancel])
        return must, may

    whole = CancelAt(0)
    play(whole)
    peer.arrived()
    before = open_files()
    assert whole.steps > 30
    for step in range(1, whole.steps + 1):
        must, may = play(CancelAt(step))
        came = peer.arrived()
        assert must <= came <= must + may, f"cancelled at step {step} of {whole.steps}"
        assert open_files() == before, f"cancelled at step {step}"
        assert not (tmp_path / "core0").exists(), f"cancelled at step {step}"


def test_cancelling_core1_at_each_step_loses_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as core0:
        core0.bind(f"{tmp_path}/core0")
        _cancel_core1(core0, tmp_path)


def _cancel_core1(core0: socket.socket, tmp_path: Path) -> None:
    frame = encode(NOTIFY.encode(), bytes(6))

    def play(cancel: CancelAt) -> list[int]:
        """Run the program; return the sequence numbers received before and after the cancellation."""
        got: list[int] = []

        async def main() -> None:
            async with Core1(f"unix:{tmp_path}/core1,peer={tmp_path}/core0") as core1:
                with core1.events() as arrivals:
                    for _ in range(4):
                        core0.sendto(frame, f"{tmp_path}/core1")
                    with cancel.scope:
                        await core1.send(RESET)
                        for _ in range(3):
                            got.append((await arrivals.receive()).sequence)  # noqa: PERF401 - append each as it arrives
                    while len(got) < 4:
                        got.append((await arrivals.receive()).sequence)

        trio.run(main, instruments=[cancel])
        return got

    whole = CancelAt(0)
    play(whole)
    before = open_files()
    for step in range(1, whole.steps + 1):
        assert play(CancelAt(step)) == [1, 2, 3, 4], f"cancelled at step {step} of {whole.steps}"
        assert open_files() == before
        while True:
            try:
                core0.recv(2000)
            except BlockingIOError:
                break


def test_a_task_that_outlives_its_proxy_reads_to_the_end_of_its_events(tmp_path: Path) -> None:
    told: list[str] = []

    async def follow(proxy: Proxy, *, task_status: trio.TaskStatus[None]) -> None:
        with proxy.events() as events:
            task_status.started()
            async for _ in events:
                told.append("delivered")  # noqa: PERF401 - append each as it arrives
        told.append("the proxy closed")

    async def main() -> None:
        configs = [
            Config(f"unix:{tmp_path}/{name}0,peer={tmp_path}/{name}1", builtin_signals(tmp_path / name))
            for name in "ab"
        ]
        async with (
            trio.open_nursery() as outer,
            open_proxy(configs[0]) as a,
            open_proxy(configs[1]) as b,
            trio.open_nursery() as inner,
        ):
            await outer.start(follow, a)
            await inner.start(follow, b)
            async with Core1(f"unix:{tmp_path}/a1,peer={tmp_path}/a0") as core1:
                with a.events() as events:
                    await core1.send(RESET)
                    await events.receive()
            inner.cancel_scope.cancel()
        # The inner task was cancelled before its proxy closed, so only the outer task appended to `told`.
        assert told == ["delivered", "the proxy closed"]

    trio.run(main)
