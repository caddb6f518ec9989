"""Tests of write_at_once: how many bytes it writes, and when it writes only some of them."""

from __future__ import annotations

import fcntl
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from inco_trio.service.lines import PIECE, write_at_once


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Yield a pipe whose buffer holds 4 * PIECE bytes."""
    reader, writer = os.pipe()
    assert fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4 * PIECE) == 4 * PIECE
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_all_is_written_if_it_fits(pipe: tuple[int, int], tmp_path: Path) -> None:
    reader, writer = pipe
    data = os.urandom(4 * PIECE)
    assert write_at_once(writer, data) == (len(data), None)
    assert os.read(reader, 5 * PIECE) == data
    with (tmp_path / "file").open("wb") as file:
        assert write_at_once(file.fileno(), data) == (len(data), None)
    assert (tmp_path / "file").read_bytes() == data


def test_writing_nothing_succeeds() -> None:
    assert write_at_once(-1, b"") == (0, None)


@pytest.mark.parametrize("patience_ms", [0, 1])
def test_a_full_pipe_gets_what_fits(pipe: tuple[int, int], patience_ms: int) -> None:
    reader, writer = pipe
    data = os.urandom(5 * PIECE)
    assert write_at_once(writer, data, patience_ms) == (4 * PIECE, "the reader is too slow")
    assert os.read(reader, 5 * PIECE) == data[: 4 * PIECE]
    assert write_at_once(writer, b"next") == (4, None)


def test_the_writer_waits_for_a_slow_reader(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    data = os.urandom(8 * PIECE)
    read = bytearray()

    def read_all() -> None:
        while len(read) < len(data):
            read.extend(os.read(reader, PIECE))

    thread = threading.Thread(target=read_all)
    thread.start()
    written = write_at_once(writer, data, patience_ms=20_000)
    thread.join()
    assert (written, bytes(read)) == ((len(data), None), data)


def test_a_closed_pipe_is_reported() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert write_at_once(writer, b"x", 1000) == (0, "Broken pipe")
    os.close(writer)
    assert write_at_once(writer, b"x", 1000) == (0, "Bad file descriptor")


def test_a_full_device_is_reported() -> None:
    with Path("/dev/full").open("wb") as full:
        assert write_at_once(full.fileno(), b"x", 1000) == (0, "No space left on device")


def test_writing_needs_no_new_descriptor(pipe: tuple[int, int]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        written = write_at_once(pipe[1], b"x", 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert written == (1, None)
