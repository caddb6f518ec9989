"""The types of the public API, as a user's type checker sees them. mypy checks this file; it is not run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import assert_type

import pytest
import trio

from inco_trio import (
    Arrival,
    Board,
    BoardNotOpenError,
    ClosedError,
    Config,
    ConfigError,
    Core0,
    Core1,
    Direction,
    IncoError,
    InvalidArgumentError,
    LinkNotFoundError,
    Notification,
    PermissionDeniedError,
    Proxies,
    Proxy,
    ProxyNotFoundError,
    RecorderStatus,
    ResourceError,
    RivalStatus,
    Signal,
    SignalStatus,
    Stats,
    Status,
    TaskStatus,
    UnknownSignalError,
    aio,
    builtin_signals,
    open_proxies,
    open_proxy,
    read_board,
    serve,
    testing,
)


def configuration(path: Path) -> Config:
    signal = Signal("door_irq", Direction.INBOUND, path, "door_state")
    assert_type(signal.name, str)
    assert_type(signal.direction, Direction)
    assert_type(signal.directory, Path)
    assert_type(signal.register, str)
    assert_type(signal.path, Path)
    value: str = Direction.OUTBOUND.value
    assert_type(Direction(value), Direction)
    assert_type(builtin_signals(path), tuple[Signal, ...])
    board = read_board(path)
    assert_type(read_board("udrv.json"), Board)
    assert_type(board.signals, tuple[Signal, ...])
    assert_type(board.notes, tuple[str, ...])
    Config("rpmsg4000", board.signals)
    config = Config("rpmsg4000", (signal,), wait_link=True, stop_deadline=1, netns=path)
    assert_type(config.link, str)
    assert_type(config.signals, tuple[Signal, ...])
    assert_type(config.wait_link, bool)
    assert_type(config.stop_deadline, float)
    assert_type(config.netns, Path | None)
    assert_type(config.same_link(config), bool)
    return config


async def one_board(config: Config, nursery: trio.Nursery) -> None:
    async with open_proxy(config) as proxy:
        assert_type(proxy, Proxy)
        assert_type(proxy.config, Config)
        assert_type(proxy.stats, Stats)
        assert_type(proxy.status, Status)
        await proxy.send("redun_notify_irq")
        await proxy.reload(config)
        with proxy.events() as events:
            assert_type(events, trio.MemoryReceiveChannel[Notification])
            async for event in events:
                assert_type(event, Notification)
        with proxy.events(1, signals={"ihub_hwwd_irq"}, direction="inbound"):
            pass
        with proxy.events(buffer=float("inf"), signals=["ihub_hwwd_irq"], direction=Direction.INBOUND):
            pass
        assert_type(await proxy.wait_for("ihub_hwwd_irq"), Notification)
    await serve(config)
    nursery.start_soon(serve, config)


async def many_boards(configs: dict[str, Config]) -> None:
    async with open_proxies(configs) as proxies:
        assert_type(proxies, Proxies)
        as_mapping: Mapping[str, Proxy] = proxies
        assert_type(as_mapping["b1"], Proxy)
        assert_type(proxies["b1"], Proxy)
        assert_type(proxies.get("b1"), Proxy | None)
        assert_type(proxies.configs, Mapping[str, Config])
        assert_type(proxies.not_open, Mapping[str, str])
        assert_type(proxies.stats, Mapping[str, Stats])
        assert_type(await proxies.reload(configs, keep=["b2"]), dict[str, IncoError])


async def both_cores(config: Config, link: str) -> None:
    async with Core0(config.signals) as core0, Core1(link, netns=Path("/run/netns/core1")) as core1:
        assert_type(core0, Core0)
        assert_type(core1, Core1)
        await core0.send("redun_notify_irq")
        await core1.send("ihub_hwwd_irq")
        await core1.send_frame(b"")
        await core1.wait_running()
        assert_type(core0.lost, int)
        assert_type(core0.overflows, int)
        assert_type(core1.malformed, int)
        with core0.events(signals=["ihub_hwwd_irq"]) as events:
            assert_type(events, trio.MemoryReceiveChannel[Arrival])
        arrival = await core1.wait_for("redun_notify_irq")
        assert_type(arrival, Arrival)
        assert_type(arrival.name, str)
        assert_type(arrival.sequence, int)
        assert_type(arrival.monotonic_ns, int)
        assert_type(arrival.time_ns, int)
        assert_type(arrival.frame, bytes)


def reports(event: Notification, status: Status) -> None:
    assert_type(event.signal, Signal)
    assert_type(event.direction, Direction)
    assert_type(event.sequence, int)
    assert_type(event.monotonic_ns, int)
    assert_type(event.time_ns, int)
    assert_type(status.link, str)
    assert_type(status.since, float)
    assert_type(status.table_since, float)
    assert_type(status.running, bool)
    assert_type(status.description, str)
    assert_type(status.descriptors, str | None)
    assert_type(status.counters, Stats)
    assert_type(status.counters.delivered, int)
    assert_type(status.counters.as_dict(), dict[str, int])
    assert_type(status.signals, tuple[SignalStatus, ...])
    assert_type(status.tasks, tuple[TaskStatus, ...])
    assert_type(status.recorded, RecorderStatus | None)
    assert_type(status.rivals, tuple[RivalStatus, ...])
    for rival in status.rivals:
        assert_type((rival.pid, rival.since), tuple[int, float])
        assert_type(rival.shared, tuple[str, ...])
    for signal in status.signals:
        assert_type(signal.signal, str)
        assert_type(signal.direction, Direction)
        assert_type(signal.register, str)
        assert_type((signal.count, signal.failures, signal.pending), tuple[int, int, int])
        assert_type(signal.last, float | None)
        assert_type(signal.problem, str | None)
    for task in status.tasks:
        assert_type(task.task, str)
        assert_type(task.restarts, int)
        assert_type((task.problem, task.last_problem), tuple[str | None, str | None])


def errors(error: IncoError) -> None:
    assert_type(error.subject, str)
    assert_type(error.reason, str)
    assert_type(error.remedy, str | None)
    invalid: ValueError = InvalidArgumentError("timeout", "negative")
    mistakes = ConfigError("udrv.json", ["first", "second"])
    assert_type(mistakes.problems, tuple[str, ...])
    missing: list[FileNotFoundError] = [LinkNotFoundError("rpmsg4000", "missing"), ProxyNotFoundError("no proxy")]
    denied: PermissionError = PermissionDeniedError("rpmsg4000", "needs CAP_NET_RAW")
    lookups: list[LookupError] = [BoardNotOpenError("b1", "not open"), UnknownSignalError("door_irq", "unknown")]
    others: list[IncoError] = [ClosedError("the proxy is closed"), ResourceError("memfd", "no memory")]
    print(invalid, missing, denied, lookups, others)  # noqa: T201


async def in_asyncio(config: Config) -> None:
    assert_type(aio.open_proxy(config), AbstractAsyncContextManager[aio.Proxy, bool | None])
    async with aio.open_proxy(config) as proxy:
        assert_type(proxy.config, Config)
        assert_type(await proxy.stats(), Stats)
        assert_type(await proxy.status(), Status)
        await proxy.send("redun_notify_irq")
        await proxy.reload(config)
        with proxy.events(16, signals=("ihub_hwwd_irq",), direction="inbound") as events:
            assert_type(events, AsyncIterator[Notification])
            assert_type(await anext(events), Notification)
        assert_type(await proxy.wait_for("ihub_hwwd_irq"), Notification)


async def asyncio_in_trio(proxy: Proxy, nursery: trio.Nursery) -> None:
    async def callback(notification: Notification) -> int:
        return notification.sequence

    async def main(asyncio_proxy: aio.AsyncioProxy) -> bytes:
        assert_type(await asyncio_proxy.stats(), Stats)
        assert_type(await asyncio_proxy.status(), Status)
        await asyncio_proxy.send("redun_notify_irq")
        with asyncio_proxy.events(signals=["ihub_hwwd_irq"], direction=Direction.INBOUND) as events:
            assert_type(events, AsyncIterator[Notification])
        return b""

    await nursery.start(aio.on_notification, proxy, callback)
    await aio.on_notification(proxy, callback, buffer=1)
    assert_type(await aio.run(proxy, main), bytes)
    with_trio_proxy: Callable[[Proxy], aio.AsyncioProxy] = aio.AsyncioProxy
    assert_type(with_trio_proxy(proxy), aio.AsyncioProxy)


def test_bench(path: Path) -> None:
    with testing.open_board(path, config={"file": {}}, signals={"door_irq": "inbound"}, in_process=True) as board:
        assert_type(board, testing.Board)
    with testing.open_board(path, config=path / "udrv.json", link="interface") as board:
        assert_type(board.core0, testing.BoardCore0)
        assert_type(board.core1, testing.BoardCore1)
        assert_type(board.proxy, testing.BoardProxy)
        assert_type(board.faults, testing.BoardFaults)
        assert_type(board.directory, Path)
        assert_type(board.signals, tuple[Signal, ...])
        assert_type(board.link, str)
        assert_type(board.history, list[testing.Happening])
        assert_type(board.report, str)
        board.record(path / "board.pcapng")
        board.close()
        with board.guest(path / "core1.elf", "verbose", ready="ready") as guest:
            assert_type(guest, testing.Guest)
            assert_type(guest.wait_for("sent"), str)
            assert_type(guest.log, str)
            assert_type(guest.pid, int)
            guest.stop()
            guest.cont()
            guest.system_reset()
            guest.wait_ready()
    missing: AssertionError = testing.NotificationMissingError("door_irq")
    ended: list[IncoError] = [testing.GuestError("QEMU"), testing.ProxyDiedError("the proxy")]
    print(missing, ended)  # noqa: T201


async def sides_of_a_board(board: testing.Board) -> None:
    core0, core1 = board.core0, board.core1
    assert_type((core0.directory, core0.config, core0.register("door_irq")), tuple[Path, Path, Path])
    assert_type(core0.environment, dict[str, str])
    core0.trigger("redun_notify_irq")
    core1.send("ihub_hwwd_irq")
    core1.send_frame(b"")
    assert_type(core0.expect("ihub_hwwd_irq", 1), testing.Happening)
    assert_type(await core1.expect_async("redun_notify_irq", timeout=1.5), testing.Happening)  # This file is not run.
    assert_type(core1.count("redun_notify_irq"), int)
    for happening in core1.history:
        assert_type(happening.core, int | None)
        assert_type((happening.what, happening.name), tuple[str, str])
        assert_type((happening.monotonic_ns, happening.time_ns), tuple[int, int])
        assert_type(happening.direction, Direction | None)
        assert_type(happening.frame, bytes | None)
    proxy, faults = board.proxy, board.faults
    for act in (proxy.start, proxy.stop, proxy.kill, proxy.restart, faults.link_down, faults.link_up):
        act()
    assert_type(proxy.pid, int | None)
    assert_type(proxy.log, str)
    assert_type(proxy.stats, Stats | None)
    faults.frames(drop=0.1, double=0, reorder=0.5, corrupt=1, delay=0.01, seed=7, direction="inbound")
    faults.frames(direction=Direction.OUTBOUND)
    faults.replace_directory()


@pytest.mark.inco_trio(signals={"door_irq": "inbound"})
def test_with_the_fixtures(inco_board: testing.Board, make_inco_board: Callable[..., testing.Board]) -> None:
    assert_type(make_inco_board(in_process=True), testing.Board)
    assert_type(inco_board.failure(), str | None)
