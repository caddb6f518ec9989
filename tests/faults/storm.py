"""The storm: send every signal once in both directions, while faults hit the proxy under a real s6-svscan.

A notification is lost if it has not arrived within a generous time after the faults have stopped. A notification counts
as sent only if the proxy could notice it. An inbound frame counts as sent as soon as core 0's kernel has queued it for
the link, where a witness socket sees it. A trigger counts as sent as soon as an application has closed it in the
current IRQ directory. The link goes down only while no frame is on it.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import attrs

from inco_trio.frame import ETHERTYPE
from inco_trio.linux.if_packet import PACKET_IGNORE_OUTGOING, SOL_PACKET
from inco_trio.simulation.world import Cores
from netns.hang import HANG
from tests.faults.applications import HEADER, Applications, Recorder, Wire, write_config
from tests.faults.links import make_again, wait_bound
from tests.faults.supervised import (
    Service,
    is_proxy,
    main_process,
    resident_kib,
    watched_inodes,
    write_scandir,
)

__all__ = ["FAULTS", "MEMORY_FILES", "Report", "Storm"]

MEMORY_FILES = "/dev/shm"  # noqa: S108 - only the parent of a directory made by tempfile
"""A tmpfs, as on a board. On a disk, creating 2,000 files takes seconds."""


class _Witness(Recorder):
    """A second packet socket on the proxy's link: it sees each frame that the kernel has queued for the link."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        # Create the socket in core 0: it stays in the network namespace in which it was created.
        self._socket = cores.core0.run(functools.partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._socket.setblocking(False)
        self.rebind()
        super().__init__(self._socket.fileno(), "witness")
        self.seen: Counter[str] = Counter()
        self.start()

    def rebind(self) -> None:
        self._socket.bind((self._cores.link, ETHERTYPE))

    def read_queued(self) -> None:
        try:
            while True:
                self.seen[self._socket.recv(1600)[HEADER:].rstrip(b"\0").decode()] += 1
        except BlockingIOError:
            return
        except OSError as error:
            # The kernel reports only once that the link went down.
            if error.errno != errno.ENETDOWN:
                raise

    def close(self) -> None:
        super().close()
        self._socket.close()


@attrs.define
class Report:
    """The report of a storm: the notifications that were sent, lost or duplicated, and the faults."""

    seed: int
    rounds: int = 0
    inbound: int = 0
    """Notifications sent from core 1."""
    outbound: int = 0
    """Notifications sent to core 1."""
    lost_inbound: list[str] = attrs.Factory(list)
    lost_outbound: list[str] = attrs.Factory(list)
    duplicates_inbound: int = 0
    duplicates_outbound: int = 0
    faults: Counter[str] = attrs.Factory(Counter)
    lives: dict[int, list[int]] = attrs.Factory(dict)
    """The resident memory of each process in KiB, sampled over time."""

    @property
    def lost(self) -> int:
        """Return the number of lost notifications."""
        return len(self.lost_inbound) + len(self.lost_outbound)

    def summary(self, seconds: float) -> dict[str, object]:
        """Return the report for JSON. The first and last memory figures omit processes that were sampled only once."""
        ends = [looks[-1] for looks in self.lives.values() if len(looks) > 1]
        return {
            "seed": self.seed,
            "minutes": round(seconds / 60, 1),
            "rounds": self.rounds,
            "notifications inbound": self.inbound,
            "notifications outbound": self.outbound,
            "lost inbound": len(self.lost_inbound),
            "lost outbound": len(self.lost_outbound),
            "duplicates inbound": self.duplicates_inbound,
            "duplicates outbound": self.duplicates_outbound,
            "faults": self.faults.total(),
            "faults by kind": dict(self.faults),
            "processes": len(self.lives),
            "KiB of the first process": ends[0],
            "KiB of the last process": ends[-1],
            "KiB of the largest": max(max(looks) for looks in self.lives.values()),
        }


class Storm:
    """A proxy under s6 in `cores`, with `count` signals in each direction, its core 1 and its applications."""

    def __init__(self, cores: Cores, work: Path, *, count: int, seed: int) -> None:
        self.cores = cores
        self.random = random.Random(seed)  # noqa: S311 - repeatable by its seed
        self.report = Report(seed)
        self.inbound = [f"in_{number:04}" for number in range(count)]
        self.outbound = [f"out_{number:04}" for number in range(count)]
        self.config = work / "udrv.json"
        directory = work / "board/irq"
        write_config(self.config, directory, self.inbound, self.outbound)
        write_scandir(work / "scan", cores.link, self.config)
        self._gates = {"inbound": threading.Lock(), "outbound": threading.Lock()}
        self._sent: dict[str, float] = {}
        self._queued_by_sender = 0
        self._resources = ExitStack()
        try:
            self.service = self._resources.enter_context(Service(cores.core0, work / "scan", cores.link))
            self.service.wait("U")
            self.applications = Applications(directory, self.inbound, self.outbound)
            self._resources.callback(self.applications.close)
            self.peer = self._resources.enter_context(cores.peer())
            self.wire = Wire(self.peer)
            self._resources.callback(self.wire.close)
            self.witness = _Witness(cores)
            self._resources.callback(self.witness.close)
        except BaseException:
            self._resources.close()
            raise

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.__exit__(kind, error, at)

    def round(self, faults: Sequence[str], *, interval: float, rate: float = 500.0) -> None:
        """Send every signal once, at `rate` signals per second in each direction, under faults.

        Inject a random fault from `faults` every `interval` seconds. Then let the proxy finish its pending work, and
        add the result to the report.
        """
        self._begin = time.monotonic()
        self._injected: list[tuple[float, str]] = []
        self.report.rounds += 1
        self.applications.reset()
        self.wire.seen.clear()
        self.witness.seen.clear()
        self._sent.clear()
        with ThreadPoolExecutor(2) as pool:
            traffic = [
                pool.submit(self._send_all, self.inbound, self._send_inbound, "inbound", rate),
                pool.submit(self._send_all, self.outbound, self._send_outbound, "outbound", rate),
            ]
            self._rain(faults, interval, traffic)
            for future in traffic:
                future.result()
        self._settle()

    def _send_all(self, names: Sequence[str], send: Callable[[str], None], way: str, rate: float) -> None:
        order = self.random.sample(names, len(names))
        start = time.monotonic()
        for number, name in enumerate(order):
            # Limit the rate of the notifications.
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            with self._gates[way]:
                send(name)

    def _send_inbound(self, name: str) -> None:
        if self.applications.delivered(name, 0.0):
            # Discard a late duplicate from the previous round.
            self.applications.reset([name])
        self._sent[name] = time.monotonic()
        self.peer.send(name.encode())

    def _send_outbound(self, name: str) -> None:
        early = self.wire.seen.pop(name, 0)
        self.report.duplicates_outbound += early
        self._sent[name] = time.monotonic()
        if self.random.random() < 0.1:
            self.applications.trigger_by_rename(name)
        else:
            self.applications.trigger(name)

    def _rain(self, faults: Sequence[str], interval: float, traffic: Sequence[Future[None]]) -> None:
        due = time.monotonic() + interval
        while not all(future.done() for future in traffic):
            # Limit the rate of the faults.
            time.sleep(min(0.05, max(0.0, due - time.monotonic())))
            self._look_at_memory()
            if time.monotonic() >= due and faults:
                due += interval
                self.inject(self.random.choice(list(faults)))

    def _settle(self) -> None:
        """Wait for all notifications in flight, and count lost and duplicate ones."""
        self.service.wait("U")
        lost_inbound = self._wait_all(self.inbound, self.applications, self._arrived_inbound)
        lost_outbound = self._wait_all(self.outbound, self.wire, lambda name: self.wire.seen[name] > 0)
        report = self.report
        report.inbound += len(self.inbound)
        report.outbound += len(self.outbound)
        report.lost_inbound += lost_inbound
        report.lost_outbound += lost_outbound
        report.duplicates_inbound += sum(max(0, self.applications.closes[name] - 1) for name in self.inbound)
        report.duplicates_outbound += sum(max(0, self.wire.seen[name] - 1) for name in self.outbound)

    def _arrived_inbound(self, name: str) -> bool:
        return self.applications.delivered(name, self._sent[name])

    def _wait_all(self, names: Sequence[str], recorder: Recorder, arrived: Callable[[str], bool]) -> list[str]:
        missing = list(names)

        def none_missing() -> bool:
            missing[:] = [name for name in missing if not arrived(name)]
            return not missing

        recorder.waited(none_missing)
        return missing

    def _look_at_memory(self) -> None:
        pid = self.service_pid
        if pid is not None and (resident := resident_kib(pid)):
            self.report.lives.setdefault(pid, []).append(resident)

    @property
    def service_pid(self) -> int | None:
        """Return the PID of the service's process, or None if the process is not inco-trio yet."""
        pid = main_process(self.service.directory)
        return pid if pid > 0 and is_proxy(pid) else None

    def inject(self, fault: str) -> None:
        """Inject the fault `fault` from FAULTS, and count it if the injection succeeded."""
        at = time.monotonic()
        if FAULTS[fault](self):
            self._injected.append((at, fault))
            self.report.faults[fault] += 1

    @property
    def story(self) -> str:
        """Return the timeline of this round in seconds: its faults, and when the lost notifications were sent."""
        lost = {*self.report.lost_inbound, *self.report.lost_outbound}
        events = [*self._injected, *((at, f"{name} was sent") for name, at in self._sent.items() if name in lost)]
        return "\n".join(f"{at - self._begin:8.3f} {what}" for at, what in sorted(events))

    @contextmanager
    def paused(self, *ways: str) -> Iterator[None]:
        """Pause sending in the directions `ways` while the block runs."""
        with ExitStack() as stack:
            for way in ways:
                stack.enter_context(self._gates[way])
            yield

    def _kill(self) -> bool:
        running = self.service_pid is not None
        self.service.control("-k")
        return running

    def _restart(self) -> bool:
        self.service.control("-r")
        return True

    def _terminate(self) -> bool:
        running = self.service_pid is not None
        self.service.control("-t")
        return running

    def _reload(self) -> bool:
        # SIGHUP would kill a process that has not installed inco-trio's signal handler yet.
        if self.service_pid is None:
            return False
        self.service.control("-h")
        return True

    def _off_and_on(self) -> bool:
        self.service.control("-d")
        self.service.wait("D")
        self.service.control("-u")
        return True

    def _freeze(self) -> bool:
        return self._frozen(signal.SIGCONT)

    def _freeze_and_kill(self) -> bool:
        return self._frozen(signal.SIGKILL)

    def _frozen(self, then: signal.Signals) -> bool:
        pid = self.service_pid
        if pid is None:
            return False
        os.kill(pid, signal.SIGSTOP)
        # Let a backlog build up.
        time.sleep(self.random.uniform(0.05, 0.3))
        os.kill(pid, then)
        return True

    def _wait_witnessed(self) -> None:
        """Wait until core 0's kernel has queued every frame sent so far."""
        self.witness.wait(
            lambda: all(self.witness.seen[name] for name in self.inbound if name in self._sent),
            "the network lost frames on their way to core 0",
        )

    @contextmanager
    def _interrupted(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Interrupt the link while no frame is on it, and wait for a trigger meanwhile, unless all have been written.

        The kernel drops frames that it has accepted, if the link goes down before they are sent.
        """
        with self.paused("inbound"):
            with self.paused("outbound"):
                self._wait_witnessed()
                self.wire.wait(
                    lambda: all(self.wire.seen[name] for name in self.outbound if name in self._sent),
                    "a notification has not been sent",
                )
                interrupt()
                before = self._triggered()
            deadline = time.monotonic() + HANG
            while self._triggered() == before < len(self.outbound):
                assert time.monotonic() < deadline, "the applications do not trigger"
                time.sleep(0.01)  # Poll: the sending thread wakes no other thread.
            yield

    def _triggered(self) -> int:
        """Return the number of triggers in this round."""
        return sum(name in self._sent for name in self.outbound)

    def _flap(self) -> bool:
        with self._interrupted(self.cores.link_down):
            self.cores.link_up()
        return True

    def _relink(self) -> bool:
        with self._interrupted(self.cores.delete_link):
            make_again(self.cores, self.peer, self.witness.rebind)
            wait_bound(self.cores, 2)
        return True

    def _wait_watched(self) -> None:
        """Wait until the proxy watches the current IRQ directory.

        If a directory is replaced before the proxy watches it, no event reports the changes in this directory. The fd
        holder has a copy of the proxy's inotify descriptor, which shows the watches.
        """
        holder = self.service.scandir / "inco-trio-fdholder"
        deadline = time.monotonic() + HANG
        while not self.applications.is_watched(watched_inodes(main_process(holder))):
            assert time.monotonic() < deadline, "the proxy does not watch the new directory"
            time.sleep(0.01)  # Poll, because the kernel does not report a new watch.

    def _replace_directory(self) -> bool:
        self._wait_watched()
        self.applications.replace_directory()
        return True

    def _move_directory(self) -> bool:
        self._wait_watched()
        self.applications.move_away(self.applications.directory)
        return True

    def _move_parent(self) -> bool:
        self._wait_watched()
        self.applications.move_away(self.applications.directory.parent)
        return True

    def _some(self, names: Sequence[str]) -> list[str]:
        return self.random.sample(names, 20)

    def _replace_registers(self) -> bool:
        for name in self._some(self.inbound):
            self.applications.replace_state(name)
        return True

    def _remove_registers(self) -> bool:
        for name in self._some(self.inbound):
            self.applications.remove_state(name)
        return True

    def _block_registers(self) -> bool:
        # Wait until the proxy is ready: it refuses to start with a blocked register (exit code 78), and stays down.
        self.service.wait("U")
        kinds = ("directory", "FIFO", "symlink")
        blocked = [self.applications.block_state(name, self.random.choice(kinds)) for name in self._some(self.inbound)]
        time.sleep(self.random.uniform(0.0, 0.2))  # Let some notifications arrive while the registers are blocked.
        for path in blocked:
            self.applications.unblock_state(path)
        return True


FAULTS: dict[str, Callable[[Storm], bool]] = {
    "SIGKILL": Storm._kill,
    "s6-svc -r": Storm._restart,
    "s6-svc -t": Storm._terminate,
    "s6-svc -h": Storm._reload,
    "s6-svc -d, -u": Storm._off_and_on,
    "SIGSTOP, SIGCONT": Storm._freeze,
    "SIGSTOP, SIGKILL": Storm._freeze_and_kill,
    "link down, up": Storm._flap,
    "link deleted, made": Storm._relink,
    "directory replaced": Storm._replace_directory,
    "directory moved": Storm._move_directory,
    "parent moved": Storm._move_parent,
    "registers replaced": Storm._replace_registers,
    "registers removed": Storm._remove_registers,
    "registers blocked": Storm._block_registers,
}
"""All faults, keyed by name. Each function injects its fault and returns whether the injection was possible."""
