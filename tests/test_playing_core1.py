"""Core 1 as a program plays it, against a real proxy, on sockets and on an interface."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from inco_trio import (
    ClosedError,
    Config,
    Core1,
    Direction,
    InvalidArgumentError,
    LinkNotFoundError,
    Notification,
    Proxy,
    UnknownSignalError,
    builtin_signals,
    open_proxy,
)
from inco_trio.simulation.world import Cores
from netns.hang import HANG

RESET, HWWD, NOTIFY = "ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_irq"

Story = Callable[[Config, str], Awaitable[None]]


def played(tmp_path: Path, story: Story) -> None:
    """Run a story with the configuration of a proxy on sockets, and the address of its core 1."""

    async def main() -> None:
        with trio.fail_after(HANG):
            address = f"unix:{tmp_path}/core0,peer={tmp_path}/core1"
            await story(
                Config(address, builtin_signals(tmp_path / "irq")), f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
            )

    trio.run(main)


def trigger(config: Config, name: str) -> None:
    """As an application does."""
    next(signal.path for signal in config.signals if signal.name == name).write_text("1")


def test_each_way(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with open_proxy(config) as proxy, Core1(link) as core1:
            with proxy.events() as events:
                await core1.send(RESET)
                carried = await events.receive()
                trigger(config, NOTIFY)
                came = await core1.wait_for(NOTIFY)
                sent = await events.receive()
        assert (carried.signal.name, carried.direction, carried.sequence) == (RESET, Direction.INBOUND, 1)
        assert (sent.signal.name, sent.direction, sent.sequence) == (NOTIFY, Direction.OUTBOUND, 2)
        assert carried.monotonic_ns < sent.monotonic_ns
        assert carried.time_ns < sent.time_ns
        assert (came.name, came.sequence) == (NOTIFY, 1)
        assert came.frame.endswith(NOTIFY.encode())
        assert came.monotonic_ns >= carried.monotonic_ns
        assert came.time_ns >= carried.time_ns

    played(tmp_path, story)


@pytest.mark.netns
def test_on_an_interface_of_another_namespace(cores: Cores, irq_dir: Path) -> None:
    async def main() -> None:
        config = Config(cores.link, builtin_signals(irq_dir), netns=Path(f"/proc/self/fd/{cores.core0.fd}"))
        with trio.fail_after(HANG):
            async with (
                open_proxy(config) as proxy,
                Core1(cores.link, netns=Path(f"/proc/self/fd/{cores.core1.fd}")) as core1,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(proxy.send, NOTIFY)
                assert (await core1.wait_for(NOTIFY)).name == NOTIFY
                with proxy.events(signals=[HWWD]) as events:
                    await core1.send(RESET)
                    await core1.send(HWWD)
                    assert (await events.receive()).sequence == 3

    trio.run(main)


def test_what_nobody_waits_for_is_kept_in_order(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link, buffer=4) as core1, open_proxy(config) as proxy:
            for _ in range(6):
                await proxy.send(NOTIFY)
            while core1.lost < 2:
                await trio.lowlevel.checkpoint()
            assert [(await anext(core1)).sequence for _ in range(4)] == [3, 4, 5, 6]

    played(tmp_path, story)


def test_one_arrival_is_one_readers(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        got = []

        async def read() -> None:
            got.append((await core1.wait_for(NOTIFY)).sequence)

        async with Core1(link) as core1, open_proxy(config) as proxy:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(read)
                for _ in range(5):
                    await proxy.send(NOTIFY)
            assert sorted(got) == [1, 2, 3, 4, 5]
            with pytest.raises(TimeoutError, match=f"{NOTIFY}: did not come within 0.001 s"):
                await core1.wait_for(NOTIFY, timeout=0.001)  # In vain: nothing is sent.

    played(tmp_path, story)


def test_frames_as_they_are(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with open_proxy(config) as proxy, Core1(link) as core1:
            for frame in (b"", bytes(12), bytes(12) + b"\x88\x00" + b"\xff", bytes(2000)):
                await core1.send_frame(frame)
            await core1.send("nobody_irq")
            with proxy.events() as events:
                await core1.send(RESET)
                await events.receive()
            assert (proxy.stats.malformed, proxy.stats.unknown, proxy.stats.delivered) == (4, 1, 1)

    played(tmp_path, story)


def test_nobody_at_the_other_end(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, trio.open_nursery() as nursery:
            with pytest.raises(LinkNotFoundError, match=r"/core1: takes no frames now: no process is at .*/core0"):
                await core1.send(RESET)
            running = trio.Event()

            async def wait() -> None:
                await core1.wait_running()
                running.set()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not running.is_set()
            async with open_proxy(config) as proxy:
                await running.wait()
                with proxy.events() as events:
                    await core1.send(RESET)
                    await events.receive()

    played(tmp_path, story)


def test_closed(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        core1 = Core1(link)
        with pytest.raises(ClosedError, match="core 1 is not open: use `async with`"):
            await core1.send(RESET)
        refused = []

        async def wait() -> None:
            with pytest.raises(ClosedError) as error:
                await core1.wait_for(NOTIFY)
            refused.append(error.value)

        async with trio.open_nursery() as nursery, core1:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        assert len(refused) == 1
        assert [arrival async for arrival in core1] == []
        assert not await trio.Path(tmp_path / "core1").exists()
        async with core1, open_proxy(config) as proxy:  # once more
            await proxy.send(NOTIFY)
            await core1.wait_for(NOTIFY)

    played(tmp_path, story)


def test_wrong_words(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        with pytest.raises(InvalidArgumentError, match="unix:/x: peer=REMOTE is missing"):
            async with Core1("unix:/x"):
                pass
        with pytest.raises(LinkNotFoundError, match="its directory does not exist: make it"):
            async with Core1(f"unix:{tmp_path}/none/a,peer={tmp_path}/b"):
                pass
        async with Core1(link) as core1, open_proxy(config) as proxy:
            with pytest.raises(InvalidArgumentError, match="'two words': a wire name is"):
                await core1.send("two words")
            with pytest.raises(TypeError, match=r"one name is given as \['x'\]"), proxy.events(signals="x"):
                pass
            with pytest.raises(
                UnknownSignalError, match=f"x: not a signal of .*; there are: {RESET}, {HWWD}, {NOTIFY}"
            ):
                await proxy.wait_for("x")
            with pytest.raises(UnknownSignalError, match=f"{HWWD}: not an outbound signal of .*; there are: {NOTIFY}$"):
                await proxy.send(HWWD)

    played(tmp_path, story)


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ({}, [RESET, HWWD, NOTIFY]),
        ({"signals": [RESET, NOTIFY]}, [RESET, NOTIFY]),
        ({"direction": Direction.INBOUND}, [RESET, HWWD]),
        ({"signals": [NOTIFY], "direction": Direction.INBOUND}, []),
        ({"signals": []}, []),
    ],
)
def test_events_of_some_signals(tmp_path: Path, chosen: dict[str, list[str] | Direction], seen: list[str]) -> None:
    async def story(config: Config, link: str) -> None:
        got: list[Notification] = []
        async with Core1(link) as core1, open_proxy(config) as proxy:
            events: trio.MemoryReceiveChannel[Notification]
            with proxy.events(**chosen) as events, proxy.events() as all_events:  # type: ignore[arg-type]
                await core1.send(RESET)
                await core1.send(HWWD)
                for _ in range(2):
                    await all_events.receive()
                await proxy.send(NOTIFY)
                while events.statistics().current_buffer_used:
                    got.append(await events.receive())
        assert [each.signal.name for each in got] == seen

    played(tmp_path, story)


def test_a_full_stream_counts_what_it_would_have_got(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, open_proxy(config) as proxy:
            with proxy.events(1, signals=[RESET]), proxy.events(math.inf) as all_events:
                for name in (RESET, HWWD, RESET, HWWD, RESET):
                    await core1.send(name)
                for _ in range(5):
                    await all_events.receive()
            assert proxy.stats.events_lost == 2

    played(tmp_path, story)


def test_wait_for_of_a_proxy(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        got: list[Notification] = []
        proxies: list[Proxy] = []

        async def wait() -> None:
            got.append(await proxies[0].wait_for(HWWD))

        async def wait_for_the_end() -> None:
            with pytest.raises(ClosedError):
                await proxies[0].wait_for(NOTIFY)

        async with Core1(link) as core1, trio.open_nursery() as late:
            async with open_proxy(config) as proxy:
                proxies.append(proxy)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked()
                    for name in (RESET, HWWD, HWWD, HWWD):
                        await core1.send(name)
                assert (got[0].signal.name, got[0].sequence) == (HWWD, 2)
                with pytest.raises(TimeoutError, match=f"{RESET}: did not come within 0 s"):
                    await proxy.wait_for(RESET, timeout=0)
                assert proxy.stats.events_lost == 0
                late.start_soon(wait_for_the_end)
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ClosedError):
                await proxy.wait_for(NOTIFY)

    played(tmp_path, story)
