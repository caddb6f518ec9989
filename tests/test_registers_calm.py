"""A random test that removes no files: each notification is reported exactly once, and nothing else is reported.

The test `test_registers_machine` shows that nothing is lost in any situation. In this test, reloads, restarts, a
full disk, overflows and unrelated files must have no visible effect.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, Inotify, parse_events
from inco_trio.registers.triggers import RETIREMENT
from inco_trio.signals import Direction, Signal
from tests.support_registers import Clock, World

MEMORY_FILES = "/dev/shm"  # noqa: S108 - where IRQ directories are
DIRECTORIES = ("irq", "irq/more", "other")

triggers = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(("a_trig", "b_trig")))
states = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(("a_state", "b_state")))


class Calm(RuleBasedStateMachine):
    """A random test: applications write triggers and watch state files, and the registers must report each write."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="inco-trio-", dir=MEMORY_FILES))
        self.consumer = Inotify()
        self.watched: dict[int, Path] = {}
        for name in DIRECTORIES:
            (self.home / name).mkdir()
            # Also watch for IN_MODIFY: such an event between two close events keeps the kernel from merging them.
            wd = self.consumer.watch(str(self.home / name), ino.IN_CLOSE_WRITE | ino.IN_MODIFY)
            self.watched[wd] = self.home / name
        self.patch = pytest.MonkeyPatch()
        clock = Clock()
        clock.install(self.patch)
        self.full = False
        write = os.write

        def write_if_there_is_room(fd: int, data: bytes) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data)

        self.patch.setattr("os.write", write_if_there_is_room)
        self.triggered: Counter[Path] = Counter()
        """How many times each trigger must have been reported since the last `follow`."""
        self.reported: Counter[Path] = Counter()
        self.earlier: set[Path] = set()
        """Triggers written since the last `follow` while they were outside the table. Reporting them is optional."""
        self.replaced: set[Path] = set()
        """Triggers that were replaced since the last `follow`: the proxy does not watch their new files yet."""
        self.dropped: set[Path] = set()
        """Triggers that were removed from the table since the last `follow`."""
        self.received: Counter[Path] = Counter()
        """For each state file, the number of inbound notifications for which no close has been seen yet."""
        self.world = World(clock, self.table({("irq", "a_trig")}, {("irq", "a_state")}))
        self.report(self.world.open())

    def teardown(self) -> None:
        try:
            self.rest()
            assert self.watches() == self.needed()
        finally:
            self.world.ending.close()
            self.consumer.close()
            self.patch.undo()
            shutil.rmtree(self.home)

    def table(
        self, outbound: set[tuple[str, str]], inbound: set[tuple[str, str]], *, renamed: bool = False
    ) -> list[Signal]:
        """Return signals for these registers; `renamed` gives the outbound signals different names."""
        return [
            Signal(f"{prefix}{directory.replace('/', '.')}.{register}", direction, self.home / directory, register)
            for direction, places, prefix in (
                (Direction.OUTBOUND, outbound, "x." if renamed else ""),
                (Direction.INBOUND, inbound, ""),
            )
            for directory, register in sorted(places)
        ]

    def report(self, names: list[str]) -> None:
        self.reported.update(self.world.table.outbound[name.encode()].path for name in names)

    @property
    def outbound(self) -> set[Path]:
        return {signal.path for signal in self.world.table.outbound.values()}

    def watches(self) -> set[int]:
        """Return the watch descriptors that exist in the kernel."""
        lines = Path(f"/proc/self/fdinfo/{self.world.inotify.fd}").read_text().splitlines()
        return {int(line.split()[1].removeprefix("wd:"), 16) for line in lines if line.startswith("inotify wd:")}

    def needed(self) -> set[int]:
        """Return the watch descriptors of the table's triggers and directories, and of the parent directories."""
        registers = self.world.registers
        return {
            *(trigger.wd for trigger in registers.triggers.by_path.values()),
            *(directory.wd for directory in registers.directories.by_path.values()),
            *(wd for directory in registers.directories.by_path.values() for wd in directory.above),
        }

    def trigger(self, path: Path) -> None:
        if path in self.outbound:
            self.triggered[path] += 1
        else:
            self.earlier.add(path)

    def leave_out(self, table: list[Signal]) -> None:
        """Forget queued triggers and pending notifications of registers that are not in `table`."""
        self.consume()
        kept = {signal.path for signal in table}
        for path in self.outbound - kept:
            self.dropped.add(path)
            if self.triggered.pop(path, 0):
                self.earlier.add(path)
        for path in [path for path in self.received if path not in kept]:
            del self.received[path]

    @rule(place=triggers)
    def write(self, place: tuple[str, str]) -> None:
        path = self.home.joinpath(*place)
        if path not in self.replaced:
            path.write_text("1")
            self.trigger(path)

    @rule(place=triggers)
    def replace(self, place: tuple[str, str]) -> None:
        path = self.home.joinpath(*place)
        path.with_name("new").write_text("1")
        path.with_name("new").rename(path)
        self.trigger(path)
        self.replaced.add(path)

    @rule(place=triggers | states)
    def read(self, place: tuple[str, str]) -> None:
        path = self.home.joinpath(*place)
        if path.exists():
            path.read_text()
            path.chmod(0o600)
            os.utime(path)

    @rule(directory=st.sampled_from(DIRECTORIES))
    def unrelated(self, directory: str) -> None:
        path = self.home / directory / "unrelated"
        path.write_text("1")
        path.rename(path.with_name("renamed"))
        path.with_name("renamed").unlink()

    @rule()
    def fill(self) -> None:
        self.full = True

    @rule()
    def make_room(self) -> None:
        self.full = False

    @rule()
    def follow(self) -> None:
        """Check that each trigger was reported once and, unless the disk is full, that no notification is pending."""
        self.report(self.world.triggered())
        for _ in range(4):
            self.world.clock.now += 0.2
            self.report(self.world.restore() + self.world.triggered())
        expected = {path: count for path, count in self.triggered.items() if path not in self.earlier}
        assert {path: count for path, count in self.reported.items() if path not in self.earlier} == expected
        for seen in (self.triggered, self.reported, self.earlier, self.replaced, self.dropped):
            seen.clear()
        self.consume()
        assert self.full or self.received == Counter()

    def consume(self) -> None:
        """Count each close of a state file as one notification; all other received notifications must be pending."""
        buffer = memoryview(bytearray(1 << 20))
        for event in parse_events(buffer[: self.consumer.read_into(buffer)]):
            path = self.watched[event.wd] / event.name.decode()
            if event.mask & ino.IN_CLOSE_WRITE and path.name.endswith("_state"):
                self.received[path] -= 1
        assert {path for path, count in self.received.items() if count < 0} == set()
        pending = {path: count for path, count in self.received.items() if count}
        assert pending == {self.home / name.replace(".", "/"): count for name, count in self.world.pending.items()}
        self.received = Counter(pending)

    @rule(seconds=st.sampled_from([0.01, 2.0, 61.0]))
    def restore(self, seconds: float) -> None:
        self.world.clock.now += seconds
        self.report(self.world.restore())

    @precondition(lambda self: self.world.table.inbound)
    @rule(data=st.data(), number=st.integers(1, 40))
    def inbound(self, data: st.DataObject, number: int) -> None:
        signal = data.draw(st.sampled_from(list(self.world.table.inbound.values())))
        self.received[signal.path] += number
        self.world.write(*[signal] * number)

    @rule()
    def overflow(self) -> None:
        """Simulate an overflow of the kernel's event queue. The proxy must then report each trigger exactly once."""
        self.follow()
        self.triggered.update(self.outbound)
        self.report(self.world.take(self.world.registers.triggers.follow([Event(-1, ino.IN_Q_OVERFLOW, b"")])))

    def rest(self) -> None:
        """Wait until no notification is pending and no replaced file is still watched."""
        # A restart, or a reload that removes the signal, would close a state file while a write waits for disk space.
        self.make_room()
        self.follow()
        self.world.clock.now += RETIREMENT
        self.follow()

    @rule(outbound=st.sets(triggers), inbound=st.sets(states), renamed=st.booleans())
    def reload(self, outbound: set[tuple[str, str]], inbound: set[tuple[str, str]], *, renamed: bool) -> None:
        table = self.table(outbound, inbound, renamed=renamed)
        if self.world.pending:
            self.rest()
        elif self.dropped & {signal.path for signal in table}:
            # If a reload drops a file that the proxy has just created, and the next reload adds the file again, the
            # proxy does not recognise the creation event as its own.
            self.follow()
        self.leave_out(table)
        self.report(self.world.reload(table))

    @rule(outbound=st.none() | st.sets(triggers), inbound=st.sets(states), rested=st.booleans())
    def restart(self, outbound: set[tuple[str, str]] | None, inbound: set[tuple[str, str]], *, rested: bool) -> None:
        """Let another process take over the stored descriptors, possibly with a different table."""
        triggers = self.world.registers.triggers
        # The successor would report a trigger again in two cases: its watch is being removed, or the file was replaced
        # before the proxy had read the event of its creation, so that the creator is unknown.
        known = triggers.by_path.values()
        unknown = set(triggers._by_wd) - {trigger.wd for trigger in known} or any(trigger.made_in for trigger in known)
        if rested or self.world.pending or unknown:
            self.rest()
        signals = list(self.world.table) if outbound is None else self.table(outbound, inbound)
        self.leave_out(signals)
        self.world = self.world.again(signals)
        self.report(self.world.open())


def calm(steps: int, walks: int) -> None:
    """Run `steps` steps in total, divided into `walks` random walks."""
    once = settings(
        max_examples=walks,
        stateful_step_count=steps // walks,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(Calm, settings=once)


@pytest.mark.parametrize(("steps", "walks"), [(500, 12), pytest.param(2000, 50, marks=pytest.mark.thorough)])
def test_each_notification_is_reported_exactly_once(steps: int, walks: int) -> None:
    calm(steps, walks)
