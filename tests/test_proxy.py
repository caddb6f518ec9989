"""Tests of a running proxy, as a process and through the library, between two cores on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import logging
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from inco_trio import (
    ClosedError,
    Config,
    ConfigError,
    Direction,
    LinkNotFoundError,
    Proxy,
    ResourceError,
    Signal,
    UnknownSignalError,
    builtin_signals,
    open_proxy,
    serve,
)
from inco_trio.frame import BROADCAST, ETHERTYPE, encode
from inco_trio.links.packet import PacketLink
from inco_trio.linux.inotify import IN_CLOSE_WRITE, IN_MODIFY, IN_Q_OVERFLOW, Inotify, parse_events
from inco_trio.notifications import Deaf
from inco_trio.persist.inflight import FRAME_STEP, Inflight
from inco_trio.proxy.handoff import Batch
from inco_trio.proxy.proxy import open_supervised
from inco_trio.registers.states import SLICE, StateFile
from inco_trio.simulation.world import Cores, Namespace, Peer
from netns.fixtures import Consumer, StartProxy, Tcpdump
from netns.fixtures import Proxy as Running
from netns.hang import HANG
from tests.support_control import Client
from tests.support_proxy import INBOUND, OUTBOUND, Cupboard, frame, mac_of, sockets_of, trigger, write_udrv

pytestmark = pytest.mark.netns

Watch = Callable[[Path], Consumer]


@pytest.fixture
def udrv(tmp_path: Path, irq_dir: Path) -> Path:
    """Return the path of a configuration with six signals."""
    return write_udrv(tmp_path / "udrv.json", irq_dir)


@pytest.fixture
def core0_mac(cores: Cores) -> bytes:
    return mac_of(cores.core0, cores.link)


@pytest.fixture
def proxy(proxy: StartProxy) -> Iterator[StartProxy]:
    """Start proxies with the outer fixture `proxy`. After the test, each running proxy must stop cleanly."""
    started: list[Running] = []

    def start(*arguments: str | Path, **how: Any) -> Running:
        started.append(proxy(*arguments, **how))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            assert running.stop() == 0


def names(core1: Peer, count: int) -> list[bytes]:
    """Return the payloads of the next `count` frames that reach core 1."""
    return [core1.receive()[14:] for _ in range(count)]


def room(running: Running) -> int:
    """Return a number of small frames that always fits into the proxy's receive queue.

    Without CAP_NET_ADMIN, net.core.rmem_max limits the queue. The kernel doubles the granted size, and charges less
    than 1 kB for a small frame.
    """
    granted = re.search(r"receive buffer of (\d+) kB granted", running.log)
    assert granted is not None
    return 2 * int(granted[1])


def test_triggers_become_frames(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, tcpdump: Tcpdump, core0_mac: bytes
) -> None:
    proxy("--config", udrv)
    for name, register in OUTBOUND.items():
        trigger(irq_dir / register)
        expected = frame(core0_mac, name.encode())
        assert core1.receive() == expected
        assert tcpdump.packet() == expected


def test_frames_become_writes(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, tcpdump: Tcpdump, watch: Watch
) -> None:
    running = proxy("--config", udrv)
    consumers = {name: watch(irq_dir / register) for name, register in INBOUND.items()}
    for name, consumer in consumers.items():
        core1.send(name.encode())
        consumer.wait(1)
        assert tcpdump.packet() == frame(core1.mac, name.encode())
        assert consumer.path.read_text() == "1"
    assert [consumer.count for consumer in consumers.values()] == [1] * len(INBOUND)
    # The proxy does not echo received frames, and its own writes do not trigger notifications.
    assert running.counters()["sent"] == 0


@pytest.mark.parametrize("length", [60, 64, 1514])
def test_padding_is_ignored(proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch, length: int) -> None:
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"ihub_reset_irq", pad=length)
    resets.wait(1)
    counters = running.counters()
    assert (counters["received"], counters["delivered"], counters["malformed"]) == (1, 1, 0)


def test_a_frame_that_is_too_long_is_malformed(
    proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    for namespace in (cores.core0, cores.core1):
        finished(namespace, "ip", "link", "set", cores.link, "mtu", "9000")
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"ihub_reset_irq", pad=1700)
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    # Repeat this with a batch of frames: in a batch, the receive buffer truncates the long frame.
    os.kill(running.pid, signal.SIGSTOP)
    for pad in (0, 1700, 0):
        core1.send(b"ihub_reset_irq", pad=pad)
    os.kill(running.pid, signal.SIGCONT)
    resets.wait(3)
    counters = running.counters()
    assert (counters["received"], counters["delivered"], counters["malformed"]) == (5, 3, 2)


def test_frames_of_a_foreign_vlan_are_filtered_out(proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch) -> None:
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    # No interface has this VLAN, so the kernel removes the tag and marks the frame as PACKET_OTHERHOST.
    core1.send_raw(BROADCAST + core1.mac + b"\x81\x00\x0f\xa0\x88\x00ihub_reset_irq")
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    assert running.counters()["received"] == 1


@pytest.mark.parametrize("ethertype", [0x0800, 0x0806, 0x86DD, 0x0088, 0x8801, 14])
def test_a_foreign_ethertype_is_filtered_out(
    proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch, ethertype: int
) -> None:
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    core1.send_raw(frame(core1.mac, b"ihub_reset_irq", ethertype))
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    assert running.counters()["received"] == 1


def test_frames_for_other_addresses_are_filtered_out(
    proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch, core0_mac: bytes
) -> None:
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    core1.send_raw(b"\x02\x00\x00\x00\x00\x01" + encode(b"ihub_reset_irq", core1.mac)[6:])
    core1.send_raw(core0_mac + encode(b"ihub_reset_irq", core1.mac)[6:])
    resets.wait(1)
    assert running.counters()["received"] == 1


def test_garbage_changes_only_counters(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch, tmp_path: Path
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201 - repeats a failure
    generator = random.Random(seed)  # noqa: S311 - repeatable on purpose
    running = proxy("--config", udrv)
    consumers = {name: watch(irq_dir / register) for name, register in INBOUND.items()}
    lengths = [1, 1499, 1500, *(generator.randint(1, 1500) for _ in range(500))]
    for length in lengths:
        core1.send_raw(frame(core1.mac, generator.randbytes(length)))
        # Also send raw frames with random addresses and types.
        core1.send_raw(generator.randbytes(generator.randint(14, 1514)))
    for printable in (b"x", b"n" * 64, b"ihub_reset_ir", b"ihub_reset_irqq"):
        core1.send(printable)
    for broken in (b"", b"\0ihub_reset_irq", b"ihub_reset_irq\n", b"ihub\0reset_irq", b"n" * 65, bytes(46)):
        core1.send_raw(frame(core1.mac, broken))
    core1.send(b"ihub_reset_irq")
    consumers["ihub_reset_irq"].wait(1)
    assert [consumer.count for consumer in consumers.values()] == [1, 0, 0]
    counters = running.counters()
    assert counters["unknown"] >= 4
    assert counters["malformed"] >= 6
    # A few of the random raw frames might have our EtherType and a broadcast address by chance.
    assert 1 + len(lengths) + 10 <= counters["received"] <= 1 + 2 * len(lengths) + 10
    assert counters["unknown"] + counters["malformed"] == counters["received"] - 1
    assert counters["delivered"] == 1
    others = {name: counters[name] for name in ("triggered", "sent", "dropped", "overflowed", "write_failures")}
    assert set(others.values()) == {0}
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]
    assert running.stop() == 0


def test_frames_of_a_large_mtu_are_malformed(
    proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    for core in (cores.core0, cores.core1):
        core.run(functools.partial(set_mtu, cores.link, 9000))
    running = proxy("--irq-dir", irq_dir)
    resets = watch(irq_dir / "message_4_state")
    core1.send_raw(frame(core1.mac, b"x" * 8000))
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    assert running.counters()["malformed"] == 1


def set_mtu(interface: str, mtu: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as links:
        links.link("set", ifname=interface, mtu=mtu)


def test_1000_quick_triggers_make_1000_frames(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer) -> None:
    running = proxy("--config", udrv)

    def application() -> None:
        for _ in range(1000):
            trigger(irq_dir / "message_6_trig")
        trigger(irq_dir / "message_1_trig")

    thread = threading.Thread(target=application)
    thread.start()
    assert names(core1, 1001) == [b"redun_notify_irq"] * 1000 + [b"ihub_uart_irq"]
    thread.join()
    assert running.counters()["sent"] == 1001


@contextlib.contextmanager
def counted(irq_dir: Path) -> Iterator[Callable[[], list[int]]]:
    """Watch each state file. Yield a function that returns how many notifications each file has received since then.

    Each file has a separate inotify queue, which holds 16,384 events, and each notification causes two: a write and a
    close. So the function counts up to 8,192 notifications of each file, even though nothing reads the queue before.
    """
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(contextlib.closing(Inotify())) for _ in INBOUND]
        for watch, register in zip(watches, INBOUND.values(), strict=True):
            watch.watch(str(irq_dir / register), IN_MODIFY | IN_CLOSE_WRITE)
        yield lambda: [number_of_closes(watch) for watch in watches]


def number_of_closes(watch: Inotify) -> int:
    closes = 0
    buffer = memoryview(bytearray(1 << 16))
    while length := watch.read_into(buffer):
        for _wd, mask, _name in parse_events(buffer[:length]):
            assert not mask & IN_Q_OVERFLOW
            closes += bool(mask & IN_CLOSE_WRITE)
    return closes


def send_to_each(core1: Peer, numbers: range) -> None:
    """Send a frame for each number, to one inbound signal after the other."""
    names = [name.encode() for name in INBOUND]
    for number in numbers:
        core1.send(names[number % len(names)])


def test_a_burst_of_20000_frames_loses_none(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer) -> None:
    running = proxy("--config", udrv)
    with counted(irq_dir) as closes:
        # Send all frames in one burst if they fit into the receive queue, otherwise in several bursts.
        for start in range(0, 20_000, room(running)):
            end = min(start + room(running), 20_000)
            send_to_each(core1, range(start, end))
            while (counters := running.counters())["delivered"] < end:
                pass
        assert closes() == [6667, 6667, 6666]
    assert (counters["received"], counters["delivered"], counters["dropped"]) == (20_000, 20_000, 0)


def test_a_burst_of_20000_frames_waits_for_a_slow_proxy(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer
) -> None:
    running = proxy("--config", udrv)
    with counted(irq_dir) as closes:
        os.kill(running.pid, signal.SIGSTOP)
        count = min(20_000, room(running))
        send_to_each(core1, range(count))
        os.kill(running.pid, signal.SIGCONT)
        # Wait for all deliveries before the stop: a stopping proxy gives up at its deadline.
        while running.counters()["delivered"] < count:
            pass
        assert running.stop() == 0
        assert closes() == [len(range(first, count, 3)) for first in range(3)]
    counters = final_counters(running.log)
    assert (counters["delivered"], counters["dropped"]) == (count, 0)


def test_frames_dropped_by_the_kernel_are_counted(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, cores: Cores
) -> None:
    running = proxy("--config", udrv)
    with counted(irq_dir) as closes:
        os.kill(running.pid, signal.SIGSTOP)
        before = arrived(cores)
        # Send more frames than any receive buffer holds. Large frames fill it faster.
        large = [encode(name.encode(), core1.mac).ljust(1514, b"\0") for name in INBOUND]
        for number in range(40_000):
            core1.send_raw(large[number % len(large)])
        # A busy kernel also drops frames before they reach the interface; the proxy cannot count such frames.
        sent = arrived(cores) - before
        os.kill(running.pid, signal.SIGCONT)
        running.wait_log("frames dropped: the receive queue was full")
        counters = running.counters()
        while counters["received"] + counters["dropped"] < sent or counters["delivered"] < counters["received"]:
            counters = running.counters()
        assert counters["dropped"] > 0
        assert counters["received"] + counters["dropped"] == sent
        assert sum(closes()) == counters["delivered"]


def arrived(cores: Cores) -> int:
    """Return how many frames the interface of core 0 has received (proc_net_dev(5))."""
    rows = cores.core0.run(Path("/proc/thread-self/net/dev").read_text).splitlines()
    (row,) = [row for row in rows if row.split(":")[0].strip() == cores.link]
    return int(row.split(":")[1].split()[1])


def final_counters(log: str) -> dict[str, int]:
    """Return the counters that the proxy logged when it stopped."""
    *_, last = (json.loads(line) for line in log.splitlines() if '"statistics"' in line)
    return {name: value for name, value in last.items() if type(value) is int}


def test_a_rename_onto_the_trigger_counts_once(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer) -> None:
    proxy("--config", udrv)
    for _ in range(3):
        trigger(irq_dir / "new")
        (irq_dir / "new").rename(irq_dir / "message_6_trig")
        assert names(core1, 1) == [b"redun_notify_irq"]
        trigger(irq_dir / "message_1_trig")
        assert names(core1, 1) == [b"ihub_uart_irq"]
        trigger(irq_dir / "message_6_trig")
        assert names(core1, 1) == [b"redun_notify_irq"]


def test_a_start_changes_no_file_and_sends_nothing(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    irq_dir.mkdir()
    registers = [irq_dir / register for register in (*INBOUND.values(), *OUTBOUND.values())]
    for register in registers:
        register.write_text(f"kept in {register.name}")
    consumers = [watch(register) for register in registers]
    running = proxy("--config", udrv)
    assert [register.read_text() for register in registers] == [f"kept in {register.name}" for register in registers]
    trigger(irq_dir / "message_1_trig")
    assert names(core1, 1) == [b"ihub_uart_irq"]
    assert running.stop() == 0
    # A second start must not change any file either.
    proxy("--config", udrv)
    trigger(irq_dir / "message_0_trig")
    assert names(core1, 1) == [b"ihub_crash_log_irq"]
    touched = {"message_0_trig", "message_1_trig"}
    for consumer in consumers:
        if consumer.path.name in touched:
            consumer.wait(1)
    assert {consumer.path.name for consumer in consumers if consumer.count} == touched


def test_an_unconfigured_file_is_not_a_trigger(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer) -> None:
    running = proxy("--config", udrv)
    trigger(irq_dir / "message_9_trig")
    trigger(irq_dir / "message_4_state")
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]
    assert running.counters()["triggered"] == 1


def test_notifications_triggered_while_the_link_is_down_are_sent_later(
    proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer
) -> None:
    running = proxy("--irq-dir", irq_dir)
    cores.link_down()
    for _ in range(3):
        trigger(irq_dir / "message_6_trig")
    running.wait_log("notifications are kept")
    cores.link_up()
    assert names(core1, 3) == [b"redun_notify_irq"] * 3
    running.wait_log("works again")


def test_the_proxy_uses_a_recreated_link(
    proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    running = proxy("--irq-dir", irq_dir, "--control", "none")  # Other tests cannot connect to this proxy.
    resets = watch(irq_dir / "message_4_state")
    sockets = sockets_of(running.pid)
    for number in range(1, 3):
        said = len(running.log)
        cores.delete_link()
        running.wait_log("the interface is gone", after=said)
        trigger(irq_dir / "message_6_trig")
        cores.make_link()
        core1.rebind()
        running.wait_log("watch: works again", after=said)
        # The first frame is lost if the proxy sends it before core 1 is listening again, so trigger once more.
        trigger(irq_dir / "message_6_trig")
        assert names(core1, 1) == [b"redun_notify_irq"]
        core1.send(b"ihub_reset_irq")
        resets.wait(number)
    assert sockets_of(running.pid) == sockets


def test_a_stop_gives_up_on_a_link_that_stays_down(proxy: StartProxy, cores: Cores, irq_dir: Path) -> None:
    running = proxy("--irq-dir", irq_dir)
    cores.link_down()
    trigger(irq_dir / "message_6_trig")
    running.wait_log("notifications are kept")
    for _ in range(3000):
        trigger(irq_dir / "message_6_trig")
    assert running.stop() == 0
    unfinished = final_counters(running.log)["unfinished"]
    assert unfinished > 0
    assert f"stopped with pending notifications: {unfinished} lost" in running.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_backlog(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch, number: int
) -> None:
    running = proxy("--config", udrv)
    consumers = [watch(irq_dir / register) for register in INBOUND.values()]
    os.kill(running.pid, signal.SIGSTOP)
    count = min(1000, room(running) // 3)
    for _ in range(count):
        for name in INBOUND:
            core1.send(name.encode())
        for register in OUTBOUND.values():
            trigger(irq_dir / register)
    os.kill(running.pid, number)
    os.kill(running.pid, signal.SIGCONT)
    assert running.wait() == 0
    assert names(core1, 3 * count) == [name.encode() for name in OUTBOUND] * count
    for consumer in consumers:
        consumer.wait(count)
    counters = final_counters(running.log)
    assert (counters["delivered"], counters["sent"], counters["unfinished"]) == (3 * count, 3 * count, 0)


def test_a_reload_takes_effect_and_loses_nothing(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    running = proxy("--config", udrv, "--control", "none")  # Other tests cannot connect to this proxy.
    sockets = sockets_of(running.pid)
    resets = watch(irq_dir / "message_4_state")
    (irq_dir / "new_trig").write_text("kept")
    write_udrv(udrv, irq_dir, {**INBOUND, "new_in": "new_state"}, {**OUTBOUND, "new_out": "new_trig"})
    count = min(500, room(running) // 3)
    os.kill(running.pid, signal.SIGSTOP)
    for part in range(2):
        for _ in range(count):
            core1.send(b"ihub_reset_irq")
            trigger(irq_dir / "message_6_trig")
        if part == 0:
            running.process.send_signal(signal.SIGHUP)
    os.kill(running.pid, signal.SIGCONT)
    for _ in range(count):
        core1.send(b"ihub_reset_irq")
        trigger(irq_dir / "message_6_trig")
    running.wait_log('"reloaded"')
    resets.wait(3 * count)
    trigger(irq_dir / "new_trig")
    assert names(core1, 3 * count + 1) == [b"redun_notify_irq"] * (3 * count) + [b"new_out"]
    news = watch(irq_dir / "new_state")
    core1.send(b"new_in")
    news.wait(1)
    assert sockets_of(running.pid) == sockets


def test_a_reload_removes_signals(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch) -> None:
    running = proxy("--config", udrv)
    type_b, resets = watch(irq_dir / "message_2_state"), watch(irq_dir / "message_4_state")
    inbound = {name: register for name, register in INBOUND.items() if name != "ihub_type_b_irq"}
    outbound = {name: register for name, register in OUTBOUND.items() if name != "ihub_uart_irq"}
    write_udrv(udrv, irq_dir, inbound, outbound)
    running.process.send_signal(signal.SIGHUP)
    running.wait_log('"reloaded"')
    core1.send(b"ihub_type_b_irq")
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    assert type_b.count == 0
    assert running.counters()["unknown"] == 1
    trigger(irq_dir / "message_1_trig")
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1 column 2: not JSON"),
        ("{}", "file.ihub-irq-dev: missing (expected a table"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["not-JSON", "invalid", "missing"],
)
def test_an_invalid_reload_is_refused(
    proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer, watch: Watch, text: str | None, reason: str
) -> None:
    running = proxy("--config", udrv)
    resets = watch(irq_dir / "message_4_state")
    if text is None:
        udrv.unlink()
    else:
        udrv.write_text(text)
    running.process.send_signal(signal.SIGHUP)
    entry = json.loads(running.wait_log("reload refused"))
    assert entry["level"] == "error"
    assert entry["message"].startswith(f"reload refused, keeping the old configuration: {udrv}: ")
    assert reason in entry["message"]
    trigger(irq_dir / "message_1_trig")
    assert names(core1, 1) == [b"ihub_uart_irq"]
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    write_udrv(udrv, irq_dir)
    running.process.send_signal(signal.SIGHUP)
    running.wait_log('"reloaded"')


def test_counters_are_logged_on_sigusr1_and_on_exit(
    proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    running = proxy("--irq-dir", irq_dir)
    assert set(running.counters().values()) == {0}
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"ihub_reset_irq")
    core1.send(b"stranger")
    core1.send_raw(frame(core1.mac, b""))
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]
    core1.send(b"ihub_reset_irq")
    resets.wait(2)
    expected = {"received": 4, "delivered": 2, "unknown": 1, "malformed": 1, "triggered": 1, "sent": 1}
    counters = running.counters()
    assert {name: count for name, count in counters.items() if count} == expected
    assert running.stop() == 0
    assert final_counters(running.log) == counters


def test_two_proxies_face_each_other(
    proxy: StartProxy, cores: Cores, udrv: Path, irq_dir: Path, tmp_path: Path, watch: Watch
) -> None:
    other = tmp_path / "other"
    mirrored = write_udrv(tmp_path / "mirrored.json", other, inbound=OUTBOUND, outbound=INBOUND)
    proxies = [proxy("--config", udrv), proxy("--config", mirrored, core=cores.core1)]
    pairs = [(irq_dir / register, other / register) for register in OUTBOUND.values()]
    pairs += [(other / register, irq_dir / register) for register in INBOUND.values()]
    consumers = [watch(there) for _, there in pairs]
    for _ in range(100):
        for here, _there in pairs:
            trigger(here)
    for consumer in consumers:
        consumer.wait(100)
    for running in proxies:
        counters = running.counters()
        assert {name: count for name, count in counters.items() if count} == {
            "received": 300,
            "delivered": 300,
            "triggered": 300,
            "sent": 300,
        }


def test_systemd_is_notified_once_link_and_watches_work(
    proxy: StartProxy, irq_dir: Path, core1: Peer, tmp_path: Path, watch: Watch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(HANG)
        systemd.bind(str(tmp_path / "notify"))
        running = proxy("--irq-dir", irq_dir, env={"NOTIFY_SOCKET": str(tmp_path / "notify")}, ready=False)
        assert systemd.recv(100) == b"READY=1"
        # After READY=1, the link and the watches must work.
        trigger(irq_dir / "message_6_trig")
        assert names(core1, 1) == [b"redun_notify_irq"]
        resets = watch(irq_dir / "message_4_state")
        core1.send(b"ihub_reset_irq")
        resets.wait(1)
        assert running.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


def test_the_notification_fd_is_closed_after_its_newline(proxy: StartProxy, irq_dir: Path) -> None:
    running = proxy("--irq-dir", irq_dir)
    # The fixture has read the newline; end of file must follow while the process is still running.
    assert os.read(running.ready_fd, 1) == b""
    assert running.process.poll() is None


def test_wait_link_waits_for_a_missing_link(proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer) -> None:
    cores.delete_link()
    running = proxy("--irq-dir", irq_dir, "--wait-link", ready=False)
    running.wait_log("no such interface yet: waiting for the link")
    trigger(irq_dir / "message_6_trig")
    os.set_blocking(running.ready_fd, False)
    with pytest.raises(BlockingIOError):
        os.read(running.ready_fd, 1)
    cores.make_link()
    core1.rebind()
    running.wait_ready()
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]


def test_a_follower_that_connects_before_the_link_exists_misses_nothing(
    proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer, tmp_path: Path
) -> None:
    cores.delete_link()
    running = proxy("--irq-dir", irq_dir, "--wait-link", "--control", tmp_path / "control", ready=False)
    running.wait_log("waiting for the link")
    with contextlib.ExitStack() as stack:
        client = Client(tmp_path / "control", stack)
        assert [*client.ask({"request": "follow"})["follow"]] == [cores.link]
        cores.make_link()
        core1.rebind()
        running.wait_ready()
        trigger(irq_dir / "message_6_trig")
        assert client.until(event="notification")["sequence"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_for_a_link_can_be_stopped(proxy: StartProxy, cores: Cores, irq_dir: Path, number: int) -> None:
    cores.delete_link()
    running = proxy("--irq-dir", irq_dir, "--wait-link", ready=False)
    running.wait_log("no such interface yet")
    assert running.stop(number) == 0
    assert os.read(running.ready_fd, 1) == b""


def test_a_missing_link_is_an_error(proxy: StartProxy, cores: Cores, irq_dir: Path) -> None:
    cores.delete_link()
    running = proxy("--irq-dir", irq_dir, ready=False)
    assert running.wait() == 69
    assert running.log.splitlines()[-1] == (
        f"inco-trio: error: {cores.link}: no such interface (available: lo); --wait-link waits for it"
    )
    assert os.read(running.ready_fd, 1) == b""


def finished(namespace: Namespace, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a core's namespace, and wait until it has exited."""
    return namespace.run(
        functools.partial(
            subprocess.run,
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG,
            env={**os.environ, **environment},
        )
    )


RUN = (sys.executable, "-m", "inco_trio", "run")


def test_a_missing_cap_net_raw_is_an_error(cores: Cores, irq_dir: Path) -> None:
    done = finished(
        cores.core0, "setpriv", "--inh-caps=-net_raw", "--bounding-set=-net_raw", *RUN, cores.link, "--irq-dir", irq_dir
    )
    assert done.returncode == 77
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"inco-trio: error: {cores.link}: opening a packet socket needs CAP_NET_RAW")


def test_cap_net_raw_is_enough(proxy: StartProxy, cores: Cores, irq_dir: Path, core1: Peer, watch: Watch) -> None:
    only = "-all,+net_raw"
    drop = ("setpriv", f"--inh-caps={only}", f"--bounding-set={only}", "--")
    running = proxy("--irq-dir", irq_dir, prefix=drop)
    effective = Path(f"/proc/{running.pid}/status").read_text().partition("CapEff:")[2].split()[0]
    assert int(effective, 16) == 1 << 13
    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert f"receive buffer of {limit // 1024} kB granted" in running.wait_log("granted")
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]
    assert running.stop() == 0


def test_the_inotify_limit_is_named_in_the_error(cores: Cores, irq_dir: Path) -> None:
    script = """
import sys
from pathlib import Path
from inco_trio.cli import main
from inco_trio.simulation.world import new_user_namespace

new_user_namespace()
Path("/proc/sys/user/max_inotify_instances").write_text("0")
sys.exit(main(sys.argv[1:]))
"""
    done = finished(cores.core0, sys.executable, "-c", script, "run", cores.link, "--irq-dir", irq_dir)
    assert (done.returncode, done.stderr) == (
        71,
        "inco-trio: error: inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n\n",
    )


def test_an_internal_error_is_logged_with_its_traceback(cores: Cores, irq_dir: Path) -> None:
    script = """
import sys
import inco_trio.links.packet
from inco_trio.cli import main

def broken(self):
    raise RuntimeError("put in by the test")

inco_trio.links.packet.PacketLink.changed = broken
sys.exit(main(sys.argv[1:]))
"""
    done = finished(cores.core0, sys.executable, "-c", script, "run", cores.link, "--irq-dir", irq_dir)
    assert done.returncode == 70
    assert "inco-trio: error: internal error: this is a bug in inco-trio; please report it" in done.stderr
    assert "RuntimeError: put in by the test" in done.stderr


def test_an_invalid_configuration_is_refused(cores: Cores, tmp_path: Path) -> None:
    (tmp_path / "u.json").write_text("[]")
    done = finished(cores.core0, *RUN, cores.link, "--config", tmp_path / "u.json")
    assert done.returncode == 78
    assert done.stderr == f"inco-trio: error: {tmp_path}/u.json: a list (expected a table)\n"


def test_default_registers_are_logged(proxy: StartProxy, irq_dir: Path, tmp_path: Path, core1: Peer) -> None:
    running = proxy("--config", write_udrv(tmp_path / "u.json", irq_dir, {}, {}))
    running.wait_log("redun_notify_trig is missing: using ihub-irq-dev.message_6_trig")
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]


@pytest.mark.parametrize("limit", [7, 9, 11, 13])
def test_too_few_descriptors_are_one_clear_error(cores: Cores, irq_dir: Path, limit: int) -> None:
    done = finished(cores.core0, "prlimit", f"--nofile={limit}", *RUN, cores.link, "--irq-dir", irq_dir)
    assert done.returncode == 71
    *before, line = done.stderr.splitlines()
    assert line.startswith("inco-trio: error: ")
    assert all(" inco-trio: warning: control socket: cannot open " in said for said in before)


def test_a_directory_that_cannot_be_created_is_one_error(cores: Cores, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = finished(cores.core0, *RUN, cores.link, "--irq-dir", tmp_path / "file")
    assert done.returncode == 78
    assert f"{tmp_path}/file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_old_command_is_a_drop_in_replacement(cores: Cores, udrv: Path, irq_dir: Path, core1: Peer) -> None:
    command = [str(Path(sys.executable).with_name("inco_proxy")), cores.link]
    start = functools.partial(
        subprocess.Popen[str],
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "UDRV_JSON_PATH": str(udrv)},
    )
    with cores.core0.run(start) as running:
        try:
            assert running.stdout is not None
            said: list[str] = []
            while not said or "ready" not in said[-1]:
                said.append(running.stdout.readline())
                assert said[-1], said
            trigger(irq_dir / "message_6_trig")
            assert names(core1, 1) == [b"redun_notify_irq"]
            # The drop-in command logs one line for each notification.
            assert running.stdout.readline().endswith(" inco-trio: debug: outbound: redun_notify_irq\n")
            running.terminate()
            assert running.wait(HANG) == 0
        finally:
            running.kill()


def test_verbose_json_lines_are_json(proxy: StartProxy, irq_dir: Path, core1: Peer, watch: Watch) -> None:
    running = proxy("--irq-dir", irq_dir, "-v")
    resets = watch(irq_dir / "message_4_state")
    core1.send(b"stranger")
    core1.send(b"ihub_reset_irq")
    resets.wait(1)
    trigger(irq_dir / "message_6_trig")
    assert names(core1, 1) == [b"redun_notify_irq"]
    assert running.stop() == 0
    entries = [json.loads(line) for line in running.log.splitlines()]
    assert [entry["message"] for entry in entries if entry["level"] == "debug"] == [
        "stranger: unknown signal",
        "inbound: ihub_reset_irq",
        "outbound: redun_notify_irq",
    ]
    assert [entry["event"] for entry in entries if entry["event"] != "message"] == ["ready", "statistics"]


def test_a_process_that_holds_a_register_open_is_named(proxy: StartProxy, irq_dir: Path) -> None:
    irq_dir.mkdir()
    with (irq_dir / "message_6_trig").open("w"):
        running = proxy("--irq-dir", irq_dir)
        line = running.wait_log("holds the file open for writing")
    assert f"process {os.getpid()} " in line


InCore0 = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture
def in_core0(cores: Cores) -> InCore0:
    """Return a function that runs an async function in core 0."""

    async def guarded(function: Callable[[], Awaitable[None]]) -> None:
        with trio.fail_after(HANG):
            await function()

    return lambda function: cores.core0.run(functools.partial(trio.run, guarded, function))


@pytest.fixture
def config(cores: Cores, irq_dir: Path) -> Config:
    return Config(cores.link, builtin_signals(irq_dir))


async def next_name(core1: Peer) -> bytes:
    await trio.lowlevel.wait_readable(core1.fileno())
    return core1.receive(0)[14:]


def test_serve_is_ready_when_it_reports_started(in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            proxy: Proxy = await nursery.start(serve, config)
            assert proxy.config is config
            trigger(irq_dir / "message_6_trig")
            assert await next_name(core1) == b"redun_notify_irq"
            nursery.cancel_scope.cancel()

    in_core0(main)


def test_cancelling_is_a_clean_stop(in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            proxy: Proxy = await nursery.start(serve, config)
            for _ in range(200):
                trigger(irq_dir / "message_6_trig")
                core1.send(b"ihub_reset_irq")
            nursery.cancel_scope.cancel()
        assert (proxy.stats.sent, proxy.stats.delivered, proxy.stats.unfinished) == (200, 200, 0)
        # The proxy stays stopped, and its counters keep their values.
        with pytest.raises(ClosedError):
            await proxy.send("redun_notify_irq")
        assert proxy.stats.sent == 200

    in_core0(main)
    assert names(core1, 200) == [b"redun_notify_irq"] * 200


def test_send_returns_once_the_link_has_accepted_the_frame(in_core0: InCore0, config: Config, core1: Peer) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy:
            for _ in range(3):
                await proxy.send("redun_notify_irq")
                # `send` has returned, so the frame must already be in core 1's queue.
                assert core1.receive(0)[14:] == b"redun_notify_irq"
            assert (proxy.stats.triggered, proxy.stats.sent) == (3, 3)
            for unknown in ("ihub_reset_irq", "stranger", "", "\u00fc"):
                with pytest.raises(UnknownSignalError, match=f"{unknown}: not an outbound signal of {config.link}"):
                    await proxy.send(unknown)
        with pytest.raises(ClosedError):
            await proxy.send("redun_notify_irq")

    in_core0(main)


def test_many_tasks_can_send(in_core0: InCore0, config: Config, core1: Peer) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy, trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(proxy.send, "redun_notify_irq")

    in_core0(main)
    assert names(core1, 100) == [b"redun_notify_irq"] * 100
    with pytest.raises(TimeoutError):
        core1.receive(0)


def test_sending_while_the_link_is_down_can_be_cancelled(in_core0: InCore0, cores: Cores, config: Config) -> None:
    cores.link_down()

    async def main() -> None:
        async with open_proxy(attrs.evolve(config, stop_deadline=0.0)) as proxy, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(proxy.send, "redun_notify_irq")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert proxy.stats.sent == 0

    in_core0(main)


def test_waiting_senders_get_closed_error_at_the_end(in_core0: InCore0, cores: Cores, config: Config) -> None:
    cores.link_down()
    ended: list[str] = []

    async def main() -> None:
        async def send(proxy: Proxy) -> None:
            with pytest.raises(ClosedError):
                await proxy.send("redun_notify_irq")
            ended.append("closed")

        async with trio.open_nursery() as nursery, open_proxy(attrs.evolve(config, stop_deadline=0.0)) as proxy:
            for _ in range(3):
                nursery.start_soon(send, proxy)
            await wait_all_tasks_blocked()

    in_core0(main)
    assert ended == ["closed"] * 3


def test_events_report_both_directions(in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy:
            with proxy.events() as events:
                core1.send(b"ihub_reset_irq")
                first = await events.receive()
                trigger(irq_dir / "message_6_trig")
                second = await events.receive()
                await proxy.send("redun_notify_irq")
                third = await events.receive()
                found = [(event.signal.name, event.signal.direction) for event in (first, second, third)]
                assert found == [
                    ("ihub_reset_irq", Direction.INBOUND),
                    ("redun_notify_irq", Direction.OUTBOUND),
                    ("redun_notify_irq", Direction.OUTBOUND),
                ]
                assert first.monotonic_ns < second.monotonic_ns < third.monotonic_ns

    in_core0(main)


def test_the_event_stream_ends_with_the_proxy(in_core0: InCore0, config: Config, core1: Peer) -> None:
    seen: list[str] = []

    async def main() -> None:
        async def read(proxy: Proxy, task_status: trio.TaskStatus[None]) -> None:
            with proxy.events() as events:
                task_status.started()
                seen.extend([event.signal.name async for event in events])

        async with trio.open_nursery() as nursery, open_proxy(config) as proxy:
            await nursery.start(read, proxy)
            core1.send(b"ihub_hwwd_irq")
            core1.send(b"ihub_reset_irq")

    in_core0(main)
    assert seen == ["ihub_hwwd_irq", "ihub_reset_irq"]


def test_a_slow_reader_delays_no_other_reader(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy:
            resets = watch(irq_dir / "message_4_state")
            with proxy.events(10) as slow, proxy.events(300) as fast:
                for _ in range(200):
                    core1.send(b"ihub_reset_irq")
                for _ in range(200):
                    await fast.receive()
                resets.wait(200)
                assert proxy.stats.delivered == 200
                assert slow.statistics().current_buffer_used == 10
                assert proxy.stats.events_lost == 190
            core1.send(b"ihub_reset_irq")
            with proxy.events() as later:
                await later.receive()
            assert proxy.stats.events_lost == 190

    in_core0(main)


def test_a_reload_through_the_library(in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer) -> None:
    uart = Signal("uart_irq", Direction.OUTBOUND, irq_dir, "message_1_trig")

    async def main() -> None:
        async with open_proxy(config) as proxy:
            await proxy.reload(attrs.evolve(config, signals=(*config.signals, uart)))
            trigger(uart.path)
            assert await next_name(core1) == b"uart_irq"
            await proxy.send("uart_irq")
            with pytest.raises(ConfigError, match="a reload cannot change the link"):
                await proxy.reload(attrs.evolve(config, link="lo"))
            assert len(proxy.config.signals) == 4

    in_core0(main)


def test_open_proxy_raises_for_a_missing_interface(in_core0: InCore0, config: Config) -> None:
    async def main() -> None:
        with pytest.raises(LinkNotFoundError, match="nothing0: no such interface"):
            async with open_proxy(attrs.evolve(config, link="nothing0")):
                pass

    in_core0(main)


def test_a_link_that_cannot_be_examined_is_a_lack_of_resources(
    in_core0: InCore0, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_link: PacketLink) -> bool:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    async def main() -> None:
        with pytest.raises(ResourceError, match=f"^{config.link}: No buffer space available$"):
            async with open_proxy(config):
                pass

    monkeypatch.setattr(PacketLink, "refresh", refuse)
    in_core0(main)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_closed_proxy_leaves_no_descriptor_open(in_core0: InCore0, config: Config) -> None:
    async def main() -> None:
        gc.collect()
        before = descriptors()
        for _ in range(3):
            async with open_proxy(config):
                assert descriptors() > before
            with pytest.raises(LinkNotFoundError):
                async with open_proxy(attrs.evolve(config, link="nothing0")):
                    pass
        # The mapping of the in-flight buffer holds a descriptor until it is garbage-collected.
        gc.collect()
        assert descriptors() == before

    in_core0(main)


def test_each_lack_of_a_descriptor_is_one_clear_error(in_core0: InCore0, config: Config) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused: set[str] = set()

    async def opens() -> bool:
        try:
            async with open_proxy(config):
                return True
        except ResourceError as error:
            refused.add(str(error).partition(":")[0])
            return False

    async def main() -> None:
        async with open_proxy(config):
            pass
        gc.collect()
        before = descriptors()
        for limit in range(soft):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                enough = await opens()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            gc.collect()
            assert descriptors() == before
            if enough:
                break

    in_core0(main)
    assert len(refused) >= 3


def test_a_register_that_cannot_be_written_is_written_later(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer
) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy:
            with proxy.events() as events:
                state = irq_dir / "message_4_state"
                state.unlink()
                state.mkdir()
                core1.send(b"ihub_reset_irq")
                while not proxy.stats.write_failures:
                    await trio.lowlevel.checkpoint()
                with pytest.raises(trio.WouldBlock):
                    events.receive_nowait()
                state.rmdir()
                # The event arrives once the file has been written.
                await events.receive()
                assert proxy.stats.delivered == 1
                assert state.read_text() == "1"

    in_core0(main)


def test_deliveries_are_reported_before_newer_pending_notifications(
    in_core0: InCore0, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers assume that a signal's older notifications are not pending if a newer one is delivered without delay."""
    found: list[tuple[str, int]] = []

    class Listening(Deaf):
        wants_frames = True

        def carried(self, *words: Any) -> None:
            found.append(("delivered", len(words[2])))

        def pending(self, *words: Any) -> None:
            found.append(("pending", len(words[2])))

    async def main() -> None:
        async with open_supervised(config, Cupboard(), Listening()) as proxy:
            file, write = proxy._registers.states.file_of("ihub_reset_irq"), StateFile.write
            outcomes = iter((None, None, OSError(errno.ENOSPC, "No space left on device")))

            def fails(self: StateFile) -> None:
                if error := next(outcomes, None):
                    raise error
                write(self)

            monkeypatch.setattr(StateFile, "write", fails)
            proxy._inbound._deliver(Batch([file] * 4, frames=[b"frame"] * 4))
            assert found == [("delivered", 2), ("pending", 2)]

    in_core0(main)


def test_a_name_longer_than_the_mtu_is_dropped_and_counted(in_core0: InCore0, cores: Cores, config: Config) -> None:
    # A veth refuses an MTU this small, so use the loopback interface.
    cores.core0.run(functools.partial(set_mtu, "lo", 40))
    long, short = (attrs.evolve(config.signals[2], name=name, register=name) for name in ("n" * 64, "short"))

    async def main() -> None:
        async with open_proxy(attrs.evolve(config, link="lo", signals=(long, short))) as proxy:
            await proxy.send(long.name)
            await proxy.send(short.name)
            assert (proxy.stats.unsendable, proxy.stats.sent) == (1, 1)

    in_core0(main)


def test_a_returning_directory_with_a_written_trigger_counts(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer
) -> None:
    other = irq_dir.with_name("other")

    def take_away() -> None:
        other.mkdir()
        trigger(other / "message_6_trig")
        irq_dir.rename(irq_dir.with_name("away"))
        # Block the path with a file: the proxy cannot create the directory, and no event reports the file's removal.
        irq_dir.touch()

    def bring_back() -> None:
        irq_dir.unlink()
        other.rename(irq_dir)

    async def main() -> None:
        async with open_proxy(config) as proxy:
            await wait_all_tasks_blocked()
            take_away()
            while proxy._registers.next_restore() == math.inf:
                await trio.lowlevel.checkpoint()
            bring_back()
            assert await next_name(core1) == b"redun_notify_irq"
            trigger(irq_dir / "message_6_trig")
            assert await next_name(core1) == b"redun_notify_irq"

    in_core0(main)


def test_two_proxies_in_one_process(in_core0: InCore0, config: Config, tmp_path: Path, core1: Peer) -> None:
    other = tmp_path / "other"

    async def main() -> None:
        both = (Signal("second", Direction.OUTBOUND, other, "trig"),)
        async with open_proxy(config) as first, open_proxy(attrs.evolve(config, signals=both)) as second:
            await first.send("redun_notify_irq")
            await second.send("second")
            trigger(other / "trig")
            assert [await next_name(core1) for _ in range(3)] == [b"redun_notify_irq", b"second", b"second"]

    in_core0(main)


def test_an_error_of_the_caller_is_raised_unchanged(in_core0: InCore0, config: Config) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="of the caller"):
            async with open_proxy(config):
                raise ValueError("of the caller")

    in_core0(main)


def test_errors_of_the_caller_and_of_a_task_are_both_raised(
    in_core0: InCore0, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_link: PacketLink) -> None:
        raise RuntimeError("of the task")

    async def fail_when_cancelled() -> None:
        async with open_proxy(config):
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("of the caller")

    async def main() -> None:
        monkeypatch.setattr(PacketLink, "changed", broken)
        with pytest.raises(ExceptionGroup) as tasks:
            async with open_proxy(config):
                await trio.sleep_forever()
        assert tasks.group_contains(RuntimeError, match="of the task")
        with pytest.raises(ExceptionGroup) as both:
            await fail_when_cancelled()
        assert both.group_contains(RuntimeError, match="of the task")
        assert both.group_contains(ValueError, match="of the caller")

    in_core0(main)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_of_the_caller_is_not_wrapped_in_a_group(
    in_core0: InCore0, config: Config, error: BaseException
) -> None:
    async def main() -> None:
        with pytest.raises(type(error)) as caught:
            async with open_proxy(config):
                raise error
        assert caught.value is error

    in_core0(main)


def test_a_closed_proxy_raises_closed_error(in_core0: InCore0, config: Config) -> None:
    async def main() -> None:
        async with open_proxy(config) as proxy:
            pass
        with pytest.raises(ClosedError), proxy.events():
            pass
        with pytest.raises(ClosedError):
            await proxy.reload(config)
        with pytest.raises(ClosedError):
            await proxy.send("redun_notify_irq")
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            proxy.stats.sent = 1  # type: ignore[misc]

    in_core0(main)


def test_a_send_cancelled_before_the_link_accepted_it_does_not_count(
    in_core0: InCore0, cores: Cores, config: Config
) -> None:
    cores.link_down()

    async def main() -> None:
        async with open_proxy(attrs.evolve(config, stop_deadline=0)) as proxy, trio.open_nursery() as nursery:
            async with trio.open_nursery() as senders:
                for _ in range(5):
                    senders.start_soon(proxy.send, "redun_notify_irq")
                await wait_all_tasks_blocked()
                senders.cancel_scope.cancel()
            # The send task already holds one notification and is waiting for the link; the other four are cancelled.
            assert proxy.stats.triggered == 1
            nursery.cancel_scope.cancel()

    in_core0(main)


def test_a_proxy_that_waits_for_its_link_stores_all_descriptors(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer
) -> None:
    async def main() -> None:
        waiting, store = attrs.evolve(config, link="later0", wait_link=True), Cupboard()

        async def wait() -> None:
            async with open_supervised(waiting, store):
                raise AssertionError("the link does not exist")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert store.stored == ["inflight", "inotify", "link"]
            trigger(irq_dir / "message_6_trig")
            nursery.cancel_scope.cancel()
        heir = store.heir()
        async with open_supervised(config, heir):
            assert await next_name(core1) == b"redun_notify_irq"
        heir.close()

    in_core0(main)


def test_writing_pending_notifications_yields_to_other_tasks(
    in_core0: InCore0, config: Config, irq_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Count the writes between two turns of another task. Measured times would depend on the load of the machine.
    largest = 0

    async def others(proxy: Proxy) -> None:
        nonlocal largest
        before = proxy.stats.delivered
        while True:
            await trio.lowlevel.checkpoint()
            now = proxy.stats.delivered
            largest, before = max(largest, now - before), now

    async def main() -> None:
        async with open_proxy(config) as proxy, trio.open_nursery() as nursery:
            state = irq_dir / "message_4_state"
            state.unlink()
            state.mkdir()
            proxy._registers.states.write([proxy._registers.states.file_of(config.signals[0].name)] * 5000)
            monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
            nursery.start_soon(others, proxy)
            state.rmdir()
            while proxy.stats.delivered < 5000:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    in_core0(main)
    # Allow two slices: Trio might run the proxy last in one round of its tasks and first in the next round.
    assert 0 < largest <= 2 * SLICE


def test_notifications_that_arrive_while_no_proxy_runs_are_delivered(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    async def main() -> None:
        first = Cupboard()
        async with open_supervised(config, first):
            pass
        assert first.stored == ["inflight", "inotify", "link"]
        resets = watch(irq_dir / "message_4_state")
        for _ in range(10):
            core1.send(b"ihub_reset_irq")
            trigger(irq_dir / "message_6_trig")
        trigger(irq_dir / "new")
        (irq_dir / "new").rename(irq_dir / "message_6_trig")
        second = first.heir()
        async with open_supervised(config, second) as proxy:
            for _ in range(11):
                assert await next_name(core1) == b"redun_notify_irq"
        resets.wait(10)
        assert proxy.stats.delivered == 10
        assert proxy.stats.recovered == 0
        assert second.stored == []
        second.close()

    in_core0(main)


def test_the_next_proxy_finishes_what_a_stop_gave_up(in_core0: InCore0, config: Config, core1: Peer) -> None:
    async def main() -> None:
        store, delivered = Cupboard(), 0
        for _ in range(5):
            async with open_supervised(attrs.evolve(config, stop_deadline=0.002), fd_store=store) as proxy:
                for _ in range(1000):
                    core1.send(b"ihub_reset_irq")
            delivered += proxy.stats.delivered
            store = store.heir()
        async with open_supervised(config, fd_store=store) as proxy:
            while delivered + proxy.stats.delivered < 5000:
                await trio.lowlevel.checkpoint()
        assert delivered + proxy.stats.delivered == 5000
        store.close()

    in_core0(main)


def test_the_next_proxy_finishes_what_a_killed_one_had_read(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer, watch: Watch
) -> None:
    async def main() -> None:
        first = Cupboard()
        async with open_supervised(config, first):
            pass
        resets, hwwds = watch(irq_dir / "message_4_state"), watch(irq_dir / "message_5_state")
        # Fill the buffers as if a process had been killed after reading frames and events but before handling them.
        memory = Inflight.open(os.dup(first.kept["inflight"]))
        for number, name in enumerate((b"ihub_reset_irq", b"ihub_hwwd_irq", b"stranger", b"ihub_reset_irq")):
            whole = encode(name, core1.mac)
            memory.frames[1].view[number * FRAME_STEP : number * FRAME_STEP + len(whole)] = whole
        trigger(irq_dir / "message_6_trig")
        assert os.readv(first.kept["inotify"], [memory.events[0].view]) > 0
        memory.close()
        second = first.heir()
        async with open_supervised(config, second) as proxy:
            assert await next_name(core1) == b"redun_notify_irq"
            assert proxy.stats.recovered == 4
        assert (proxy.stats.delivered, proxy.stats.sent) == (3, 1)
        resets.wait(2)
        hwwds.wait(1)
        third = second.heir()
        async with open_supervised(config, third) as proxy:
            pass
        assert proxy.stats.recovered == proxy.stats.sent == 0
        third.close()

    in_core0(main)


def test_descriptors_from_the_fd_store_are_checked(
    in_core0: InCore0, config: Config, irq_dir: Path, core1: Peer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        foreign = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        foreign.bind((config.link, ETHERTYPE))
        core1.send(b"ihub_reset_irq")
        holder = Cupboard({"link": foreign.detach(), "inflight": os.memfd_create("foreign")})
        async with open_supervised(config, holder) as proxy:
            # The frame that was queued in the replaced socket must not be lost.
            assert proxy.stats.delivered == 1
            assert "the inherited socket no longer matches the link and is replaced" in caplog.text
            with proxy.events() as events:
                core1.send(b"ihub_hwwd_irq")
                await events.receive()
        assert holder.stored == ["inflight", "inotify", "link"]
        heir = holder.heir()
        async with open_supervised(config, heir) as proxy:
            await proxy.send("redun_notify_irq")
        assert proxy.stats.recovered == 0
        heir.close()

    in_core0(main)
    assert caplog.text.count("no longer matches") == 1
