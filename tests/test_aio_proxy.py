"""Tests of `aio.open_proxy` with real sockets and asyncio in this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import math
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
import trio
import trio.testing

from inco_trio import (
    ClosedError,
    Config,
    ConfigError,
    Direction,
    LinkNotFoundError,
    Notification,
    ResourceError,
    Signal,
    UnknownSignalError,
    aio,
    builtin_signals,
)
from inco_trio.frame import decode, encode
from inco_trio.links.unix import UnixLink
from netns.hang import HANG
from tests.support_steps import Steps, Turns

PROJECT = Path(__file__).parents[1]
RESET, HWWD, NOTIFY = "ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_irq"
MAC = bytes.fromhex("020000000001")


class World:
    """A board; the test acts as core 1, with plain sockets that do not use the asyncio loop."""

    def __init__(self, home: Path) -> None:
        self.home = home
        # Without a stop deadline, the proxy finishes all pending notifications when it stops, even on a slow machine.
        self.config = Config(
            f"unix:{home}/core0,peer={home}/core1", builtin_signals(home / "irq"), stop_deadline=math.inf
        )
        self.core1 = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.core1.bind(f"{home}/core1")
        self.sent = 0
        self.came = 0

    def send(self, *names: str) -> None:
        for name in names:
            self.core1.sendto(encode(name.encode(), MAC), f"{self.home}/core0")

    def feed(self) -> None:
        """Send one frame unless the proxy's queue is full."""
        with contextlib.suppress(BlockingIOError):
            self.core1.sendto(encode(RESET.encode(), MAC), socket.MSG_DONTWAIT, f"{self.home}/core0")
            self.sent += 1

    def receive(self) -> str:
        """Block the thread until core 1 receives a signal, and return the signal's name."""
        name = decode(self.core1.recv(200))
        assert name is not None
        return name.decode()

    def count(self) -> int:
        """Return the number of signals that core 1 has received so far."""
        try:
            while True:
                self.core1.recv(200, socket.MSG_DONTWAIT)
                self.came += 1
        except BlockingIOError:
            return self.came

    def trigger(self) -> None:
        """Write to the trigger file as an application does."""
        (self.home / "irq/message_6_trig").write_text("1")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.core1.close()


def descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        # iterdir() also lists its own descriptor, which is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{entry.name} {entry.readlink()}")
    return found


def alive() -> tuple[set[str], set[str]]:
    """Return the names of threads and descriptors, without idle threads that Trio ends after 10 s."""
    return {
        thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread ")
    }, descriptors()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = alive()
    yield
    assert alive() == before


Run = Callable[[Coroutine[Any, Any, None]], None]


def run(main: Callable[[], Awaitable[None]], run_loop: Run = asyncio.run) -> None:
    async def guarded() -> None:
        await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_loop(guarded())


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Turns]:
    turns = Turns(monkeypatch)
    yield turns
    turns.free()


def test_notifications_pass_in_both_directions(world: World) -> None:
    async def main() -> None:
        policy = type(asyncio.get_running_loop())
        async with aio.open_proxy(world.config) as proxy:
            assert proxy.config is world.config
            assert (await proxy.status()).running
            with proxy.events() as events:
                world.send(RESET)
                came = await anext(events)
                await proxy.send(NOTIFY)
                assert world.receive() == NOTIFY
                went = await anext(events)
            assert (came.signal.name, came.direction, came.sequence) == (RESET, Direction.INBOUND, 1)
            assert (went.signal.name, went.direction, went.sequence) == (NOTIFY, Direction.OUTBOUND, 2)
            stats = await proxy.stats()
            assert (stats.delivered, stats.sent) == (1, 1)
        assert await proxy.stats() == stats
        assert not (await proxy.status()).running
        assert type(asyncio.new_event_loop_policy() if False else asyncio.get_running_loop()) is policy
        assert "trio_asyncio" not in sys.modules

    run(main)


def test_the_proxy_continues_while_the_loop_is_blocked_in_a_system_call(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            for _ in range(100):
                world.trigger()
                # receive() blocks the loop's thread.
                assert world.receive() == NOTIFY
            assert (await proxy.stats()).sent == 100

    run(main)


def test_reading_counters_does_not_block_the_loop(world: World) -> None:
    """Read the counters while the proxy's thread is busy; the loop still runs other tasks."""

    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            busy, go_on = threading.Event(), threading.Event()

            def hold() -> None:
                busy.set()
                go_on.wait(HANG)

            proxy._beside._in_trio(hold)
            assert await asyncio.to_thread(busy.wait, HANG)
            asked = asyncio.gather(proxy.stats(), proxy.status())
            await asyncio.sleep(0)
            assert not asked.done()
            go_on.set()
            stats, status = await asked
            assert status.counters == stats

    run(main)


def test_several_proxies_run_in_one_loop(tmp_path: Path) -> None:
    worlds = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        worlds.append(World(tmp_path / name))

    async def carry(world: World) -> None:
        async with aio.open_proxy(world.config) as proxy:
            async with asyncio.TaskGroup() as tasks:
                waiting = [tasks.create_task(proxy.wait_for(name)) for name in (RESET, HWWD)]
                with proxy.events() as events:
                    # The proxy handles requests in order: once it has sent NOTIFY, both tasks are waiting.
                    await proxy.send(NOTIFY)
                    assert (await anext(events)).signal.name == NOTIFY
                world.send(RESET, HWWD)
            assert [task.result().signal.name for task in waiting] == [RESET, HWWD]
            assert world.receive() == NOTIFY

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for world in worlds:
                tasks.create_task(carry(world))

    run(main)
    for world in worlds:
        world.core1.close()


def test_wait_for_raises_for_unknown_signals_and_closed_proxies(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):  # No notification arrives, so this deadline expires.
                    await proxy.wait_for(RESET)
            with pytest.raises(UnknownSignalError, match="nothing: not a signal"):
                await proxy.wait_for("nothing")
            closed = asyncio.create_task(proxy.wait_for(RESET))
            await proxy.send(NOTIFY)
        with pytest.raises(ClosedError):
            await closed
        for call in (proxy.wait_for(RESET), proxy.send(NOTIFY), proxy.reload(world.config)):
            with pytest.raises(ClosedError):
                await call

    run(main)


def test_send_raises_for_inbound_signals_and_closed_proxies(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(attrs.evolve(world.config, stop_deadline=0.0)) as proxy:
            with pytest.raises(UnknownSignalError, match="ihub_reset_irq: not an outbound signal"):
                await proxy.send(RESET)
            world.core1.close()
            (world.home / "core1").unlink()
            sends = [asyncio.create_task(proxy.send(NOTIFY)) for _ in range(3)]
            await asyncio.sleep(0)
            sends[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await sends[1]
        for send in (sends[0], sends[2]):
            with pytest.raises(ClosedError):
                await send

    run(main)


def test_reload_adds_a_signal_and_refuses_another_link(world: World) -> None:
    other = attrs.evolve(
        world.config, signals=(*world.config.signals, Signal("more", Direction.OUTBOUND, world.home / "irq", "more"))
    )

    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            await proxy.reload(other)
            assert proxy.config is other
            await proxy.send("more")
            assert world.receive() == "more"
            with pytest.raises(ConfigError, match="a reload cannot change the link"):
                await proxy.reload(attrs.evolve(other, link="elsewhere"))
            assert proxy.config is other

    run(main)


def names(notifications: list[Notification]) -> list[str]:
    return [notification.signal.name for notification in notifications]


def test_events_are_filtered_by_signal_and_direction(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with (
                proxy.events(signals=[RESET, NOTIFY]) as some,
                proxy.events(direction=Direction.OUTBOUND) as out,
                proxy.events() as every,
            ):
                world.send(HWWD, RESET)
                for _ in range(2):
                    await anext(every)
                await proxy.send(NOTIFY)
                assert names([await anext(some), await anext(some)]) == [RESET, NOTIFY]
                assert names([await anext(out)]) == [NOTIFY]
            with pytest.raises(UnknownSignalError, match="nothing: not a signal"), proxy.events(signals=["nothing"]):
                pass
        with pytest.raises(ClosedError), proxy.events():
            pass

    run(main)


def test_a_slow_reader_loses_events_beyond_its_buffer(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with proxy.events(3) as slow, proxy.events() as fast:
                for _ in range(10):
                    world.send(RESET)
                    await anext(fast)
                assert (await proxy.stats()).events_lost == 7
                assert [(await anext(slow)).sequence for _ in range(3)] == [1, 2, 3]
                world.send(HWWD)
                assert (await anext(slow)).sequence == 11

    run(main)


def test_a_burst_wakes_the_loop_once_per_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        wakes = 0

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal wakes
            wakes += 1
            return wake(*args, **kwargs)

        async with aio.open_proxy(world.config) as proxy:
            with proxy.events() as events, proxy.events() as delivered:
                world.send(*[RESET] * 640)
                for _ in range(640):
                    await anext(delivered)
                wake = asyncio.get_running_loop().call_soon_threadsafe
                monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", counted)
                assert [(await anext(events)).sequence for _ in range(640)] == [*range(1, 641)]
                assert wakes == 10

    run(main)


def test_buffered_events_can_be_read_after_the_proxy_closed(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            kept = proxy.events()
            stream, waiting = kept.__enter__(), proxy.events(direction=Direction.OUTBOUND)
            with waiting as outbound:
                reader = asyncio.create_task(anext(outbound, None))
                world.send(*[RESET] * 200)
                world.trigger()
                assert (await reader) is not None
                reader = asyncio.create_task(anext(outbound, None))
                await asyncio.sleep(0)
                world.send(*[HWWD] * 100)
                proxy._beside._end()
                assert await reader is None
        assert names([event async for event in stream]).count(HWWD) == 100
        assert await anext(stream, None) is None
        kept.__exit__(None, None, None)
        with pytest.raises(ClosedError, match="the event stream is closed"):
            await anext(stream)

    run(main)


def test_closing_a_stream_ends_a_waiting_reader(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with proxy.events() as events:
                readers = [asyncio.ensure_future(anext(events)) for _ in range(2)]
                await proxy.send(NOTIFY)
                await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
                (left,) = [reader for reader in readers if not reader.done()]
            with pytest.raises(ClosedError, match="the event stream is closed"):
                await left
            with pytest.raises(ClosedError, match="the event stream is closed"):
                await anext(events)

    run(main)


def test_closing_a_stream_during_a_fetch_ends_the_reader(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with proxy.events() as events:
                assert isinstance(events, aio._Events)

                def notify_and_close() -> None:
                    # Trio passes the notification to the waiting task. The stream is closed when this task continues.
                    proxy._proxy._parts.events.carried(proxy.config.signals[:1], ())
                    events.close()

                reader = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)
                await proxy._beside.call(trio.testing.wait_all_tasks_blocked)
                proxy._beside.ask(notify_and_close)
                with pytest.raises(ClosedError, match="the event stream is closed"):
                    await reader

    run(main)


def test_a_reader_whose_event_another_reader_takes_waits_for_the_next_one(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with proxy.events() as events:
                waiting = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)
                world.send(RESET)
                # Without a turn of this loop, the waiting reader cannot take the event that Trio's thread has fetched.
                while not events._fetched:  # type: ignore[attr-defined]
                    os.sched_yield()
                assert (await anext(events)).sequence == 1
                world.send(RESET)
                assert (await waiting).sequence == 2

    run(main)


def test_readers_of_one_stream_share_its_events(world: World) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with proxy.events() as events:
                readers = [asyncio.ensure_future(anext(events)) for _ in range(20)]
                await asyncio.sleep(0)
                world.send(*[RESET] * 20)
                seen = [(await reader).sequence for reader in readers]
            assert sorted(seen) == [*range(1, 21)]

    run(main)


def test_errors_while_opening_are_raised_unchanged(world: World) -> None:
    async def main() -> None:
        missing = attrs.evolve(world.config, link=f"unix:{world.home}/no/core0,peer={world.home}/core1")
        with pytest.raises(LinkNotFoundError):
            async with aio.open_proxy(missing):
                pass
        (world.home / "irq/message_4_state").unlink()
        (world.home / "irq/message_4_state").symlink_to("elsewhere")
        with pytest.raises(ConfigError, match="message_4_state"):
            async with aio.open_proxy(world.config):
                pass
        (world.home / "irq/message_4_state").unlink()
        async with aio.open_proxy(world.config):
            pass

    run(main)


# If Trio cannot start, it leaves a socket open.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_too_few_descriptors_is_an_error_and_leaks_nothing(world: World) -> None:
    async def main() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = os.dup(0)
        os.close(first)
        before, refused = alive(), []
        for room in itertools.count():
            resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, hard))
            try:
                async with aio.open_proxy(world.config):
                    break
            except ResourceError as error:
                refused.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            gc.collect()
            assert alive() == before
        assert len(refused) > 3
        assert "Trio for unix:" in refused[0]
        assert all(os.strerror(errno.EMFILE) in each or "limit reached" in each for each in refused), refused

    run(main)


def test_failure_to_start_a_thread_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(ResourceError, match=r"^unix:.*: cannot start a thread: can't start new thread"):
            async with aio.open_proxy(world.config):
                pass

    run(main)


@pytest.mark.parametrize("error", [ValueError("block"), SystemExit(7), KeyboardInterrupt()], ids=repr)
def test_errors_of_the_block_are_raised_unchanged(world: World, error: BaseException) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config):
            world.trigger()
            raise error

    with pytest.raises(type(error)) as raised:
        run(main)
    assert raised.value is error
    assert world.count() == 1


def test_a_cancelled_block_sends_pending_notifications(world: World) -> None:
    async def main() -> None:
        async def block(entered: Callable[[], None]) -> None:
            async with aio.open_proxy(world.config):
                world.trigger()
                entered()
                await asyncio.Event().wait()

        entered = asyncio.Event()
        task = asyncio.create_task(block(entered.set))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.count() == 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await block(lambda: limit.reschedule(asyncio.get_running_loop().time()))
        assert world.count() == 2

    run(main)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[aio.Proxy], None]:
    """Return a function that makes a task of the proxy fail."""
    waiting: queue.SimpleQueue[trio.Event] = queue.SimpleQueue()

    async def changed(_link: UnixLink) -> None:
        failing = trio.Event()
        waiting.put(failing)
        await failing.wait()
        raise RuntimeError("of the task")

    monkeypatch.setattr(UnixLink, "changed", changed)
    return lambda proxy: proxy._beside.ask(waiting.get().set)


async def raised_by(block: Callable[[], Awaitable[None]]) -> pytest.ExceptionInfo[BaseException]:
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - the caller checks the type
        await block()
    return raised


def test_a_failing_task_cancels_the_block(world: World, fail: Callable[[aio.Proxy], None]) -> None:
    ended = []

    async def block() -> None:
        async with aio.open_proxy(world.config) as proxy:
            fail(proxy)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # The proxy's other tasks are still running.
                await proxy.send(NOTIFY)
                world.trigger()
                ended.append("cancelled")
                raise

    async def main() -> None:
        raised = await raised_by(block)
        assert raised.type is ExceptionGroup
        assert raised.group_contains(RuntimeError, match="of the task")
        assert ended == ["cancelled"]
        assert world.count() == 2
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    run(main)


@pytest.mark.parametrize("sleeps", range(3))
def test_a_task_that_fails_as_the_block_ends_is_reported(
    world: World, fail: Callable[[aio.Proxy], None], turns: Turns, sleeps: int
) -> None:
    async def block() -> None:
        async with aio.open_proxy(world.config) as proxy:
            # Trio reports the failure before fail() returns; the loop handles the report in its next turn.
            fail(proxy)
            with contextlib.suppress(asyncio.CancelledError):
                for _ in range(sleeps):
                    await asyncio.sleep(0)

    async def main() -> None:
        raised = await raised_by(block)
        assert raised.type is ExceptionGroup
        assert raised.group_contains(RuntimeError, match="of the task")
        for _ in range(3):
            await asyncio.sleep(0)

    run(main, turns.run)


def test_errors_of_a_task_and_of_the_block_are_both_raised(world: World, fail: Callable[[aio.Proxy], None]) -> None:
    async def block() -> None:
        async with aio.open_proxy(world.config) as proxy:
            fail(proxy)
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("of the block")

    async def main() -> None:
        raised = await raised_by(block)
        assert raised.type is ExceptionGroup
        assert raised.group_contains(RuntimeError, match="of the task")
        assert raised.group_contains(ValueError, match="of the block")

    run(main)


@pytest.mark.parametrize("error", [ExceptionGroup, ValueError])
def test_an_error_that_replaces_a_cancellation_does_not_swallow_it(
    world: World, fail: Callable[[aio.Proxy], None], error: type[Exception]
) -> None:
    waited = []

    async def block() -> None:
        async with aio.open_proxy(world.config) as proxy:
            task = asyncio.current_task()
            assert task is not None
            # asyncio raises the cancellation at the block's next await, or when the block ends.
            task.cancel()
            if error is ExceptionGroup:
                fail(proxy)
                await asyncio.Event().wait()
            raise ValueError("of the block")

    async def whole() -> None:
        assert (await raised_by(block)).type is error
        waited.append(True)
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(whole())
        await asyncio.wait({task})
        assert task.cancelled()
        assert waited

    run(main)


@pytest.mark.parametrize("waits", ["never", "before", "after"])
def test_a_crash_of_trio_ends_the_block(world: World, turns: Turns, waits: str) -> None:
    """Crash Trio, as a bug in Trio or inco-trio might. In each run, the asyncio loop gets a turn one step later."""

    async def broken() -> None:
        raise RuntimeError("broken")

    async def block() -> None:
        async with aio.open_proxy(world.config) as proxy:
            proxy._beside._in_trio(trio.lowlevel.spawn_system_task, broken)
            if waits == "before":
                await proxy.wait_for(RESET)
            elif waits == "after":
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await proxy.wait_for(RESET)

    async def once() -> None:
        raised = await raised_by(block)
        if waits == "after" or (waits == "before" and raised.type is ExceptionGroup):
            # If `waits` is "before", wait_for() can raise ClosedError before the block is cancelled.
            assert raised.type is ExceptionGroup
            assert raised.group_contains(ClosedError)
            assert raised.group_contains(trio.TrioInternalError)
        else:
            assert raised.type is trio.TrioInternalError
        await asyncio.sleep(0)

    async def main() -> None:
        assert await turns.at_each("steps of Trio", once, lambda task: not task.done()) > 10

    run(main, turns.run)


def test_closing_the_coroutine_stops_the_proxy(world: World) -> None:
    """Close the coroutine as the garbage collector closes unfinished coroutines after the loop has ended."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)
    entered = asyncio.Event()

    async def block() -> None:
        async with aio.open_proxy(world.config):
            world.trigger()
            entered.set()
            await asyncio.Event().wait()

    opening, entering = block(), block()
    tasks = [loop.create_task(opening)]
    # Run one turn. Only in the next turn is the loop notified that the proxy is open.
    loop.call_soon(loop.stop)
    loop.run_forever()
    opening.close()
    assert not (world.home / "core0").exists()
    tasks.append(loop.create_task(entering))
    loop.run_until_complete(entered.wait())
    entering.close()
    loop.close()
    assert world.count() == 1
    assert not (world.home / "core0").exists()


Cut = Callable[..., Awaitable[int]]


@pytest.fixture(params=get_args(Steps))
def cut(request: pytest.FixtureRequest, turns: Turns) -> Cut:
    """Return a function that cancels `once()` at each step: `await cut(once, check=check)`; see `Turns.at_each`."""
    return partial(turns.at_each, request.param)


def test_open_and_close_can_be_cancelled_at_each_step(world: World, cut: Cut, turns: Turns) -> None:
    async def main() -> None:
        triggered = 0

        async def once() -> None:
            nonlocal triggered
            async with aio.open_proxy(world.config) as proxy:
                world.trigger()
                triggered += 1
                await proxy.send(NOTIFY)

        def check() -> None:
            assert alive() == before
            assert not (world.home / "core0").exists()
            # Each trigger sends one frame. send() can be cancelled before or after it sends its frame.
            assert triggered <= world.count() <= 2 * triggered

        before = alive()
        assert await cut(once, check=check) > 10

    run(main, turns.run)


def test_close_can_be_cancelled_at_each_step(world: World, cut: Cut, turns: Turns) -> None:
    async def main() -> None:
        triggered = 0

        async def once() -> None:
            nonlocal triggered
            async with aio.open_proxy(world.config):
                world.trigger()
                triggered += 1

        def check() -> None:
            assert alive() == before
            assert world.count() == triggered

        before = alive()
        assert await cut(once, check=check) > 10
        assert triggered > 1

    run(main, turns.run)


def test_send_can_be_cancelled_at_each_step(world: World, cut: Cut, turns: Turns) -> None:
    async def main() -> None:
        calls = 0

        async def once() -> None:
            nonlocal calls
            calls += 1
            await proxy.send(NOTIFY)

        async with aio.open_proxy(world.config) as proxy:
            assert await cut(once, check=world.count) > 1
            await proxy.send(NOTIFY)
        stats = await proxy.stats()
        assert 3 <= stats.triggered == stats.sent == world.count() <= calls + 1

    run(main, turns.run)


def test_wait_for_can_be_cancelled_at_each_step(world: World, cut: Cut, turns: Turns) -> None:
    async def main() -> None:
        async with aio.open_proxy(world.config) as proxy:
            with turns.feeding(world.feed):
                assert await cut(lambda: proxy.wait_for(RESET)) > 1
            assert proxy._proxy._parts.events._entries == {}
        stats = await proxy.stats()
        assert (stats.delivered, stats.events_lost) == (world.sent, 0)

    run(main, turns.run)


def test_events_can_be_cancelled_at_each_step(world: World, cut: Cut, turns: Turns) -> None:
    async def main() -> None:
        seen: list[int] = []

        async def once() -> None:
            # anext() cannot be cancelled while it returns events that were already fetched, so read these first.
            assert isinstance(events, aio._Events)
            while events._fetched:
                seen.append((await anext(events)).sequence)
            seen.append((await anext(events)).sequence)

        async with aio.open_proxy(world.config) as proxy:
            with proxy.events(math.inf) as events:
                with turns.feeding(world.feed):
                    assert await cut(once) > 1
                while len(seen) < world.sent:
                    seen.append((await anext(events)).sequence)
            assert seen == [*range(1, world.sent + 1)]

    run(main, turns.run)


def test_reload_can_be_cancelled_at_each_step(
    world: World, cut: Cut, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With TURN = 0, the reload yields to other tasks after each signal.
    monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
    more = tuple(Signal(f"more{n}", Direction.OUTBOUND, world.home / "more", f"more{n}") for n in range(5))
    other = attrs.evolve(world.config, signals=world.config.signals[1:] + more)

    async def main() -> None:
        async def once() -> None:
            await proxy.reload(world.config if proxy.config is other else other)

        def check() -> None:
            status = proxy._beside.ask(lambda: proxy._proxy.status)
            assert {each.signal for each in status.signals} == {each.name for each in proxy.config.signals}

        async with aio.open_proxy(world.config) as proxy:
            for _ in range(2):
                assert await cut(once, check=check) > 1
            await proxy.reload(other)
            await proxy.send("more3")
            assert world.receive() == "more3"
        assert world.count() == 0

    run(main, turns.run)


PROGRAM = """
import asyncio, sys
from pathlib import Path
import inco_trio
from inco_trio import aio

home = Path(sys.argv[1])
config = inco_trio.Config(f"unix:{home}/core0,peer={home}/core1", inco_trio.builtin_signals(home / "irq"))

async def main():
    async with aio.open_proxy(config) as proxy:
        print("ready", flush=True)
        opened.set()
        await asyncio.Event().wait()

opened = asyncio.Event()
"""
ABANDONED = """
loop = asyncio.new_event_loop()
task = loop.create_task(main())
loop.run_until_complete(opened.wait())
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["Ctrl-C", "abandoned"])
def test_a_program_ended_by_ctrl_c_or_without_running_its_loop_stops_cleanly(world: World, way: str) -> None:
    """Check that neither way of ending the program hangs or loses a pending notification."""
    program = PROGRAM + ("asyncio.run(main())" if way == "Ctrl-C" else ABANDONED)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(world.home)],
        cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            world.trigger()
            if way == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        finally:
            process.kill()
    assert process.returncode == (-signal.SIGINT if way == "Ctrl-C" else 0), err.decode()
    assert world.receive() == NOTIFY
    assert not (world.home / "core0").exists()
