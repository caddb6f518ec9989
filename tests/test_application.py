"""Tests of docs/application.md: its programs report a whole burst, and each trigger example sends one notification."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inco_trio.frame import decode
from inco_trio.simulation.world import Cores, Peer
from inco_trio.testing import Board, open_board
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_pages import run

PAGE = (Path(__file__).parents[1] / "docs/application.md").read_text()
BLOCKS = re.findall(r"^```(c|sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BURST = 100
HWWD, NOTIFY = "ihub_hwwd_irq", "redun_notify_irq"
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
READY = {"watching", "Watches established."}
NOTIFICATION, LOSS = "notification", "notifications may be missing"


def block(language: str, beginning: str) -> str:
    """Return the page's only code block in this language that begins with `beginning`."""
    (text,) = (text for each, text in BLOCKS if each == language and text.startswith(beginning))
    return str(text)


def c_program(home: Path, text: str) -> list[str]:
    (home / "watch.c").write_text(text)
    command = block("sh", "gcc").splitlines()[0]
    subprocess.run(command.split(), cwd=home, check=True, timeout=HANG)
    return [str(home / "watch")]


def shell_program(home: Path, text: str) -> list[str]:
    (home / "watch.sh").write_text(text)
    return ["sh", str(home / "watch.sh")]


def python_program(home: Path, text: str) -> list[str]:
    (home / "watch.py").write_text(text)
    return [sys.executable, str(home / "watch.py")]


PROGRAMS = {
    "C": (c_program, block("c", "/* Print"), "IN_CLOSE_WRITE | IN_MODIFY |", "IN_CLOSE_WRITE |"),
    "shell": (shell_program, block("sh", "#!/bin/sh"), "close_write,modify", "close_write"),
    "Python": (python_program, block("python", '"""Print'), "flags.CLOSE_WRITE | flags.MODIFY", "flags.CLOSE_WRITE"),
}
"""For each language: the build function, the program's text, its inotify mask, and a mask that loses notifications."""

FOLLOWERS = ("C", "Python")
"""Languages of the programs that follow a replaced directory and report an overflow."""


class Running:
    """A program from the page that runs alongside a board. The test can pause its process group."""

    def __init__(self, command: list[str], board: Board) -> None:
        register = board.core0.register(HWWD)
        self.process = subprocess.Popen(
            [*command, str(register.parent), register.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.wait_for(READY)

    def wait_for(self, wanted: set[str]) -> list[str]:
        """Read lines until one is in `wanted`; return the lines before it."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in map(str.strip, self.process.stdout):
            if line in wanted:
                return lines
            lines.append(line)
        raise AssertionError(f"the program ended: {lines}")

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def pause(self) -> None:
        """Stop all processes of the group, and wait until all of them have stopped."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):  # The process has ended since glob() found it.
                if os.getpgid(int(process.name)) == self.process.pid:
                    wait_stopped(int(process.name))

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.communicate(timeout=HANG)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with open_board(tmp_path / "board") as board:
        yield board


Start = Callable[[str, str], Running]


@pytest.fixture
def start(board: Board, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a program from the page with a different inotify mask."""
    started: list[Running] = []

    def start(language: str, mask: str) -> Running:
        build, text, right, _ = PROGRAMS[language]
        assert text.count(right) == 1
        started.append(Running(build(tmp_path, text.replace(right, mask)), board))
        return started[-1]

    yield start
    for each in started:
        each.close()


def burst(board: Board, running: Running) -> None:
    """Send a burst of signals while the program is paused. Resume the program once all signals have been delivered."""
    running.pause()
    for _ in range(BURST):
        board.core1.send(HWWD)
    for _ in range(BURST):
        board.core0.expect(HWWD)
    running.signal(signal.SIGCONT)


pytestmark = pytest.mark.tools


@pytest.mark.parametrize("language", PROGRAMS)
def test_a_program_reports_each_notification_of_a_burst(language: str, board: Board, start: Start) -> None:
    running = start(language, PROGRAMS[language][2])
    burst(board, running)
    for _ in range(BURST):
        assert running.wait_for({NOTIFICATION}) == []


@pytest.mark.parametrize("language", FOLLOWERS)
def test_a_program_follows_a_replaced_directory(language: str, board: Board, start: Start) -> None:
    running = start(language, PROGRAMS[language][2])
    board.faults.replace_directory()
    assert set(running.wait_for({LOSS})) == {"watching"}
    board.core1.send(HWWD)
    assert running.wait_for({NOTIFICATION}) == []


@pytest.mark.parametrize("language", FOLLOWERS)
def test_without_modify_events_a_program_misses_notifications(language: str, board: Board, start: Start) -> None:
    running = start(language, PROGRAMS[language][3])
    burst(board, running)
    board.faults.replace_directory()
    assert running.wait_for({LOSS}).count(NOTIFICATION) < BURST


@pytest.mark.parametrize("language", FOLLOWERS)
def test_a_program_reports_an_overflow(language: str, board: Board, start: Start) -> None:
    running = start(language, PROGRAMS[language][2])
    running.pause()
    files = [os.open(board.core0.directory / name, os.O_WRONLY | os.O_CREAT) for name in ("left", "right")]
    for _ in range(int(QUEUE.read_text()) // 2 + 1):
        for file in files:
            os.pwrite(file, b"1", 0)  # The kernel does not merge events for alternating files.
    for file in files:
        os.close(file)
    running.signal(signal.SIGCONT)
    assert running.wait_for({LOSS}) == []


def c_trigger(home: Path, text: str) -> list[str]:
    includes = "".join(f"#include <{name}.h>\n" for name in ("fcntl", "stdio", "unistd"))
    (home / "trigger.c").write_text(f"{includes}int main(void)\n{{\n{text}}}\n")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", "trigger", "trigger.c"], cwd=home, check=True)
    return [str(home / "trigger")]


def test_the_c_program_answers_with_the_example_of_a_trigger(board: Board, tmp_path: Path) -> None:
    program, answer, call = block("c", "/* Print"), block("c", "int fd"), 'puts("notification");'
    assert program.count(call) == 1
    answer = answer.replace("/run/irq", str(board.core0.directory))
    command = c_program(tmp_path, f"#include <fcntl.h>\n{program.replace(call, answer)}")
    with contextlib.closing(Running(command, board)):
        board.core1.send(HWWD)
        board.core1.expect(NOTIFY)


def shell_trigger(_: Path, text: str) -> list[str]:
    return ["sh", "-ec", text]


def python_trigger(_: Path, text: str) -> list[str]:
    return [sys.executable, "-c", f"from pathlib import Path\n{text}"]


@pytest.mark.parametrize(
    ("language", "build", "beginning"),
    [("c", c_trigger, "int fd"), ("sh", shell_trigger, "echo 1"), ("python", python_trigger, "Path(")],
)
def test_each_trigger_makes_one_notification(
    language: str, build: Callable[[Path, str], list[str]], beginning: str, board: Board, tmp_path: Path
) -> None:
    text = block(language, beginning)
    assert "/run/irq/message_6_trig" in text
    text = text.replace("/run/irq", str(board.core0.directory))
    subprocess.run(build(tmp_path, text), check=True, timeout=HANG)
    board.core1.expect(NOTIFY)
    board.core0.trigger(NOTIFY)
    board.core1.expect(NOTIFY)
    assert board.core1.count(NOTIFY) == 2


@pytest.mark.netns
@pytest.mark.parametrize("own", [False, True], ids=["file_of_the_proxy", "own_file"])
def test_another_user_may_write_a_trigger_file_of_its_own(cores: Cores, core1: Peer, tmp_path: Path, own: bool) -> None:
    """Here, inco-trio is the user of the application, and the proxy runs as root."""
    create = block("sh", "install -o app").replace("app", "inco-trio") if own else ""
    done = run(
        cores,
        tmp_path,
        f"""
        install -d /run/irq
        {create}
        inco-trio run rpmsg4000 --irq-dir /run/irq 2> log &
        until inco-trio status > status 2>&1; do sleep 0.1; done
        setpriv --reuid 2147 --regid 2147 --clear-groups sh -c '{block("sh", "echo 1").strip()}'
        """,
    )
    if own:
        assert (done.returncode, done.stderr) == (0, "")
        assert decode(core1.receive(HANG)) == NOTIFY.encode()
    else:
        assert done.returncode
        assert "message_6_trig: Permission denied" in done.stderr
