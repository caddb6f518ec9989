"""Tests of a link that other programs flood with frames that carry no known name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.links.unix import UnixLink
from inco_trio.proxy.flood import CALM, FLOOD, Flood
from inco_trio.proxy.supervise import Health
from inco_trio.simulation.world import Peer
from netns.fixtures import Consumer, StartProxy
from netns.hang import HANG
from tests.support_proxy import frame, write_udrv

Watch = Callable[[Path], Consumer]


class Restrictable(UnixLink):
    """A fake link that records each call of `restrict`."""

    def __init__(self) -> None:
        self.restricted: list[bool] = []
        self.keeps_filter = False

    def restrict(self, on: bool) -> bool:
        self.restricted.append(on)
        return on or self.keeps_filter


def test_a_flood_restricts_the_link_until_it_has_ended() -> None:
    link = Restrictable()
    flood, health = Flood(link), Health("rpmsg4000: filter")

    async def main() -> None:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood.filter, health)
                for _ in range(2):
                    link.restricted.clear()
                    await wait_all_tasks_blocked()
                    for _ in range(2 * FLOOD + 1):
                        flood.ignored(1)
                    assert link.restricted == [True]
                    await wait_all_tasks_blocked()
                    assert health.problem is not None
                    assert health.problem.startswith("more than 1000 unknown or malformed frames per second")
                    # The flood continues: the sample that the kernel lets through still has FLOOD frames per check.
                    for _ in range(3):
                        flood.ignored(FLOOD)
                        clock.jump(CALM)
                        await wait_all_tasks_blocked()
                        assert link.restricted == [True]
                    flood.ignored(FLOOD - 1)
                    clock.jump(CALM)
                    await wait_all_tasks_blocked()
                    assert link.restricted == [True, False]
                    assert health.problem is None
                nursery.cancel_scope.cancel()

    clock = MockClock()
    trio.run(main, clock=clock)


def test_the_kernel_is_asked_again_if_it_keeps_the_filter() -> None:
    link = Restrictable()
    flood, health = Flood(link), Health("rpmsg4000: filter")

    async def main() -> None:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood.filter, health)
                for _ in range(2 * FLOOD + 1):
                    flood.ignored(1)
                await wait_all_tasks_blocked()
                for keeps in (True, True, False):
                    assert health.problem is not None
                    link.keeps_filter = keeps
                    clock.jump(CALM)
                    await wait_all_tasks_blocked()
                assert link.restricted == [True, False, False, False]
                assert health.problem is None
                nursery.cancel_scope.cancel()

    clock = MockClock()
    trio.run(main, clock=clock)


def test_few_ignored_frames_per_second_do_not_restrict_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("inco_trio.real_clock.monotonic", lambda: now)
    link = Restrictable()
    flood = Flood(link)
    for _ in range(20 * FLOOD):
        now += 1.01 / FLOOD
        flood.ignored(1)
    assert link.restricted == []
    for _ in range(2 * FLOOD):
        now += 0.4 / FLOOD
        flood.ignored(1)
    assert link.restricted == [True]


def test_a_link_that_cannot_be_restricted_is_rarely_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.real_clock.monotonic", lambda: 1000.0)
    link = Restrictable()
    monkeypatch.setattr(link, "restrict", lambda on: link.restricted.append(on))
    flood = Flood(link)
    for _ in range(5 * FLOOD):
        flood.ignored(1)
    assert 1 <= len(link.restricted) <= 5


@pytest.mark.netns
def test_a_flood_of_unknown_frames_loses_no_known_frame(
    proxy: StartProxy, tmp_path: Path, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    running = proxy("--config", write_udrv(tmp_path / "udrv.json", irq_dir))
    consumer = watch(irq_dir / "message_5_state")
    unknown = [frame(core1.mac, b"unknown_%03d" % number) for number in range(98)]
    block = [*unknown, frame(core1.mac, b"\xff malformed"), frame(core1.mac, b"ihub_hwwd_irqs")]
    for _ in range(1000):  # Send without pauses: more than 50,000 frames per second.
        for data in block:
            core1.send_raw(data)
        core1.send(b"ihub_hwwd_irq")
    consumer.wait(1000)
    counters = running.counters()
    assert (counters["delivered"], counters["dropped"]) == (1000, 0)
    assert counters["unknown"] > FLOOD
    assert counters["malformed"] > 0
    running.wait_log("the kernel drops them")
    running.wait_log("filter: works again")
    before = running.counters()
    core1.send(b"misspelled")
    core1.send(b"ihub_hwwd_irq")
    consumer.wait(1001)
    assert running.counters()["unknown"] == before["unknown"] + 1
