"""Tests of how many events one board handles before other boards get a turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from inco_trio.counters import Counters
from inco_trio.frame import encode
from inco_trio.linux.inotify import Inotify
from inco_trio.notifications import Events
from inco_trio.persist.followed import History
from inco_trio.persist.inflight import FRAMES, Inflight
from inco_trio.proxy.handoff import Handoff
from inco_trio.proxy.inbound import Inbound
from inco_trio.proxy.supervise import Health
from inco_trio.registers.registers import Registers
from inco_trio.signals import SignalTable, builtin_signals
from tests.support_registers import finish_steps

FRAME = encode(b"ihub_hwwd_irq", bytes(6))


class Queue:
    """A stand-in for a link with a long queue."""

    name, foreign, fd = "a queue", 0, -1

    def __init__(self, number: int) -> None:
        self.left = number

    def receive_one(self, room: memoryview) -> int:
        if not self.left:
            return -1
        self.left -= 1
        room[: len(FRAME)] = FRAME
        return len(FRAME)

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        lengths = [self.receive_one(room) for room in rooms[: self.left]]
        assert all(length <= step for length in lengths)
        return lengths

    def dropped(self) -> int:
        return 0

    async def wait_readable(self) -> None:
        await trio.sleep_forever()


@pytest.mark.parametrize("at_once", [16, FRAMES])
def test_a_backlog_is_read_in_turns(tmp_path: Path, at_once: int) -> None:
    number, turns = 1000, 0

    async def main() -> None:
        nonlocal turns
        with ExitStack() as stack:
            inflight, counters = Inflight.open(at_once=at_once), Counters()
            stack.callback(inflight.close)
            inotify = Inotify()
            stack.callback(inotify.close)
            registers = Registers(inotify, inflight, counters)
            stack.callback(registers.close)
            finish_steps(registers.open(SignalTable(builtin_signals(tmp_path / "irq"))))
            handoff = Handoff(inflight.watches, Events(counters, History(inflight.history)).written)
            queue = Queue(number)
            inbound = Inbound(handoff, queue, registers.states, inflight, counters)  # type: ignore[arg-type]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inbound.receive, Health("receive"))
                nursery.start_soon(inbound.write, Health("write"))
                while counters.delivered < number:
                    await trio.lowlevel.checkpoint()
                    turns += 1
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert (tmp_path / "irq/message_5_state").read_text() == "1"
    if at_once < FRAMES:
        assert turns >= number / at_once
