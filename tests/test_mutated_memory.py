"""Tests of an in-flight buffer with arbitrary content: a proxy uses it, or reports it and starts with an empty one."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inco_trio.config import Config
from inco_trio.control.past import past_events
from inco_trio.control.protocol import Response, decode_reply, encode_event, encode_history
from inco_trio.linux.inotify import EVENT, IN_CREATE, Inotify, pack_event, parse_events
from inco_trio.mqtt.bridge_progress import Memory, Progress
from inco_trio.persist.followed import History
from inco_trio.persist.inflight import (
    BEFORE_HISTORY,
    BEFORE_RECORDER,
    EVENT_BANK,
    FRAME_BANK,
    FRAME_STEP,
    FRAMES,
    MAGIC,
    SIZE,
    Inflight,
    frames_in,
)
from inco_trio.persist.memory import map_memory, new_memory
from inco_trio.persist.queue import POSITION_MAX
from inco_trio.persist.recorder import _EVENTS, _NOTED, _RECORD, _RING, _WRITTEN, Recorder
from inco_trio.persist.tables import KEY, PAGE, TABLE, NumberTable
from inco_trio.proxy.proxy import open_supervised
from inco_trio.registers.refusals import refusal
from inco_trio.signals import Direction, Signal
from netns.hang import HANG
from tests.support_proxy import Cupboard, trigger

REFUSED = "in-flight buffer: cannot use the stored memory ("
IN, OUT = Direction.INBOUND, Direction.OUTBOUND
NUMBERS = KEY * 65536
"""The offset of the numbers in a table. They follow the 65,536 keys."""


def filled() -> Inflight:
    """Return an in-flight buffer in which every section contains data."""
    memory = Inflight.open()
    for number, bank in enumerate(memory.frames):
        bank.begin(number + 1)
        bank.view[:40] = b"\xff" * 12 + b"\x88\x00" + b"first".ljust(26, b"\0")
        bank.view[FRAME_STEP : FRAME_STEP + 3] = b"bad"
    for number, bank in enumerate(memory.events):
        bank.begin(number + 1)
        bank.view[:16] = pack_event(3, 8)
    memory.pending[b"first"] = 2
    memory.pending[b"gone"] = 1
    memory.watches[b"k" * 64] = 7
    memory.queue.append(pack_event(5, 8) * 3)
    history = History(memory.history)
    history.begin(5)
    history.append([Signal("first", IN, Path("/run"), "a"), Signal("second", OUT, Path("/run"), "b")] * 3, (2, 1))
    history._merge(history.floor + 1)
    recorder = Recorder(memory.recorder)
    for _ in range(3):
        recorder.append([Signal("first", IN, Path("/run"), "a")])
        recorder.note("problem", f"problem {recorder.sequence}", "first", IN)
    return memory


def parts() -> dict[str, int]:
    """Return the offset of each part whose content the proxy interprets."""
    after_events = PAGE + 2 * FRAME_BANK + 2 * EVENT_BANK
    return {
        "header": 0,
        "times": PAGE - 80,
        "sequences": PAGE - 48,
        "frames": PAGE,
        "pending keys": after_events,
        "pending numbers": after_events + NUMBERS,
        "watches": after_events + TABLE,
        "watch numbers": after_events + TABLE + NUMBERS,
        "queue": after_events + 2 * TABLE,
        "queued events": after_events + 2 * TABLE + PAGE,
        "history": BEFORE_HISTORY,
        "merged keys": BEFORE_HISTORY + PAGE,
        "merged numbers": BEFORE_HISTORY + PAGE + NUMBERS,
        "ring": BEFORE_HISTORY + PAGE + 2 * TABLE,
        "recorder": BEFORE_RECORDER,
        "notifications": BEFORE_RECORDER + _RING,
        "events": BEFORE_RECORDER + _EVENTS,
    }


def changed(write: Callable[[memoryview, dict[str, int]], None]) -> int:
    """Fill an in-flight buffer, let `write` change it, and return its descriptor."""
    memory = filled()
    fd = os.dup(memory.fd)
    write(map_memory(memory.fd, SIZE), parts())
    memory.close()
    return fd


def use(memory: Inflight) -> None:
    """Use the memory in the same way as the proxy, the gateway and the status report do."""
    for bank in (*memory.frames, *memory.events):
        bank.begin(bank.sequence + 1)
        bank.pending_since = bank.pending_since
    for bank in memory.frames:
        assert all(frames_in(bank))
    for bank in memory.events:
        parse_events(bank.view)
    for name in memory.pending:
        assert name.decode("ascii")
        memory.pending[name] -= 1
    for key in memory.watches:
        assert 0 < memory.watches[key] < 1 << 31
        memory.watches[key] = 0
    memory.watches[b"new"] = 1
    buffer = memoryview(bytearray(4096))
    while len(memory.queue):
        assert memory.queue.read_into(buffer) > 0
    memory.queue.append(pack_event(1, 8))
    history = History(memory.history)
    history.begin(0)
    history.append([Signal("third", IN, Path("/run"), "c")], (2, 1))
    merged = list(history.merged())
    assert history.waiting >= 1
    assert history.after(0, 1 << 20)[-1].name == "third"
    assert all(record.time_ns / 1e9 < 1 << 63 for record in history.after(0, 1 << 20))
    history.acknowledge(history.sequence, merged)
    assert history.waiting == 0
    use_recorder(memory.recorder)


def use_recorder(view: memoryview) -> None:
    """Use the flight recorder as a proxy, its clients and its successor do."""
    recorder = Recorder(view)
    recorder.note_start("systemd")
    for number in range(3):
        recorder.append([Signal("third", IN, Path("/run"), "c")])
        recorder.note("problem", f"new problem {number}")
        recorder.status()
    text = "".join(encode_history("b", recorder.boot, map(encode_event, past_events("b", recorder)), {}))
    reply = decode_reply(text.encode())
    assert isinstance(reply, Response)
    assert reply.history is not None
    assert "new problem 2" in [event.message for event in reply.history.events]
    Recorder(view).append([Signal("third", IN, Path("/run"), "c")])


PLACES = st.sampled_from(sorted(parts()))
SMALL = st.binary(min_size=1, max_size=24)
NUMBER = st.sampled_from([0, 1, 2, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]).map(
    lambda n: n.to_bytes(8, "little")
)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(PLACES, st.integers(0, 96), SMALL | NUMBER), min_size=1, max_size=4))
@example([("queue", 8, (2**63).to_bytes(8, "little"))])
@example([("recorder", 8 * _WRITTEN, (2**64 - 1).to_bytes(8, "little"))])
@example([("recorder", 8 * _NOTED, (2**64 - 1).to_bytes(8, "little"))])
@example([("notifications", 2 * _RECORD.size, (2**64 - 1).to_bytes(8, "little"))])
@example([("notifications", 2 * _RECORD.size + 8, (2**64 - 1).to_bytes(8, "little"))])
@example([("notifications", 2 * _RECORD.size + 16, (2**64 - 1).to_bytes(8, "little"))])
@example([("notifications", 2 * _RECORD.size + 28, struct.pack("<f", math.nan))])
@example([("notifications", 2 * _RECORD.size + 28, struct.pack("<f", -1))])
@example([("notifications", 2 * _RECORD.size + 28, struct.pack("<f", math.inf))])
@example([("events", 0, (2**64 - 1).to_bytes(8, "little"))])
@example([("events", 8, (2**64 - 1).to_bytes(8, "little"))])
@example([("events", 16, (2**64 - 1).to_bytes(8, "little"))])
def test_mutated_memory_is_used_or_replaced(mutations: list[tuple[str, int, bytes]]) -> None:
    def write(whole: memoryview, at: dict[str, int]) -> None:
        for place, offset, data in mutations:
            start = at[place] + offset
            whole[start : start + len(data)] = data

    held = changed(write)
    found = Inflight.open(held)
    assert found.inherited is (found.fd == held)
    use(found)
    found.close()


def number_at(place: str, offset: int, number: int) -> Callable[[memoryview, dict[str, int]], None]:
    def write(whole: memoryview, at: dict[str, int]) -> None:
        struct.pack_into("<Q", whole, at[place] + offset, number)

    return write


def bytes_at(place: str, offset: int, data: bytes) -> Callable[[memoryview, dict[str, int]], None]:
    def write(whole: memoryview, at: dict[str, int]) -> None:
        whole[at[place] + offset : at[place] + offset + len(data)] = data

    return write


def long_event(whole: memoryview, at: dict[str, int]) -> None:
    """Queue one complete event, which is too long for the memory that the board reads it into."""
    struct.pack_into("<Q", whole, at["queue"] + 8, EVENT.size + EVENT_BANK)
    EVENT.pack_into(whole, at["queued events"], 5, IN_CREATE, 0, EVENT_BANK)


def many_merged(whole: memoryview, at: dict[str, int]) -> None:
    """Store more merged signals than the six notifications so far can have, and one that may be half stored."""
    for number in range(1, 8):
        whole[at["merged keys"] + KEY * number :][:2] = b"s%d" % number
        struct.pack_into("<Q", whole, at["merged numbers"] + 8 * number, 1)


INVALID = [
    (number_at("sequences", 16, 2**64 - 1), "a batch has an invalid sequence number"),
    (number_at("sequences", 40, 2**63), "a batch has an invalid sequence number"),
    (bytes_at("pending keys", 0, b"\xff"), r"a table has an invalid entry: b'\xffirst', 2"),
    (bytes_at("pending keys", KEY, b"first".ljust(KEY, b"\0")), "a table has an invalid entry: b'first', 1"),
    (number_at("pending numbers", 0, 2**41), f"a table has an invalid entry: b'first', {2**41}"),
    (number_at("watch numbers", 0, 2**31), f"a table has an invalid entry: {b'k' * 64!r}, {2**31}"),
    (number_at("queue", 8, 2**62), "the event queue has invalid positions"),
    (number_at("queue", 0, POSITION_MAX), None),
    (number_at("queue", 8, 40), "the event queue contains an incomplete event"),
    (number_at("queued events", 8, 2**63), "the event queue contains an incomplete event"),
    (bytes_at("queued events", 4, bytes(4)), "the event queue contains an incomplete event"),
    (long_event, "the event queue contains an event with too long a name"),
    (number_at("history", 3 * 8, 2**63), "the history contains invalid numbers"),
    (number_at("history", 2 * 8, 2**64 - 1), "the history contains invalid numbers"),
    (number_at("history", 6 * 8, 2**63), "the history contains invalid numbers"),
    (number_at("merged numbers", 0, 2**62), "the history contains invalid numbers"),
    (many_merged, "the history contains invalid numbers"),
    (number_at("ring", 96 + 16, 2), "the history contains an invalid notification"),
    (number_at("ring", 96, 2**64 - 1), "the history contains an invalid notification"),
    (bytes_at("ring", 96 + 24, b"\x80"), "the history contains an invalid notification"),
    (bytes_at("merged keys", 0, b"\n"), "a table has an invalid entry: "),
]


@pytest.mark.parametrize(("write", "reason"), INVALID)
def test_the_reason_is_logged_in_one_line(
    write: Callable[[memoryview, dict[str, int]], None], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = Inflight.open(changed(write))
    use(found)
    assert found.inherited is (reason is None)
    assert [REFUSED + reason in line for line in caplog.messages] == [True] if reason else caplog.messages == []
    found.close()


def test_the_status_does_not_depend_on_the_content_of_records() -> None:
    """Another process with a copy of the descriptor can write to the memory at any time."""
    memory = filled()
    recorder = Recorder(memory.recorder)
    since = recorder.status().since
    for place in ("notifications", "events"):
        memory.recorder[parts()[place] - BEFORE_RECORDER + 24 :][:8] = b"\xfe" * 8
    assert recorder.status().since == since
    memory.close()


def test_a_table_refuses_more_entries_than_the_next_process_can_use() -> None:
    memory = memoryview(bytearray(TABLE))
    table = NumberTable(memory)
    for number in range(1, 65536):
        table[b"%d" % number] = number
    with pytest.raises(OSError, match="more than 65535 entries in a table") as caught:
        table[b"another"] = 1
    assert str(refusal(caught.value, "/irq/x_trig")) == (
        "/irq/x_trig: more than 65535 entries in a table (configure fewer signals)"
    )
    table[b"1"] = 5
    found = NumberTable(memory)
    assert {key: found[key] for key in found} == {b"%d" % n: n for n in range(1, 65536)} | {b"1": 5}
    found[b"2"] = 0
    found[b"another"] = 1
    assert (len(found), found[b"another"]) == (65535, 1)


def test_a_full_table_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def write(whole: memoryview, at: dict[str, int]) -> None:
        for index in range(65536):
            struct.pack_into("<Q", whole, at["watches"] + index * KEY, index + 1)
            struct.pack_into("<Q", whole, at["watch numbers"] + index * 8, 1)

    found = Inflight.open(changed(write))
    assert not found.inherited
    assert REFUSED + "a table is full)" in caplog.text
    found.close()


def test_the_size_of_the_memory_cannot_change() -> None:
    memory = Inflight.open()
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    memory.close()


def unsealed() -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, MAGIC % FRAMES, 0)
    return fd


def sealed_for_writing(seal: int) -> int:
    fd = unsealed()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | seal)
    return fd


def read_only() -> int:
    fd = new_memory("read-only", SIZE, MAGIC % FRAMES)
    reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return reopened


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unsealed, "not a sealed memfd"),
        (read_only, "not writable"),
        (lambda: sealed_for_writing(fcntl.F_SEAL_WRITE), "not writable"),
        (lambda: sealed_for_writing(0x10), "not writable"),  # F_SEAL_FUTURE_WRITE
        (lambda: os.pipe()[0], "not a sealed memfd"),
        (lambda: os.open("/", os.O_RDONLY), "not a sealed memfd"),
        (lambda: new_memory("old", SIZE, b"inco-trio inflight 4"), "written by another version"),
        (lambda: new_memory("small", SIZE - PAGE, MAGIC % FRAMES), "written by another version"),
    ],
)
def test_another_file_is_replaced(make: Callable[[], int], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    held = make()
    found = Inflight.open(held)
    assert not found.inherited
    assert [f"{REFUSED}{reason})" in line for line in caplog.messages] == [True]
    found.close()


async def run_proxy(tmp_path: Path, store: Cupboard, name: str) -> None:
    """Run a proxy with a `unix:` link and the fd store `store`, and send a notification in each direction."""
    directory = tmp_path / "irq"
    signals = (Signal("first", IN, directory, "state"), Signal("second", OUT, directory, "trig"))
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as core1, trio.fail_after(HANG):
        await trio.Path(f"{tmp_path}/{name}.peer").unlink(missing_ok=True)
        await core1.bind(f"{tmp_path}/{name}.peer")
        config = Config(f"unix:{tmp_path}/{name},peer={tmp_path}/{name}.peer", signals)
        async with open_supervised(config, store) as proxy:
            # Wait for the frame of `second`, not for its event. The memory may contain millions of pending
            # notifications of `first`, and `events` discards events that are read too slowly.
            with proxy.events(signals=["first"]) as events:
                await core1.sendto(b"\xff" * 6 + bytes(6) + b"\x88\x00first", f"{tmp_path}/{name}")
                trigger(directory / "trig")
                await events.receive()
                while b"second" not in await core1.recv(FRAME_STEP):
                    pass
            assert proxy.status.signals


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(st.tuples(PLACES, st.integers(0, 96), SMALL | NUMBER), min_size=1, max_size=4))
def test_a_proxy_runs_with_mutated_memory(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[str, int, bytes]]
) -> None:
    def write(whole: memoryview, at: dict[str, int]) -> None:
        for place, offset, data in mutations:
            whole[at[place] + offset : at[place] + offset + len(data)] = data

    store = Cupboard({"inflight": changed(write)})
    trio.run(run_proxy, tmp_path_factory.mktemp("proxy"), store, "a")
    store.close()


def test_invalid_memory_is_not_inherited_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store = Cupboard({"inflight": changed(number_at("queue", 8, 40))})
    trio.run(run_proxy, tmp_path, store, "a")
    assert [REFUSED in line for line in caplog.messages].count(True) == 1
    assert "inflight" in store.stored
    caplog.clear()
    heir = store.heir()
    trio.run(run_proxy, tmp_path, heir, "a")
    assert REFUSED not in caplog.text
    assert "inflight" not in heir.stored
    heir.close()


@pytest.mark.parametrize("name", ["link", "inotify"])
def test_a_stored_descriptor_of_the_wrong_kind_is_reported(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Cupboard({name: os.open("/dev/null", os.O_RDWR)})
    trio.run(run_proxy, tmp_path, store, "a")
    assert f"fd store: the stored descriptor {name} is of the wrong kind: starting without it" in caplog.messages
    assert name in store.stored
    store.close()


def test_a_stored_inotify_descriptor_that_blocks_does_not_block_the_proxy(tmp_path: Path) -> None:
    inotify = Inotify()
    os.set_blocking(inotify.fd, True)
    store = Cupboard({"inotify": inotify.fd})
    trio.run(run_proxy, tmp_path, store, "a")
    assert "inotify" not in store.stored
    store.close()


def test_the_sender_of_a_link_that_is_replaced_cannot_delay_the_start(tmp_path: Path) -> None:
    """After shutdown(2), each read from a socket returns an empty datagram, as if a sender never stopped sending."""
    former = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    former.bind(f"{tmp_path}/former")
    former.shutdown(socket.SHUT_RD)
    store = Cupboard({"link": former.detach()})
    trio.run(run_proxy, tmp_path, store, "a")
    assert "link" in store.stored
    store.close()


def test_inotify_is_accepted_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inotify = Inotify()
    monkeypatch.setattr(Path, "readlink", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    store = Cupboard({"inotify": inotify.fd})
    trio.run(run_proxy, tmp_path, store, "a")
    assert "inotify" not in store.stored
    store.close()


NUMBERING = b"sent:0123456789abcdef:7"


@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        ([NUMBERING, b"written:0123456789abcdef", b"limit"], True),
        ([b"sent:xyz:7"], False),
        ([b"sent:0123456789abcdef"], False),
        ([b"written:0g"], False),
        ([b"other"], False),
    ],
)
def test_the_frame_numbers_of_a_bridge_are_checked(
    keys: list[bytes], valid: bool, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory.open(None)
    for key in keys:
        memory.numbers[key] = 3
    held = os.dup(memory.fd)
    memory.close()
    found = Memory.open(held)
    assert (found.fd == held) is valid
    assert [line.startswith("bridge: cannot use the stored frame numbers (") for line in caplog.messages] == [True] * (
        not valid
    )
    progress = Progress(found.numbers)
    progress.number(1)
    assert len(progress.boot) == 8
    found.close()
