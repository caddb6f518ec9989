"""Tests of the pytest plugin, as users run it: each test starts another pytest."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inco_trio.capture.recording import Entry, open_recording
from inco_trio.signals import SignalTable
from netns.hang import HANG

pytestmark = pytest.mark.tools
pytest_plugins = ["pytester"]

ASYNCIO_AUTO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
QUIET = ("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:hypothesispytest", "-W", "error")


def run(pytester: pytest.Pytester, test: str, *options: str) -> pytest.RunResult:
    """Write `test` to a file and run pytest on this file."""
    pytester.makepyfile(test)
    plugins = ("-p", "no:asyncio", "-p", "no:trio", "-p", "no:anyio") if "-p" not in options else ()
    return pytester.runpytest_subprocess(*QUIET, *plugins, *options, timeout=HANG)


PASSING = """
import pytest

def test_an_application_answers(inco_board):
    inco_board.core1.send("ihub_hwwd_irq")
    inco_board.core0.expect("ihub_hwwd_irq")
    inco_board.core0.trigger("redun_notify_irq")  # the application under test would
    inco_board.core1.expect("redun_notify_irq", timeout=600)
    assert inco_board.core0.count("ihub_hwwd_irq") == 1

@pytest.mark.inco_trio(signals={"door_irq": "inbound"})
class TestMarked:
    def test_signals(self, inco_board):
        inco_board.core1.send("door_irq")
        inco_board.core0.expect("door_irq")

    @pytest.mark.inco_trio(signals={"lamp_irq": "outbound"})
    def test_the_nearest_marker_counts(self, inco_board):
        assert [signal.name for signal in inco_board.signals][3:] == ["lamp_irq"]

def test_several(make_inco_board):
    boards = [make_inco_board() for _ in range(3)]
    for each in boards:
        each.core0.trigger("redun_notify_irq")
    for each in boards:
        each.core1.expect("redun_notify_irq")
"""


@pytest.mark.parametrize("options", [(), ("--inco-trio-in-process",), ("-n", "2")], ids=" ".join)
def test_tests_that_use_the_plugin_pass(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    run(pytester, PASSING, *options).assert_outcomes(passed=4)


def test_short_names_are_opt_in(pytester: pytest.Pytester) -> None:
    test = """
        def test_short(board, make_board, inco_board):
            assert board is inco_board
            make_board().core1.send("ihub_hwwd_irq")
        """
    in_process = "--inco-trio-in-process"
    run(pytester, test, in_process).assert_outcomes(errors=1)
    pytester.makeconftest("pytest_plugins = ['inco_trio.testing.short_names']")
    run(pytester, test, in_process).assert_outcomes(passed=1)


def test_a_missing_signal_shows_what_both_cores_did(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        def test_missing(inco_board):
            inco_board.core1.send("ihub_hwwd_irq")
            inco_board.core0.expect("ihub_hwwd_irq")
            inco_board.core1.expect("redun_notify_irq", timeout=0.01)

        def test_another(inco_board):
            pass
        """,
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.re_match_lines_random(
        [
            r">       inco_board.core1.expect\(\"redun_notify_irq\", timeout=0.01\)",
            r"E .*MissingError: redun_notify_irq: did not arrive at core 1 within 0.01 s; events at this core: sends i",
            r"-+ inco-trio board -+",
            r"  0.000000  +sends ihub_hwwd_irq",
            r"  \d+\.\d+  gets ihub_hwwd_irq",
            r"counters: received=1 delivered=1",
            r"log of the proxy:",
            r"[-\d]+ [:.\d]+ inco-trio: info: .*/core0: ready",
            r"what the counters mean: https://github.com/.*/docs/testing.md#a-failed-test",
        ]
    )
    recorded = re.search(r"recorded in (.*)", result.stdout.str())
    assert recorded
    with open_recording(Path(recorded[1]), SignalTable(())) as recording:
        assert [each.signal for each in recording if isinstance(each, Entry)] == ["ihub_hwwd_irq"]
    result.stdout.no_fnmatch_line("*happenings.py*")  # the traceback must contain only frames of the test itself


def test_a_proxy_that_dies_fails_the_test(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import os, select, signal

        def die(inco_board):
            end = os.pidfd_open(inco_board.proxy.pid)
            os.kill(inco_board.proxy.pid, signal.SIGKILL)
            select.select([end], [], [])
            os.close(end)

        def test_waits(inco_board):
            die(inco_board)
            inco_board.core1.expect("redun_notify_irq")

        def test_notices_nothing(inco_board):
            die(inco_board)

        def test_another(inco_board):
            inco_board.core1.send("ihub_hwwd_irq")
            inco_board.core0.expect("ihub_hwwd_irq")
        """,
    )
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.re_match_lines(
        [
            r"E .*did not arrive at core 1 \(the proxy has ended by itself, with exit code -9",
            r"the proxy has ended by itself, with exit code -9; it logged: [-\d]+ [:.\d]+ inco-trio: info: .*",
        ]
    )


def test_a_leaked_board_is_reported(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        from inco_trio.testing import open_board
        kept = []

        def test_leaks(tmp_path):
            kept.append(open_board(tmp_path / "leaked"))
            kept[0].__enter__()

        def test_another():
            from inco_trio.testing.board import open_boards
            assert not open_boards()
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.re_match_lines([r".*/leaked: board left open \(use `with open_board\(\.\.\.\)` or make_inco_board\)"])


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("signals={'x': 'up'}", "signals: x: direction='up': expected 'inbound' or 'outbound'"),
        ("config='/nowhere'", "/nowhere: cannot be read: No such file or directory"),
        ("link='pigeon'", "link='pigeon': expected 'unix' or 'interface'"),
        ("'unix'", "marker inco_trio: expected only the arguments config=, signals= and link="),
        ("lnk='unix'", "marker inco_trio: expected only the arguments config=, signals= and link="),
    ],
)
def test_an_invalid_marker_is_an_error(pytester: pytest.Pytester, marker: str, said: str) -> None:
    result = run(
        pytester,
        f"""
        import pytest

        @pytest.mark.inco_trio({marker})
        def test_marked(inco_board):
            pass
        """,
    )
    result.assert_outcomes(errors=1)
    assert [line for line in result.outlines if line.endswith(said)]
    assert "Traceback" not in result.stdout.str()
    assert "another exception" not in result.stdout.str()


def test_a_missing_qemu_is_an_error(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    test = """
        import pytest

        @pytest.fixture
        def guest(inco_board):
            with inco_board.guest() as running:
                yield running

        def test_in_a_fixture(guest):
            pass

        def test_in_the_test(inco_board):
            with inco_board.guest():
                pass
        """
    result = run(pytester, test)
    result.assert_outcomes(failed=1, errors=1)
    hint = r"qemu-system-riscv64 is not installed .* \(or skip such tests: pytest -o inco_trio_missing=skip\)"
    result.stdout.re_match_lines([hint, hint])
    assert "another exception" not in result.stdout.str()
    result = run(pytester, test, "-o", "inco_trio_missing=skip", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.re_match_lines([r"SKIPPED \[\d\] .*qemu-system-riscv64 is not installed"])
    result = run(pytester, test, "-o", "inco_trio_missing=maybe")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: inco_trio_missing = maybe: expected fail or skip" in result.stderr.str()


def test_the_output_of_a_guest_is_in_the_failure(pytester: pytest.Pytester) -> None:
    if not shutil.which("qemu-system-riscv64"):
        pytest.fail("this test needs QEMU")
    result = run(
        pytester,
        """
        def test_guest(inco_board):
            with inco_board.guest(command_line="verbose"):
                inco_board.core0.trigger("redun_notify_irq")
                inco_board.core0.expect("ihub_reset_irq", timeout=0.1)
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"serial output of the guest:", r"core1: ready, .*"])


ASYNC = """
    async def application(inco_board, sleep):
        while not inco_board.core0.register("ihub_hwwd_irq").read_text():
            await sleep(0.001)
        inco_board.core0.trigger("redun_notify_irq")

    async def test_{library}(inco_board):
        {tasks}
"""
TRIO = """import trio
        async with trio.open_nursery() as nursery:
            nursery.start_soon(application, inco_board, trio.sleep)
            inco_board.core1.send("ihub_hwwd_irq")
            await inco_board.core1.expect_async("redun_notify_irq")
        await trio.to_thread.run_sync(inco_board.proxy.restart)"""
ASYNCIO = """import asyncio
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(application(inco_board, asyncio.sleep))
            inco_board.core1.send("ihub_hwwd_irq")
            await inco_board.core1.expect_async("redun_notify_irq")
        await asyncio.to_thread(inco_board.proxy.restart)"""


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize(
    ("library", "tasks", "options"),
    [
        ("trio", TRIO, ("-p", "no:asyncio", "-p", "no:anyio", "-o", "trio_mode=true")),
        ("asyncio", ASYNCIO, ("-p", "no:trio", "-p", "no:anyio", *ASYNCIO_AUTO)),
        ("anyio", ASYNCIO, ("-p", "no:trio", "-p", "no:asyncio", "-o", "anyio_mode=auto")),
    ],
)
def test_async_tests_run_in_their_event_loops(
    pytester: pytest.Pytester, library: str, tasks: str, options: tuple[str, ...], in_process: bool
) -> None:
    if library == "anyio":
        pytester.makeconftest("import pytest\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n")
    where = ("--inco-trio-in-process",) if in_process else ()
    run(pytester, ASYNC.format(library=library, tasks=tasks), *options, *where).assert_outcomes(passed=1)


def test_ctrl_c_leaves_no_process_or_directory(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_waits(inco_board, make_inco_board):
            second = make_inco_board()
            print(inco_board.proxy.pid, second.proxy.pid, inco_board.directory, second.directory, flush=True)
            inco_board.core0.expect("ihub_hwwd_irq", timeout=1000)
        """
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pytester.path,
    )
    assert running.stdout is not None
    *pids, first, second = running.stdout.readline().split()
    ends = [os.pidfd_open(int(pid)) for pid in pids]
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=HANG)
    assert running.returncode == pytest.ExitCode.INTERRUPTED
    assert "Traceback" not in err
    for end in ends:
        assert select.select([end], [], [], 0)[0]
        os.close(end)
    for directory in (first, second):
        assert [path for path in Path(directory).iterdir() if path.is_socket()] == []
    assert "1 error" not in out


def test_an_unused_plugin_imports_nothing(pytester: pytest.Pytester) -> None:
    run(
        pytester,
        """
        import sys

        def test_imports():
            names = {name for name in sys.modules if name.startswith("inco_trio")}
            assert names == {"inco_trio", "inco_trio.testing", "inco_trio.testing.plugin"}
        """,
    ).assert_outcomes(passed=1)
