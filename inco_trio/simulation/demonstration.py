"""`inco-trio demo`: show a real proxy at work between two simulated cores."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from inco_trio.cores.watch import Watch
from inco_trio.errors import IncoError, InvalidArgumentError, ResourceError
from inco_trio.service.launch import Launched, Wait
from inco_trio.signals import BUILTIN, Direction, Signal, builtin_signals
from inco_trio.simulation.screen import Output, Screen
from inco_trio.simulation.stage import Stage, namespaces, qemu, sockets
from inco_trio.simulation.traffic import Applications, Traffic, table, traffic_of, verdict
from inco_trio.simulation.waiter import Stopped, Waiter, stoppable
from inco_trio.simulation.world import may_make_namespaces, namespaces_refusal, new_user_namespace

__all__ = ["Output", "ProxyError", "run_demo"]

_DEVICE = "ihub-irq-dev"
_ADDED = (
    ("ihub_crash_log_irq", Direction.OUTBOUND, "message_0_trig"),
    ("ihub_uart_irq", Direction.OUTBOUND, "message_1_trig"),
    ("ihub_type_b_irq", Direction.INBOUND, "message_2_state"),
)
"""The signals of the demonstration in addition to the built-in ones."""
_ANSWERS = {
    "redun_notify_irq": "ihub_hwwd_irq",
    "ihub_crash_log_irq": "ihub_reset_irq",
    "ihub_uart_irq": "ihub_type_b_irq",
}
"""For each outbound signal, the inbound signal with which a QEMU guest answers. These pairs cover every signal."""
_READY_DEADLINE = 60.0
"""Timeout for waiting for a process, in seconds. A process starts within 2 s, so only a hang reaches this limit."""
_SetUp = Callable[[Path, Wait], AbstractContextManager[Stage]]
"""A function that sets up a stage in a directory. It waits only with `Wait`, so that signals can stop it."""


class ProxyError(IncoError):
    """The proxy did not become ready, or it ended unexpectedly."""


def _signals(directory: Path) -> list[Signal]:
    return [*builtin_signals(directory), *(Signal(name, way, directory, reg) for name, way, reg in _ADDED)]


def _udrv(directory: Path) -> str:
    regs = {builtin.reg: {"reg": f"{_DEVICE}.{builtin.register}"} for builtin in BUILTIN}
    added = {name: {"direction": way.value, "reg": f"{_DEVICE}.{register}"} for name, way, register in _ADDED}
    misc = {"ihub_config_dev": {"regs": regs}, "inco_proxy": {"signals": added}}
    return json.dumps({"file": {_DEVICE: {"path": str(directory)}}, "misc": misc})


def _play(waiter: Waiter, applications: Applications, traffic: Sequence[Traffic], rate: float, out: Output) -> None:
    screen = Screen(out, traffic)
    next_send = time.monotonic()
    while not all(one.over for one in traffic):
        # The signals take turns: the signal that was sent least often is next.
        idle = min((one for one in traffic if one.idle), key=lambda one: one.sent, default=None)
        if idle is not None and time.monotonic() >= next_send:
            applications.send(idle)
            next_send = max(next_send + 1 / rate, time.monotonic())
        waiter.wait(screen.next if idle is None else min(next_send, screen.next))
        if late := [one for one in traffic if one.late]:
            # The demonstration itself may be late. First count the frames that have arrived. Each call reads one frame.
            for _ in traffic:
                waiter.wait(0)
            for one in late:
                one.expire()
        screen.show()
    screen.show(last=True)


def _wait_ready(proxy: Launched, waiter: Waiter) -> None:
    """Wait until the proxy is ready, or raise ProxyError. If the proxy ends later, `waiter` raises ProxyError."""

    def failed(what: str) -> ProxyError:
        sys.stderr.write(proxy.log)
        return ProxyError(f"{what} (see its log above)")

    def ended() -> None:
        raise failed(f"the proxy has ended with exit code {proxy.process.wait()}")

    if not proxy.wait_ready(_READY_DEADLINE, waiter.readable):
        if waiter.readable([proxy.end_fd], _READY_DEADLINE):
            ended()
        raise failed("the proxy did not become ready")
    waiter.on(proxy.end_fd, ended)


def _record(path: Path, control: str, log: Path) -> Launched:
    """Start `inco-trio record` for the proxy. Raises ResourceError."""
    recording = Launched("record", path, "--control", control, log=log, ready=False)
    line = recording.wait_log("inco-trio: ", _READY_DEADLINE) or ""
    if "recording" not in line:
        recording.close()
        raise ResourceError(f"--record: {line.removeprefix('inco-trio: error: ')}")
    return recording


def _demonstrate(set_up: _SetUp, count: int, rate: float, out: Output, record: Path | None) -> int:
    with ExitStack() as stack:
        waiter = Waiter()
        stack.callback(waiter.close)
        stack.enter_context(stoppable(waiter))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inco-trio-demo-")))
        stage = stack.enter_context(set_up(scratch, waiter.readable))
        if stage.guest is not None:
            waiter.on(stage.guest.fileno(), stage.guest.raise_ended)
        watch = stack.enter_context(contextlib.closing(Watch()))
        directory = scratch / "irq"
        config = scratch / "udrv.json"
        config.write_text(_udrv(directory))
        control = "none" if record is None else str(scratch / "control")
        arguments = ("run", stage.link, "--config", config, "--control", control)
        proxy = Launched(*arguments, log=scratch / "proxy.log", netns=stage.netns)
        stack.callback(proxy.close)
        _wait_ready(proxy, waiter)
        traffic = traffic_of(stage, _signals(directory), count)
        out.write(f"{stage.about}; process {proxy.pid} is the proxy.\n")
        if stage.answers:
            answers = ", ".join(f"{name} by {answer}" for name, answer in stage.answers.items())
            out.write(f"It answers {answers}.\nEach latency is a round-trip time.\n")
        out.write(f"Sending {count} notifications of each of {len(traffic)} signals, {rate:g} per second in total:\n")
        out.flush()
        recording = None
        if record is not None:
            recording = _record(record, control, scratch / "record.log")
            stack.callback(recording.close)
        _play(waiter, Applications(waiter, stage.peer, watch, traffic), traffic, rate, out)
        last_line, code = verdict(traffic)
        out.write(f"\n{table(traffic)}\n\n{last_line}\n")
        if recording is not None:
            recording.stop(signal.SIGINT)
            out.write(f"Recorded: {recording.log.rpartition('inco-trio: ')[2].rstrip()}\n")
        out.flush()  # Show the result now: stopping the proxy takes a moment.
        return code


def _choose(out: Output) -> _SetUp:
    if not Path("/proc/self/ns/net").exists():
        raise ResourceError("/proc is not mounted: the demonstration needs it to create network namespaces")
    refusal = namespaces_refusal()
    if refusal is not None:
        out.write(f"Using a Unix socket, because this system forbids namespaces: {refusal}\n")
        return sockets
    if not may_make_namespaces():
        new_user_namespace()
    return namespaces


def run_demo(count: int, rate: float, out: Output, *, with_qemu: bool = False, record: Path | None = None) -> int:
    """Send `count` notifications of each signal through a real proxy, `rate` per second in total. Show counts on `out`.

    Record the notifications to the file `record`, if given. Return the exit code: 0 if all notifications arrived, 1 if
    not, and 128 + n after the process signal n.

    A process that cannot create network namespaces moves into a new user namespace and stays there. It must have only
    one thread. If the system forbids user namespaces too, the link is a Unix socket. With `with_qemu`, core 1 is a QEMU
    guest behind a Unix socket.

    Raises InvalidArgumentError, GuestError, ProxyError, ResourceError, and BrokenPipeError if `out` is a closed pipe.
    """
    if count < 1 or not 0 < rate < math.inf:
        raise InvalidArgumentError("the demonstration needs a count of 1 or more and a rate above 0")
    set_up = functools.partial(qemu, answers=_ANSWERS) if with_qemu else _choose(out)
    try:
        return _demonstrate(set_up, count, rate, out, record)
    except Stopped as stopped:
        return 128 + stopped.number
    except (BrokenPipeError, IncoError):
        raise
    except OSError as error:
        raise ResourceError(f"the demonstration failed: {error}") from error
