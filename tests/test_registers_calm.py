"""A random walk in which nobody removes anything: every notification is told exactly once, and nothing else makes one.

The walk of `test_registers_machine` shows that nothing is lost, whatever happens. Here reloads, restarts, a full disk,
overflows and unrelated files have to be seen by nobody.
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
    """Who writes the triggers and watches the state files, and the registers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="inco-trio-", dir=MEMORY_FILES))
        self.consumer = Inotify()
        self.watched: dict[int, Path] = {}
        for name in DIRECTORIES:
            (self.home / name).mkdir()
            # What stands between two closes keeps the kernel from merging them.
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
        """What was triggered, and not told yet when the queue was last empty."""
        self.told: Counter[Path] = Counter()
        self.earlier: set[Path] = set()
        """What was triggered since then while it was in no table, or in another one: it may be told or not."""
        self.replaced: set[Path] = set()
        """What was replaced since then: the file that is there now is not watched yet."""
        self.dropped: set[Path] = set()
        """Triggers that were taken out of the table since then."""
        self.received: Counter[Path] = Counter()
        """Inbound notifications by state file, that no close was seen of yet."""
        self.world = World(clock, self.table({("irq", "a_trig")}, {("irq", "a_state")}))
        self.tell(self.world.open())

    def teardown(self) -> None:
        try:
            self.rest()
            assert self.watches() == self.needed()
        finally:
            self.world.ending.close()
            self.consumer.close()
            self.patch.undo()
            shutil.rmtree(self.home)

    # ------------------------------------------------------------------------------------------------------- words

    def table(
        self, outbound: set[tuple[str, str]], inbound: set[tuple[str, str]], *, renamed: bool = False
    ) -> list[Signal]:
        """Signals of these registers; `renamed` gives the outbound ones other names."""
        return [
            Signal(f"{prefix}{directory.replace('/', '.')}.{register}", direction, self.home / directory, register)
            for direction, places, prefix in (
                (Direction.OUTBOUND, outbound, "x." if renamed else ""),
                (Direction.INBOUND, inbound, ""),
            )
            for directory, register in sorted(places)
        ]

    def tell(self, names: list[str]) -> None:
        self.told.update(self.world.table.outbound[name.encode()].path for name in names)

    @property
    def outbound(self) -> set[Path]:
        return {signal.path for signal in self.world.table.outbound.values()}

    def watches(self) -> set[int]:
        """The watches that the kernel has."""
        lines = Path(f"/proc/self/fdinfo/{self.world.inotify.fd}").read_text().splitlines()
        return {int(line.split()[1].removeprefix("wd:"), 16) for line in lines if line.startswith("inotify wd:")}

    def needed(self) -> set[int]:
        """The watches on what is in the table, and on the directories above."""
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
        """What is queued for what is not in the table is nobody's; what is pending neither."""
        self.consume()
        kept = {signal.path for signal in table}
        for path in self.outbound - kept:
            self.dropped.add(path)
            if self.triggered.pop(path, 0):
                self.earlier.add(path)
        for path in [path for path in self.received if path not in kept]:
            del self.received[path]

    # --------------------------------------------------------------------------------------------- what others do

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

    # -------------------------------------------------------------------------------------- what the registers do

    @rule()
    def follow(self) -> None:
        """All that was triggered was told once, and nothing else; what was received is written if there is room."""
        self.tell(self.world.triggered())
        for _ in range(4):
            self.world.clock.now += 0.2
            self.tell(self.world.restore() + self.world.triggered())
        expected = {path: count for path, count in self.triggered.items() if path not in self.earlier}
        assert {path: count for path, count in self.told.items() if path not in self.earlier} == expected
        for seen in (self.triggered, self.told, self.earlier, self.replaced, self.dropped):
            seen.clear()
        self.consume()
        assert self.full or self.received == Counter()

    def consume(self) -> None:
        """Each close of a state file is one notification; what is left is pending."""
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
        self.tell(self.world.restore())

    @precondition(lambda self: self.world.table.inbound)
    @rule(data=st.data(), number=st.integers(1, 40))
    def inbound(self, data: st.DataObject, number: int) -> None:
        signal = data.draw(st.sampled_from(list(self.world.table.inbound.values())))
        self.received[signal.path] += number
        self.world.write(*[signal] * number)

    @rule()
    def overflow(self) -> None:
        """Each trigger is told once, and no more."""
        self.follow()
        self.triggered.update(self.outbound)
        self.tell(self.world.take(self.world.registers.triggers.follow([Event(-1, ino.IN_Q_OVERFLOW, b"")])))

    def rest(self) -> None:
        """Nothing is pending, nor watched for the sake of those who have a former file open."""
        # A file that waits for room is closed by a restart, and by a reload that drops it.
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
            # Of a file that the proxy made, dropped and took again, it has forgotten that an event is still to come.
            self.follow()
        self.leave_out(table)
        self.tell(self.world.reload(table))

    @rule(outbound=st.none() | st.sets(triggers), inbound=st.sets(states), rested=st.booleans())
    def restart(self, outbound: set[tuple[str, str]] | None, inbound: set[tuple[str, str]], *, rested: bool) -> None:
        """Another process takes over what is held, perhaps with another table."""
        triggers = self.world.registers.triggers
        # What it cannot know of its predecessor, and would tell once more: whose a watch was that is being ended, and
        # who made a file that is replaced before the event of that is read.
        known = triggers.by_path.values()
        unknown = set(triggers._by_wd) - {trigger.wd for trigger in known} or any(trigger.made_in for trigger in known)
        if rested or self.world.pending or unknown:
            self.rest()
        signals = list(self.world.table) if outbound is None else self.table(outbound, inbound)
        self.leave_out(signals)
        self.world = self.world.again(signals)
        self.tell(self.world.open())


def calm(steps: int, walks: int) -> None:
    """Go so many steps, in so many walks."""
    once = settings(
        max_examples=walks,
        stateful_step_count=steps // walks,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(Calm, settings=once)


def test_nothing_is_told_but_once() -> None:
    calm(steps=2000, walks=50)
