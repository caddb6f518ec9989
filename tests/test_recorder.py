"""Tests of the flight recorder: its content, its limits, and its state after a process has been killed."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inco_trio.control.past import past_events
from inco_trio.persist.inflight import Inflight
from inco_trio.persist.recorder import AREA, COUNT_MAX, EVENTS_SHARE, KEPT, NAMES_MAX, Note, Recorded, Recorder
from inco_trio.signals import Direction, Signal

IN = Signal("in_irq", Direction.INBOUND, Path("/irq"), "in")
OTHER = Signal("other_irq", Direction.INBOUND, Path("/irq"), "other")
OUT = Signal("out_irq", Direction.OUTBOUND, Path("/irq"), "out")


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, AREA))


def contents(recorder: Recorder) -> list[tuple[Any, ...]]:
    """Return all fields of the notifications and the events."""
    return [tuple(vars(each).values()) for each in (*recorder.notifications(), *recorder.notes())]


def counts(recorder: Recorder) -> list[tuple[str, int, int]]:
    return [(each.signal, each.count, each.sequence) for each in recorder.notifications()]


def test_notifications_have_times_sequence_and_delay(memory: memoryview) -> None:
    recorder = Recorder(memory)
    before = time.time_ns(), time.monotonic_ns()
    at = recorder.append([IN])
    recorder.append([OUT], since=before[1])
    after = time.time_ns(), time.monotonic_ns()
    first, second = recorder.notifications()
    assert contents(recorder)[0] == (*at, 1, 1, Direction.INBOUND, "in_irq", 0.0)
    assert before[0] <= first.time_ns <= second.time_ns <= after[0]
    assert before[1] <= first.monotonic_ns <= second.monotonic_ns <= after[1]
    assert (second.sequence, second.direction) == (2, Direction.OUTBOUND)
    assert second.delay == pytest.approx((second.monotonic_ns - before[1]) / 1e9)
    # A negative time is the earliest possible one.
    recorder.append([OUT, OUT], since=-before[1])
    *_, event = past_events("b", recorder)
    assert event.delay_max == pytest.approx((event.monotonic_ns - before[1]) / 1e9)
    assert [(each.delay, each.delay_max) for each in past_events("b", Recorder(memory))][-1] == (0, event.delay_max)


def test_a_batch_is_one_record_for_each_signal(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.append([IN, OTHER] * 100 + [IN])
    assert counts(recorder) == [("in_irq", 101, 101), ("other_irq", 100, 201)]
    recorder.append([IN] * (COUNT_MAX + 1))
    assert [each[1] for each in counts(recorder)[2:]] == [COUNT_MAX, 1]
    assert recorder.sequence == 201 + COUNT_MAX + 1


def test_each_ring_keeps_the_newest(memory: memoryview) -> None:
    recorder = Recorder(memory, kept=160)
    for number in range(1, 500):
        recorder.append([IN])
        recorder.note("problem", f"problem {number}")
    assert counts(recorder) == [("in_irq", 1, number) for number in range(340, 500)]
    assert [note.text for note in recorder.notes()] == [f"problem {number}" for number in range(480, 500)]
    assert 160 // EVENTS_SHARE == 20
    status = recorder.status()
    assert (status.notifications, status.events, status.kept) == (160, 20, 160)


def test_a_successor_continues(memory: memoryview) -> None:
    first = Recorder(memory)
    first.note_start()
    first.append([IN, OTHER])
    boot = first.boot
    second = Recorder(memory)
    second.note_start()
    second.append([IN])
    second.note("stopped", "stopped")
    third = Recorder(memory)
    third.note_start()
    assert third.boot == boot
    assert counts(third) == [("in_irq", 1, 1), ("other_irq", 1, 2), ("in_irq", 1, 3)]
    assert [note.text for note in third.notes() if note.kind == "started"] == [
        f"started (PID {os.getpid()}); earlier history is unknown: no fd store keeps it",
        f"started again after the previous process had ended without a stop (PID {os.getpid()})",
        f"started again (PID {os.getpid()})",
    ]


def test_the_start_says_why_there_is_no_earlier_history(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.note_start("systemd")
    (first,) = recorder.notes()
    assert first.text == f"started (PID {os.getpid()}); earlier history is unknown: systemd has none"
    recorder._numbers[2] = 0  # An invalid size.
    damaged = Recorder(memory)
    damaged.note_start("systemd", after_crash=True)
    (second,) = damaged.notes()
    assert second.text == (
        f"started after the previous process had ended without a stop (PID {os.getpid()}); "
        "earlier history is lost: the stored memory was damaged"
    )


@pytest.mark.parametrize(("kept", "left"), [(3, [8, 9, 10]), (20, [*range(1, 11)]), (None, [*range(1, 11)])])
def test_another_size_keeps_the_newest_records(memory: memoryview, kept: int | None, left: list[int]) -> None:
    first = Recorder(memory, kept=10)
    for _ in range(10):
        first.append([IN])
    first.note("problem", "a problem", "in_irq", Direction.INBOUND, count=5, state=2)
    second = Recorder(memory, kept)
    assert ([each[2] for each in counts(second)], second.kept) == (left, kept or 10)
    assert (contents(second)[len(left) :], second.boot) == (contents(first)[10:], first.boot)


def test_repeated_events_are_counted(memory: memoryview) -> None:
    recorder = Recorder(memory)
    for number in range(1000):
        recorder.note("ignored", "unknown", f"name{number % 3}", Direction.INBOUND)
    found = [(note.signal, note.count, note.last_ns > note.monotonic_ns) for note in recorder.notes()]
    assert found == [("name0", 334, True), ("name1", 333, True), ("name2", 333, True)]
    recorder.note("link", "link went down")
    recorder.note("link", "link went down")
    assert len(list(recorder.notes())) == 5


def test_names_that_the_link_peer_sends_fill_no_table(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.note("problem", "disk full")
    recorder.append([IN])
    for number in range(NAMES_MAX + 1):
        recorder.note("ignored", "unknown", f"s{number}", Direction.INBOUND, state=1)
    assert counts(recorder) == [("in_irq", 1, 1)]
    first, *named, last = recorder.notes()
    assert first.text == "disk full"
    assert [(note.text, note.signal, note.direction) for note in named] == [
        ("unknown", f"s{number}", Direction.INBOUND) for number in range(KEPT // EVENTS_SHARE // 4)
    ]
    assert (last.kind, last.signal, last.count) == ("ignored", None, NAMES_MAX + 1 - len(named))
    assert [note.signal for note in Recorder(memory).notes()] == [None, *(note.signal for note in named), None]


def test_an_unsendable_notification_stays_outbound(memory: memoryview) -> None:
    Recorder(memory).note("ignored", "unsendable", "out_irq", Direction.OUTBOUND, state=1)
    (note,) = Recorder(memory).notes()
    assert (note.text, note.signal, note.direction) == ("unsendable", "out_irq", Direction.OUTBOUND)


def test_each_reason_to_ignore_frames_is_counted_in_a_full_share(memory: memoryview) -> None:
    recorder = Recorder(memory)
    share = KEPT // EVENTS_SHARE // 4
    for number in range(share):
        recorder.note("ignored", "unknown", f"s{number}", Direction.INBOUND, state=1)
    for number in range(10):
        recorder.note("ignored", "unknown", f"t{number}", Direction.INBOUND, state=1)
        recorder.note("ignored", "malformed", None, Direction.INBOUND, state=1)
    assert [(note.text, note.count) for note in recorder.notes()][share:] == [("unknown", 10), ("malformed", 10)]


@pytest.mark.parametrize("kept", [None, KEPT // 2])
def test_a_restart_gives_the_link_peer_no_further_share(memory: memoryview, kept: int | None) -> None:
    for start in range(8):
        recorder = Recorder(memory, kept)
        recorder.note("problem", f"problem {start}")
        for number in range(KEPT // EVENTS_SHARE):
            recorder.note("ignored", "unknown", f"s{start}_{number}", Direction.INBOUND, state=1)
    texts = [note.text for note in Recorder(memory, KEPT // 2).notes()]
    assert [text for text in texts if text != "unknown"] == [f"problem {start}" for start in range(8)]


def test_a_link_that_flips_displaces_no_other_events(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.note("problem", "disk full")
    for number in range(KEPT):
        recorder.note("link", f"the link changed after {number} s", state=number % 2)
    first, *links = recorder.notes()
    assert (first.text, len(links)) == ("disk full", KEPT // EVENTS_SHARE // 4 + 2)
    assert sum(note.count for note in links) == KEPT
    for number in range(KEPT // EVENTS_SHARE):
        recorder.note("problem", f"problem {number}")
    recorder.note("link", "the link came up", state=1)
    assert [note.text for note in recorder.notes()][-1] == "the link came up"


def test_the_past_is_decoded_while_it_is_read(memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the history must neither delay notifications nor miss records that are overwritten meanwhile."""
    recorder = Recorder(memory, 1000)
    record_many(recorder, range(1000))
    decoded = 0

    def decode(*fields: Any) -> Recorded:
        nonlocal decoded
        decoded += 1
        return Recorded(*fields)

    monkeypatch.setattr("inco_trio.persist.recorder.Recorded", decode)
    for skipped in (0, 600):
        kept = list(recorder.notifications())
        after, decoded = kept[skipped - 1].monotonic_ns if skipped else 0, 0
        events = (event for event in past_events("b", recorder, after) if event.sequence)
        first = next(events)
        assert decoded <= 2
        record_many(recorder, range(1000))
        assert [first.sequence, *(event.sequence for event in events)] == [each.sequence for each in kept[skipped:]]


def test_a_long_text_is_cut_between_characters(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.note("message", "ö" * 200)
    recorder.note("message", "x" * 156)
    assert [note.text for note in recorder.notes()] == ["ö" * 76 + "...", "x" * 156]


def test_the_duration_of_a_link_event_is_kept(memory: memoryview) -> None:
    recorder = Recorder(memory)
    recorder.note("link", "the link went down", seconds=2.5)
    recorder.note("problem", "disk full")
    (link, problem) = Recorder(memory).notes()
    assert (link.seconds, problem.seconds) == (2.5, 0.0)
    for value in (b"\xff" * 4, struct.pack("=f", -1.0), struct.pack("=f", float("inf"))):
        recorder._events[188:192] = value  # The end of the first event record.
        assert next(recorder.notes()).seconds == 0.0


def test_a_wall_clock_that_is_set_is_recorded(memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(memory)
    real, shifts = time.time_ns, [0]
    monkeypatch.setattr("inco_trio.real_clock.time_ns", lambda: real() + shifts[-1])
    for shift in (0, 10**8, 3600 * 10**9, 0):
        shifts.append(shift)
        recorder.append([IN])
    shifts.append(86_400 * 10**9)
    recorder = Recorder(memory)  # The clock was set while no process was running.
    assert [note.text for note in recorder.notes() if note.kind == "clock"] == [
        "the wall clock was set forward by 3600.0 s",
        "the wall clock was set back by 3600.0 s",
        "the wall clock was set forward by 86400.0 s",
    ]
    monotonic = [each.monotonic_ns for each in recorder.notifications()]
    assert monotonic == sorted(monotonic)


def record_many(recorder: Recorder, names: Iterable[int]) -> None:
    """For each number, record a notification of one signal and an event about another signal."""
    for number in names:
        signal = Signal(f"s{number}_irq", Direction.OUTBOUND, Path("/irq"), "out")
        recorder.append([signal])
        recorder.note("pending", "no space", f"n{number}_irq", Direction.INBOUND)


def names_of(recorder: Recorder) -> tuple[list[str], list[str | None]]:
    return [each.signal for each in recorder.notifications()], [note.signal for note in recorder.notes()]


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit the table of names, and return the limit."""
    monkeypatch.setattr("inco_trio.persist.recorder.NAMES_MAX", 50)
    return 50


def test_a_full_table_of_names_keeps_the_records(memory: memoryview, few_names: int) -> None:
    recorder = Recorder(memory, kept=16)
    for number in range(4 * few_names):
        record_many(recorder, [number])
        newest = range(max(0, number - 15), number + 1)
        assert names_of(recorder) == ([f"s{n}_irq" for n in newest], [f"n{n}_irq" for n in newest])
        if number % 7 == 0:
            recorder = Recorder(memory)
            assert recorder.inherited
    assert len(recorder._names) == few_names


def test_more_recorded_names_than_fit_keep_the_newest_records(
    memory: memoryview, few_names: int, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(memory, kept=few_names)
    recorder.note("problem", "a problem")
    for number in range(4 * few_names):
        record_many(recorder, [number])
        signals, noted = names_of(recorder)
        assert len(signals) >= min(number + 1, few_names // 4)
        assert signals == [f"s{n}_irq" for n in range(number + 1 - len(signals), number + 1)]
        assert noted[-1] == f"n{number}_irq"
    recorder.note("problem", "a problem")
    assert list(recorder.notes())[-1].count == 1
    assert recorder.boot == Recorder(memory).boot
    assert caplog.messages == [f"the recorded history has {few_names} signal names: deleting its oldest records"]


def test_a_kill_while_an_unused_name_is_replaced_keeps_the_records(memory: memoryview, few_names: int) -> None:
    recorder = Recorder(memory, kept=16)
    record_many(recorder, range(few_names))
    unused = recorder._unused[-1]
    memory[256 + unused * 64 : 256 + unused * 64 + 3] = b"x\0\0"
    again = Recorder(memory)
    assert names_of(again) == names_of(recorder)
    record_many(again, range(few_names))
    assert names_of(again)[0] == [f"s{n}_irq" for n in range(few_names - 16, few_names)]


def test_an_incomplete_record_is_not_read(memory: memoryview) -> None:
    """If a process is killed while it writes a record, the slot contains neither the new nor the oldest record."""
    recorder = Recorder(memory, kept=10)
    for _ in range(25):
        recorder.append([IN])
    before = contents(recorder)
    place = recorder._written % 11 * 32
    recorder._ring[place : place + 32] = b"\xff" * 32
    assert contents(Recorder(memory)) == before


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("value", [0, 1 << 62, (1 << 64) - 1])
def test_damaged_numbers_start_an_empty_recorder(
    memory: memoryview, number: int, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(memory, kept=10)
    for _ in range(20):
        recorder.append([IN])
        recorder.note("problem", os.urandom(4).hex(), "in_irq", Direction.INBOUND)
    recorder._numbers[number] = value
    again = Recorder(memory)
    assert len(caplog.records) <= 1
    again.append([IN])
    assert counts(again)[-1][0] == "in_irq"
    assert again.status().notifications > 0


@settings(max_examples=50)
@given(place=st.integers(0, 3000), slot=st.integers(0, 16), garbage=st.binary(min_size=1, max_size=200))
def test_damaged_memory_never_raises(place: int, slot: int, garbage: bytes) -> None:
    memory = memoryview(mmap.mmap(-1, AREA))
    recorder = Recorder(memory, kept=16)
    for number in range(40):
        recorder.append([IN, OUT][number % 2 :][:1])
        recorder.note("problem", str(number), "in_irq", Direction.INBOUND)
    memory[place : place + len(garbage)] = garbage
    recorder._ring[slot * 32 : slot * 32 + len(garbage)] = garbage
    logging.disable()
    try:
        again = Recorder(memory)
    finally:
        logging.disable(logging.NOTSET)
    again.append([IN])
    assert list(again.notifications())
    assert all(isinstance(note, Note) for note in again.notes())


def test_a_killed_process_leaves_a_valid_recorder() -> None:
    inflight = Inflight.open()
    expected = 0
    for _ in range(20):
        ready, begun = os.pipe()
        child = os.fork()
        if not child:
            try:
                recorder = Recorder(Inflight.open(os.dup(inflight.fd)).recorder, kept=64)
                while True:
                    recorder.append([IN, OTHER] * 3)
                    recorder.note("problem", str(recorder.sequence))
                    os.write(begun, b"x")
            finally:
                os._exit(1)
        os.close(begun)
        seen = len(os.read(ready, 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(ready, 1 << 16):
            seen += len(data)
        os.close(ready)
        recorder = Recorder(inflight.recorder)
        assert recorder.inherited
        assert recorder.sequence >= expected + 6 * seen
        sequences = [each[2] for each in counts(recorder)]
        assert sequences == [*range(sequences[0], sequences[-1] + 1, 3)]
        expected = recorder.sequence
    inflight.close()


def test_memory_of_one_board() -> None:
    """A full recorder of the default size, with a typical signal table, allocates less than 256 kB."""
    inflight = Inflight.open()
    before = os.fstat(inflight.fd).st_blocks * 512
    recorder = Recorder(inflight.recorder)
    for number in range(2 * KEPT):
        recorder.append([IN, OUT][number % 2 :][:1])
        recorder.note("problem", str(number))
    assert recorder.status().notifications == KEPT
    assert recorder.status().events == 512
    assert os.fstat(inflight.fd).st_blocks * 512 - before < 256_000
    inflight.close()
