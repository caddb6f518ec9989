"""Tests of the log in text and JSON format."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
import trio
import trio.testing

from inco_trio.problems import Problems, report, working_for
from inco_trio.service.log import _Lines, log_statistics, needs_timestamps, set_up_logging
from inco_trio.service.throttle import PERIOD, Throttle
from netns.hang import HANG

logger = logging.getLogger("inco_trio.somewhere")


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Restore the package's logger after the test."""
    package = logging.getLogger("inco_trio")
    before = package.handlers, package.propagate, package.level
    yield
    for handler in package.handlers:
        handler.flush()  # Print held lines now, not in the output of the next test.
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


def test_text_lines_name_level_and_message(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False)
    logger.warning("%s: is gone", "rpmsg4000")
    logger.debug("unheard")
    log_statistics({"received": 2, "sent": 0})
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "inco-trio: warning: rpmsg4000: is gone",
        "inco-trio: info: statistics: received=2 sent=0",
    ]


def test_timestamps_are_added_unless_the_supervisor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    with contextlib.ExitStack() as stack:
        pair = (*os.pipe(), *pty.openpty(), os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY), os.open(os.devnull, 1))
        for fd in pair:
            stack.callback(os.close, fd)
        _, pipe, _, terminal, file, null = pair
        # Programs written for Node.js give their children sockets as standard streams.
        sock = stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
        targets = (pipe, terminal, file, sock, null)
        assert [needs_timestamps("auto", fd) for fd in targets] == [True, True, True, True, False]
        # The logger of an s6 service adds timestamps, but a terminal, a file or a socket does not.
        s6 = [needs_timestamps("auto", fd, is_s6_service=True) for fd in targets]
        assert s6 == [False, True, True, True, False]
        status = os.fstat(pipe)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert [needs_timestamps("auto", fd) for fd in (pipe, file)] == [False, True]
        assert needs_timestamps("always", pipe)
        assert not needs_timestamps("never", file)
    assert not needs_timestamps("auto", -1)


def test_stamped_lines_start_with_the_local_time(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False, stamped=True)
    logger.warning("%s: is gone", "rpmsg4000")
    line = capfd.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} inco-trio: warning: rpmsg4000: is gone\n", line)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_journal_gets_priorities(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    found = os.fstat(theirs)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    set_up_logging(log_format, verbose=True, fd=theirs)
    logger.error("one")
    logger.warning("two")
    logger.info("three")
    logger.debug("four")
    logger.error("five", exc_info=ValueError("six"))
    os.close(theirs)
    with open(ours) as lines:  # noqa: PTH123 - a file descriptor
        said = lines.read().splitlines()
    assert [line[:3] for line in said[:4]] == ["<3>", "<4>", "<6>", "<7>"]
    assert {line[:3] for line in said[4:]} == {"<3>"}
    assert len(said) == 5 if log_format == "json" else len(said) == 6


@pytest.mark.parametrize("value", ["", "1:2", "x", None])
def test_another_stream_has_no_priorities(
    value: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", value or "")
    if value is None:
        monkeypatch.delenv("JOURNAL_STREAM")
    set_up_logging("text", verbose=False)
    logger.warning("two")
    assert capfd.readouterr().err == "inco-trio: warning: two\n"


def test_the_same_cause_is_logged_once_per_second(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False)
    for number in range(5):
        logger.warning("%s: %d frames dropped", "rpmsg4000", number)
        logger.warning("%s: %d frames dropped", "rpmsg4001", number)
        logger.info("reloaded")
    (handler,) = logging.getLogger("inco_trio").handlers
    before = capfd.readouterr().err.splitlines()
    handler.flush()
    assert before == [
        "inco-trio: warning: rpmsg4000: 0 frames dropped",
        "inco-trio: warning: rpmsg4001: 0 frames dropped",
        *["inco-trio: info: reloaded"] * 5,
    ]
    assert capfd.readouterr().err.splitlines() == [
        "inco-trio: warning: rpmsg4000: 4 frames dropped (3 similar lines omitted)",
        "inco-trio: warning: rpmsg4001: 4 frames dropped (3 similar lines omitted)",
    ]


def read_lines(write_held: Callable[[], Awaitable[None]], fd: int, number: int) -> list[str]:
    """Run the task that writes held lines until it has written `number` lines to the pipe `fd`. Return them."""

    async def read(lines: TextIO) -> list[str]:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_held)
                read = [await trio.to_thread.run_sync(lines.readline) for _ in range(number)]
                nursery.cancel_scope.cancel()
        return read

    with open(fd) as lines:
        return trio.run(read, lines)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_omitted_lines_are_summarized_after_a_second(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    monkeypatch.setattr("inco_trio.service.throttle.PERIOD", 0.5)
    ours, theirs = os.pipe()
    write_held = set_up_logging(log_format, verbose=False, fd=theirs)
    # The summary prints the last line for each cause, so that the log ends with the current state.
    for _ in range(2):
        logger.warning("down")
        logger.info("up", extra={"cause": "works"})
    said = read_lines(write_held, ours, 4)
    os.close(theirs)
    assert [("down" in line, "up" in line) for line in said] == [(True, False), (False, True)] * 2


def test_a_line_of_another_thread_is_held_without_a_further_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that starts before the process drops its privileges keeps them, as do the threads that it starts."""
    monkeypatch.setattr("inco_trio.service.throttle.PERIOD", 0.1)
    ours, theirs = os.pipe()
    write_held = set_up_logging("text", verbose=False, fd=theirs)

    def log() -> int:
        before = threading.active_count()
        for _ in range(3):
            logger.warning("down")
        return threading.active_count() - before

    async def run() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_held)
            await trio.testing.wait_all_tasks_blocked()
            started = await trio.to_thread.run_sync(log)
            with trio.fail_after(HANG):
                await trio.lowlevel.wait_readable(ours)
                read = b""
                while b"(1 similar" not in read:
                    await trio.lowlevel.wait_readable(ours)
                    read += os.read(ours, 4096)
            nursery.cancel_scope.cancel()
        return started

    assert trio.run(run) == 0
    logger.warning("down")  # The task has ended, so the lines wait for the end of the process.
    logger.warning("down")
    os.close(ours)
    os.close(theirs)


def test_json_has_the_number_of_omitted_lines(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("json", verbose=False)
    for _ in range(3):
        logger.error("down")
    (handler,) = logging.getLogger("inco_trio").handlers
    handler.flush()
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(entry["message"], entry.get("left_out")) for entry in entries] == [("down", None), ("down", 1)]


def test_json_lines_have_time_level_event_and_message(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("json", verbose=True)
    logger.debug('"quoted"\nand more')
    logger.info("ready", extra={"event": "ready"})
    log_statistics({"received": 2, "sent": 0})
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    times = [entry.pop("time") for entry in entries]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert entries == [
        {"level": "debug", "event": "message", "message": '"quoted"\nand more'},
        {"level": "info", "event": "ready", "message": "ready"},
        {
            "level": "info",
            "event": "statistics",
            "message": "statistics: received=2 sent=0",
            "received": 2,
            "sent": 0,
        },
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("char", ["x", "\x1b", "\N{SNOWMAN}", "\U0001f600", "\ud800"])
def test_the_middle_of_a_long_line_is_omitted(log_format: str, char: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The logger of s6 splits lines of more than 8192 bytes: the next line would begin with text of others."""
    set_up_logging(log_format, verbose=False)
    with working_for("b" * 64):
        logger.warning("%s: cannot be read: %s", char * 100_000, "Permission denied")
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert len(line.encode()) <= 8192
    assert "bytes omitted) ..." in line
    assert "cannot be read: Permission denied" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_keeps_its_traceback(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(log_format, verbose=False)
    try:
        int("no number")
    except ValueError:
        logger.exception("internal error")
    said = capfd.readouterr().err
    if log_format == "json":
        (line,) = said.splitlines()
        said = json.loads(line)["traceback"]
    assert "Traceback" in said
    assert said.rstrip().endswith("ValueError: invalid literal for int() with base 10: 'no number'")


def test_a_second_set_up_replaces_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=True)
    set_up_logging("text", verbose=False)
    logger.debug("unheard")
    logger.info("once")
    assert capfd.readouterr().err == "inco-trio: info: once\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Yield a full pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b".")
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def drain(reader: int) -> bytes:
    os.set_blocking(reader, False)
    read = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            read += os.read(reader, 65536)
    return read.lstrip(b".")


def test_lost_lines_are_counted_in_the_next_written_line(
    pipe: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = pipe
    set_up_logging("text", verbose=False, fd=writer)
    for number in range(3):
        logger.info("lost %d", number)
    assert capfd.readouterr().err == "inco-trio: warning: log lines are lost: the reader is too slow\n"
    assert drain(reader) == b""
    logger.info("heard")
    logger.info("and this")
    assert drain(reader).decode().splitlines() == [
        "inco-trio: warning: log lines lost before this line: 3",
        "inco-trio: info: heard",
        "inco-trio: info: and this",
    ]


def test_a_partial_line_is_ended_before_the_next_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    set_up_logging("text", verbose=False, fd=writer)
    # Make room for one page (4 KiB). The line is longer than that.
    os.read(reader, 4096)
    logger.info("x" * 10000)
    torn = drain(reader)
    assert torn.startswith(b"inco-trio: info: xxx")
    assert not torn.endswith(b"\n")
    logger.info("heard")
    assert drain(reader) == b"\ninco-trio: warning: log lines lost before this line: 1\ninco-trio: info: heard\n"


@pytest.mark.parametrize(("place", "reason"), [("full", "No space left on device"), ("closed", "Bad file descriptor")])
def test_an_unwritable_log_is_reported_once(place: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    if place == "closed":
        os.close(fd)
    set_up_logging("json", verbose=False, fd=fd)
    logger.info("one")
    logger.info("two")
    assert capfd.readouterr().err == f"inco-trio: warning: log lines are lost: {reason}\n"
    if place == "full":
        os.close(fd)


def test_a_full_standard_error_is_not_reported_to_itself(capfd: pytest.CaptureFixture[str]) -> None:
    saved, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        set_up_logging("text", verbose=False)
        logger.info("lost")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(full)
    logger.info("heard")
    assert capfd.readouterr().err.splitlines() == [
        "inco-trio: warning: log lines lost before this line: 1",
        "inco-trio: info: heard",
    ]


def test_a_wrong_log_call_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False)
    logger.info("%d", "no number")
    assert "--- Logging error ---" in capfd.readouterr().err


def test_a_surrogate_is_logged_as_an_escape(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False)
    logger.info("/dev/\udcff")
    assert capfd.readouterr().err == "inco-trio: info: /dev/\\udcff\n"


def test_a_cause_is_forgotten_after_its_period() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    record = logging.LogRecord("x", logging.WARNING, __file__, 0, "down", None, None)
    assert [throttle.admit("", cause, record) for cause in "aba"] == [True, True, False]
    now = PERIOD
    written: list[logging.LogRecord] = []
    throttle.release(written.append)
    assert written == [record]
    assert [throttle.admit("", cause, record) for cause in "ba"] == [True, False]
    throttle.release(written.append)
    now = 3 * PERIOD
    throttle.admit("", "c", record)
    assert list(throttle._boards[""]) == ["c"]


def test_many_causes_of_one_board_wait(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.service.throttle.CAUSES_MAX", 60)
    now = 0.0
    set_up_logging("text", verbose=False)
    (handler,) = logging.getLogger("inco_trio").handlers
    assert isinstance(handler, _Lines)
    monkeypatch.setattr(handler, "_throttle", Throttle(lambda: now))
    for number in range(100):
        logger.warning("register %s", f"r{number}")
    with working_for("b1"):
        logger.warning("another board")

    def lines() -> list[str]:
        return [line.removeprefix("inco-trio: warning: ") for line in capfd.readouterr().err.splitlines()]

    assert lines() == [*(f"register r{number}" for number in range(20)), "b1: another board"]
    for second in (1, 2):
        now = second * PERIOD
        handler._release()
        left = [f"register r{number}" for number in range(20 * second, 20 * second + 20)]
        if second == 2:
            left[-1] += " (40 similar lines omitted)"
        assert lines() == left
    logger.warning("register %s", "r0")
    assert lines() == []  # 20 lines have already been written in this second.
    handler.flush()
    assert lines() == ["register r0"]


def test_no_line_overtakes_a_held_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    set_up_logging("text", verbose=False)
    (handler,) = logging.getLogger("inco_trio").handlers
    assert isinstance(handler, _Lines)
    monkeypatch.setattr(handler, "_throttle", Throttle(lambda: now))
    problems = Problems()

    def lines() -> list[str]:
        return [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()]

    failed, works = "warning: /f: cannot write", "info: /f: works again"
    omitted = " (1 similar lines omitted)"
    for _ in range(3):
        problems.failed("/f", "cannot write")
        problems.well("/f")
    assert lines() == [failed, works]
    now = PERIOD
    handler._release()
    assert lines() == [failed + omitted, works + omitted]
    # The second problem line is held, because the first one was logged less than a period ago. All later lines
    # about the file must then be held as well.
    now = 3 * PERIOD
    problems.failed("/f", "cannot write")
    problems.failed("/f", "cannot open")
    problems.well("/f")
    # Different keys can belong to the same file.
    problems.failed(("/f", "states"), "missing", "/f")
    with working_for("b1"):
        logger.warning("another board")
    assert lines() == [failed, "warning: b1: another board"]
    now = 3.5 * PERIOD
    problems.failed("/f", "cannot write")
    now = 4 * PERIOD
    handler._release()
    assert lines() == [works, "warning: /f: missing", failed + omitted]


def test_a_held_line_is_written_after_further_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.service.throttle.PERIOD", 0.1)
    monkeypatch.setattr("inco_trio.service.throttle.LINES_MAX", 1)
    ours, theirs = os.pipe()
    write_held = set_up_logging("text", verbose=False, fd=theirs)
    for name in "abc":
        logger.warning("register %s", name)
    assert [line[-2] for line in read_lines(write_held, ours, 3)] == ["a", "b", "c"]
    os.close(theirs)


@pytest.mark.parametrize(
    "say",
    [
        lambda number: Problems().failed("x", f"cannot open /home/app/{number}"),
        lambda number: Problems().failed(number, f"refused user {number}", "control", cause="refused"),
        lambda number: report(logger, logging.WARNING, f"the link went down after {number} s", cause="down"),
        lambda number: report(logger, logging.INFO, f"the link came up after {number} s", cause="up"),
    ],
    ids=["problem", "user", "down", "up"],
)
def test_texts_that_others_vary_have_the_same_cause(
    say: Callable[[int], None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a slow machine, the last line would be logged after the period.
    monkeypatch.setattr("inco_trio.service.throttle.PERIOD", HANG)
    set_up_logging("text", verbose=False)
    for number in range(100):
        say(number)
    assert len(capfd.readouterr().err.splitlines()) == 1
