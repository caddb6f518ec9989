"""`inco-trio demo`: the real proxy between two cores of its own, seen working by a person.

Core 1 is played here, and so are the applications of core 0. A notification counts as arrived only when its frame was
read in core 1, or the close of its state file was reported by inotify(7). Where core 1 is a guest of QEMU, what counts
is a round trip: the close of the state file of its answer. At most one notification of a signal is under way, so each
arrival has one departure, and a latency.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import attrs

from inco_trio.errors import IncoError, InvalidArgumentError, ResourceError
from inco_trio.frame import decode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, Inotify, parse_events
from inco_trio.linux.process import end_with_parent
from inco_trio.service.process_signals import wakeups
from inco_trio.signals import BUILTIN, Direction, Signal, builtin_signals
from inco_trio.simulation.guest import Guest, Wait
from inco_trio.simulation.stage import Core1, Stage, namespaces, qemu, sockets
from inco_trio.simulation.world import may_make_namespaces, namespaces_refusal, new_user_namespace

__all__ = ["Output", "ProxyError", "run_demo"]

_DEVICE = "ihub-irq-dev"

_ADDED = (
    ("ihub_crash_log_irq", Direction.OUTBOUND, "message_0_trig"),
    ("ihub_uart_irq", Direction.OUTBOUND, "message_1_trig"),
    ("ihub_type_b_irq", Direction.INBOUND, "message_2_state"),
)
"""The rest of the board's table that is the proxy's business."""

_ANSWERS = {
    "redun_notify_irq": "ihub_hwwd_irq",
    "ihub_crash_log_irq": "ihub_reset_irq",
    "ihub_uart_irq": "ihub_type_b_irq",
}
"""What a guest of QEMU answers each outbound signal by: every signal has its part."""

_READY_DEADLINE = 60.0
"""Seconds; a start takes up to 2 s, so this only stops a hang."""
_LOST_AFTER = 3.0
"""Seconds; the proxy needs well below a millisecond, but the machine may be busy."""
_STOP_DEADLINE = 60.0
"""Seconds until a proxy that does not end is killed; its own deadline for a stop is 5 s."""


_SetUp = Callable[[Path, Wait], AbstractContextManager[Stage]]
"""Makes a stage in a directory; the wait of the demonstration is the one in which it may be stopped."""

_ARROW = {Direction.INBOUND: "core 1 -> core 0", Direction.OUTBOUND: "core 0 -> core 1"}
_ROUND_TRIP = "core 0 -> 1 -> 0"


class Output(Protocol):
    """Where a demonstration is shown."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class ProxyError(IncoError):
    """The proxy did not become ready, or ended."""


class _Stopped(BaseException):
    """The user has had enough, by signal `number`; no error, as KeyboardInterrupt is none."""

    def __init__(self, number: int) -> None:
        self.number = number


@attrs.define(eq=False)
class _Traffic:
    """The notifications of one signal, or its round trips: those that come back as `answer`."""

    signal: Signal
    wanted: int
    answer: Signal | None = None
    sent: int = 0
    latencies: list[int] = attrs.Factory(list)
    """Of each that arrived, in nanoseconds."""
    departed: int | None = None
    """When the one under way left: monotonic nanoseconds."""
    unexpected: int = 0
    lost: bool = False

    @property
    def seen(self) -> Signal:
        """The signal whose arrival counts."""
        return self.answer or self.signal

    @property
    def way(self) -> str:
        return _ARROW[self.signal.direction] if self.answer is None else _ROUND_TRIP

    @property
    def idle(self) -> bool:
        return self.departed is None and self.sent < self.wanted and not self.lost

    @property
    def over(self) -> bool:
        return self.departed is None and not self.idle

    def depart(self) -> None:
        self.sent += 1
        self.departed = time.monotonic_ns()

    def arrive(self) -> None:
        if self.departed is None:
            self.unexpected += 1
        else:
            self.latencies.append(time.monotonic_ns() - self.departed)
            self.departed = None

    def expire(self) -> None:
        """Give the signal up after its first loss: what arrived later could not be told apart."""
        if self.departed is not None and time.monotonic_ns() - self.departed > _LOST_AFTER * 1e9:
            self.departed = None
            self.lost = True


class _Waiter:
    """Every wait of the demonstration, and so the only place where a signal of the user can end it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def on(self, fd: int, ready: Callable[[], None]) -> None:
        """Call `ready` when `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, ready)

    def off(self, fd: int) -> None:
        self._selector.unregister(fd)

    def wait(self, until: float) -> None:
        """Wait until something was readable, or until the monotonic time `until`."""
        for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
            key.data()

    def readable(self, fds: Sequence[int], timeout: float) -> list[int]:
        """Which of `fds` are readable, once anything is, or after `timeout` seconds."""
        found: list[int] = []
        for fd in fds:
            self.on(fd, functools.partial(found.append, fd))
        try:
            self.wait(time.monotonic() + timeout)
        finally:
            for fd in fds:
                self.off(fd)
        return found

    def close(self) -> None:
        self._selector.close()


@contextlib.contextmanager
def _stoppable(waiter: _Waiter) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `_Stopped` from `waiter.wait`, where nothing is half done, and only there."""
    with wakeups((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as arrived:

        def stop() -> None:
            raise _Stopped(arrived.recv(1)[0])

        waiter.on(arrived.fileno(), stop)
        yield


def _signals(directory: Path) -> list[Signal]:
    return [*builtin_signals(directory), *(Signal(name, way, directory, reg) for name, way, reg in _ADDED)]


def _udrv(directory: Path) -> str:
    """The text of a udrv.json with the signals of `_signals`."""
    regs = {builtin.reg: {"reg": f"{_DEVICE}.{builtin.register}"} for builtin in BUILTIN}
    added = {name: {"direction": way.value, "reg": f"{_DEVICE}.{register}"} for name, way, register in _ADDED}
    misc = {"ihub_config_dev": {"regs": regs}, "inco_proxy": {"signals": added}}
    return json.dumps({"file": {_DEVICE: {"path": str(directory)}}, "misc": misc})


class _Proxy:
    """The process `inco-trio run` in core 0."""

    def __init__(self, stage: Stage, config: Path, log: Path, control: str) -> None:
        self._log = log
        read_ready, write_ready = os.pipe()
        parent = os.getpid()

        def prepare() -> None:
            # Whatever happens to the demonstration, the proxy ends with it.
            if not end_with_parent(parent):
                os._exit(1)
            stage.enter()

        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        command = [sys.executable, "-m", "inco_trio", "run", stage.link, "--config", str(config), "--control", control]
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [*command, "--notification-fd", str(write_ready)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[write_ready],
                    preexec_fn=prepare,
                    # A group of its own: Ctrl-C is for the demonstration, which then ends the proxy.
                    process_group=0,
                    env=environment,
                    # So that exactly this package runs, whatever the current directory has.
                    cwd=Path(__file__).parents[1],
                )
        except BaseException:
            os.close(read_ready)
            raise
        finally:
            os.close(write_ready)
        self._ready = read_ready
        self.end = os.pidfd_open(self.process.pid)

    def failed(self, what: str) -> ProxyError:
        """The error; what the proxy said is shown at once."""
        sys.stderr.write(self._log.read_text(errors="replace"))
        return ProxyError(f"{what}; what it said is above")

    def ended(self) -> None:
        raise self.failed(f"the proxy has ended with exit code {self.process.wait()}")

    def wait_ready(self, waiter: _Waiter) -> None:
        deadline = time.monotonic() + _READY_DEADLINE
        said = b""

        def read() -> None:
            nonlocal said
            said = os.read(self._ready, 1)
            if not said:
                # It has closed the descriptor without a word: all that is left to wait for is its end.
                waiter.off(self._ready)

        waiter.on(self._ready, read)
        while not said:
            if time.monotonic() > deadline:
                raise self.failed(f"the proxy is not ready after {_READY_DEADLINE:g} s")
            waiter.wait(deadline)
        waiter.off(self._ready)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.end)
        os.close(self._ready)


class _Recording:
    """The process `inco-trio record`, which asks the proxy at `control`. Raises ResourceError."""

    said = ""
    """The last thing that it has said."""

    def __init__(self, path: Path, control: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "inco_trio", "record", str(path), "--control", control],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert self._process.stderr is not None  # noqa: S101 - a pipe
        said = self._process.stderr.readline()
        if "recording" not in said:
            self.close()
            raise ResourceError(f"--record: {said.rstrip().removeprefix('inco-trio: error: ')}")

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            _, said = self._process.communicate()
            self.said = said.rpartition("inco-trio: ")[2].rstrip()


class _Applications:
    """The applications of core 0, and core 1 unless it is a guest: they make each notification, and see it arrive."""

    def __init__(self, waiter: _Waiter, peer: Core1 | None, inotify: Inotify, traffic: Sequence[_Traffic]) -> None:
        self._peer = peer
        self._inotify = inotify
        self._buffer = memoryview(bytearray(4096))
        inbound = [one for one in traffic if one.seen.direction is Direction.INBOUND]
        self._states = {inotify.watch(str(one.seen.path), IN_CLOSE_WRITE): one for one in inbound}
        self._frames = {one.signal.name.encode(): one for one in traffic if one not in inbound}
        waiter.on(inotify.fd, self._see_states)
        if peer is not None:
            waiter.on(peer.fileno(), lambda: self._see_frame(peer))

    def send(self, one: _Traffic) -> None:
        if one.signal.direction is Direction.INBOUND and self._peer is not None:
            one.depart()
            self._peer.send(one.signal.name.encode())
        else:
            trigger = os.open(one.signal.path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(trigger, b"1")
            one.depart()
            os.close(trigger)

    def _see_states(self) -> None:
        for event in parse_events(self._buffer[: self._inotify.read_into(self._buffer)]):
            if event.mask & IN_CLOSE_WRITE:
                self._states[event.wd].arrive()

    def _see_frame(self, peer: Core1) -> None:
        one = self._frames.get(decode(peer.receive()) or b"")
        if one is not None:
            one.arrive()


class _Screen:
    """What a person sees: a line for each signal that changes in place, or, not on a terminal, a line each second."""

    def __init__(self, out: Output, traffic: Sequence[_Traffic]) -> None:
        self._out = out
        self._traffic = traffic
        self._terminal = out.isatty()
        self._drawn = False
        self.next = time.monotonic() + (0.0 if self._terminal else 1.0)
        """When `show` wants to be called: monotonic seconds."""

    def show(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if now < self.next and not last:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{len(self._traffic)}A" if self._drawn else ""
            self._write(up + "".join(f"\x1b[K{self._line(one)[:width]}\n" for one in self._traffic))
            self._drawn = True
            self.next = now + 0.05
        else:
            sent, arrived = (
                sum(counts) for counts in zip(*((t.sent, len(t.latencies)) for t in self._traffic), strict=True)
            )
            self._write(f"  {sent} sent, {arrived} arrived\n")
            self.next = now + 1.0

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    @staticmethod
    def _line(one: _Traffic) -> str:
        arrived = len(one.latencies)
        bar = "#" * (20 * arrived // one.wanted)
        latency = duration(one.latencies[-1]) if one.latencies else ""
        state = "LOST" if one.lost else latency
        return f"  {one.way}  {one.signal.name:<18}  {arrived:>5} [{bar:<20}] {state:>7}"


def duration(nanoseconds: float) -> str:
    if nanoseconds < 999.5e3:
        return f"{nanoseconds / 1e3:.0f} us"
    if nanoseconds < 999.5e6:
        return f"{nanoseconds / 1e6:.1f} ms"
    return f"{nanoseconds / 1e9:.1f} s"


def quantile(ordered: Sequence[int], part: float) -> int:
    """The smallest value that is not exceeded by `part` of all (nearest rank)."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def _table(traffic: Sequence[_Traffic]) -> str:
    titles = ("sent", "arrived", "min", "median", "p99", "max")
    lines = [f"  {'signal':<18}  {'way':<16}" + "".join(f"{title:>9}" for title in titles)]
    for one in traffic:
        ordered = sorted(one.latencies)
        spread = [duration(quantile(ordered, part)) for part in (0, 0.5, 0.99, 1)] if ordered else ["-"] * 4
        cells = [str(one.sent), str(len(ordered)), *spread]
        head = f"  {one.signal.name:<18}  {one.way:<16}"
        lines.append(head + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def _verdict(traffic: Sequence[_Traffic]) -> tuple[str, int]:
    """The last line, and the exit code."""
    sent = sum(one.sent for one in traffic)
    latencies = sorted(latency for one in traffic for latency in one.latencies)
    unexpected = sum(one.unexpected for one in traffic)
    what = "notifications" if traffic[0].answer is None else "round trips"
    if len(latencies) < sent:
        names = ", ".join(one.signal.name for one in traffic if one.lost)
        return f"LOST {sent - len(latencies)} of {sent} {what} ({names}): the proxy does not work here", 1
    if unexpected:
        return f"{unexpected} notifications arrived that nobody sent: the proxy does not work here", 1
    median = duration(quantile(latencies, 0.5))
    return f"all {sent} {what} arrived, median {median}: the proxy works on this machine", 0


def _play(waiter: _Waiter, applications: _Applications, traffic: Sequence[_Traffic], rate: float, out: Output) -> None:
    screen = _Screen(out, traffic)
    next_send = time.monotonic()
    while not all(one.over for one in traffic):
        # The least sent first: the signals take turns.
        idle = min((one for one in traffic if one.idle), key=lambda one: one.sent, default=None)
        if idle is not None and time.monotonic() >= next_send:
            applications.send(idle)
            next_send = max(next_send + 1 / rate, time.monotonic())
        waiter.wait(screen.next if idle is None else min(next_send, screen.next))
        for one in traffic:
            one.expire()
        screen.show()
    screen.show(last=True)


def _traffic(stage: Stage, signals: Sequence[Signal], count: int) -> list[_Traffic]:
    if stage.guest is None:
        return [_Traffic(one, count) for one in signals]
    by_name = {one.name: one for one in signals}
    return [_Traffic(by_name[name], count, by_name[answer]) for name, answer in stage.answers.items()]


def _watch_end(waiter: _Waiter, guest: Guest) -> None:
    def ended() -> None:
        raise guest.ended()

    waiter.on(guest.fileno(), ended)


def _demonstrate(set_up: _SetUp, count: int, rate: float, out: Output, record: Path | None) -> int:
    with ExitStack() as stack:
        waiter = _Waiter()
        stack.callback(waiter.close)
        stack.enter_context(_stoppable(waiter))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inco-trio-demo-")))
        stage = stack.enter_context(set_up(scratch, waiter.readable))
        if stage.guest is not None:
            _watch_end(waiter, stage.guest)
        inotify = Inotify()
        stack.callback(inotify.close)

        directory = scratch / "irq"
        config = scratch / "udrv.json"
        config.write_text(_udrv(directory))
        control = "none" if record is None else str(scratch / "control")
        proxy = _Proxy(stage, config, scratch / "proxy.log", control)
        stack.callback(proxy.close)
        waiter.on(proxy.end, proxy.ended)
        proxy.wait_ready(waiter)
        traffic = _traffic(stage, _signals(directory), count)
        out.write(f"{stage.about}; process {proxy.process.pid} is the proxy.\n")
        if stage.answers:
            answers = ", ".join(f"{name} by {answer}" for name, answer in stage.answers.items())
            out.write(f"It answers {answers}.\nEach latency is that of a round trip.\n")
        out.write(f"Sending {count} notifications of each of {len(traffic)} signals, {rate:g} a second in all:\n")
        out.flush()

        recording = None if record is None else _Recording(record, control)
        if recording is not None:
            stack.callback(recording.close)
        _play(waiter, _Applications(waiter, stage.peer, inotify, traffic), traffic, rate, out)
        verdict, code = _verdict(traffic)
        out.write(f"\n{_table(traffic)}\n\n{verdict}\n")
        if recording is not None:
            recording.close()
            out.write(f"Recorded: {recording.said}\n")
        # The end of the proxy may take a moment.
        out.flush()
        return code


def _choose(out: Output) -> _SetUp:
    if not os.path.exists("/proc/self/ns/net"):  # noqa: PTH110 - no path of the user's
        raise ResourceError("the demonstration makes network namespaces by way of /proc, which is not mounted here")
    refusal = namespaces_refusal()
    if refusal is not None:
        out.write(f"Over a Unix socket, as this system forbids namespaces: {refusal}\n")
        return sockets
    if not may_make_namespaces():
        new_user_namespace()
    return namespaces


def run_demo(count: int, rate: float, out: Output, *, with_qemu: bool = False, record: Path | None = None) -> int:
    """Send `count` notifications of each signal through a real proxy, `rate` a second in all, and show it on `out`.

    All of them are recorded to the file `record`, see `capture.recording`.

    Returns the exit code: 0 only if all arrived, 1 if not, 128 + n if stopped by signal n. Whoever may not make network
    namespaces gets a user namespace, in which the calling process, which must have a single thread, then remains; where
    that is forbidden too, the link is a Unix socket. With `with_qemu`, it is one too, and core 1 a guest of QEMU.

    Raises `InvalidArgumentError`, `GuestError`, `ProxyError`, `ResourceError`; BrokenPipeError if nobody reads `out`.
    """
    if count < 1 or not 0 < rate < math.inf:
        raise InvalidArgumentError("the demonstration needs a count of at least 1 and a rate above 0")
    set_up = functools.partial(qemu, answers=_ANSWERS) if with_qemu else _choose(out)
    try:
        return _demonstrate(set_up, count, rate, out, record)
    except _Stopped as stopped:
        return 128 + stopped.number
    except (BrokenPipeError, IncoError):
        raise
    except OSError as error:
        raise ResourceError(f"the demonstration cannot go on: {error}") from error
