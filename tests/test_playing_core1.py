"""Tests of `Core0` and `Core1` with a real proxy, over Unix sockets and over a network interface."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from inco_trio import (
    ClosedError,
    Config,
    Core0,
    Core1,
    Direction,
    InvalidArgumentError,
    LinkNotFoundError,
    Notification,
    Proxy,
    ProxyNotFoundError,
    UnknownSignalError,
    builtin_signals,
    open_proxy,
)
from inco_trio.cores.peer import Peer
from inco_trio.simulation.world import Cores
from netns.hang import HANG

RESET, HWWD, NOTIFY = "ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_irq"

Story = Callable[[Config, str], Awaitable[None]]


def played(tmp_path: Path, story: Story) -> None:
    """Run `story` with a proxy configuration for Unix sockets and with core 1's link address."""

    async def main() -> None:
        with trio.fail_after(HANG):
            address = f"unix:{tmp_path}/core0,peer={tmp_path}/core1"
            await story(
                Config(address, builtin_signals(tmp_path / "irq")), f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
            )

    trio.run(main)


def trigger(config: Config, name: str) -> None:
    """Write the trigger file of a signal, as an application does."""
    next(signal.path for signal in config.signals if signal.name == name).write_text("1")


def test_signals_pass_in_both_directions(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with open_proxy(config) as proxy, Core1(link) as core1:
            with proxy.events() as events:
                await core1.send(RESET)
                carried = await events.receive()
                with core1.events() as arrivals:
                    trigger(config, NOTIFY)
                    came = await arrivals.receive()
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
def test_signals_pass_over_an_interface_of_another_namespace(cores: Cores, irq_dir: Path) -> None:
    async def main() -> None:
        config = Config(cores.link, builtin_signals(irq_dir), netns=cores.core0.path)
        with trio.fail_after(HANG):
            async with (
                open_proxy(config) as proxy,
                Core1(cores.link, netns=cores.core1.path) as core1,
            ):
                with core1.events() as arrivals:
                    await proxy.send(NOTIFY)
                    assert (await arrivals.receive()).name == NOTIFY
                with proxy.events(signals=[HWWD]) as events:
                    await core1.send(RESET)
                    await core1.send(HWWD)
                    assert (await events.receive()).sequence == 3

    trio.run(main)


def test_each_stream_gets_each_arrival_until_its_buffer_is_full(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, open_proxy(config) as proxy:
            with core1.events(4) as short, core1.events() as long, core1.events(signals=[RESET]) as other:
                for _ in range(6):
                    await proxy.send(NOTIFY)
                assert [(await long.receive()).sequence for _ in range(6)] == [1, 2, 3, 4, 5, 6]
                assert core1.lost == 2
                assert [(await short.receive()).sequence for _ in range(4)] == [1, 2, 3, 4]
                for stream in (short, long, other):
                    with pytest.raises(trio.WouldBlock):
                        stream.receive_nowait()

    played(tmp_path, story)


def test_wait_for_of_core1_returns_the_next_arrival(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        got = []

        async def wait() -> None:
            got.append((await core1.wait_for(NOTIFY)).sequence)

        async with Core1(link) as core1, open_proxy(config) as proxy:
            with core1.events() as arrivals:
                await proxy.send(NOTIFY)
                await arrivals.receive()
                async with trio.open_nursery() as nursery:
                    for _ in range(2):
                        nursery.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked()
                    await proxy.send(NOTIFY)
                assert got == [2, 2]

    played(tmp_path, story)


def test_core0_sends_triggers_and_reads_state_files(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        with pytest.raises(ProxyNotFoundError, match=r"/irq: missing: the proxy creates it \(is a proxy running\?\)"):
            async with Core0(config.signals):
                pass
        async with open_proxy(config) as proxy, Core1(link) as core1, Core0(config.signals) as core0:
            with core0.events(signals=[HWWD]) as arrivals, core1.events() as frames:
                for name in (RESET, *[HWWD] * 50):
                    await core1.send(name)
                got = [await arrivals.receive() for _ in range(50)]
                assert [each.sequence for each in got] == list(range(2, 52))
                assert {each.name for each in got} == {HWWD}
                await core0.send(NOTIFY)
                assert (await frames.receive()).name == NOTIFY
            assert (core0.lost, core0.overflows, proxy.stats.sent) == (0, 0, 1)
            with pytest.raises(
                UnknownSignalError, match=f"{RESET}: not an outbound signal of core 0 .expected one of: {NOTIFY}."
            ):
                await core0.send(RESET)
            with pytest.raises(UnknownSignalError, match=f"{NOTIFY}: not an inbound signal of core 0"):
                await core0.wait_for(NOTIFY)
            (config.signals[2].path).unlink()
            with pytest.raises(ProxyNotFoundError, match=r"message_6_trig: missing"):
                await core0.send(NOTIFY)
            assert not config.signals[2].path.exists()
        with pytest.raises(ClosedError, match="core 0 is not open: use `async with`"):
            await core0.wait_for(RESET)

    played(tmp_path, story)


def test_core0_that_reads_too_late_counts_the_overflow(tmp_path: Path) -> None:
    (signal,) = [each for each in builtin_signals(tmp_path) if each.name == RESET]
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

    async def main() -> None:
        async with Core0([signal]) as core0:
            with core0.events(math.inf) as arrivals:
                for _ in range(limit // 2 + 1):
                    signal.path.write_text("1")
                with trio.fail_after(HANG):
                    while not core0.overflows:
                        await arrivals.receive()
        assert core0.overflows == 1

    trio.run(main)


def test_core1_sends_frames_unchanged(tmp_path: Path) -> None:
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


def test_core1_waits_until_a_proxy_runs(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, trio.open_nursery() as nursery:
            with pytest.raises(LinkNotFoundError, match=r"link accepts no frames: no process has bound .*core0"):
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


def test_core1_notices_a_proxy_behind_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "peer").symlink_to("target")

    async def story() -> None:
        async with Core1(f"unix:{tmp_path}/core1,peer={tmp_path}/peer") as core1, trio.open_nursery() as nursery:
            nursery.start_soon(core1.wait_running)
            await trio.sleep(60)  # simulated time
            assert len(nursery.child_tasks) == 1
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.bind(f"{tmp_path}/target")
                await trio.sleep(60)  # simulated time
                assert not nursery.child_tasks

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_closed_core1_raises_and_can_be_reopened(tmp_path: Path) -> None:
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
        assert not await trio.Path(tmp_path / "core1").exists()
        async with core1, open_proxy(config) as proxy:  # reopen the same `core1` object
            with core1.events() as arrivals:
                await proxy.send(NOTIFY)
                await arrivals.receive()
        with pytest.raises(ClosedError), core1.events():
            pass

    played(tmp_path, story)


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        with pytest.raises(InvalidArgumentError, match="unix:/x: peer=REMOTE is missing"):
            async with Core1("unix:/x"):
                pass
        with pytest.raises(LinkNotFoundError, match="the directory does not exist"):
            async with Core1(f"unix:{tmp_path}/none/a,peer={tmp_path}/b"):
                pass
        async with Core1(link) as core1, open_proxy(config) as proxy:
            with pytest.raises(InvalidArgumentError, match="'two words': a wire name is"):
                await core1.send("two words")
            with (
                pytest.raises(TypeError, match=r"expected a collection of names, such as \['x'\]"),
                proxy.events(signals="x"),
            ):
                pass
            with pytest.raises(
                UnknownSignalError, match=rf"x: not a signal of .* \(expected one of: {RESET}, {HWWD}, {NOTIFY}\)"
            ):
                await proxy.wait_for("x")
            with (
                pytest.raises(InvalidArgumentError, match="direction='in': expected 'inbound' or 'outbound'"),
                proxy.events(direction="in"),
            ):
                pass
            # HWWD is an inbound signal, so none of its notifications would pass both filters.
            with (
                pytest.raises(UnknownSignalError, match=rf"{HWWD}: not an outbound signal .*: {NOTIFY}\)$"),
                proxy.events(signals=[NOTIFY, HWWD], direction="outbound"),
            ):
                pass
            with (
                pytest.raises(TypeError, match=r"expected a collection of names, such as \['x'\]"),
                core1.events(signals="x"),
            ):
                pass
            with pytest.raises(InvalidArgumentError, match="'two words': a wire name is"):
                await core1.wait_for("two words")
            with pytest.raises(UnknownSignalError, match=rf"{HWWD}: not an outbound signal .*: {NOTIFY}\)$"):
                await proxy.send(HWWD)

    played(tmp_path, story)


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ({}, [RESET, HWWD, NOTIFY]),
        ({"signals": [RESET, NOTIFY]}, [RESET, NOTIFY]),
        ({"direction": Direction.INBOUND}, [RESET, HWWD]),
        ({"direction": "inbound"}, [RESET, HWWD]),
        ({"signals": [RESET], "direction": Direction.INBOUND}, [RESET]),
        ({"signals": []}, []),
    ],
)
def test_events_can_be_filtered_by_signal_and_direction(
    tmp_path: Path, chosen: dict[str, list[str] | Direction], seen: list[str]
) -> None:
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


def test_a_full_stream_counts_only_the_events_that_it_selects(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, open_proxy(config) as proxy:
            with proxy.events(1, signals=[RESET]), proxy.events(math.inf) as all_events:
                for name in (RESET, HWWD, RESET, HWWD, RESET):
                    await core1.send(name)
                for _ in range(5):
                    await all_events.receive()
            assert proxy.stats.events_lost == 2

    played(tmp_path, story)


def test_wait_for_of_a_proxy_returns_the_next_notification(tmp_path: Path) -> None:
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
                with pytest.raises(trio.TooSlowError), trio.fail_after(0):
                    await proxy.wait_for(RESET)
                assert proxy.stats.events_lost == 0
                late.start_soon(wait_for_the_end)
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ClosedError):
                await proxy.wait_for(NOTIFY)

    played(tmp_path, story)


def test_closing_one_stream_stops_only_that_stream(tmp_path: Path) -> None:
    async def story(config: Config, link: str) -> None:
        async with Core1(link) as core1, open_proxy(config) as proxy, Core0(config.signals) as core0:
            with (
                proxy.events() as closed_events,
                core0.events() as closed_states,
                core1.events() as closed_frames,
                proxy.events() as events,
                core0.events() as states,
                core1.events() as frames,
            ):
                for stream in (closed_events, closed_states, closed_frames):
                    await stream.aclose()
                await core1.send(HWWD)
                assert (await events.receive()).signal.name == HWWD
                assert (await states.receive()).name == HWWD
                await core0.send(NOTIFY)
                assert (await events.receive()).signal.name == NOTIFY
                assert (await frames.receive()).name == NOTIFY
            assert (proxy.stats.events_lost, core0.lost, core1.lost) == (0, 0, 0)

    played(tmp_path, story)


@pytest.mark.parametrize("number", [0, 1])
def test_a_notification_that_arrives_while_a_core_closes_is_no_error(tmp_path: Path, number: int) -> None:
    async def story(config: Config, link: str) -> None:
        for _ in range(20):  # Trio runs the task that reads and the task that closes in random order.
            with arriving(config, link, number) as (core, arrive), contextlib.ExitStack() as stack:
                async with core:
                    events = stack.enter_context(core.events())
                    await trio.testing.wait_all_tasks_blocked()
                    arrive()
                    await trio.lowlevel.checkpoint()  # Both tasks can continue now.
                assert [each.sequence async for each in events] in ([], [1])

    played(tmp_path, story)


@pytest.mark.parametrize("number", [0, 1])
def test_a_reopened_core_ignores_its_former_streams(tmp_path: Path, number: int) -> None:
    async def story(config: Config, link: str) -> None:
        with arriving(config, link, number) as (core, arrive), contextlib.ExitStack() as stack:
            async with core:
                former = stack.enter_context(core.events())
            async with core:
                with core.events() as events:
                    arrive()
                    assert (await events.receive()).sequence == 1
                assert [each async for each in former] == []

    played(tmp_path, story)


@contextlib.contextmanager
def arriving(config: Config, link: str, number: int) -> Iterator[tuple[Core0 | Core1, Callable[[], object]]]:
    """Return core 0 or core 1 without a proxy, and a function that makes a notification arrive there."""
    state = next(signal for signal in config.signals if signal.name == HWWD)
    state.directory.mkdir(exist_ok=True)
    with Peer(config.link) as peer:
        if number == 0:
            yield Core0(config.signals), lambda: state.path.write_text("1")
        else:
            yield Core1(link), lambda: peer.send(NOTIFY.encode())
