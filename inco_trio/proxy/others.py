"""The other proxies that share the link or a directory of a board, and therefore cause duplicate notifications."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import attrs

from inco_trio import real_clock
from inco_trio.config import Config
from inco_trio.counters import Counters
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import described
from inco_trio.problems import Note, noted_by, report, working_for
from inco_trio.registers.directory import Directory
from inco_trio.wall_clock import WallClock

if TYPE_CHECKING:
    from inco_trio.proxy_status import RivalStatus

__all__ = ["OF_LINK", "OF_TRIGGERS", "Others", "key_of"]

logger = logging.getLogger(__name__)

OF_LINK = "also serves this link, so both proxies receive each frame"
OF_TRIGGERS = "also watches its triggers, so both proxies send each notification"
ENDED = 16
"""For how many ended processes later results of a search are ignored."""
REMEDY = "while both run, `inco-trio doctor` names the one to stop"


def key_of(place: tuple[int, int]) -> str:
    """Return the device and the inode of a directory or a network namespace, as text for a `RivalRequest`."""
    return "{}:{}".format(*place)


@attrs.define
class _Other:
    since: int
    """When this proxy noticed the second proxy (real_clock.monotonic_ns())."""
    what: str
    """What the process was when it was noticed (see `described`)."""
    shared: list[str] = attrs.Factory(list)
    """The name of the link, the IRQ directories, or both."""


class Others:
    """The other proxies of a board. `note` records events in the board's history until the proxy `is_closed`."""

    def __init__(
        self,
        board: str,
        counters: Counters,
        note: Note,
        is_closed: Callable[[], bool],
    ) -> None:
        self._board = board
        self._counters = counters
        self._note = note
        self._is_closed = is_closed
        self._by_pid: dict[int, _Other] = {}
        self._ended: deque[int] = deque(maxlen=ENDED)
        """The PIDs of the last processes that have ended."""

    def status(self, clock: WallClock) -> tuple[RivalStatus, ...]:
        from inco_trio.proxy_status import RivalStatus

        found = self._by_pid.items()
        return tuple(RivalStatus(pid, clock.seconds(other.since), tuple(other.shared)) for pid, other in found)

    def appeared(self, pid: int, subject: str, text: str, what: str | None = None) -> None:
        """Count and report a process that also serves the link or the IRQ directory `subject`.

        `what` describes the process; if it is None, this call describes it.
        """
        if self._is_closed():
            return
        other = self._by_pid.get(pid)
        if other is None:
            other = self._by_pid[pid] = _Other(real_clock.monotonic_ns(), described(pid) if what is None else what)
            self._counters.rivals += 1
            if other.what:
                # Record this separately, because a record has room for little text.
                with working_for(self._board), noted_by(self._note):
                    report(logger, logging.WARNING, f"process {pid}: {other.what}", "message", cause=("rival", pid))
        if subject not in other.shared:
            other.shared.append(subject)
            with working_for(self._board), noted_by(self._note):
                report(logger, logging.WARNING, f"{subject}: {text}", "problem", cause=("rival", subject))

    def found(self, pid: int, subject: str, text: str, what: str) -> None:
        """Do the same as `appeared` for a process that a search found. It may have reported itself and ended since."""
        if pid not in self._ended:
            self.appeared(pid, subject, text, what)

    def claimed(
        self,
        pid: int,
        link: str | None,
        netns: str | None,
        directory: str | None,
        config: Config,
        directories: Iterable[Directory],
    ) -> bool:
        """Report a process that claims to share a link or a directory, if this board uses it. Return whether it does.

        `netns` identifies the network namespace of the link, and `directory` the directory (see `key_of`).
        """
        shared = [(str(each.path), OF_TRIGGERS) for each in directories if key_of(each.identity) == directory]
        if config.address.name == link and key_of(identity(config.netns)) == netns:
            shared.append((link, OF_LINK))
        for subject, what in shared:
            self.appeared(pid, subject, f"process {pid} {what}: {REMEDY}")
        return bool(shared)

    def ended(self, pid: int) -> None:
        """Report that a process has ended, if it was reported before."""
        if (other := self._by_pid.pop(pid, None)) is None or self._is_closed():
            return
        self._ended.append(pid)
        seconds = (real_clock.monotonic_ns() - other.since) / 1e9
        text = f"process {pid} ended {seconds:.1f} s after it was noticed: it had shared {', '.join(other.shared)}"
        text += f"; it was: {other.what}" if other.what else ""
        with working_for(self._board), noted_by(self._note):
            report(logger, logging.INFO, text, "works", cause="rival ended")
