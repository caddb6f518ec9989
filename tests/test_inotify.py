"""Tests of the decoder of inotify events, and of inotify descriptors and watches on the real kernel."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inco_trio.linux.inotify import (
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_IGNORED,
    IN_MODIFY,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    Event,
    Inotify,
    parse_events,
)

EVENTS_ROOM = 65536


def encoded(wd: int, mask: int, name: bytes = b"", cookie: int = 0, padding: int = 0) -> bytes:
    """Return the bytes of an event as the kernel writes them; at least one NUL follows the name."""
    padded = name + bytes(1 + padding) if name else b""
    return struct.pack("=iIII", wd, mask, cookie, len(padded)) + padded


CLOSED = encoded(1, IN_CLOSE_WRITE)
NAMED = encoded(2, IN_MOVED_TO, b"message_6_trig", cookie=7, padding=1)


@pytest.mark.parametrize(
    ("data", "events"),
    [
        pytest.param(b"", [], id="nothing"),
        pytest.param(CLOSED, [Event(1, IN_CLOSE_WRITE, b"")], id="one"),
        pytest.param(NAMED, [Event(2, IN_MOVED_TO, b"message_6_trig")], id="padded name"),
        pytest.param(
            CLOSED + NAMED + CLOSED,
            [Event(1, IN_CLOSE_WRITE, b""), Event(2, IN_MOVED_TO, b"message_6_trig"), Event(1, IN_CLOSE_WRITE, b"")],
            id="in order",
        ),
        pytest.param(encoded(-1, IN_Q_OVERFLOW), [Event(-1, IN_Q_OVERFLOW, b"")], id="overflow"),
        pytest.param(encoded(3, IN_CREATE, b"\xff\xfe"), [Event(3, IN_CREATE, b"\xff\xfe")], id="not UTF-8"),
        pytest.param(CLOSED + bytes(100), [Event(1, IN_CLOSE_WRITE, b"")], id="unused memory behind"),
        pytest.param(bytes(16) + CLOSED, [], id="unused memory in front"),
        pytest.param(CLOSED + CLOSED[:15], [Event(1, IN_CLOSE_WRITE, b"")], id="cut head"),
        pytest.param(CLOSED + NAMED[:-1], [Event(1, IN_CLOSE_WRITE, b"")], id="cut name"),
        pytest.param(NAMED[:16], [], id="name missing"),
    ],
)
def test_events_are_decoded(data: bytes, events: list[Event]) -> None:
    assert parse_events(data) == events
    assert parse_events(memoryview(data)) == events


names = st.binary(max_size=255).map(lambda name: name.replace(b"\0", b"").replace(b"/", b""))
events_of_kernel = st.builds(Event, st.integers(-1, 2**31 - 1), st.integers(1, 2**32 - 1), names)


@given(st.lists(st.tuples(events_of_kernel, st.integers(0, 15))), st.integers(0, 64))
def test_encoded_events_are_decoded_back(generated: list[tuple[Event, int]], unused: int) -> None:
    data = b"".join(encoded(*event, padding=padding) for event, padding in generated)
    assert parse_events(data + bytes(unused)) == [event for event, _ in generated]


@given(st.lists(events_of_kernel, min_size=1), st.data())
def test_truncated_data_gives_the_complete_events(generated: list[Event], data: st.DataObject) -> None:
    whole = b"".join(encoded(*event) for event in generated[:-1])
    last = encoded(*generated[-1])
    cut = data.draw(st.integers(0, len(last) - 1))
    assert parse_events(whole + last[:cut]) == generated[:-1]


@given(st.binary(max_size=2000))
def test_any_bytes_are_decoded_without_error(data: bytes) -> None:
    events = parse_events(data)
    assert all(event.mask for event in events)
    assert sum(16 + len(event.name) for event in events) <= len(data)


@pytest.fixture
def inotify() -> Iterator[Inotify]:
    made = Inotify()
    yield made
    made.close()


def read(inotify: Inotify) -> list[Event]:
    buffer = memoryview(bytearray(EVENTS_ROOM))
    return parse_events(buffer[: inotify.read_into(buffer)])


def test_descriptor_is_nonblocking_and_not_inheritable(inotify: Inotify) -> None:
    assert not os.get_blocking(inotify.fd)
    assert not os.get_inheritable(inotify.fd)
    assert inotify.read_into(memoryview(bytearray(EVENTS_ROOM))) == 0


def test_a_write_between_two_closes_prevents_merging(inotify: Inotify, tmp_path: Path) -> None:
    file = tmp_path / "trig"
    file.touch()
    wd = inotify.watch(str(file), IN_CLOSE_WRITE | IN_MODIFY)
    for _ in range(1000):
        file.write_text("1")
    assert read(inotify).count(Event(wd, IN_CLOSE_WRITE, b"")) == 1000


def test_events_that_do_not_fit_stay_queued(inotify: Inotify, tmp_path: Path) -> None:
    wd = inotify.watch(str(tmp_path), IN_CREATE)
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    buffer = memoryview(bytearray(40))
    assert parse_events(buffer[: inotify.read_into(buffer)]) == [Event(wd, IN_CREATE, b"a")]
    assert parse_events(buffer[: inotify.read_into(buffer)]) == [Event(wd, IN_CREATE, b"b")]


def test_one_file_has_one_watch(inotify: Inotify, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    (tmp_path / "b").hardlink_to(file)
    assert inotify.watch(str(file), IN_MODIFY) == inotify.watch(str(tmp_path / "b"), IN_MODIFY)


def test_names_that_are_not_utf8_can_be_watched(inotify: Inotify, tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/\xff"
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
    wd = inotify.watch(os.fsdecode(file), IN_CLOSE_WRITE)
    os.close(os.open(file, os.O_WRONLY))
    assert read(inotify) == [Event(wd, IN_CLOSE_WRITE, b"")]


def test_a_failed_watch_names_its_path(inotify: Inotify, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        inotify.watch(missing, IN_MODIFY)
    assert caught.value.filename == missing


def test_unwatched_files_give_no_events(inotify: Inotify, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    wd = inotify.watch(str(file), IN_CLOSE_WRITE)
    inotify.unwatch(wd)
    file.write_text("1")
    assert read(inotify) == [Event(wd, IN_IGNORED, b"")]


def test_unwatching_a_removed_file_is_harmless(inotify: Inotify, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    wd = inotify.watch(str(file), IN_CLOSE_WRITE)
    file.unlink()
    inotify.unwatch(wd)
    inotify.unwatch(wd)
    assert read(inotify) == [Event(wd, IN_IGNORED, b"")]


def test_forgetting_keeps_the_kernel_watch(inotify: Inotify, tmp_path: Path) -> None:
    wd = inotify.watch(str(tmp_path), IN_CREATE)
    inotify.forget(wd)
    inotify.forget(wd)
    # forget() only removes the entry in pyinotify's manager; the kernel's watch can still be removed by number.
    inotify.unwatch(wd)
    assert read(inotify) == [Event(wd, IN_IGNORED, b"")]


def test_a_successor_inherits_watches_and_queue(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    predecessor = Inotify()
    wd = predecessor.watch(str(file), IN_CLOSE_WRITE)
    successor = Inotify(os.dup(predecessor.fd))
    predecessor.close()
    file.write_text("1")
    assert successor.watch(str(file), IN_CLOSE_WRITE) == wd
    assert read(successor) == [Event(wd, IN_CLOSE_WRITE, b"")]
    successor.close()


def test_inherited_watches_can_be_removed(inotify: Inotify, tmp_path: Path) -> None:
    wd = inotify.watch(str(tmp_path), IN_CREATE)
    successor = Inotify(os.dup(inotify.fd))
    successor.unwatch(wd)
    assert read(successor) == [Event(wd, IN_IGNORED, b"")]
    successor.close()


def test_too_many_open_files_is_an_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            Inotify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.filename == "inotify"


@pytest.mark.netns
@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("instances", "inotify: Too many open files"),
        ("watches", "/: the limit of inotify watches is reached: raise fs.inotify.max_user_watches"),
    ],
)
def test_error_names_the_inotify_limit(limit: str, reason: str) -> None:
    script = f"""
from pathlib import Path
from inco_trio.linux.inotify import IN_CREATE, Inotify
from inco_trio.simulation.world import new_user_namespace

new_user_namespace()
Path("/proc/sys/user/max_inotify_{limit}").write_text("0")
try:
    Inotify().watch("/", IN_CREATE)
except OSError as error:
    print(f"{{error.filename}}: {{error.strerror}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [reason]
