"""Tests of recovery: a killed process's successor completes the pending work in order and repeats no finished work.

The link is a Unix socket, and the test acts as core 1. While core 1 has no socket, the proxy cannot send anything, so
a test can stop the proxy in the middle of its work, as a kill would.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from inco_trio.config import Config
from inco_trio.counters import Counters
from inco_trio.errors import ConfigError
from inco_trio.frame import decode, encode
from inco_trio.links import unix
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Inotify, parse_events
from inco_trio.notifications import Deaf, Listener
from inco_trio.persist.inflight import FRAME_STEP, Bank, Inflight, frames_in
from inco_trio.proxy.outbound import Outbound
from inco_trio.proxy.proxy import Proxy, open_supervised
from inco_trio.registers.registers import Registers
from inco_trio.registers.states import StateFile
from inco_trio.registers.triggers import Triggered
from inco_trio.signals import Direction, Signal, SignalTable
from netns.hang import HANG
from tests.support_proxy import Cupboard, trigger
from tests.support_registers import finish_steps

MAC = bytes.fromhex("02005e100001")
INBOUND = ["reset", "hwwd", "type_b", "spare"]
OUTBOUND = ["redun", "crash", "uart", "other"]


class Board:
    """A board whose link is the socket `core0` in the directory `home`. The socket of core 1 is `core1`."""

    def __init__(self, home: Path) -> None:
        self.home, self.irq = home, home / "irq"
        self.store = Cupboard()
        self.config = Config(
            f"unix:{home}/core0,peer={home}/core1",
            (
                *(Signal(name, Direction.INBOUND, self.irq, f"{name}_state") for name in INBOUND),
                *(Signal(name, Direction.OUTBOUND, self.irq, f"{name}_trig") for name in OUTBOUND),
            ),
            stop_deadline=0,
        )

    def trigger(self, *names: str) -> None:
        for name in names:
            trigger(self.irq / f"{name}_trig")

    @asynccontextmanager
    async def proxy(self, listener: Listener | None = None) -> AsyncIterator[Proxy]:
        """Yield a proxy that takes over from its predecessor.

        The proxy stops at the end of the block and leaves its pending work to its successor.
        """
        self.store = self.store.heir()
        async with open_supervised(self.config, self.store, listener) as proxy:
            yield proxy

    async def leave(self) -> None:
        """Run a proxy until all its tasks are blocked."""
        async with self.proxy():
            await stuck()

    async def run(self) -> None:
        """Run a proxy until it is cancelled or killed."""
        async with self.proxy():
            await trio.sleep_forever()

    def memory(self) -> Inflight:
        """Return the in-flight buffer. Call this only while no proxy is running."""
        return Inflight.open(os.dup(self.store.kept["inflight"]))

    def peer(self) -> Peer:
        return Peer(self.home / "core1")


class Peer:
    """Core 1, on the other side of the link."""

    def __init__(self, path: Path) -> None:
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = path

    async def __aenter__(self) -> Peer:
        self._path.unlink(missing_ok=True)
        await self._socket.bind(str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()
        self._path.unlink()

    async def receive(self, count: int) -> list[str]:
        """Return the signal names in the next `count` frames."""
        names: list[str] = []
        while len(names) < count:
            name = decode(await self._socket.recv(200))
            assert name is not None
            names.append(name.decode())
        return names

    async def send(self, *names: str) -> None:
        for name in names:
            await self._socket.sendto(encode(name.encode(), MAC), str(self._path.with_name("core0")))

    async def all(self, last: str) -> list[str]:
        """Return the signal names in all frames up to and including the next frame named `last`."""
        names = await self.receive(1)
        while names[-1] != last:
            names += await self.receive(1)
        return names


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    made = Board(tmp_path)
    yield made
    made.store.close()


def run(function: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(HANG):
            await function()

    trio.run(guarded)


class Writes:
    """A record of the files in a directory that are closed after writing, in order."""

    def __init__(self, directory: Path) -> None:
        self._inotify = Inotify()
        # Also watch for IN_MODIFY: such an event between two close events keeps the kernel from merging them.
        self._inotify.watch(str(directory), ino.IN_CLOSE_WRITE | ino.IN_MODIFY)

    def names(self) -> list[str]:
        """Return the signal name of each state file that was closed since the last call, in order."""
        buffer = memoryview(bytearray(1 << 16))
        events = parse_events(buffer[: self._inotify.read_into(buffer)])
        closed = [event.name.decode() for event in events if event.mask & ino.IN_CLOSE_WRITE]
        return [name.removesuffix("_state") for name in closed if name.endswith("_state")]

    def close(self) -> None:
        self._inotify.close()


def put(bank: Bank, sequence: int, names: list[str]) -> None:
    """Put a batch of frames into the in-flight buffer, as if a process had been killed before it wrote state files."""
    bank.begin(sequence)
    for slot, name in enumerate(names):
        whole = encode(name.encode(), MAC)
        bank.view[slot * FRAME_STEP : slot * FRAME_STEP + len(whole)] = whole


@pytest.mark.parametrize("older", [0, 1])
def test_frames_of_both_batches_are_delivered_in_the_order_of_their_arrival(board: Board, older: int) -> None:
    async def main() -> None:
        await board.leave()
        memory = board.memory()
        put(memory.frames[older], 7, ["reset", "hwwd", "reset"])
        put(memory.frames[1 - older], 8, ["type_b", "spare"])
        memory.close()
        writes = Writes(board.irq)
        async with board.proxy() as proxy:
            assert proxy.stats.recovered == 5
        assert writes.names() == ["reset", "hwwd", "reset", "type_b", "spare"]
        writes.close()
        memory = board.memory()
        assert [frames_in(bank) for bank in memory.frames] == [[], []]
        memory.close()

    run(main)


def killed(board: Board, patch: Callable[[], object]) -> None:
    """Run a proxy in a child process. `patch` makes it kill itself in the middle of its work."""
    child = os.fork()
    if child == 0:
        try:
            patch()
            trio.run(board.run)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("after", range(5))
def test_a_crash_while_frames_are_recovered_loses_none(board: Board, after: int) -> None:
    older, newer = ["reset", "hwwd", "reset"], ["type_b", "spare"]

    def patch(original: Callable[[StateFile], None] = StateFile.write) -> None:
        left = after

        def write(file: StateFile) -> None:
            nonlocal left
            if not left:
                kill_now()
            left -= 1
            original(file)

        StateFile.write = write  # type: ignore[assignment,method-assign]

    run(board.leave)
    memory = board.memory()
    put(memory.frames[1], 7, older)
    put(memory.frames[0], 8, newer)
    memory.close()
    writes = Writes(board.irq)
    killed(board, patch)
    assert writes.names() == [*older, *newer][:after]
    run(board.leave)
    # The successor repeats all frames of the batch that its predecessor was handling when it was killed.
    assert writes.names() == ([*older, *newer] if after < len(older) else newer)
    writes.close()


async def leave_in_flight(board: Board, older: list[str], newer: list[str], first: int = 0) -> None:
    """Leave two batches of events in the in-flight buffer, as if a process had been killed before it sent a frame."""
    await board.leave()
    memory = board.memory()
    for sequence, names in ((19, older), (20, newer)):
        bank = memory.events[(first + sequence - 19) % 2]
        bank.begin(sequence)
        board.trigger(*names)
        assert os.readv(board.store.kept["inotify"], [bank.view]) > 0
    memory.close()


async def until(true: Callable[[], bool]) -> None:
    """Let other tasks run until `true()` returns True."""
    while not true():
        await trio.lowlevel.checkpoint()


async def stuck() -> None:
    """Wait until all tasks are blocked."""
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("first", [0, 1])
def test_events_of_both_banks_are_sent_in_the_order_of_their_arrival(board: Board, first: int) -> None:
    async def main() -> None:
        await leave_in_flight(board, ["redun", "crash", "redun"], ["uart"], first)
        async with board.proxy() as proxy, board.peer() as peer:
            assert await peer.receive(4) == ["redun", "crash", "redun", "uart"]
            assert proxy.stats.recovered == 4

    run(main)


class Reported(Deaf):
    """A listener that stores the names of pending notifications, and since when delivered ones were pending."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.delivered: list[tuple[str, int]] = []

    def pending(self, *args: Any) -> None:
        self.names += [signal.name for signal in args[0]]

    def carried(self, *args: Any) -> None:
        signals, *_, since = args
        self.delivered += [(signal.name, since) for signal in signals]


def test_a_restart_does_not_report_pending_notifications_again(board: Board) -> None:
    async def main() -> None:
        await board.leave()
        reported = Reported()
        async with board.proxy(reported):
            await stuck()
            board.trigger("redun", "crash")
            await stuck()
        assert reported.names == ["redun", "crash"]
        end = time.monotonic_ns()
        async with board.proxy(reported):
            await stuck()
        async with board.proxy(reported), board.peer() as peer:
            assert await peer.receive(2) == ["redun", "crash"]
            await stuck()
            board.trigger("uart")
            await peer.receive(1)
            await stuck()
        assert reported.names == ["redun", "crash"]
        assert [name for name, since in reported.delivered if 0 < since < end] == ["redun", "crash"]
        assert reported.delivered[2:] == [("uart", 0)]

    run(main)


@pytest.mark.parametrize("older_is_reported", [True, False])
def test_recovered_notifications_become_pending_unless_a_predecessor_reported_them(
    board: Board, older_is_reported: bool
) -> None:
    async def main() -> None:
        await leave_in_flight(board, ["redun", "crash"], ["uart"])
        memory = board.memory()
        memory.events[not older_is_reported].pending_since = since = time.monotonic_ns()
        memory.close()
        reported = Reported()
        async with board.proxy(reported):
            await stuck()
        assert reported.names == ([] if older_is_reported else ["redun", "crash"])
        async with board.proxy(reported), board.peer() as peer:
            assert await peer.receive(3) == ["redun", "crash", "uart"]
            await stuck()
        (_, first), (_, second), (_, third) = reported.delivered
        assert first == second
        # The others may have waited since the predecessor was last active.
        assert ((first, third < 0) if older_is_reported else (third, first < 0)) == (since, True)

    run(main)


@pytest.mark.parametrize("noted", ["clock", "dropped"])
def test_the_bound_after_a_crash_begins_before_the_events_of_the_start(
    board: Board, noted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with board.proxy(), board.peer() as peer:
            board.trigger("redun")
            await peer.receive(1)
            await stuck()
        memory = board.memory()
        memory.times[:] = memoryview(array("Q", [0, 0, 0]))  # A killed process stores no times.
        if noted == "dropped":
            memory.pending[b"removed"] = 1
        memory.close()
        killed_before = time.monotonic_ns()
        board.trigger("crash")
        if noted == "clock":
            monkeypatch.setattr("inco_trio.real_clock.time_ns", lambda: time.time_ns() + 60 * 10**9)
        reported = Reported()
        async with board.peer() as peer, board.proxy(reported) as proxy:
            await peer.receive(1)
            await stuck()
            recorder = proxy._recorder()
            assert recorder is not None
            assert noted in [note.kind for note in recorder.notes(killed_before)]
        ((name, since),) = reported.delivered
        assert name == "crash"
        assert 0 < -since < killed_before

    run(main)


def test_recovered_notifications_of_a_lost_inotify_descriptor_have_no_exact_delay(board: Board) -> None:
    """Events of lost watches may stand for any trigger, so the proxy sends a frame for each trigger."""

    async def main() -> None:
        await leave_in_flight(board, ["redun"], ["uart"])
        memory = board.memory()
        memory.events[0].pending_since = since = time.monotonic_ns()
        memory.close()
        board.store.remove("inotify")
        reported = Reported()
        async with board.peer() as peer, board.proxy(reported):
            await peer.receive(len(OUTBOUND))
            await stuck()
        assert {name for name, _ in reported.delivered} == set(OUTBOUND)
        assert all(0 < -bound <= since for _, bound in reported.delivered)

    run(main)


def test_the_bound_after_a_crash_ignores_pending_notifications_that_were_sent(board: Board) -> None:
    async def main() -> None:
        async with board.proxy():
            await stuck()
            board.trigger("redun")
            await stuck()
            async with board.peer() as peer:
                await peer.receive(1)
                await stuck()
                sent_before = time.monotonic_ns()
                board.trigger("crash")
                await peer.receive(1)
                await stuck()
        memory = board.memory()
        memory.times[:] = memoryview(array("Q", [0, 0, 0]))  # A killed process stores no times.
        memory.close()
        board.trigger("uart")
        reported = Reported()
        async with board.peer() as peer, board.proxy(reported):
            await peer.receive(1)
            await stuck()
        ((name, since),) = reported.delivered
        assert name == "uart"
        assert -since > sent_before

    run(main)


def test_new_events_do_not_overwrite_recovered_ones(board: Board) -> None:
    async def main() -> None:
        await leave_in_flight(board, ["redun", "crash"], ["uart"])
        for _ in range(3):
            # Without a peer, the recovered notifications cannot be sent, so new events must stay in the kernel.
            async with board.proxy() as proxy:
                board.trigger("other")
                await stuck()
                assert proxy.stats.sent == 0
        async with board.proxy(), board.peer() as peer:
            names = await peer.receive(6)
        assert names == ["redun", "crash", "uart", "other", "other", "other"]

    run(main)


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new sockets send only a few frames that the peer has not received, whatever net.unix.max_dgram_qlen is."""

    def new_socket(original: Callable[[], socket.socket] = unix._new_socket) -> socket.socket:
        sock = original()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return sock

    monkeypatch.setattr(unix, "_new_socket", new_socket)


@pytest.mark.usefixtures("small_buffer")
def test_a_crash_while_recovered_events_are_sent_loses_none(board: Board) -> None:
    async def main() -> None:
        await leave_in_flight(board, ["redun", "crash"] * 20, ["uart"])
        async with board.proxy() as proxy, board.peer():
            # The send buffer is too small for all of these notifications.
            board.trigger("other")
            await stuck()
            assert 0 < proxy.stats.sent < 41
        async with board.proxy(), board.peer() as peer:
            assert await peer.all(last="other") == [*["redun", "crash"] * 20, "uart", "other"]

    run(main)


def test_bank_sequence_numbers_continue_after_a_restart(board: Board) -> None:
    async def main() -> None:
        await leave_in_flight(board, ["redun"], ["crash"])
        memory = board.memory()
        put(memory.frames[0], 7, ["reset"])
        put(memory.frames[1], 8, ["hwwd"])
        async with board.proxy() as proxy, board.peer() as peer:
            assert await peer.receive(2) == ["redun", "crash"]
            await stuck()
            with proxy.events() as events:
                board.trigger("uart")
                await peer.send("reset", "reset")
                for _ in range(3):
                    await events.receive()
        assert max(bank.sequence for bank in memory.frames) > 8
        assert max(bank.sequence for bank in memory.events) > 20
        memory.close()

    run(main)


@pytest.mark.usefixtures("small_buffer")
def test_registers_are_restored_while_nothing_can_be_sent(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Triggered] = []

    async def send_found(
        outbound: Outbound,
        one: Triggered,
        original: Callable[[Outbound, Triggered], Awaitable[None]] = Outbound.send_found,
    ) -> None:
        found.append(one)
        await original(outbound, one)

    monkeypatch.setattr(Outbound, "send_found", send_found)

    async def main() -> None:
        async with board.proxy() as proxy, board.peer() as peer:
            # Replace the directory and all triggers in it, which counts as one notification per trigger. Whether an
            # event or a scan finds the new triggers depends on timing.
            for number in range(100):
                # Send more than fits into the send buffer.
                board.trigger(*["redun"] * 100)
                await stuck()
                board.irq.rename(board.home / f"away{number}")
                board.irq.mkdir()
                for signal_ in board.config.signals:
                    signal_.path.touch()
                await until(lambda: len(proxy._parts.handoffs[1].unfinished) >= 2)
                if found:
                    break
                await peer.receive(100 + len(OUTBOUND))
            assert found
            (board.irq / "reset_state").unlink()
            await peer.send("reset")
            await until(lambda: proxy.stats.delivered == 1)
            assert (board.irq / "reset_state").read_text() == "1"

    run(main)


@pytest.mark.parametrize("then", ["nothing", "written", "replaced"])
def test_a_successor_knows_a_trigger_created_before_the_kill(board: Board, then: str) -> None:
    def patch(link: Callable[..., None] = os.link) -> None:
        def linked(source: str, name: str, **directories: int | bool) -> None:
            link(source, name, **directories)
            # From now on, an application can write the file, and the process can be killed.
            if name == "redun_trig":
                if then != "nothing":
                    board.trigger("redun")
                if then == "replaced":
                    # The file that was watched first no longer has a name, so the path does not identify its watch.
                    (board.irq / "new").touch()
                    (board.irq / "new").rename(board.irq / "redun_trig")
                kill_now()

        os.link = linked  # type: ignore[assignment]

    async def main() -> None:
        async with board.proxy(), board.peer() as peer:
            await stuck()
            board.trigger("other")
            # If the successor had no record of the file's watch or creator, it would send additional notifications to
            # be safe.
            expected = {"other"} if then == "nothing" else {"redun", "other"}
            assert set(await peer.all(last="other")) == expected

    run(board.leave)
    (board.irq / "redun_trig").unlink()
    killed(board, patch)
    run(main)


def test_a_refused_start_leaves_the_watches_to_the_next(board: Board) -> None:
    async def main() -> None:
        await board.leave()
        (board.irq / "spare_state").unlink()
        (board.irq / "spare_state").symlink_to("nowhere")
        with pytest.raises(ConfigError, match="spare_state: not a regular file but a symlink"):
            await board.leave()
        board.trigger("redun")
        (board.irq / "spare_state").unlink()
        async with board.proxy(), board.peer() as peer:
            board.trigger("other")
            assert await peer.all(last="other") == ["redun", "other"]

    run(main)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_pending_notifications_are_not_written_to_a_replaced_directory(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    irq, number = tmp_path / "irq", 0
    signal = Signal("reset", Direction.INBOUND, irq, "reset_state")
    inotify, inflight, counters = Inotify(), Inflight.open(), Counters()
    registers = Registers(inotify, inflight, counters)
    finish_steps(registers.open(SignalTable((signal,))))
    inflight.pending[b"reset"] = 6

    def write(file: StateFile, original: Callable[[StateFile], None] = StateFile.write) -> None:
        nonlocal number
        if number == at:
            irq.rename(tmp_path / "away")
            irq.mkdir()
            (irq / "reset_state").touch()
        number += 1
        original(file)

    monkeypatch.setattr(StateFile, "write", write)
    directory = registers.directories.by_path[irq]
    assert False in list(registers.states.write_pending(directory))
    assert inflight.pending[b"reset"] == 6
    registers.directories.look(directory)
    writes = Writes(irq)
    list(registers.states.write_pending(directory))
    assert writes.names() == ["reset"] * 6
    assert inflight.pending[b"reset"] == 0
    for part in (writes, registers, inflight, inotify):
        part.close()
