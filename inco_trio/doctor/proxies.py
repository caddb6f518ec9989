"""Checks of proxies: competing processes, stored descriptors, outdated configurations, capabilities and counters."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from inco_trio.config import Config
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor.result import Result, fail, hidden, ok, warn
from inco_trio.linux.capabilities import names_of
from inco_trio.linux.processes import Process, Processes, named
from inco_trio.service.privileges import OF_NAMESPACES, OF_OWNERS, needed_capabilities
from inco_trio.service.rivals import Users, superfluous, watchers
from inco_trio.signals import Signal

__all__ = [
    "capabilities",
    "configuration",
    "counters",
    "descriptors",
    "users_of_directory",
    "users_of_link",
    "value_of",
]

COUNTERS = {
    "dropped": "frames were dropped because the receive queue was full: raise net.core.rmem_max",
    "unknown": "frames had a name that is not an inbound signal: compare `inco-trio monitor` with `inco-trio check`",
    "malformed": "frames had no valid wire name: `inco-trio monitor` shows them",
    "overflowed": "inotify overflows, each followed by a frame for every trigger: raise fs.inotify.max_queued_events",
    "write_failures": "attempts to write a state file failed: the log has the reason",
    "send_failures": "attempts to send a frame failed: the log has the reason",
    "unsendable": "notifications were discarded: the link can never send frames of that size",
    "link_downs": "times the link went down: `inco-trio history` shows when",
    "restarts": "restarts of a failed task: the log has the reason",
}
"""The meaning of each counter that should be 0, and the remedy."""


def users_of_link(link: str, users: Users, start: str | None = None) -> Iterator[Result]:
    """Check that exactly one proxy serves the link. `start` is the command that starts a proxy."""
    if users.unseen:
        yield hidden(f"which process has a socket of {link}")
    yield from _check_alone(link, (*users.proxies, *users.others), "serves the link", "receives each frame")
    if not users.unseen and not users.proxies and not users.others:
        kept = f"; {named(users.holders)} keeps notifications for the next proxy" if users.holders else ""
        yield warn("proxy", link, f"no proxy serves this link{kept}", start or f"inco-trio run {shlex.quote(link)}")


def users_of_directory(directory: Path, signals: Iterable[Signal], processes: Processes) -> Iterator[Result]:
    """Check that no two proxies watch the trigger files of a directory."""
    found = [process for process in watchers(signals, processes) if process.pid != os.getpid()]
    yield from _check_alone(str(directory), found, "watches its triggers", "sends each notification")


def _check_alone(subject: str, processes: Iterable[Process], does: str, harm: str) -> Iterator[Result]:
    """Check that only one process uses `subject`. `does` and `harm` are the texts for one proxy and for several."""
    everyone = sorted(processes, key=lambda process: (not process.is_proxy, process.started, process.pid))
    proxies = [process for process in everyone if process.is_proxy]
    if len(proxies) > 1:
        text = f"{len(proxies)} proxies: {named(proxies)}: each {harm}"
        yield fail("proxy", subject, text, superfluous(proxies).stop)
    elif len(everyone) > 1:
        text = f"several processes use it: {named(everyone)}: if two are proxies, each {harm}"
        yield warn("proxy", subject, text)
    elif everyone:
        yield ok("proxy", subject, f"only process {named(everyone)} {does}")


def descriptors(link: str, users: Users, processes: Processes) -> Iterator[Result]:
    """Check that an fd store keeps the proxy's socket, so that no notifications are lost during a restart."""
    proxy = users.proxy
    if proxy is None:
        return
    if users.holders:
        yield ok("descriptors", link, f"process {named(users.holders)} keeps its socket while the proxy restarts")
    elif processes.unseen:
        yield hidden(f"whether an fd store keeps the socket of {link} while the proxy restarts")
    elif value_of("--fd-holder", proxy.command) is not None:
        text = f"process {proxy.pid} was started with --fd-holder, but no fd store has its socket: see the proxy's log"
        yield fail("descriptors", link, text)
    else:
        text = "no fd store keeps its socket: notifications that arrive while the proxy restarts are lost"
        config = value_of("--config", proxy.command)
        option = "" if config is None else f" --config {shlex.quote(config)}"
        yield warn("descriptors", link, text, f"inco-trio s6 /run/service --iface {shlex.quote(link)}{option}")


def value_of(option: str, command: Sequence[str]) -> str | None:
    """Return the value of an option in a command line, or None."""
    for word, following in pairwise([*command, ""]):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else following
    return None


def configuration(path: Path, proxy: Process, read_at: float | None = None) -> Iterator[Result]:
    """Check that a proxy has read the current version of its configuration file.

    `read_at` is the time of the last read in seconds since 1970 (default: the start of the process).
    """
    try:
        changed = path.stat().st_mtime
    except OSError:
        return
    if changed > (proxy.started if read_at is None else read_at):
        text = f"changed after process {proxy.pid} "
        text += "started: unless reloaded since, the proxy uses the old version" if read_at is None else "read it"
        yield warn("reload", path, text, f"kill -HUP {proxy.pid}")
    else:
        yield ok("reload", path, f"process {proxy.pid} has read the current version")


def capabilities(proxy: Process, board: BoardStatus, netns: Path | None) -> Iterator[Result]:
    """Report a proxy's capabilities, and check that it needs them. Skip other programs, which may need more."""
    if board.status is None or not proxy.is_proxy:
        return
    words = proxy.command
    config = Config(board.status.link, (), netns=netns)
    several = value_of("--boards", words) is not None
    needed = set(needed_capabilities([config], grows=several, locked="--lock-memory" in words))
    if several or value_of("--irq-owner", words) is not None:
        needed |= OF_OWNERS
    if several:
        needed |= OF_NAMESPACES  # Any of the boards may use a network namespace.
    held, subject = board.status.capabilities, f"process {proxy.pid}"
    if surplus := [name for name in held if name not in names_of(needed)]:
        text = f"has capabilities that it does not need: {' '.join(surplus)}: start it without --sandbox none"
        yield warn("capabilities", subject, text)
    else:
        yield ok("capabilities", subject, f"has {' '.join(held) or 'no capabilities'}")


def counters(board: BoardStatus) -> Iterator[Result]:
    """Check the current problems and the counters that a proxy reports for a board."""
    status = board.status
    if status is None:
        yield fail("board", board.board, f"not open: {board.problem}")
        return
    faults = []
    for signal in status.signals:
        if signal.problem is not None or signal.pending:
            text = f"{signal.signal}: {signal.problem or 'not delivered yet'} ({signal.pending} pending)"
            faults.append(fail("signal", signal.register, text))
    faults += [fail("task", board.board, f"{task.task}: {task.problem}") for task in status.tasks if task.problem]
    for name, count in status.counters.as_dict().items():
        if count and name in COUNTERS:
            faults.append(warn("counters", board.board, f"{name}: {count} {COUNTERS[name]}"))
    yield from faults or [ok("counters", board.board, "no failures, unknown frames or drops since the start")]
