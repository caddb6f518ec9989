"""Tests of the in-flight buffer: a process recovers the data that its predecessor left in the memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inco_trio.linux.inotify import Event, parse_events
from inco_trio.persist.inflight import (
    EVENT_BANK,
    FRAME_MAX,
    FRAME_STEP,
    FRAMES,
    MAGIC,
    SHORT,
    SIZE,
    Inflight,
    frames_in,
)
from inco_trio.persist.memory import map_memory

NAMES = [b"first", b"second", b"third"]
EVENT = (5).to_bytes(4, "little") + (8).to_bytes(4, "little") + bytes(8)

KILLED = """
import os, sys
from inco_trio.persist.inflight import FRAME_STEP, Inflight

memory = Inflight.open(int(sys.argv[1]))
assert memory.inherited
for number, bank in enumerate(memory.frames):
    bank.begin(8 - number)
    for slot, frame in enumerate([b"first", b"second", b"third"]):
        bank.view[slot * FRAME_STEP:slot * FRAME_STEP + len(frame)] = frame
memory.frames[0].clear(FRAME_STEP)
memory.events[1].begin(3)
memory.events[1].view[:16] = bytes.fromhex(sys.argv[2])
memory.pending[b"ihub_reset_irq"] += 2
memory.pending[b"ihub_hwwd_irq"] += 1
memory.pending[b"ihub_hwwd_irq"] -= 1
memory.watches[b"k" * 64] = 77
os._exit(9)
"""


@pytest.fixture
def memory() -> Iterator[Inflight]:
    made = Inflight.open()
    yield made
    made.close()


def mappings() -> int:
    """Return how many in-flight buffers this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:inco-trio")


def test_a_closed_buffer_has_no_descriptor_but_its_memory_stays_valid() -> None:
    gc.collect()
    before = mappings()
    open_before = set(Path("/proc/self/fd").iterdir())
    memory = Inflight.open()
    view = memory.frames[0].view
    memory.close()
    assert set(Path("/proc/self/fd").iterdir()) == open_before
    view[:4] = b"kept"
    del memory
    assert (bytes(view[:4]), mappings()) == (b"kept", before + 1)
    del view
    assert mappings() == before


def test_memory_that_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_memory(-1, SIZE)


@pytest.fixture
def successor(memory: Inflight) -> Iterator[Callable[[], Inflight]]:
    """Yield a function that maps the same memory again, as a successor does."""
    with ExitStack() as stack:

        def start() -> Inflight:
            found = Inflight.open(os.dup(memory.fd))
            stack.callback(found.close)
            return found

        yield start


def test_new_memory_is_empty(memory: Inflight) -> None:
    assert not memory.inherited
    assert not os.get_inheritable(memory.fd)
    assert [bank.sequence for bank in memory.frames + memory.events] == [0, 0, 0, 0]
    assert [frames_in(bank) for bank in memory.frames] == [[], []]
    assert [len(bank.view) >= FRAME_STEP * (FRAMES - 1) + FRAME_MAX for bank in memory.frames] == [True, True]
    assert [parse_events(bank.view) for bank in memory.events] == [[], []]
    assert [len(bank.view) for bank in memory.events] == [EVENT_BANK] * 2
    assert (list(memory.pending), list(memory.watches)) == ([], [])


def test_no_byte_of_the_mark_can_end_a_text(memory: Inflight) -> None:
    # If the mark contained an ASCII byte, one in 256 processes would return a long text without its last byte.
    for bank in memory.frames:
        assert not any(map(str.isascii, bank.blank[SHORT:FRAME_STEP].decode("latin-1")))


def test_new_memory_allocates_few_pages(memory: Inflight) -> None:
    # The kernel has allocated only the pages that hold the marks between frames, and one page for each table.
    assert os.fstat(memory.fd).st_blocks * 512 <= sum(len(bank.view) for bank in memory.frames) + 4096 * 4


def test_a_successor_finds_what_a_killed_process_had_in_flight(
    memory: Inflight, successor: Callable[[], Inflight]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(memory.fd), EVENT.hex()], pass_fds=[memory.fd], check=False
    )
    assert done.returncode == 9
    found = successor()
    assert found.inherited
    assert [bank.sequence for bank in found.frames] == [8, 7]
    assert [frames_in(bank) for bank in found.frames] == [NAMES[1:], NAMES]
    assert [bank.sequence for bank in found.events] == [0, 3]
    assert [parse_events(bank.view) for bank in found.events] == [[], [Event(5, 8, b"")]]
    assert {name: found.pending[name] for name in found.pending} == {b"ihub_reset_irq": 2}
    assert {key: found.watches[key] for key in found.watches} == {b"k" * 64: 77}


def test_a_cleared_bank_is_empty_again(memory: Inflight, successor: Callable[[], Inflight]) -> None:
    bank = memory.frames[1]
    bank.begin(2**40)
    for slot in range(FRAMES):
        bank.view[slot * FRAME_STEP : slot * FRAME_STEP + SHORT] = b"x" * SHORT
    assert frames_in(bank) == [b"x" * SHORT] * FRAMES
    bank.clear(2 * FRAME_STEP)
    assert len(frames_in(bank)) == FRAMES - 2
    bank.clear(len(bank.view))
    assert frames_in(successor().frames[1]) == []
    assert bank.sequence == 2**40


@pytest.mark.parametrize("length", [SHORT, SHORT + 1, FRAME_STEP, FRAME_STEP + 1, 200, 300, FRAME_MAX])
@pytest.mark.parametrize("slot", [0, 3, FRAMES - 1])
@pytest.mark.parametrize("fill", [b"x", b"\0"])
def test_a_long_frame_is_recovered_completely(
    memory: Inflight, successor: Callable[[], Inflight], length: int, slot: int, fill: bytes
) -> None:
    bank = memory.frames[0]
    # A frame that is longer than a slot also occupies the following slots.
    whole = (b"head" + fill * 124 + b"a part" + fill * FRAME_MAX)[: length - 1] + b"e"
    for number in range(slot):
        bank.view[number * FRAME_STEP : number * FRAME_STEP + 5] = b"short"
    bank.view[slot * FRAME_STEP : slot * FRAME_STEP + length] = whole
    found = successor().frames[0]
    assert frames_in(found) == [b"short"] * slot + [whole]
    found.clear(slot * FRAME_STEP + length)
    assert frames_in(bank) == []


@pytest.mark.parametrize("length", [SHORT, SHORT + 1, FRAME_STEP, 300])
def test_a_frame_that_consists_of_padding_is_no_frame(memory: Inflight, length: int) -> None:
    bank = memory.frames[0]
    bank.view[:length] = bytes(length)
    assert frames_in(bank) == []


def test_parts_of_the_memory_do_not_overlap(memory: Inflight, successor: Callable[[], Inflight]) -> None:
    banks = memory.frames + memory.events
    for number, bank in enumerate(banks):
        bank.begin(number + 1)
        bank.pending_since = number + 2
        bank.view[:] = bytes([number + 1]) * len(bank.view)
    memory.pending[b"o"] = 5
    memory.watches[b"w"] = 6
    found = successor()
    for number, bank in enumerate(found.frames + found.events):
        assert (bank.sequence, bank.pending_since) == (number + 1, number + 2)
        assert bytes(bank.view) == bytes([number + 1]) * len(bank.view)
    assert (found.pending[b"o"], found.watches[b"w"]) == (5, 6)
    assert (list(found.pending), list(found.watches)) == ([b"o"], [b"w"])


@pytest.mark.parametrize(
    ("size", "start"),
    [
        pytest.param(SIZE, b"", id="no magic"),
        pytest.param(SIZE, (MAGIC % FRAMES).replace(b"5", b"1"), id="another version"),
        pytest.param(SIZE, MAGIC % (FRAMES - 1), id="other banks"),
        pytest.param(SIZE - 4096, MAGIC % FRAMES, id="too small"),
        pytest.param(SIZE + 4096, MAGIC % FRAMES, id="too large"),
        pytest.param(0, b"", id="empty"),
    ],
)
def test_other_memory_is_replaced(size: int, start: bytes) -> None:
    held = os.memfd_create("foreign")
    assert "foreign" in str(Path(f"/proc/self/fd/{held}").resolve())
    os.ftruncate(held, size)
    os.pwrite(held, start, 0)
    os.pwrite(held, b"x", 5000)
    made = Inflight.open(held)
    assert not made.inherited
    assert made.fd != held
    assert "foreign" not in str(Path(f"/proc/self/fd/{held}").resolve())
    assert frames_in(made.frames[0]) == []
    made.close()


def test_the_mapping_works_after_its_descriptor_is_closed() -> None:
    made = Inflight.open()
    made.close()
    made.pending[b"key"] = 1
    assert made.pending[b"key"] == 1


def test_a_count_of_zero_removes_the_key(memory: Inflight) -> None:
    pending = memory.pending
    pending[b"key"] = 0
    assert (len(pending), pending[b"key"], list(pending)) == (0, 0, [])
    pending[b"key"] = 1
    pending[b"key"] = 0
    assert (len(pending), pending[b"key"], list(pending)) == (0, 0, [])


def test_removed_entries_are_reused(memory: Inflight, successor: Callable[[], Inflight]) -> None:
    pending = memory.pending
    for number in range(1000):
        pending[b"%d" % number] = number + 1
    for number in range(1000):
        pending[b"%d" % number] = 0
    touched = os.fstat(memory.fd).st_blocks
    for number in range(1000):
        pending[b"new%d" % number] = number + 1
    assert os.fstat(memory.fd).st_blocks == touched
    found = successor().pending
    assert {name: found[name] for name in found} == {b"new%d" % number: number + 1 for number in range(1000)}


def test_a_successor_reuses_removed_entries(memory: Inflight, successor: Callable[[], Inflight]) -> None:
    memory.pending[b"kept"] = 1
    memory.pending[b"gone"] = 1
    memory.pending[b"gone"] = 0
    found = successor().pending
    found[b"new"] = 3
    third = successor().pending
    assert {name: third[name] for name in third} == {b"kept": 1, b"new": 3}
    assert len(third) == 2


keys = st.sampled_from([b"a", b"b", b"c", b"d" * 64, b"e\0f"])


@settings(max_examples=30)
@given(st.lists(st.tuples(keys, st.integers(0, 3), st.booleans())))
def test_a_table_behaves_like_a_counter(changes: list[tuple[bytes, int, bool]]) -> None:
    expected: dict[bytes, int] = {}
    with ExitStack() as stack:
        memory = Inflight.open()
        stack.callback(memory.close)
        for key, number, handed_on in changes:
            memory.watches[key] = expected[key] = number
            if handed_on:
                memory = Inflight.open(os.dup(memory.fd))
                stack.callback(memory.close)
            found = {name: memory.watches[name] for name in memory.watches}
            assert found == {name: count for name, count in expected.items() if count}
