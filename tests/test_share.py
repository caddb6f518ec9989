"""Tests of the inotify descriptor that many boards share, of each board's queue, and of the bundle of descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.errors import ResourceError
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, parse_events
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.inflight import Inflight
from inco_trio.persist.queue import OVERFLOW, EventQueue
from inco_trio.persist.tables import PAGE
from inco_trio.proxy.share import GENERATION, Share, SharedInotify
from tests.support_proxy import Cupboard
from tests.support_registers import finish_steps

EVENT = bytes.fromhex("01000000 08000000 00000000 00000000")
NAMED = bytes.fromhex("02000000 00010000 00000000 10000000") + b"a name".ljust(16, b"\0")


def queue(size: int, memory: bytearray | None = None) -> EventQueue:
    return EventQueue(memoryview(memory if memory is not None else bytearray(PAGE + size)))


def read(events: EventQueue, size: int) -> bytes:
    buffer = memoryview(bytearray(b"\xff" * size))
    length = events.read_into(buffer)
    assert set(buffer[length : min(size, length + 16)]) <= {0, 0xFF}
    return bytes(buffer[:length])


def test_events_leave_the_queue_whole_and_in_order() -> None:
    events = queue(1024)
    events.append(EVENT + NAMED)
    events.append(NAMED + EVENT)
    assert read(events, 20) == EVENT
    assert read(events, 70) == NAMED + NAMED
    assert (read(events, 70), read(events, 70)) == (EVENT, b"")


def test_the_queue_wraps_around() -> None:
    events = queue(128)
    for _ in range(50):
        events.append(NAMED)
        events.append(EVENT)
        assert read(events, 40) == NAMED
        events.append(NAMED)
        assert read(events, 100) == EVENT + NAMED


def test_a_full_queue_ends_with_an_overflow_and_accepts_events_again_later() -> None:
    events = queue(80)
    for _ in range(10):
        events.append(EVENT)
    assert read(events, 32) == EVENT * 2
    events.append(NAMED)
    assert read(events, 200) == EVENT * 2 + OVERFLOW
    events.append(EVENT)
    assert read(events, 200) == EVENT


def test_a_successor_finds_the_queued_events() -> None:
    memory = bytearray(PAGE + 128)
    events = queue(128, memory)
    events.append(EVENT)
    assert read(queue(128, memory), 100) == EVENT


@pytest.mark.parametrize("queued", [b"", EVENT, NAMED])
def test_a_queue_uses_only_the_memory_that_it_needs(queued: bytes) -> None:
    memory = Inflight.open()
    memory.queue.append(queued)
    before = os.fstat(memory.fd).st_blocks
    assert memory.queue.copy() == queued
    assert os.fstat(memory.fd).st_blocks <= before + 8
    memory.close()


def test_a_kill_while_the_queue_restarts_leaves_it_empty() -> None:
    memory = bytearray(PAGE + 128)
    memory[:8] = (77).to_bytes(8, "little")
    events = queue(128, memory)
    assert len(events) == 0
    events.append(EVENT)
    assert read(events, 100) == EVENT


def test_a_lone_event_is_finished_in_place_or_stays_queued() -> None:
    events = queue(128)
    assert events.finish_alone(lambda *_: True) == 0
    events.append(EVENT)
    assert events.finish_alone(lambda *_: False) == 0
    assert events.finish_alone(lambda view, length: bytes(view[:length]) == EVENT) == len(EVENT)
    assert len(events) == 0


class Boards:
    """Two boards that share one inotify descriptor."""

    def __init__(self, stack: ExitStack, held: int | None = None, memories: Sequence[Inflight] = ()) -> None:
        self._stack = stack
        self.shared = SharedInotify(held, Inflight.open().events[0])
        stack.callback(self.shared.inotify.close)
        self.memories = memories or [Inflight.open() for _ in range(2)]
        self.shares = [self.shared.share(memory) for memory in self.memories]

    def successor(self) -> Boards:
        """Return the boards of a process that inherits all descriptors."""
        return Boards(self._stack, os.dup(self.shared.inotify.fd), self.memories)

    def received(self, share: Share) -> list[Event]:
        self.shared.drain()
        buffer = memoryview(bytearray(4096))
        return parse_events(buffer[: share.read_into(buffer)])


@pytest.fixture
def boards() -> Iterator[Boards]:
    with ExitStack() as stack:
        yield Boards(stack)


def test_each_board_gets_only_events_that_it_watches(boards: Boards, tmp_path: Path) -> None:
    one, other = boards.shares
    wd = one.watch(str(tmp_path), ino.IN_CREATE)
    assert other.watch(str(tmp_path), ino.IN_DELETE) % GENERATION == wd % GENERATION
    (tmp_path / "a").touch()
    (tmp_path / "a").unlink()
    assert boards.received(one) == [Event(wd, ino.IN_CREATE, b"a")]
    assert [event.mask for event in boards.received(other)] == [ino.IN_DELETE]


def test_stored_events_that_a_board_cannot_read_are_left_out(boards: Boards, tmp_path: Path) -> None:
    share, bank = boards.shares[0], boards.shared._bank.view
    wd = share.watch(str(tmp_path), ino.IN_CREATE)
    good = ino.EVENT.pack(wd, ino.IN_CREATE, 0, 16) + b"a name".ljust(16, b"\0")
    too_long = ino.EVENT.pack(wd, ino.IN_CREATE, 0, 512) + b"x" * 512
    incomplete = ino.EVENT.pack(wd, ino.IN_CREATE, 0, 16)
    number = (len(bank) - len(too_long) - len(incomplete)) // len(good)
    bank[:] = too_long + good * number + incomplete
    boards.shared.recover()
    assert share.queue.copy() == good * number


def test_removing_a_shared_watch_is_reported_and_gives_a_new_number(boards: Boards, tmp_path: Path) -> None:
    one, other = boards.shares
    first, kept = one.watch(str(tmp_path), ino.IN_CREATE), other.watch(str(tmp_path), ino.IN_CREATE)
    one.unwatch(first)
    again = one.watch(str(tmp_path), ino.IN_CREATE)
    assert again != first
    assert again % GENERATION == first % GENERATION
    (tmp_path / "a").touch()
    assert boards.received(one) == [Event(first, ino.IN_IGNORED, b""), Event(again, ino.IN_CREATE, b"a")]
    assert boards.received(other) == [Event(kept, ino.IN_CREATE, b"a")]
    one.unwatch(first)  # this watch no longer exists
    one.unwatch(again)
    other.unwatch(kept)
    assert boards.received(one) == [Event(again, ino.IN_IGNORED, b"")]
    assert boards.received(other) == [Event(kept, ino.IN_IGNORED, b"")]


def test_a_replaced_mask_causes_no_events(boards: Boards, tmp_path: Path) -> None:
    one, other = boards.shares
    one.watch(str(tmp_path), ino.IN_CREATE)
    one.watch(str(tmp_path), ino.IN_DELETE)
    other.watch(str(tmp_path / ".."), ino.IN_CREATE)
    (tmp_path / "a").touch()
    assert boards.shared.inotify.queued == 0


def test_a_successor_watches_only_what_its_predecessor_watched(boards: Boards, tmp_path: Path) -> None:
    for share, inflight in zip(boards.shares, boards.memories, strict=True):
        inflight.watches[b"directory"] = share.watch(str(tmp_path), ino.IN_DELETE)
    successor = boards.successor()
    one, other = successor.shares
    # The second board is not open yet, so only the kernel knows which events it has requested.
    wd = one.watch(str(tmp_path), ino.IN_CREATE)
    (tmp_path / "a").write_text("1")
    (tmp_path / "a").unlink()
    assert successor.received(one) == [Event(wd, ino.IN_CREATE, b"a")]
    assert {event.mask for event in successor.received(other)} == {ino.IN_CREATE, ino.IN_DELETE}
    other.watch(str(tmp_path), ino.IN_CREATE)
    (tmp_path / "b").touch()
    (tmp_path / "b").unlink()
    assert [event.mask for event in successor.received(other)] == [ino.IN_CREATE]
    assert successor.received(one) == [Event(wd, ino.IN_CREATE, b"b")]


def test_a_watch_can_be_narrowed_although_its_path_changed(boards: Boards, tmp_path: Path) -> None:
    one, other = boards.shares
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wide = one.watch(str(tmp_path / "a"), ino.IN_CREATE)
    place = other.watch(str(tmp_path / "b"), ino.IN_CREATE)
    boards.shared._narrow(wide % GENERATION, str(tmp_path / "b"), 0)
    boards.shared._narrow(wide % GENERATION, str(tmp_path), 0)
    (tmp_path / "b/x").touch()
    assert boards.received(other) == [Event(place, ino.IN_CREATE, b"x")]
    assert boards.received(one) == []


def test_watches_of_a_closed_board_and_unknown_watches_are_removed(boards: Boards, tmp_path: Path) -> None:
    one, other = boards.shares
    one.watch(str(tmp_path), ino.IN_CREATE)
    other.watch(str(tmp_path), ino.IN_CREATE)
    finish_steps(boards.shared.end(one))
    # Forget the other board's watches, as if a predecessor had created them for a board that no longer exists.
    boards.shared._watches.clear()
    (tmp_path / "a").touch()
    boards.shared.drain()
    boards.shared.drain()
    (tmp_path / "b").touch()
    assert boards.shared.inotify.queued == 0


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_any_number_of_descriptors_is_stored_as_one(tmp_path: Path) -> None:
    holder = Cupboard()
    bundle = Bundle(holder)
    expected = {}
    for number in range(600):
        path = tmp_path / str(number)
        path.touch()
        with path.open() as file:
            bundle.store(f"name/{number}", file.fileno())
        expected[f"name/{number}"] = path.stat().st_ino
    for number in range(0, 600, 3):
        bundle.remove(f"name/{number}")
        del expected[f"name/{number}"]
    with (tmp_path / "5").open() as file:
        bundle.store("name/1", file.fileno())
    expected["name/1"] = expected["name/5"]
    bundle.remove("unknown")
    bundle.close()
    assert list(holder.kept) == ["bundle"]
    assert len(holder.stored) > 1  # the first socket was full, so a new one replaced it
    for _ in range(2):
        holder = holder.heir()
        heir = Bundle(holder)
        assert {name: inode(fd) for name, fd in heir.kept.items()} == expected
        heir.close()
    holder.close()


def test_a_lack_of_descriptors_is_an_error() -> None:
    holder = Cupboard()
    bundle = Bundle(holder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(ResourceError, match="cannot store descriptors: Too many open files: raise ulimit -n"):
            bundle.store("a", 0)
        with pytest.raises(ResourceError, match="cannot store descriptors: Too many open files: raise ulimit -n"):
            bundle._renew()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    bundle.close()
    holder.close()
