"""A random test of everything that can happen to registers, with a tmpfs, the real inotify and a simulated clock.

After each step, the data structures must agree. At the end, every trigger must work, every state file must be written,
and each write of a trigger must have been reported at least once. The fault suite runs longer walks.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from inco_trio.errors import IncoError
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, Inotify, parse_events
from inco_trio.registers.directories import ABANDONED
from inco_trio.signals import Direction, Signal
from tests.support_registers import Clock, World

MEMORY_FILES = "/dev/shm"  # noqa: S108 - where IRQ directories are
# Two of the directories are nested.
DIRECTORIES = ("board", "board/irq", "other/irq")
TRIGGERS = ("a_trig", "b_trig")
STATES = ("a_state", "b_state")

places = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(TRIGGERS))
state_places = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(STATES))
any_places = places | state_places
directories = st.sampled_from(DIRECTORIES)


class Walk(RuleBasedStateMachine):
    """A random test: applications change the files, and the registers must follow the changes."""

    shared = False
    """Whether another board watches directories with the same inotify descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="inco-trio-", dir=MEMORY_FILES))
        self.patch = pytest.MonkeyPatch()
        clock = Clock()
        clock.install(self.patch)
        self.away: dict[str, list[Path]] = {}
        self.number = 0
        self.written: set[Path] = set()
        """Triggers that have been written but not reported yet."""
        self.delivered = 0
        table = self.table({("board/irq", "a_trig"), ("other/irq", "a_trig")}, {("board/irq", "a_state")}, moved=False)
        beside = (self.home, *(self.home / directory for directory in DIRECTORIES)) if self.shared else None
        for directory in beside or ():
            directory.mkdir(exist_ok=True, parents=True)
        self.world = World(clock, table, shared=beside)
        self.take(self.world.open())

    def teardown(self) -> None:
        try:
            self.settle()
            self.everything_works()
        finally:
            self.world.ending.close()
            self.patch.undo()
            shutil.rmtree(self.home)

    def table(self, triggers: set[tuple[str, str]], states: set[tuple[str, str]], *, moved: bool) -> list[Signal]:
        """Return signals for these registers; `moved` gives them different names."""
        return [
            Signal(
                f"{'x' if moved else ''}{register}.{place.replace('/', '.')}", direction, self.home / place, register
            )
            for direction, registers in ((Direction.OUTBOUND, triggers), (Direction.INBOUND, states))
            for place, register in sorted(registers)
        ]

    def path(self, place: tuple[str, str]) -> Path:
        return self.home / place[0] / place[1]

    def take(self, names: list[str]) -> None:
        """Remove the reported signals from `written`."""
        reported = {signal.path for signal in self.world.table.outbound.values() if signal.name in names}
        self.written -= reported

    def wrote(self, path: Path) -> None:
        """Record in `written` that a trigger was written, if it is in the table."""
        if any(signal.path == path for signal in self.world.table.outbound.values()):
            self.written.add(path)

    @property
    def states(self) -> list[Signal]:
        return list(self.world.table.inbound.values())

    @rule(place=places)
    def write(self, place: tuple[str, str]) -> None:
        path = self.path(place)
        with contextlib.suppress(OSError):
            path.write_text("1")
            self.wrote(path)

    @rule(place=any_places)
    def remove(self, place: tuple[str, str]) -> None:
        self.forget_unseen("/".join(place))
        with contextlib.suppress(OSError):
            self.path(place).unlink()

    @rule(place=any_places, text=st.sampled_from(["", "1"]))
    def replace(self, place: tuple[str, str], text: str) -> None:
        path = self.path(place)
        with contextlib.suppress(OSError):
            path.with_name("new").write_text(text)
            path.with_name("new").rename(path)
            self.wrote(path)

    @rule(place=places, other=places)
    def rename(self, place: tuple[str, str], other: tuple[str, str]) -> None:
        # Handle all events first: after a rename and a reload, an earlier write would be reported under the new name.
        self.follow()
        if place == other:
            return
        self.forget_unseen("/".join(place))
        with contextlib.suppress(OSError):
            file = self.path(place).is_file()  # A directory does not count as a written trigger.
            self.path(place).rename(self.path(other))
            if file:
                self.wrote(self.path(other))

    @rule(place=any_places)
    def block(self, place: tuple[str, str]) -> None:
        self.forget_unseen("/".join(place))
        with contextlib.suppress(OSError):
            self.path(place).unlink(missing_ok=True)
            self.path(place).mkdir()

    @rule(place=any_places)
    def unblock(self, place: tuple[str, str]) -> None:
        with contextlib.suppress(OSError):
            self.path(place).rmdir()

    @rule(directory=directories)
    def move_away(self, directory: str) -> None:
        self.forget_unseen(directory)
        self.number += 1
        away = self.home / f"away{self.number}"
        with contextlib.suppress(OSError):
            (self.home / directory).rename(away)
            self.away.setdefault(directory, []).append(away)

    @rule(directory=directories)
    def bring_back(self, directory: str) -> None:
        if self.away.get(directory):
            with contextlib.suppress(OSError):
                (self.home / directory).parent.mkdir(parents=True, exist_ok=True)
                self.away[directory][-1].rename(self.home / directory)
                self.away[directory].pop()

    @rule(directory=directories, other=directories)
    def move_to_another(self, directory: str, other: str) -> None:
        # Handle all events first, as in `rename`.
        self.follow()
        self.forget_unseen(directory)
        with contextlib.suppress(OSError):
            (self.home / other).rmdir()
        with contextlib.suppress(OSError):
            (self.home / directory).rename(self.home / other)

    @rule(directory=directories)
    def remove_directory(self, directory: str) -> None:
        self.forget_unseen(directory)
        shutil.rmtree(self.home / directory, ignore_errors=True)

    @rule(directory=directories)
    def make_directory(self, directory: str) -> None:
        (self.home / directory).mkdir(parents=True, exist_ok=True)

    def forget_unseen(self, gone: str) -> None:
        """Discard writes to files that are removed before the proxy has seen them: no event reports such writes."""
        watched, now = self.world.registers.directories, self.world.clock.now
        for path in tuple(self.written):
            directory = watched.by_path[path.parent]
            # The proxy opens a new directory immediately, but checks the files in it only at the next retry that is
            # due.
            seen = directory.current and not (directory in watched.retries._troubled and directory.retry_at <= now)
            if path.is_relative_to(self.home / gone) and not seen:
                self.written.discard(path)

    @rule()
    def follow(self) -> None:
        self.take(self.world.triggered())

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.5, ABANDONED]))
    def restore(self, seconds: float) -> None:
        self.world.clock.now += seconds
        self.take(self.world.restore())

    @rule(kept=st.integers(0, 20))
    def overflow(self, kept: int) -> None:
        """Simulate an overflow of the kernel's event queue: all events after the first `kept` events are lost."""
        events = [*self.world.events()[:kept], Event(-1, ino.IN_Q_OVERFLOW, b"")]
        self.take(self.world.take(self.world.registers.triggers.follow(events)))

    @precondition(lambda self: self.states)
    @rule(data=st.data(), number=st.integers(1, 3))
    def inbound(self, data: st.DataObject, number: int) -> None:
        signal = data.draw(st.sampled_from(self.states))
        before = self.world.stats.delivered + sum(self.world.pending.values())
        self.world.write(*[signal] * number)
        assert self.world.stats.delivered + sum(self.world.pending.values()) >= before + number

    @rule(triggers=st.sets(places), states=st.sets(state_places), moved=st.booleans())
    def reload(self, triggers: set[tuple[str, str]], states: set[tuple[str, str]], *, moved: bool) -> None:
        before, table = self.world.table, self.table(triggers, states, moved=moved)
        try:
            self.take(self.world.reload(table))
        except IncoError:
            self.world.table = before  # The old table remains in use.
        self.written &= {signal.path for signal in self.world.table.outbound.values()}

    @rule(triggers=st.none() | st.sets(places), states=st.sets(state_places))
    def restart(self, triggers: set[tuple[str, str]] | None, states: set[tuple[str, str]]) -> None:
        """Let another process take over the stored descriptors, possibly with a different table."""
        table = None if triggers is None else self.table(triggers, states, moved=False)
        self.world = self.world.again(table)
        try:
            names = self.world.open()
        except IncoError:
            # The process exits. Its supervisor restarts it once the user has fixed the refused register.
            self.unblock_all()
            self.world = self.world.again()
            names = self.world.open()
        self.written &= {signal.path for signal in self.world.table.outbound.values()}
        self.take(names)

    def unblock_all(self) -> None:
        for directory in DIRECTORIES:
            for register in (*TRIGGERS, *STATES):
                with contextlib.suppress(OSError):
                    (self.home / directory / register).rmdir()

    @invariant()
    def structures_agree(self) -> None:
        registers = self.world.registers
        triggers, watched = registers.triggers, registers.directories
        table = self.world.table
        assert registers.table is table
        assert {path: one.signal for path, one in triggers.by_path.items()} == {
            signal.path: signal for signal in table.outbound.values()
        }
        assert set(watched.by_path) == {signal.directory for signal in table}
        troubled = watched.retries._troubled
        for path, trigger in triggers.by_path.items():
            assert trigger.path == path
            assert triggers._in[trigger.directory][trigger.register.encode()] is trigger
            assert watched.by_path[path.parent] is trigger.directory
            assert not trigger.wd or triggers._by_wd[trigger.wd] is trigger
            assert trigger.missing_since is None or trigger.directory in troubled
            assert bool(trigger.replaced) == (trigger in triggers._replaced)
        live = [trigger.wd for trigger in triggers.by_path.values() if trigger.wd]
        assert len(live) == len(set(live))
        assert set(triggers._retired) <= set(triggers._by_wd)
        assert not set(live) & set(triggers._retired)
        assert set(triggers._in) == {trigger.directory for trigger in triggers.by_path.values()}
        for path, directory in watched.by_path.items():
            assert directory.path == path
            assert (directory.fd >= 0) == (directory.wd > 0)
            if directory.fd >= 0:
                found = os.fstat(directory.fd)
                assert directory.identity == (found.st_dev, found.st_ino)
                assert watched._by_wd[directory.wd] is directory
            else:
                assert directory.missing_since is not None
            assert all(directory in watched._above[wd] for wd in directory.above)
            assert not directory.awaited_in or directory.missing_since is not None
        for wd, below in watched._above.items():
            assert all(wd in directory.above for directory in below)
        assert {path for path, names in watched._awaited.items() if not names.names} == set()
        assert not troubled or self.world.troubled

    def settle(self) -> None:
        """Unblock all files and wait until every timeout has expired."""
        self.unblock_all()
        for _ in range(3):
            self.take(self.world.after(1.5))
        self.take(self.world.after(ABANDONED))

    def everything_works(self) -> None:
        self.structures_agree()
        world = self.world
        assert self.written == set()
        assert world.pending == {}
        assert world.after(1.5) == []
        assert all(directory.fd >= 0 for directory in world.registers.directories.by_path.values())
        assert world.registers.next_restore() == math.inf
        for signal in world.table.outbound.values():
            signal.path.write_text("1")
            assert world.triggered() == [signal.name]
        consumer = Inotify()
        watches = {consumer.watch(str(signal.path), ino.IN_CLOSE_WRITE): signal for signal in self.states}
        world.write(*self.states)
        buffer = memoryview(bytearray(1 << 16))
        closed = parse_events(buffer[: consumer.read_into(buffer)])
        consumer.close()
        assert [watches[event.wd] for event in closed] == self.states
        assert all(signal.path.read_text() == "1" for signal in self.states)


class SharedWalk(Walk):
    """Like `Walk`, but with another board in the same process."""

    shared = True


def walk(steps: int, walks: int, machine: type[Walk] = Walk) -> None:
    """Run `steps` steps in total, divided into `walks` random walks."""
    once = settings(
        max_examples=walks,
        stateful_step_count=steps // walks,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=once)


@pytest.mark.parametrize("machine", [Walk, SharedWalk])
def test_a_random_walk_loses_nothing(machine: type[Walk]) -> None:
    walk(steps=1600, walks=40, machine=machine)


def test_an_overflow_hides_a_rename_from_a_removed_trigger_to_a_configured_one() -> None:
    # Found by the long random walk: the file had the watch of a trigger that was no longer in the table.
    machine = Walk()
    machine.reload(moved=False, states=set(), triggers={("board", "a_trig")})
    machine.rename(place=("board/irq", "a_trig"), other=("board", "a_trig"))
    machine.overflow(kept=0)
    machine.write(place=("board", "a_trig"))
    machine.remove_directory(directory="board")
    machine.teardown()


@pytest.mark.parametrize("kind", [Walk, SharedWalk])
def test_a_file_removed_before_ours_is_created_counts(kind: type[Walk]) -> None:
    # Found by the long random walk: the proxy mistook an event of the application's file for an event of its own file.
    machine = kind()
    machine.move_away(directory="board/irq")
    machine.follow()
    machine.reload(moved=False, states=set(), triggers={("board/irq", "b_trig")})
    machine.write(place=("board/irq", "b_trig"))
    machine.block(place=("board/irq", "b_trig"))
    machine.teardown()
