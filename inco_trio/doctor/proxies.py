"""Checks of proxies: competing processes, stored descriptors, outdated configurations, capabilities and counters."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import attrs

from inco_trio.board_files import Boards
from inco_trio.config import Config
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor.register_files import unreadable
from inco_trio.doctor.result import Result, fail, hidden, ok, warn
from inco_trio.linux.capabilities import names_of
from inco_trio.linux.processes import Process, Processes, is_stopped, listening_sockets, named
from inco_trio.proxy_status import Status
from inco_trio.service.privileges import OF_NAMESPACES, OF_OWNERS, needed_capabilities
from inco_trio.service.rivals import Users, superfluous, watchers
from inco_trio.signals import Direction, Signal

__all__ = [
    "board_files",
    "capabilities",
    "configuration",
    "counters",
    "descriptors",
    "stopped",
    "unanswered",
    "users_of_directory",
    "users_of_link",
    "value_of",
]

COUNTERS = {
    "dropped": "the receive queue was full, and frames were lost: raise net.core.rmem_max",
    "unknown": "core 1 sent a name that is not an inbound signal: compare `inco-trio monitor` with `inco-trio check`",
    "malformed": "a frame had no valid wire name: `inco-trio monitor` shows it",
    "overflowed": "the inotify queue was full, and each trigger sent a frame: raise fs.inotify.max_queued_events",
    "write_failures": "writing a state file failed: `inco-trio history` shows when and why",
    "send_failures": "sending a frame failed: `inco-trio history` shows when and why",
    "unsendable": "the frame of a notification is larger than the MTU, and was discarded",
    "link_downs": "the link went down: `inco-trio history` shows when",
    "rivals": "another proxy shared this link or its triggers: `inco-trio history` shows when",
    "restarts": "a failed task was restarted: `inco-trio history` shows when and why",
}
"""The meaning of each counter that should be 0, and the remedy."""


def users_of_link(link: str, users: Users, start: str | None = None, *, has_service: bool = False) -> Iterator[Result]:
    """Check that exactly one proxy serves the link.

    `start` is the command that starts a proxy. If the link has a service, it may be None; `services` reports the rest.
    """
    if users.unseen:
        yield hidden(f"which process has a socket of {link}")
    yield from _check_alone(link, (*users.proxies, *users.others), "serves the link", "receives each frame")
    if not users.unseen and not users.proxies and not users.others:
        next_one = "the next proxy" if has_service else "a service of this link"
        kept = f"; {named(users.holders)} keeps notifications for {next_one}" if users.holders else ""
        text = f"no proxy serves this link{kept}"
        if has_service:
            yield fail("proxy", link, text if start else f"{text}: see the log of its service", start)
        else:
            yield warn("proxy", link, text, start or f"inco-trio run {shlex.quote(link)}")


def stopped(process: Process) -> Iterator[Result]:
    """Yield a failure if a signal or a debugger has stopped the process."""
    if is_stopped(process.pid):
        text = "the process is stopped by a signal or a debugger, and neither delivers nor sends notifications"
        yield fail("control", _subject(process), text, f"kill -CONT {process.pid}")


def unanswered(process: Process) -> Result:
    """Return the result for a proxy that does not answer. If it runs without a control socket, a restart opens one."""
    for result in stopped(process):
        return result
    if not process.instances and not process.hidden:
        waits = ": it waits for the fd store" if process.is_holder else ""
        return warn("control", _subject(process), f"the process has not finished its start{waits}")
    text = "the process does not answer on a control socket: its counters and its configuration are unknown"
    words = shlex.split(process.supervised)
    restart = {"s6-svc": "-r", "systemctl": "restart"}.get(words[0]) if words else None
    has_none = value_of("--control", process.command) == "none" or process.name == "inco_proxy"
    if restart is None or has_none or process.stop is None or process.hidden or listening_sockets(process):
        return warn("control", _subject(process), text)
    text += "; its socket could not be opened when it started, for example because another proxy used the path"
    return warn("control", _subject(process), text, shlex.join([*words[:-2], restart, words[-1]]))


def _subject(process: Process) -> str:
    return f"process {process.pid} ({process.name})"


def users_of_directory(directory: Path, signals: Iterable[Signal], processes: Processes) -> Iterator[Result]:
    """Check that no two proxies watch the trigger files of the same directory."""
    found = [process for process in watchers(signals, processes) if process.pid != os.getpid()]
    yield from _check_alone(str(directory), found, "watches its triggers", "sends each notification")


def _check_alone(subject: str, processes: Iterable[Process], does: str, harm: str) -> Iterator[Result]:
    """Check that only one process uses `subject`.

    `does` describes what a single process does; `harm` describes what each of several proxies does.
    """
    everyone = sorted(processes, key=lambda process: (not process.is_proxy, process.started, process.pid))
    proxies = [process for process in everyone if process.is_proxy]
    for process in proxies:
        yield from stopped(process)
    if len(proxies) > 1:
        all_named = ", ".join(f"{each.pid} ({each.name}) {each.supervision}" for each in proxies)
        text, chosen = f"{len(proxies)} proxies: {all_named}: each {harm}", superfluous(proxies)
        if chosen.stop is not None and chosen.supervised:
            text += "; after this command, `inco-trio doctor` prints how to remove the stopped service for good"
        result = fail("proxy", subject, text, chosen.stop)
        yield result if chosen.stop is None else attrs.evolve(result, ends=_subject(chosen))
    elif len(everyone) > 1:
        text = f"several processes use it: {named(everyone)}: if two are proxies, each {harm}"
        yield warn("proxy", subject, text)
    elif everyone:
        alone = f"{named(everyone)} {proxies[0].supervision}" if proxies else named(everyone)
        yield ok("proxy", subject, f"only process {alone} {does}")


def descriptors(
    link: str, users: Users, processes: Processes, status: Status | None = None, *, has_service: bool = False
) -> Iterator[Result]:
    """Check that an fd store keeps the proxy's socket, so that no notifications are lost during a restart.

    `status` is what the proxy reports. `has_service` is whether the link has a service. A proxy with several boards
    stores their sockets in the queue of another socket, where /proc does not show them.
    """
    proxy = users.proxy
    if proxy is None:
        return
    if users.keepers:
        yield ok("descriptors", link, f"process {named(users.keepers)} keeps its socket while the proxy restarts")
    elif status is not None and status.descriptors and value_of("--boards", proxy.command) is not None:
        yield ok("descriptors", link, f"{status.descriptors} keeps its socket while the proxy restarts")
    elif processes.unseen:
        yield hidden(f"whether an fd store keeps the socket of {link} while the proxy restarts")
    elif value_of("--fd-holder", proxy.command) is not None:
        text = f"process {proxy.pid} was started with --fd-holder, but no fd store has its socket: see the proxy's log"
        yield fail("descriptors", link, text)
    else:
        text = "no fd store keeps its socket: notifications that arrive while the proxy restarts are lost"
        yield warn("descriptors", link, text, None if has_service else _service_of(link, proxy.command))


def _service_of(link: str, command: Sequence[str]) -> str:
    """Return the command that writes a service for the proxy that `command` started."""
    words = ["inco-trio", "service", "s6", "/run/service"]
    if (boards := value_of("--boards", command)) is not None:
        return shlex.join([*words, "--boards", boards])
    config, owner = value_of("--config", command), value_of("--irq-owner", command)
    # A service reads a udrv.json. Use a placeholder if the command line does not contain the path.
    options = ["--config", "udrv.json" if config is None else config]
    return shlex.join([*words, link, *options, *([] if owner is None else ["--irq-owner", owner])])


def value_of(option: str, command: Sequence[str]) -> str | None:
    """Return the value of an option in a command line, or None."""
    for word, following in pairwise([*command, ""]):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else following
    return None


def configuration(path: Path, wanted: Config | Sequence[Signal], proxy: Process, status: Status) -> Iterator[Result]:
    """Check that a proxy uses the current content of its configuration file.

    `wanted` is the content: the signals of a udrv.json, or the whole configuration that a board file describes. The
    check compares contents, because timestamps of files and processes are misleading after the clock has been changed.
    """
    signals = wanted.signals if isinstance(wanted, Config) else wanted
    used = {(each.signal, each.direction, each.register) for each in status.signals}
    current = {(each.name, each.direction, str(each.path)) for each in signals}
    changed = sorted({name for name, _, _ in used ^ current})
    if isinstance(wanted, Config):
        netns = None if wanted.netns is None else str(wanted.netns)
        keys = {
            "link": (status.link, wanted.link),
            "netns": (status.netns, netns),
            "irq_owner": ((status.owner, status.group), (wanted.owner, wanted.group)),
        }
        changed = [*(key for key, (before, now) in keys.items() if before != now), *changed]
    if changed:
        text = f"process {proxy.pid} does not use the current version, which differs in {', '.join(changed)}"
        yield _reload(path, text, proxy)
    else:
        yield ok("reload", path, f"process {proxy.pid} uses the current version")


def board_files(directory: Path, boards: Boards, served: Collection[str], proxy: Process) -> Iterator[Result]:
    """Check that a proxy serves the boards in its directory and no others. `served` contains the boards' names."""
    for name in sorted(boards.configs.keys() - served):
        text = f"process {proxy.pid} has not read this file: it does not serve the board"
        yield _reload(directory / f"{name}.json", text, proxy)
    for name in sorted(set(served) - boards.configs.keys() - boards.refused.keys()):
        text = f"was removed, but process {proxy.pid} still serves the board"
        yield warn("reload", directory / f"{name}.json", text, f"kill -HUP {proxy.pid}")


def _reload(path: Path, text: str, proxy: Process) -> Result:
    """Return the warning that a proxy must read a file, with the command, or with the reason why it cannot."""
    reason, fix = unreadable(path, proxy) or ("", "")
    reload = f"kill -HUP {proxy.pid}"
    if not reason:
        return warn("reload", path, text, reload)
    return warn("reload", path, f"{text}: {reason}", f"{fix} && {reload}" if fix else None)


def capabilities(proxy: Process, status: Status) -> Iterator[Result]:
    """Report a proxy's capabilities, and check that it needs them. Skip other programs, which may need more."""
    if not proxy.is_proxy:
        return
    words = proxy.command
    netns = None if status.netns is None else Path(status.netns)
    config = Config(status.link, (), netns=netns, owner=status.owner, group=status.group)
    several = value_of("--boards", words) is not None
    needed = set(needed_capabilities([config], grows=several, locked="--lock-memory" in words))
    if several:
        needed |= OF_OWNERS | OF_NAMESPACES  # Any of the boards may use an owner or a network namespace.
    held, subject = status.capabilities, f"process {proxy.pid}"
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
    # Pending notifications alone do not show a failure: a busy proxy always has some. The other counters count single
    # events.
    continues = {
        "write_failures": any(each.problem and each.direction is Direction.INBOUND for each in status.signals),
        # A failure to send concerns all signals, so the task has the problem.
        "send_failures": any(task.problem for task in status.tasks if task.task == "send"),
        "link_downs": not status.running,
        "rivals": bool(status.rivals),
        "restarts": any(task.problem for task in status.tasks),
    }
    for signal in status.signals:
        if signal.problem is not None or signal.pending:
            waiting = "not delivered yet" if signal.direction is Direction.INBOUND else "not sent yet"
            text = f"{signal.signal}: {signal.problem or waiting} ({signal.pending} pending)"
            faults.append(fail("signal", signal.register, text))
    faults += [fail("task", board.board, f"{task.task}: {task.problem}") for task in status.tasks if task.problem]
    for name, count in status.counters.as_dict().items():
        if count and name in COUNTERS:
            state = {True: " (continues)", False: " (over)", None: ""}[continues.get(name)]
            faults.append(warn("counters", board.board, f"{name} is {count}{state}: {COUNTERS[name]}"))
    yield from faults or [ok("counters", board.board, "no failures, unknown frames or drops since the start")]
