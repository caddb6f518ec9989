"""Tests of the test bench: boards on which a test acts as both cores."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import freezegun
import pytest
import trio

from inco_trio.capture.recording import Entry, Mark, open_recording
from inco_trio.errors import (
    ClosedError,
    ConfigError,
    IncoError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceError,
)
from inco_trio.frame import decode, encode
from inco_trio.signals import Direction, SignalTable
from inco_trio.simulation.world import Namespace
from inco_trio.testing import Board, GuestError, Happening, NotificationMissingError, ProxyDiedError, open_board
from inco_trio.testing.board import _converting_errors
from inco_trio.testing.engine import Engine
from inco_trio.testing.faults import LATE, FrameFaults
from inco_trio.testing.happenings import History
from inco_trio.testing.layout import make_layout
from inco_trio.testing.report import side_by_side
from netns.hang import HANG
from tests.support_control import no_threads
from tests.support_proxy import thread_count

RESET, HWWD, NOTIFY = "ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_irq"
FRAME = encode(RESET.encode(), bytes(6))
T = TypeVar("T")
UDRV = {
    "file": {"ihub-irq-dev": {"path": "/nowhere/dev"}, "eps": {"path": "/nowhere/eps"}, "bus": {"kind": "spi"}},
    "misc": {"inco_proxy": {"signals": {"eps_irq": {"direction": "inbound", "reg": "eps.state"}}}},
}
UDRV_BEFORE = copy.deepcopy(UDRV)


def test_no_fault_by_default() -> None:
    assert FrameFaults().fates(FRAME) == [(0.0, FRAME, "")]


def test_each_fault_changes_a_frame() -> None:
    assert FrameFaults(drop=1).fates(FRAME) == [(0.0, b"", "dropped")]
    assert FrameFaults(double=1).fates(FRAME) == [(0.0, FRAME, ""), (0.0, FRAME, "duplicated")]
    assert FrameFaults(reorder=1, delay=2).fates(FRAME) == [(2 + LATE, FRAME, "reordered")]
    assert FrameFaults(corrupt=1).fates(b"") == [(0.0, b"", "")]
    for seed in range(50):
        ((late, frame, what),) = FrameFaults(corrupt=1, seed=seed).fates(FRAME)
        turned = [a ^ b for a, b in zip(frame, FRAME, strict=True)]
        assert (late, what, sum(each.bit_count() for each in turned)) == (0.0, "corrupted", 1)


def test_a_seed_repeats_the_faults() -> None:
    def fates(**options: float) -> list[list[tuple[float, bytes, str]]]:
        faults = FrameFaults(**options)  # type: ignore[arg-type]
        return [faults.fates(FRAME) for _ in range(1000)]

    assert fates(drop=0.3, corrupt=0.1, seed=4) == fates(drop=0.3, corrupt=0.1, seed=4)
    assert fates(drop=0.3, seed=4) != fates(drop=0.3, seed=5)
    assert 250 < sum(each == [(0.0, b"", "dropped")] for each in fates(drop=0.3)) < 350
    doubled = [len(each) == 2 for each in fates(double=0.2)]
    assert doubled == [len(each) == 2 for each in fates(double=0.2, corrupt=0.5)], "one rate affects another fault"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": 1.5}, "drop=1.5: expected a rate from 0 to 1"),
        ({"corrupt": float("nan")}, "corrupt=nan: expected a rate"),
        ({"delay": -1}, "delay=-1: expected a number of seconds, 0 or more"),
        ({"delay": float("inf")}, "delay=inf: expected a number of seconds"),
    ],
)
def test_invalid_fault_rates_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        FrameFaults(**options)  # type: ignore[arg-type]


def test_each_notification_is_returned_once() -> None:
    history = History()
    for core, name in ((0, RESET), (1, RESET), (0, HWWD), (0, RESET)):
        history.add(core, "gets", name)
    first, second = history.wait(0, RESET, 0), history.wait(0, RESET, 0)
    assert [each.name for each in history.all(0)] == [RESET, HWWD, RESET]
    assert history.all(0)[::2] == [first, second]
    with pytest.raises(
        NotificationMissingError,
        match=f"{RESET}: did not arrive at core 0 within 0 s; events at this core: gets {RESET}, g",
    ):
        history.wait(0, RESET, 0)
    with pytest.raises(
        NotificationMissingError,
        match=f"{HWWD}: did not arrive at core 1 within 0 s; events at this core: gets {RESET}$",
    ):
        history.wait(1, HWWD, 0)
    with pytest.raises(NotificationMissingError, match=r"events at this core: nothing$"):
        History().wait(1, HWWD, 0)


def run(library: str, function: Callable[..., Coroutine[object, object, T]], *args: object) -> T:
    """Run an async function with `library` ("trio" or "asyncio") and return its result."""
    return trio.run(function, *args) if library == "trio" else asyncio.run(function(*args))


def _add_later(history: History, act: Callable[[], None]) -> threading.Thread:
    def wait_and_act() -> None:
        while not history._listeners:
            time.sleep(0)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.parametrize("loop", ["none", "trio", "asyncio"])
@pytest.mark.parametrize("fails", [False, True])
def test_wait_returns_or_fails_with_the_history(loop: str, fails: bool) -> None:
    history = History()

    def act() -> None:
        history.add(0, "gets", RESET)
        if fails:
            history.fail("it broke")
        else:
            history.add(1, "gets", HWWD)

    thread = _add_later(history, act)

    def wait() -> Happening:
        if loop == "none":
            return history.wait(1, HWWD, HANG)
        return run(loop, history.wait_async, 1, HWWD, HANG)

    if fails:
        with pytest.raises(NotificationMissingError, match=r"\(it broke\)"):
            wait()
    else:
        assert wait() == history.all(1)[0]
    thread.join()
    assert not history._listeners


@pytest.mark.parametrize("library", ["trio", "asyncio"])
def test_wait_async_times_out(library: str) -> None:
    history = History()
    with pytest.raises(NotificationMissingError, match=r"within 0.01 s"):
        run(library, history.wait_async, 0, RESET, 0.01)
    assert not history._listeners


def test_a_loop_that_has_ended_is_not_woken() -> None:
    history = History()
    bells = []

    async def leave() -> None:
        from inco_trio.testing.happenings import _bell

        ring, _ = _bell()
        bells.append(ring)

    trio.run(leave)
    asyncio.run(leave())
    for bell in bells:
        bell()
    history.add(0, "gets", RESET)


def test_devices_get_directories_of_the_board(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "board", UDRV, {"door_irq": "inbound", "lamp_irq": "outbound"})
    paths = {signal.name: str(signal.path.relative_to(tmp_path)) for signal in layout.signals}
    assert paths == {
        RESET: "board/registers/ihub-irq-dev/message_4_state",
        HWWD: "board/registers/ihub-irq-dev/message_5_state",
        NOTIFY: "board/registers/ihub-irq-dev/message_6_trig",
        "eps_irq": "board/registers/eps/state",
        "door_irq": "board/registers/ihub-irq-dev/door_irq_state",
        "lamp_irq": "board/registers/ihub-irq-dev/lamp_irq_trig",
    }
    assert UDRV == UDRV_BEFORE
    file = tmp_path / "own.json"
    file.write_text(json.dumps(UDRV))
    assert [signal.name for signal in make_layout(tmp_path / "b", file, None).signals] == [
        RESET,
        HWWD,
        NOTIFY,
        "eps_irq",
    ]


@pytest.mark.parametrize(
    ("config", "signals", "said"),
    [
        (None, {"x": "up"}, "signals: x: direction='up': expected 'inbound' or 'outbound'"),
        (None, {"two words": "inbound"}, "signals: misc.inco_proxy.signals"),
        ({"file": []}, None, "file: expected an object"),
        ("/nowhere/udrv.json", None, "/nowhere/udrv.json: cannot be read: No such file or directory"),
    ],
)
def test_invalid_boards_are_refused(
    tmp_path: Path, config: dict[str, object] | str | None, signals: dict[str, str] | None, said: str
) -> None:
    with pytest.raises((InvalidArgumentError, ConfigError), match=said):
        make_layout(tmp_path, config, signals)


def test_a_board_with_a_long_path_keeps_its_sockets_elsewhere(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / ("x" * 100), None, None)
    assert layout.sockets.is_dir()
    assert len(str(layout.socket("control.sock"))) < 100
    layout.remove()
    assert not layout.sockets.exists()
    assert layout.directory.is_dir()


def test_unknown_signals_are_refused(tmp_path: Path) -> None:
    layout = make_layout(tmp_path, None, None)
    with pytest.raises(
        InvalidArgumentError, match=f"^x: not a signal of this board .expected one of: {RESET}, {HWWD}, {NOTIFY}.$"
    ):
        layout.signal("x")
    with pytest.raises(
        InvalidArgumentError, match=f"{RESET}: not an outbound signal of this board .expected one of: {NOTIFY}.$"
    ):
        layout.signal(RESET, Direction.OUTBOUND)


@pytest.mark.parametrize(
    ("config", "signals", "complaint"),
    [
        (3, None, "config=3: expected the path of a udrv.json, or a dict"),
        (None, ["a"], r"signals=\['a'\]: expected a dict from wire names"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(tmp_path: Path, config: Any, signals: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        make_layout(tmp_path, config, signals)


def test_both_cores_are_shown_side_by_side() -> None:
    history = History()
    assert side_by_side(history.all()) == "nothing happened at either core"
    history.add(1, "sends", RESET)
    history.add(0, "gets", RESET)
    history.add(None, "the link is taken down")
    lines = side_by_side(history.all()).splitlines()
    assert lines[0].split() == ["seconds", "core", "0", "core", "1"]
    places = [line.index(word) for line, word in zip(lines[1:], ("sends", "gets", "-- the"), strict=True)]
    assert places == [lines[0].index("core 1"), lines[0].index("core 0"), lines[0].index("core 0")]
    for _ in range(150):
        history.add(1, "sends", RESET)
        history.add(1, "sends", HWWD)
    lines = side_by_side(history.all()).splitlines()
    assert (len(lines), lines[1].strip()) == (202, "(103 earlier events)")


def test_a_burst_is_shown_in_one_line() -> None:
    history = History()
    for what, name, count in (("sends", HWWD, 100), ("gets", NOTIFY, 3), ("gets", RESET, 4)):
        for _ in range(count):
            history.add(1, what, name)
    burst, *single, last = side_by_side(history.all()).splitlines()[1:]
    assert re.fullmatch(rf" +0\.000000 +sends {HWWD} \(100 times within \d+\.\d{{6}} s\)", burst)
    assert [line.split()[1:] for line in single] == [["gets", NOTIFY]] * 3
    assert f"gets {RESET} (4 times within " in last
    listed = f"sends {HWWD} (100 times), " + f"gets {NOTIFY}, " * 3 + f"gets {RESET} (4 times)"
    with pytest.raises(NotificationMissingError, match=f"events at this core: {re.escape(listed)}$"):
        history.wait(1, "another", 0)
    for _ in range(100):
        history.add(1, "sends", RESET)
        history.add(1, "sends", HWWD)
    assert side_by_side(history.all()).splitlines()[1].strip() == "(107 earlier events)"


@pytest.fixture(params=[False, True], ids=["process", "in process"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Board]:
    with open_board(tmp_path / "board", in_process=request.param) as made:
        yield made


@pytest.mark.tools
def test_notifications_pass_in_both_directions(board: Board) -> None:
    board.core1.send(HWWD)
    came = board.core0.expect(HWWD)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    assert (came.core, came.what, came.direction) == (0, "gets", Direction.INBOUND)
    assert (board.core0.count(HWWD), board.core0.count(NOTIFY), board.core1.count(NOTIFY)) == (1, 1, 1)
    assert [(each.core, each.what) for each in board.history] == [
        (1, "sends"),
        (0, "gets"),
        (0, "triggers"),
        (1, "gets"),
    ]
    stats = board.proxy.stats
    assert stats is not None
    assert (stats.delivered, stats.sent) == (1, 1)
    assert "works" not in board.proxy.log
    assert (board.proxy.pid is None) == board._plan.in_process


@pytest.mark.tools
def test_counts_are_current(board: Board) -> None:
    for number in range(1, 200):
        board.core0.trigger(NOTIFY)
        assert board.core0.count(NOTIFY) == number
    for _ in range(199):
        board.core1.expect(NOTIFY)
    assert board.core1.count(NOTIFY) == 199


@pytest.mark.tools
def test_appending_and_renaming_applications_are_seen(board: Board) -> None:
    trigger = board.core0.register(NOTIFY)
    with trigger.open("a"):
        pass  # opened and closed without a write
    board.core1.expect(NOTIFY)
    (trigger.parent / "new").write_text("1")
    (trigger.parent / "new").rename(trigger)
    board.core1.expect(NOTIFY)
    (trigger.parent / "foreign").write_text("1")
    trigger.read_text()
    assert (board.core0.count(NOTIFY), board.core1.count(NOTIFY)) == (2, 2)
    assert board.core0.environment["UDRV_JSON_PATH"] == str(board.core0.config)
    assert board.core0.directory == trigger.parent


@pytest.mark.tools
def test_a_killed_proxy_loses_nothing(tmp_path: Path) -> None:
    with open_board(tmp_path / "board") as board:
        for _ in range(3):
            board.proxy.kill()
            assert board.proxy.pid is None
            assert board.proxy.stats is None
            for _ in range(7):
                board.core1.send(RESET)
                board.core0.trigger(NOTIFY)
            board.proxy.start()
            for _ in range(7):
                board.core0.expect(RESET)
                board.core1.expect(NOTIFY)
        assert board.failure() is None
        with pytest.raises(InvalidArgumentError, match=r"the proxy is already running .PID \d+"):
            board.proxy.start()


def test_a_board_of_a_killed_test_program_can_be_reopened(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from inco_trio.testing import open_board
with open_board(Path(sys.argv[1])) as board:
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "board"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "board/notify").is_socket()
    with open_board(tmp_path / "board") as board:
        board.core1.send(HWWD)
        board.core0.expect(HWWD)


def test_a_second_board_in_the_directory_of_an_open_board_is_refused(board: Board) -> None:
    threads, rigs = thread_count(), len(board._engine.watch._all())
    for _ in range(2):
        with (
            pytest.raises(ResourceError, match=rf"^{re.escape(str(board.directory))}: .*in use by"),
            open_board(board.directory, in_process=board._plan.in_process),
        ):
            pass
    assert (thread_count(), len(board._engine.watch._all())) == (threads, rigs)
    board.core1.send(HWWD)
    board.core0.expect(HWWD)
    assert board.failure() is None


def test_a_board_that_cannot_be_opened_releases_its_socket(tmp_path: Path) -> None:
    (tmp_path / "registers").mkdir()
    (tmp_path / "registers/ihub-irq-dev").touch()
    with pytest.raises(ResourceError, match=r"registers/ihub-irq-dev: File exists$"), open_board(tmp_path):
        pass
    assert not (tmp_path / "notify").exists()
    (tmp_path / "notify").touch()
    with pytest.raises(ResourceError, match="in use by"), open_board(tmp_path):
        pass
    assert (tmp_path / "notify").is_file()
    with pytest.raises(ResourceError, match=r"^/proc/board: No such file or directory$"), open_board("/proc/board"):
        pass
    with pytest.raises(PermissionDeniedError, match=r"^x: denied$"), _converting_errors(tmp_path):
        raise PermissionDeniedError("x", "denied")


@pytest.mark.tools
def test_a_proxy_can_be_restarted(board: Board) -> None:
    board.proxy.restart()
    board.proxy.stop()
    board.proxy.stop()
    board.proxy.start()
    board.core1.send(RESET)
    board.core0.expect(RESET)
    if board._plan.in_process:
        with pytest.raises(InvalidArgumentError, match=r"cannot kill a proxy .* .omit --inco-trio-in-process"):
            board.proxy.kill()
        with pytest.raises(InvalidArgumentError, match="the proxy is already running"):
            board.proxy.start()


@pytest.mark.tools
def test_a_closed_board_raises_closed_error(tmp_path: Path) -> None:
    with open_board(tmp_path / "board", in_process=True) as board:
        pass
    uses: list[Callable[[], object]] = [
        lambda: board.core0.trigger(NOTIFY),
        lambda: board.core0.expect(RESET),
        lambda: board.core0.count(RESET),
        lambda: board.core1.history,
        lambda: board.core1.send(RESET),
        lambda: board.core1.send_frame(FRAME),
        board.proxy.start,
        board.proxy.stop,
        board.proxy.kill,
        board.proxy.restart,
        lambda: board.proxy.pid,
        lambda: board.proxy.log,
        lambda: board.proxy.stats,
        board.faults.frames,
        board.faults.link_down,
        board.faults.link_up,
        board.faults.replace_directory,
        lambda: board.history,
        lambda: board.report,
        lambda: board.record(tmp_path / "f"),
        board.failure,
        lambda: board.guest().__enter__(),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match=r"^the board is closed$"):
            use()
    for library in ("trio", "asyncio"):
        with pytest.raises(ClosedError, match=r"^the board is closed$"):
            run(library, board.core1.expect_async, NOTIFY)


def test_a_lack_of_threads_is_an_error(board: Board) -> None:
    for library in ("trio", "asyncio"):
        with no_threads(), pytest.raises(ResourceError, match=r"^expect_async: cannot start a thread: can't"):
            run(library, board.core1.expect_async, NOTIFY)
    with no_threads(), pytest.raises(ResourceError, match=r"^the boards under test: cannot start a thread: can't"):
        Engine()
    with no_threads(), pytest.raises(ResourceError, match=r"^a network namespace: cannot start a thread: can't"):
        Namespace()


@pytest.mark.tools
def test_the_link_goes_down_and_up(board: Board) -> None:
    for _ in range(3):
        board.faults.link_down()
        board.faults.link_down()
        board.core0.trigger(NOTIFY)
        board.core1.send(RESET)
        board.faults.link_up()
        board.faults.link_up()
        board.core1.expect(NOTIFY)
    board.core1.send(HWWD)
    board.core0.expect(HWWD)
    assert board.core0.count(RESET) == 0, "frames sent while the link is down must be lost"
    assert [each.name for each in board.history if each.what.startswith("lost")] == [RESET] * 3


@pytest.mark.tools
def test_a_replaced_directory_loses_nothing(board: Board) -> None:
    board.faults.replace_directory()
    board.core1.send(RESET)
    board.core0.expect(RESET)
    while not board.core0.register(NOTIFY).exists():
        time.sleep(0)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    assert (board.core0.count(RESET), board.core1.count(NOTIFY)) == (1, 1)


@pytest.mark.tools
def test_frame_faults_apply_by_direction(board: Board) -> None:
    board.faults.frames(double=1, direction=Direction.INBOUND)
    board.core1.send(RESET)
    board.core0.expect(RESET)
    board.core0.expect(RESET)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    board.faults.frames(drop=1, direction=Direction.OUTBOUND)
    board.core0.trigger(NOTIFY)
    while not (dropped := [each for each in board.history if each.what == "dropped on the link"]):
        pass
    board.faults.frames(delay=0.001)
    board.core0.trigger(NOTIFY)
    board.core1.send(RESET)
    board.core0.expect(RESET)
    board.core1.expect(NOTIFY)
    board.faults.frames()
    assert (board.core1.count(NOTIFY), [each.name for each in dropped]) == (2, [NOTIFY])
    with pytest.raises(InvalidArgumentError, match="double=2: expected a rate"):
        board.faults.frames(double=2)
    board.faults.frames(drop=1, direction="inbound")
    board.core1.send(HWWD)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    assert [each.name for each in board.history if each.what == "dropped on the link"][-1] == HWWD
    with pytest.raises(InvalidArgumentError, match="direction='in': expected 'inbound' or 'outbound'"):
        board.faults.frames(direction="in")


@pytest.mark.tools
def test_invalid_and_unknown_frames_can_be_sent(board: Board) -> None:
    board.core1.send_frame(b"\x01" * 20)
    board.core1.send_frame(encode(b"strange_irq", bytes(6)))
    board.core1.send(RESET)
    board.core0.expect(RESET)
    stats = board.proxy.stats
    assert stats is not None
    assert (stats.malformed, stats.unknown, stats.delivered) == (1, 1, 1)
    assert [f"{each.what} {each.name}" for each in board.core1.history] == [
        "sends a malformed frame ",
        "sends strange_irq",
        f"sends {RESET}",
    ]


@pytest.mark.tools
def test_invalid_arguments_are_refused(board: Board) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected one of: ihub_reset_irq, ihub_hwwd_irq\)$"):
        board.core1.send(NOTIFY)
    with pytest.raises(InvalidArgumentError, match=f"expected one of: {NOTIFY}.$"):
        board.core0.trigger(RESET)
    for use in (board.core0.count, board.core0.expect, board.core1.expect, board.core0.register):
        with pytest.raises(InvalidArgumentError, match=r"^x: not a signal of this board"):
            use("x")
    timeouts: list[Any] = [-1, math.nan, math.inf, "1"]
    for timeout in timeouts:
        with pytest.raises(InvalidArgumentError, match=f"timeout={timeout!r}: expected a number of seconds"):
            board.core0.expect(RESET, timeout)
    frame: Any = "text"
    with pytest.raises(InvalidArgumentError, match="frame: expected bytes, not str"):
        board.core1.send_frame(frame)
    with (
        pytest.raises(InvalidArgumentError, match="link='carrier pigeon': expected 'unix' or 'interface'"),
        open_board(board.directory, link="carrier pigeon"),
    ):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_of_the_bench_does_not_affect_later_boards(tmp_path: Path) -> None:
    def fault() -> None:
        raise ZeroDivisionError

    with (  # noqa: PT012
        pytest.raises(IncoError, match="all boards of this process are closed"),
        open_board(tmp_path / "a", in_process=True) as board,
    ):
        board._engine.soon(fault)
        board._engine._thread.join()
        with pytest.raises(IncoError, match="all boards of this process are closed"):
            board.core1.send(RESET)
    with open_board(tmp_path / "b", in_process=True) as board:
        board.core1.send(RESET)
        board.core0.expect(RESET)


@pytest.mark.tools
def test_a_proxy_that_dies_is_reported_once(tmp_path: Path) -> None:
    with open_board(tmp_path / "board") as board:
        assert board.proxy.pid is not None
        end = os.pidfd_open(board.proxy.pid)
        os.kill(board.proxy.pid, signal.SIGKILL)
        assert select.select([end], [], [], HANG)[0]
        os.close(end)
        failure = board.failure()
        assert failure is not None
        logged = r"the proxy has ended by itself, with exit code -9; it logged: [-\d]+ [:.\d]+ inco-trio: info:"
        assert re.match(logged, failure)
        assert board.failure() is None, "a failure must be reported only once"
        with pytest.raises(NotificationMissingError, match=r"did not arrive at core 0 \(the proxy has ended by itself"):
            board.core0.expect(RESET)
        board.proxy.start()
        board.core1.send(RESET)
        board.core0.expect(RESET)


@pytest.mark.tools
def test_a_proxy_that_cannot_start_raises_proxy_died_error(tmp_path: Path) -> None:
    (tmp_path / "board/registers/ihub-irq-dev/message_6_trig").mkdir(parents=True)
    for in_process in (False, True):
        with (
            pytest.raises(ProxyDiedError, match="message_6_trig"),
            open_board(tmp_path / "board", in_process=in_process),
        ):
            pass
    assert sorted(path.name for path in tmp_path.glob("board/*")) == ["proxy.log", "registers", "udrv.json"]


@pytest.mark.tools
def test_a_closed_board_leaves_no_process_and_no_socket(board: Board, tmp_path: Path) -> None:
    pid = board.proxy.pid
    board.close()
    board.close()
    left = sorted(path.name for path in (tmp_path / "board").iterdir())
    assert left == ["registers", "udrv.json"] if pid is None else ["proxy.log", "registers", "udrv.json"]
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.tools
def test_a_board_can_be_recorded(board: Board, tmp_path: Path) -> None:
    board.core1.send(RESET)
    board.core0.expect(RESET)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    board.core1.send_frame(b"\x01" * 20)
    board.faults.link_down()
    board.record(tmp_path / "f.pcapng")
    with open_recording(tmp_path / "f.pcapng", SignalTable(())) as recording:
        entries = list(recording)
    assert [(each.signal, each.direction) for each in entries if isinstance(each, Entry)] == [
        (RESET, Direction.INBOUND),
        (NOTIFY, Direction.OUTBOUND),
    ]
    assert [each.text for each in entries if isinstance(each, Mark)] == ["the link is taken down"]
    assert "received=2 delivered=1" in board.report


@pytest.mark.tools
@pytest.mark.parametrize("library", ["trio", "asyncio"])
def test_an_application_runs_in_the_loop_of_an_async_test(board: Board, library: str) -> None:
    async def application(sleep: Callable[[float], Awaitable[object]]) -> None:
        while not board.core0.register(HWWD).read_text():
            await sleep(0.001)  # Poll, as an application without inotify would.
        board.core0.trigger(NOTIFY)

    async def with_trio() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(application, trio.sleep)
            board.core1.send(HWWD)
            await board.core1.expect_async(NOTIFY)

    async def with_asyncio() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(application(asyncio.sleep))
            board.core1.send(HWWD)
            await board.core1.expect_async(NOTIFY)

    run(library, with_trio if library == "trio" else with_asyncio)
    assert board.core0.count(HWWD) == 1


@pytest.mark.tools
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.thorough)])
def test_many_boards_run_side_by_side(tmp_path: Path, count: int) -> None:
    with ExitStack() as stack:
        boards = [stack.enter_context(open_board(tmp_path / str(number), in_process=True)) for number in range(count)]
        for board in boards:
            board.core1.send(HWWD)
            board.core0.trigger(NOTIFY)
        for board in boards:
            board.core0.expect(HWWD)
            board.core1.expect(NOTIFY)
        assert {(board.core0.count(HWWD), board.core1.count(NOTIFY)) for board in boards} == {(1, 1)}


@pytest.mark.netns
@pytest.mark.parametrize("in_process", [False, True])
def test_a_board_can_use_an_interface(tmp_path: Path, in_process: bool) -> None:
    with open_board(tmp_path / "board", link="interface", in_process=in_process) as board:
        board.core1.send(HWWD)
        board.core0.expect(HWWD)
        board.faults.link_down()
        board.core0.trigger(NOTIFY)
        board.faults.link_up()
        board.core1.expect(NOTIFY)
        with pytest.raises(InvalidArgumentError, match="a guest needs a socket link"), board.guest():
            pass


@pytest.mark.qemu
def test_a_guest_can_be_stopped_reset_and_killed(tmp_path: Path) -> None:
    with open_board(tmp_path / "board") as board:
        with board.guest(command_line=f"echo={NOTIFY}:{HWWD} verbose") as guest:
            board.core0.trigger(NOTIFY)
            board.core0.expect(HWWD)
            guest.stop()
            board.core0.trigger(NOTIFY)
            guest.cont()
            board.core0.expect(HWWD)
            guest.system_reset()
            guest.wait_ready()
            guest.kill()
            guest.start()
            guest.wait_ready()
            board.core0.trigger(NOTIFY)
            board.core0.expect(HWWD)
            with pytest.raises(InvalidArgumentError, match="core 1 is a guest: only its firmware can send"):
                board.core1.send(HWWD)
        assert "serial output of the guest:\ncore1: ready" in board.report
        assert [f"{each.what} {each.name}" for each in board.core1.history] == [f"gets {NOTIFY}", f"sends {HWWD}"] * 3
        board.core1.send(RESET)  # The test replaces the guest again.
        board.core0.expect(RESET)
        with board.guest(command_line=f"echo={NOTIFY}:{HWWD}"):
            board.core0.trigger(NOTIFY)
            board.core0.expect(HWWD)
        with pytest.raises(GuestError, match="QEMU has ended"), board.guest(tmp_path / "none.elf"):
            pass


def test_no_frame_of_a_guest_is_lost_when_it_is_detached(board: Board) -> None:
    board._engine.run(board._rig.attach_guest)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as guest:
        guest.bind(str(board._layout.socket("guest")))

        async def send_and_detach() -> None:
            for _ in range(5):
                guest.sendto(encode(HWWD.encode(), bytes(6)), str(board._layout.socket("wire1")))
            await board._rig.detach_guest()

        board._engine.run(send_and_detach)
    for _ in range(5):
        board.core0.expect(HWWD)


@pytest.mark.qemu
def test_frame_faults_apply_to_a_guest(tmp_path: Path) -> None:
    with open_board(tmp_path / "board") as board, board.guest(command_line=f"echo={NOTIFY}:{HWWD}"):
        board.faults.frames(corrupt=1, direction=Direction.OUTBOUND, seed=1)
        board.core0.trigger(NOTIFY)
        while not board.core1.history:
            pass
        board.faults.frames()
        board.faults.frames(double=1, direction=Direction.INBOUND)
        board.core0.trigger(NOTIFY)
        board.core0.expect(HWWD)
        board.core0.expect(HWWD)
        first = next(each for each in board.core1.history if each.what.startswith("gets"))
        assert first.frame is not None
        assert decode(first.frame) != NOTIFY.encode() or first.frame[:12] != b"\xff" * 6


@pytest.mark.parametrize("library", ["blocking", "trio", "asyncio"])
def test_a_wait_ends_although_a_test_has_frozen_time(library: str) -> None:
    """freezegun also stops the clocks of Trio and asyncio."""
    history = History()
    waits: dict[str, Callable[[], object]] = {
        "blocking": lambda: history.wait(0, HWWD, 0.01),
        "trio": lambda: trio.run(history.wait_async, 0, HWWD, 0.01),
        "asyncio": lambda: asyncio.run(history.wait_async(0, HWWD, 0.01)),
    }
    with freezegun.freeze_time("2026-01-01"), pytest.raises(NotificationMissingError, match=r"within 0\.01 s"):
        waits[library]()


def test_a_delayed_frame_arrives_although_a_test_has_frozen_time(tmp_path: Path) -> None:
    with freezegun.freeze_time("2026-01-01"), open_board(tmp_path / "board") as board:
        board.faults.frames(delay=0.001)
        board.core1.send(HWWD)
        board.core0.expect(HWWD, HANG)


def test_a_proxy_retries_although_a_test_has_frozen_time(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with freezegun.freeze_time("2026-01-01"), open_board(tmp_path / "board", in_process=True) as board:
        # The proxy refuses a file with two names, and no event reports the removal of the other name.
        os.link(board.core0.register(HWWD), other)
        board.core1.send(HWWD)
        while "cannot write" not in board.proxy.log:
            time.sleep(0.01)  # Poll, because no event reports a new log line.
        other.unlink()
        board.core0.expect(HWWD, HANG)


WRONG: dict[str, Callable[[Board], object]] = {
    "drop='0.5'": lambda board: board.faults.frames(drop="0.5"),  # type: ignore[arg-type]
    "double=None": lambda board: board.faults.frames(double=None),  # type: ignore[arg-type]
    "corrupt=nan": lambda board: board.faults.frames(corrupt=float("nan")),
    "delay='1'": lambda board: board.faults.frames(delay="1"),  # type: ignore[arg-type]
    "seed=[1]": lambda board: board.faults.frames(seed=[1]),  # type: ignore[arg-type]
    "in_process='no'": lambda board: open_board(board.directory / "x", in_process="no").__enter__(),  # type: ignore[arg-type]
    "directory=None": lambda board: open_board(None).__enter__(),  # type: ignore[arg-type] # noqa: ARG005
    "directory=''": lambda board: open_board("").__enter__(),  # noqa: ARG005
    "config=''": lambda board: open_board(board.directory / "x", config="").__enter__(),
    "path=None": lambda board: board.record(None),  # type: ignore[arg-type]
    "path='a\\x00b'": lambda board: board.record("a\0b"),
    "firmware=5": lambda board: board.guest(firmware=5).__enter__(),  # type: ignore[arg-type]
    "command_line=5": lambda board: board.guest(command_line=5).__enter__(),  # type: ignore[arg-type]
    "program=5": lambda board: board.guest(program=5).__enter__(),  # type: ignore[arg-type]
    "ready=b'x'": lambda board: board.guest(ready=b"x").__enter__(),  # type: ignore[arg-type]
    "machine='virt'": lambda board: board.guest(machine="virt").__enter__(),
    "machine=5": lambda board: board.guest(machine=5).__enter__(),  # type: ignore[arg-type]
    "machine=[5]": lambda board: board.guest(machine=[5]).__enter__(),  # type: ignore[list-item]
    "signals: 1": lambda board: open_board(board.directory / "x", signals={1: "inbound"}).__enter__(),  # type: ignore[dict-item]
}
"""Calls with an argument of the wrong type. The key is the start of the error message."""


def test_arguments_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    with open_board(str(tmp_path / "board"), in_process=True) as board:
        for text, call in WRONG.items():
            with pytest.raises(InvalidArgumentError, match=f"^{re.escape(text)}: expected "):
                call(board)
        board.core1.send(HWWD)
        board.core0.expect(HWWD, HANG)


def test_relative_paths_and_text_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_board("board", in_process=True) as board:
        assert board.directory == tmp_path / "board"
        board.core1.send(HWWD)
        board.core0.expect(HWWD, HANG)
        board.record("recording.pcapng")
    assert (tmp_path / "recording.pcapng").stat().st_size


def test_a_wait_in_another_thread_ends_when_the_board_is_closed(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with open_board(tmp_path / "board", in_process=True) as board:
        history = board._rig.history

        def wait() -> None:
            try:
                board.core0.expect(HWWD, HANG)
            except NotificationMissingError as error:
                failures.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not history._listeners:
            time.sleep(0.01)  # Poll: no event reports that the other thread has started to wait.
    waiting.join(HANG)
    assert [str(error).partition("; ")[0] for error in failures] == [
        f"{HWWD}: did not arrive at core 0 (the board is closed)"
    ]


def test_a_forked_process_cannot_use_the_board(tmp_path: Path) -> None:
    with open_board(tmp_path / "board", in_process=True) as board:
        said, saying = os.pipe()
        if not (child := os.fork()):
            for use in (lambda: board.history, lambda: board.core0.expect(HWWD, HANG), lambda: board.core1.send(HWWD)):
                try:
                    use()
                except ClosedError as error:
                    os.write(saying, f"{error}\n".encode())
            board.close()
            os._exit(0)
        os.close(saying)
        assert os.waitpid(child, 0)[1] == 0
        refusal = "the board belongs to the parent process (open another board in this process)"
        with os.fdopen(said) as lines:
            assert lines.read().splitlines() == [refusal] * 3
        board.core1.send(HWWD)
        board.core0.expect(HWWD, HANG)
