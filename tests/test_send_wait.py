"""Tests of `inco-trio send` and `inco-trio wait`, as shell tests use them, with a real daemon and without one."""

from __future__ import annotations

import functools
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from inco_trio.cli import send as send_command
from inco_trio.cli import wait as wait_command
from inco_trio.cli.parser import parse
from inco_trio.cli.send import _Schedule
from inco_trio.cli.signalling import alone
from inco_trio.control.protocol import Event
from inco_trio.cores.peer import Peer
from inco_trio.frame import decode, encode
from inco_trio.signals import Direction
from inco_trio.simulation.world import Cores
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.support_control import MAC, PATIENT, Board
from tests.support_proxy import write_udrv

pytestmark = pytest.mark.tools

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the user's configuration, put `inco-trio` on PATH, and hide all proxies except the test's own proxy."""
    monkeypatch.delenv("UDRV_JSON_PATH", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    program = tmp_path / "bin/inco-trio"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PATIENT)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Yield a function that starts a command, waits until it is listening (using --after), and returns its process."""
    with ExitStack() as stack:

        def start(*words: str | Path) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [*PATIENT, *map(str, words), "--after", "echo listening"], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            return process

        yield start


def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PATIENT, *map(str, words)], capture_output=True, text=True, timeout=HANG, check=False,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


def error(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Return the exit code and the single line of standard error."""
    assert done.stdout == ""
    assert done.stderr.startswith("inco-trio: error: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr.removeprefix("inco-trio: error: ").rstrip("\n")


def received(peer: socket.socket, count: int) -> list[bytes | None]:
    return [decode(peer.recv(2000)) for _ in range(count)]


def core1_link(board: Board) -> str:
    return f"unix:{board.home}/core1,peer={board.home}/core0"


def test_send_through_the_proxy(board: Board) -> None:
    peer = board.core1()
    board.running()
    done = run("send", "redun_notify_irq", "--control", board.path, "--count", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["signal"], said["count"], said["sent"]) == ("redun_notify_irq", 3, 3)
    assert (said["board"], said["register"], said["link"]) == (f"{board.home}/core0", None, None)
    assert received(peer, 3) == [b"redun_notify_irq"] * 3
    assert run("send", "redun_notify_irq", "--control", board.path, "-q").stdout == ""
    done = run("send", "redun_notify_irq", "--control", board.path)
    assert re.fullmatch(rf"redun_notify_irq: 1 sent, through {board.home}/core0, in [\d.]+ s\n", done.stdout)


def test_the_only_proxy_is_found_and_a_link_names_it(board: Board) -> None:
    runtime = board.home / "xdg/inco-trio"
    runtime.mkdir(parents=True)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(runtime / "left.sock"))
    left.close()
    peer = board.core1()
    proxy = board.start(control=str(runtime / "board.sock"))
    proxy.wait_ready()
    assert run("send", "redun_notify_irq", board.link).returncode == 0
    assert received(peer, 1) == [b"redun_notify_irq"]
    done = run("send", "redun_notify_irq", "unix:/x/a,peer=/x/b")
    assert error(done)[0] == 69
    assert "no proxy of unix:/x/a,peer=/x/b answers" in done.stderr


def test_send_keeps_the_rate(board: Board) -> None:
    peer = board.core1()
    board.running()
    done = run("send", "redun_notify_irq", "--control", board.path, "--count", "5", "--rate", "50", "--json")
    assert received(peer, 5) == [b"redun_notify_irq"] * 5
    assert json.loads(done.stdout)["seconds"] >= 0.08


def test_wait_through_the_proxy(board: Board) -> None:
    peer = board.core1()
    board.running()
    after = f"inco-trio send redun_notify_irq --control {board.path} -q"
    done = run("wait", "redun_notify_irq", "--control", board.path, "--timeout", str(HANG), "--after", after)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" outbound redun_notify_irq\n")
    assert received(peer, 1) == [b"redun_notify_irq"]


def test_the_documented_example_of_wait_works(board: Board) -> None:
    line = "inco-trio wait redun_notify_irq --timeout 5 --after 'echo 1 > irq/message_6_trig'"
    board.core1()
    board.running()
    # Select the test's proxy, because other proxies might be running on this machine.
    named = re.sub(r"--timeout \d+", f"--control {board.path} --timeout {HANG}", line)
    done = subprocess.run(
        ["/bin/sh", "-c", named], cwd=board.home, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" outbound redun_notify_irq\n")


def test_wait_counts_only_the_named_signal(board: Board, started: Callable[..., subprocess.Popen[str]]) -> None:
    peer = board.core1()
    board.running()
    waiting = started("wait", "ihub_hwwd_irq", "--control", board.path, "--count", "2", "--json")
    board.inbound(peer, encode(b"ihub_reset_irq", MAC))
    board.inbound(peer)
    board.inbound(peer)
    out, err = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, err) == (0, "")
    assert [json.loads(line)["signal"] for line in out.splitlines()] == ["ihub_hwwd_irq"] * 2


def test_wait_times_out(board: Board) -> None:
    board.running()
    done = run("wait", "ihub_hwwd_irq", "--control", board.path, "--timeout", "0.01")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "inco-trio: ihub_hwwd_irq: 0 of 1 arrived within 0.01 s\n"
    done = run("wait", "ihub_hwwd_irq", "--control", board.path, "--timeout", "0", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_what_arrived_before_wait_looks_at_the_clock_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is stopped after poll(2): the notification arrives and the time runs out."""
    now, arrived = [0.0], list[Event]()

    class Poll:
        def register(self, *_: int) -> None: ...
        def poll(self, _: int) -> list[tuple[int, int]]:
            now[0] += 10
            arrived.append(Event("notification", time=1.5, direction=Direction.INBOUND, signal="a"))
            return []

    class Source:
        def fileno(self) -> int:
            return 0

        def arrived(self) -> list[Event]:
            return arrived

    monkeypatch.setattr(wait_command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(wait_command, "select", SimpleNamespace(poll=Poll, POLLIN=select.POLLIN))
    waiting = wait_command._Waiting(parse(["wait", "a", "--timeout", "5"]))
    waiting.hear(Source())
    assert waiting.exit_code() == 0
    assert capsys.readouterr().out.endswith(" inbound a\n")


def test_wait_ends_with_an_error_when_the_proxy_ends(
    board: Board, started: Callable[..., subprocess.Popen[str]]
) -> None:
    proxy = board.running()
    waiting = started("wait", "ihub_hwwd_irq", "--control", board.path)
    proxy.stop()
    _, err = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, err) == (69, f"inco-trio: error: {board.path}: the proxy has ended\n")


def test_send_reports_a_link_that_is_down_and_waits(board: Board) -> None:
    board.running()
    with subprocess.Popen(
        [*PATIENT, "send", "redun_notify_irq", "--control", str(board.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("inco-trio: the link is down, or core 1 is not running")
        assert received(board.core1(), 1) == [b"redun_notify_irq"]
        assert process.wait(HANG) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ("send", "redun_notfy_irq"),
            "redun_notfy_irq: no such signal (expected one of: redun_notify_irq); did you mean redun_notify",
        ),
        (("send", "ihub_hwwd_irq"), "ihub_hwwd_irq: is not sent by core 0: core 1 sends it (LINK --as core1)"),
        (
            ("wait", "ihub_hwd_irq"),
            "ihub_hwd_irq: no such signal (expected one of: ihub_hwwd_irq, ihub_reset_irq, redun_notify_irq); did",
        ),
        (("send", "redun_notify_irq", "--board", "b9"), "board 'b9': unknown (available: {home}/core0)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_unknown_signal_or_board_is_an_error(board: Board, words: tuple[str, ...], complaint: str) -> None:
    board.running()
    code, said = error(run(*words, "--control", board.path))
    assert code == 2
    assert said.startswith(complaint.format(home=board.home))


def test_send_and_wait_choose_a_board(board: Board) -> None:
    boards = board.home / "boards"
    boards.mkdir()
    for name in ("a", "b"):
        (boards / f"{name}.json").write_text(
            json.dumps(
                {
                    "link": f"unix:{board.home}/{name}0,peer={board.home}/{name}1",
                    "irq_dir": str(board.home / name),
                }
            )
        )
    with ExitStack() as stack:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        peer.bind(f"{board.home}/b1")
        peer.settimeout(HANG)
        runtime = board.home / "xdg/inco-trio"
        runtime.mkdir(parents=True)
        arguments = ["--boards", str(boards), "--control", str(runtime / "boards.sock")]
        proxy = Proxy(None, arguments, {}, board.home / "log")
        stack.callback(proxy.close)
        proxy.wait_ready()
        code, complaint = error(run("send", "redun_notify_irq", "--control", runtime / "boards.sock", "--board", "c"))
        assert (code, complaint) == (2, "board 'c': unknown (available: a, b)")
        done = run(
            "wait", "redun_notify_irq", "b", "--timeout", str(HANG), "--after", "inco-trio send redun_notify_irq b"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "redun_notify_irq: 1 sent, through b, in " in done.stdout
        assert received(peer, 1) == [b"redun_notify_irq"]


@pytest.mark.netns
def test_other_users_may_wait_if_the_group_allows_it_but_not_send(nobody: list[str]) -> None:
    # Other users cannot enter pytest's directories.
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        board = Board(Path(home), stack)
        for path in (board.home, board.path.parent):
            path.chmod(0o755)
        board.core1()
        board.running()

        def ask(*words: str) -> subprocess.CompletedProcess[str]:
            whole = [*nobody, *PATIENT, *words, "--control", str(board.path)]
            return subprocess.run(whole, capture_output=True, text=True, timeout=HANG, check=False)

        assert error(ask("wait", "ihub_hwwd_irq"))[0] == 77
        board.path.chmod(0o666)
        assert error(ask("send", "redun_notify_irq")) == (77, "only root and the user of the proxy may send")
        assert ask("wait", "ihub_hwwd_irq", "--timeout", "0").returncode == 1


def test_a_missing_proxy_is_an_error(tmp_path: Path) -> None:
    assert error(run("send", "x", "--control", tmp_path / "none")) == (
        69,
        f"{tmp_path}/none: no proxy is listening on this socket",
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(tmp_path / "stale"))
    code, complaint = error(run("wait", "x", "--control", tmp_path / "stale"))
    assert (code, complaint) == (69, f"{tmp_path}/stale: no proxy is listening on this socket")


def test_send_as_an_application(board: Board) -> None:
    peer = board.core1()
    board.running()
    done = run("send", "redun_notify_irq", "--irq-dir", board.irq)
    assert done.returncode == 0
    assert done.stdout.startswith(f"redun_notify_irq: 1 sent, by {board.irq}/message_6_trig, in ")
    assert received(peer, 1) == [b"redun_notify_irq"]


def test_send_as_an_application_by_the_configuration(board: Board) -> None:
    peer = board.core1()
    udrv = write_udrv(board.home / "udrv.json", board.irq)
    board.running("--config", str(udrv))
    assert run("send", "ihub_crash_log_irq", "--config", udrv, "--count", "4", "--rate", "100").returncode == 0
    assert received(peer, 4) == [b"ihub_crash_log_irq"] * 4


def test_wait_as_an_application(board: Board, started: Callable[..., subprocess.Popen[str]]) -> None:
    peer = board.core1()
    board.running()
    waiting = started("wait", "ihub_hwwd_irq", "--irq-dir", board.irq, "--count", "3", "--timeout", str(HANG))
    board.trigger()
    for _ in range(3):
        board.inbound(peer)
    out, err = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, err) == (0, "")
    assert [line.split()[1:] for line in out.splitlines()] == [["inbound", "ihub_hwwd_irq"]] * 3


def test_wait_follows_replaced_files_and_directories(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    irq = tmp_path / "above/irq"
    irq.mkdir(parents=True)
    state = irq / "message_5_state"
    state.touch()
    waiting = started("wait", "ihub_hwwd_irq", "--irq-dir", irq, "--count", "4", "--timeout", str(HANG))
    assert waiting.stdout is not None
    state.write_text("1")
    assert waiting.stdout.readline().endswith(" inbound ihub_hwwd_irq\n")
    state.unlink()
    state.write_text("1")  # This creates a new file.
    assert waiting.stdout.readline().endswith(" inbound ihub_hwwd_irq\n")
    # Replace the directory. Writes to the old directory must not count.
    other = tmp_path / "above/other"
    other.mkdir()
    (other / "message_5_state").touch()
    irq.rename(tmp_path / "away")
    other.rename(irq)
    (tmp_path / "away/message_5_state").write_text("1")
    assert wait_until_counted(waiting, state) == 0
    out, err = waiting.communicate(timeout=HANG)
    assert (out, err) == ("", "")


def wait_until_counted(waiting: subprocess.Popen[str], state: Path) -> int:
    """Write until `wait` has seen two notifications. No event shows when `wait` has found the new directory."""
    deadline = time.monotonic() + HANG
    while waiting.poll() is None:
        assert time.monotonic() < deadline
        state.write_text("1")
    assert waiting.stdout is not None
    assert [waiting.stdout.readline().split()[1:] for _ in range(2)] == [["inbound", "ihub_hwwd_irq"]] * 2
    return waiting.returncode


def test_wait_follows_a_recreated_directory(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    irq = tmp_path / "above/irq"
    irq.mkdir(parents=True)
    state = irq / "message_5_state"
    state.touch()
    waiting = started("wait", "ihub_hwwd_irq", "--irq-dir", irq, "--count", "2", "--timeout", str(HANG))
    state.unlink()
    irq.rmdir()
    irq.parent.rmdir()
    irq.mkdir(parents=True)
    assert wait_until_counted(waiting, state) == 0


@pytest.mark.parametrize("command", ["send", "wait"])
def test_missing_registers_are_an_error(tmp_path: Path, command: str) -> None:
    name, register = (
        ("redun_notify_irq", "message_6_trig") if command == "send" else ("ihub_hwwd_irq", "message_5_state")
    )
    missing = f"{tmp_path}/irq/{register}: missing: the proxy creates it (is a proxy running?)"
    assert error(run(command, name, "--irq-dir", tmp_path / "irq")) == (69, missing)
    (tmp_path / "irq").mkdir()
    assert error(run(command, name, "--irq-dir", tmp_path / "irq")) == (69, missing)
    assert list((tmp_path / "irq").iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "null"])
def test_a_trigger_that_is_not_a_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "message_6_trig"
    make: dict[str, Callable[[], None]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "symlink": lambda: path.symlink_to("/etc/passwd"),
        "null": lambda: path.symlink_to("/dev/null"),
    }
    make[kind]()
    assert error(run("send", "redun_notify_irq", "--irq-dir", tmp_path)) == (
        2,
        f"{path}: not a regular file",
    )


def test_send_as_core1(board: Board, started: Callable[..., subprocess.Popen[str]]) -> None:
    board.running()
    waiting = started("wait", "ihub_hwwd_irq", "--control", board.path, "--count", "30", "--timeout", str(HANG), "-q")
    done = run("send", "ihub_hwwd_irq", "--as", "core1", core1_link(board), "--count", "30")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ihub_hwwd_irq: 30 sent, as core 1 on {core1_link(board)}, in ")
    assert waiting.communicate(timeout=HANG) == ("", "")
    assert waiting.returncode == 0
    assert not (board.home / "core1").exists()


def test_wait_as_core1(board: Board) -> None:
    board.running()
    after = f"inco-trio send redun_notify_irq --irq-dir {board.irq} --count 20 -q"
    done = run(
        "wait",
        "redun_notify_irq",
        "--as",
        "core1",
        core1_link(board),
        "--count",
        "20",
        "--timeout",
        str(HANG),
        "--after",
        after,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["outbound", "redun_notify_irq"]] * 20


def test_core1_waits_for_its_own_signal_only(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core0:
        core0.bind(f"{tmp_path}/core0")
        waiting = started("wait", "a_irq", "--as", "core1", f"unix:{tmp_path}/core1,peer={tmp_path}/core0")
        for name in (b"b_irq", b"a_irq"):
            core0.sendto(encode(name, MAC), f"{tmp_path}/core1")
        out, _ = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, out.split()[1:]) == (0, ["outbound", "a_irq"])


def test_core1_waits_for_the_after_command_too(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
    command = [*PATIENT, "wait", "a_irq", "--as", "core1", link, "--after", f"echo listening; cat {fifo}"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core0,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting,
    ):
        core0.bind(f"{tmp_path}/core0")
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "listening\n"
        core0.sendto(encode(b"a_irq", MAC), f"{tmp_path}/core1")
        assert waiting.stdout.readline().endswith(" outbound a_irq\n")
        fifo.write_text("")  # End the --after command only now.
        assert (waiting.wait(HANG), waiting.stderr and waiting.stderr.read()) == (0, "")


def test_core1_sends_once_it_listens(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    link = f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core0:
        core0.bind(f"{tmp_path}/core0")
        core0.settimeout(HANG)
        waiting = started("wait", "a_irq", "--as", "core1", link, "--send", "b_irq", "--timeout", str(HANG))
        assert decode(core0.recv(2000)) == b"b_irq"
        core0.sendto(encode(b"a_irq", MAC), f"{tmp_path}/core1")
        out, _ = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, out.split()[1:]) == (0, ["outbound", "a_irq"])
    assert error(run("wait", "a_irq", "--as", "core1", link, "--send", "b_irq")) == (
        69,
        f"{tmp_path}/core1: the link accepts no frames: no process has bound {tmp_path}/core0 (Connection refused)",
    )
    assert error(run("wait", "a_irq", "--send", "b_irq")) == (
        2,
        "--send requires LINK and --as core1; without them, use --after 'inco-trio send SIGNAL'",
    )


def test_core1_times_out_or_reports_a_failed_command(tmp_path: Path) -> None:
    link = f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
    done = run("wait", "a_irq", "--as", "core1", link, "--timeout", "0.01")
    assert (done.returncode, done.stderr) == (1, "inco-trio: a_irq: 0 of 1 arrived within 0.01 s\n")
    done = run("wait", "a_irq", "--as", "core1", link, "--after", "exit 5")
    assert (done.returncode, done.stderr) == (4, "inco-trio: the command of --after failed: exit code 5\n")
    assert not (tmp_path / "core1").exists()


def test_core1_reports_a_missing_or_wrong_peer(board: Board) -> None:
    code, complaint = error(run("send", "ihub_hwwd_irq", "--as", "core1", core1_link(board)))
    assert code == 69
    home = board.home
    assert complaint.startswith(f"{home}/core1: the link accepts no frames: no process has bound {home}/core0")
    board.running()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"{board.home}/other")
        code, complaint = error(
            run("send", "ihub_hwwd_irq", "--as", "core1", f"unix:{board.home}/other,peer={board.home}/core0")
        )
    assert code == 69
    assert complaint.endswith("or use another path) (core 1's path comes first here, then peer=CORE0)")


def test_send_stops_at_its_timeout(board: Board) -> None:
    board.running()  # Without core 1, the proxy accepts no more notifications than it can queue.
    result = run(
        "send", "redun_notify_irq", "--control", board.path, "--count", "100000", "--timeout", "0.1s", "--json"
    )
    assert result.returncode == 1
    said = json.loads(result.stdout)
    assert (said["version"], said["count"]) == (1, 100000)
    assert said["sent"] < 100000
    assert result.stderr.endswith(f"redun_notify_irq: {said['sent']} of 100000 were sent\n")
    # When `send` acts as an application or as core 1, --rate makes it wait.
    board.core1()
    for words in (("--irq-dir", board.irq), ("--as", "core1", f"unix:{board.home}/c,peer={board.home}/core1")):
        done = run("send", "redun_notify_irq", *words, "--count", "9", "--rate", "1e-3", "--timeout", "10ms")
        assert (done.returncode, done.stdout) == (1, "")
        # If the start is slow, the time can run out before the first notification.
        assert re.fullmatch("inco-trio: redun_notify_irq: [01] of 9 were sent\n", done.stderr)


@pytest.mark.parametrize("command", ["send", "wait"])
def test_the_socket_of_core0_is_refused_for_core1(board: Board, command: str) -> None:
    pid = board.running().pid
    code, complaint = error(run(command, "ihub_hwwd_irq", "--as", "core1", board.link))
    assert code == 2
    assert complaint.startswith(f"{board.link}: is core 0's side of the link: process {pid} (")
    assert complaint.endswith(f" serves it, and receives only frames from core 1: use {core1_link(board)}")


@pytest.mark.netns
@pytest.mark.parametrize(
    "words",
    [("send", "a_irq", "--as", "core1"), ("wait", "a_irq", "--as", "core1"), ("replay", "a.pcapng")],
    ids=" ".join,
)
def test_the_interface_of_core0_is_refused_for_core1(
    cores: Cores, proxy: StartProxy, irq_dir: Path, words: tuple[str, ...]
) -> None:
    running = proxy("--irq-dir", irq_dir)
    # This pair has both ends in one network namespace.
    pair = ["ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0"]
    cores.core0.run(lambda: subprocess.run(pair, check=True))
    near = Proxy(cores.core0, ["near0", "--irq-dir", f"{irq_dir}-near"], {}, irq_dir.with_name("near.log"))
    try:
        near.wait_ready()
        for link, pid, use in (
            (cores.link, running.pid, "core 1's interface, which may be in another network namespace"),
            ("near0", near.pid, "core 1's interface far0"),
        ):
            code, complaint = error(cores.core0.run(functools.partial(run, *words, link)))
            assert code == 2
            assert complaint.startswith(f"{link}: is core 0's side of the link: process {pid} (")
            assert complaint.endswith(f" serves it, and receives only frames from core 1: use {use}")
    finally:
        near.close()


@pytest.mark.netns
def test_a_proxy_without_sockets_does_not_serve_the_link(cores: Cores, core1: Peer) -> None:
    """A proxy for a link of this name is starting in another namespace. Another program is listening on this link."""
    starting = [sys.executable, "-c", "print(flush=True); input()", "inco-trio", "run", cores.link]
    with subprocess.Popen(starting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        send = functools.partial(run, "send", "ihub_hwwd_irq", "--as", "core1", cores.link)
        sent = cores.core1.run(send)
        process.communicate("\n")
    assert (sent.returncode, sent.stderr) == (0, "")


@pytest.mark.netns
def test_core1_on_an_interface(cores: Cores, proxy: StartProxy, irq_dir: Path) -> None:
    proxy("--irq-dir", irq_dir)
    inside = [*PATIENT, "send", "ihub_hwwd_irq", "--as", "core1", cores.link, "--count", "100"]

    def send() -> subprocess.CompletedProcess[str]:
        return subprocess.run(inside, capture_output=True, text=True, timeout=HANG, check=False)

    after = ["wait", "ihub_hwwd_irq", "--irq-dir", str(irq_dir), "--count", "100", "--timeout", str(HANG), "-q"]
    with subprocess.Popen(
        [*PATIENT, *after, "--after", "echo listening"], stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "listening\n"
        done = cores.core1.run(send)
        assert (done.returncode, done.stderr) == (0, "")
        assert waiting.wait(HANG) == 0
    inside[3:] = ["send", "x", "--as", "core1", "nothing0"]
    code, complaint = error(cores.core1.run(send))
    assert code == 69
    assert complaint.startswith("nothing0: no such interface (available: ")
    assert "wait-link" not in complaint


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("send", "x", "--count", "0"), "argument --count: '0': expected an integer above 0 with at most 12 digits"),
        (("send", "x", "--count", "-1"), "argument --count: '-1': expected an integer above 0 with at most 12 digits"),
        (("send", "x", "--count", "9" * 5000), ": expected an integer above 0 with at most 12 digits"),
        (("send", "x", "--rate", "0"), "argument --rate: '0': expected a number above 0, such as 50 or 2k"),
        (("send", "x", "--rate", "nan"), "argument --rate: 'nan': expected a number above 0, such as 50 or 2k"),
        (("send", "x", "--rate", "inf"), "argument --rate: 'inf': expected a number above 0, such as 50 or 2k"),
        (("send", "x", "--rate", "many"), "argument --rate: 'many': expected a number above 0, such as 50 or 2k"),
        (
            ("wait", "x", "--timeout", "nan"),
            "argument --timeout: 'nan': expected a duration, 0 or more, such as",
        ),
        (
            ("wait", "x", "--timeout", "-1"),
            "argument --timeout: '-1': expected a duration, 0 or more, such as",
        ),
        (("send", "x", "--as", "core0", "l"), "--as core0: unknown core (expected core1)"),
        (("send", "x", "--as", "core1", "a/b"), "link 'a/b': expected unix:"),
        (("send", "a b", "--as", "core1", "l"), "'a b': a wire name is 1 to 64 printable ASCII characters"),
        (("send", "x", "l", "--as", "core1", "l"), "unrecognized arguments: l"),
        (("wait", "x", "--irq-dir", "a", "--config", "b"), "--irq-dir and --config are mutually exclusive"),
        (("wait", "x", "--irq-dir", ""), "--irq-dir: the path is empty"),
        (("send", "x", "--irq-dir", "/a"), "x: no such signal (expected one of: redun_notify_irq)"),
        (
            ("wait", "redun_notify_irq", "--irq-dir", "/a"),
            "redun_notify_irq: is not received by core 0: core 1 receives",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_invalid_arguments_are_refused(words: tuple[str, ...], complaint: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["exit 3", "kill -TERM $$", "no-such-program"])
def test_a_failed_after_command_fails_wait_too(tmp_path: Path, command: str) -> None:
    (tmp_path / "message_5_state").touch()
    done = run("wait", "ihub_hwwd_irq", "--irq-dir", tmp_path, "--after", command)
    how = {"exit 3": "exit code 3", "kill -TERM $$": "signal 15", "no-such-program": "exit code 127"}[command]
    assert done.returncode == 4
    assert done.stderr.endswith(f"inco-trio: the command of --after failed: {how}\n")


def test_wait_waits_for_the_after_command(tmp_path: Path) -> None:
    state = tmp_path / "message_5_state"
    state.touch()
    words = ("wait", "ihub_hwwd_irq", "--irq-dir", str(tmp_path), "-q", "--after")
    assert run(*words, f"echo 1 > {state}").returncode == 0
    assert run(*words, f"echo 1 > {state}; exec 1>&- 2>&-; read x < {tmp_path}/none; exit 4").returncode == 4
    # The timeout stops the --after command, whether or not the notification has arrived.
    os.mkfifo(tmp_path / "fifo")
    done = run(
        "wait", "ihub_hwwd_irq", "--irq-dir", tmp_path, "--timeout", "0.5", "--after", f"exec cat {tmp_path}/fifo"
    )
    assert (done.returncode, done.stderr) == (1, "inco-trio: ihub_hwwd_irq: 0 of 1 arrived within 0.5 s\n")
    timeout = 1
    while True:
        done = run(*words, f"echo 1 > {state}; exec cat {tmp_path}/fifo", "--timeout", str(timeout))
        if "0 of 1 arrived" not in done.stderr:
            break
        timeout *= 4  # On a busy machine, the command might not have written yet.
    assert (done.returncode, done.stderr) == (
        1,
        "inco-trio: the command was stopped: it was still running at the timeout\n",
    )


def test_children_of_the_after_command_are_stopped_with_it(tmp_path: Path) -> None:
    (tmp_path / "message_5_state").touch()
    # A child that inherits standard output would keep the pipe open and block this test.
    command = "cat > /dev/null & sleep 1000 & sleep 1000"
    done = run("wait", "ihub_hwwd_irq", "--irq-dir", tmp_path, "--timeout", "0.5", "--after", command)
    assert (done.returncode, done.stderr) == (1, "inco-trio: ihub_hwwd_irq: 0 of 1 arrived within 0.5 s\n")


def test_an_after_command_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "message_5_state").touch()
    # /bin/sh always exists here, so a NUL byte prevents the start, as a process limit would.
    code = "import sys; sys.argv[-1] = chr(0); from inco_trio.cli import main; sys.exit(main())"
    words = ["wait", "ihub_hwwd_irq", "--irq-dir", str(tmp_path), "--after", "x"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=HANG, check=False
    )
    exit_code, complaint = error(done)
    assert (exit_code, complaint.startswith("--after: cannot run the command: ")) == (71, True)


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    state = tmp_path / "message_5_state"
    state.touch()
    words = f"wait ihub_hwwd_irq --irq-dir {tmp_path} --count 3 --after 'for i in 1 2 3; do echo 1 > {state}; done'"
    shell = f"set -o pipefail; inco-trio {words} | true"
    done = subprocess.run(["/bin/bash", "-c", shell], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("way", ["proxy", "application", "core1"])
def test_ctrl_c_ends_wait(board: Board, started: Callable[..., subprocess.Popen[str]], way: str) -> None:
    board.running()
    options: dict[str, list[str | Path]] = {
        "proxy": ["ihub_hwwd_irq", "--control", board.path],
        "application": ["ihub_hwwd_irq", "--irq-dir", board.irq],
        "core1": ["redun_notify_irq", "--as", "core1", core1_link(board)],
    }
    waiting = started("wait", *options[way])
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=HANG)
    assert (waiting.returncode, out, err) == (-signal.SIGINT, "", "")
    assert not (board.home / "core1").exists()


def test_ctrl_c_reports_how_many_were_sent(tmp_path: Path) -> None:
    trigger = tmp_path / "message_6_trig"
    trigger.touch()
    words = ["send", "redun_notify_irq", "--irq-dir", str(tmp_path), "--count", "2", "--rate", "1e-300"]
    # Only when `send` pauses has it counted the notification.
    code = """
import sys, time, types
from inco_trio.cli import main, send
def sleep(seconds):
    print("pause", flush=True)
    time.sleep(seconds)
send.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
sys.exit(main())
"""
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "pause\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANG)
    assert (process.returncode, err) == (-signal.SIGINT, "inco-trio: redun_notify_irq: 1 of 2 were sent\n")


class Clock:
    """A stand-in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_schedule_does_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(send_command, "time", clock)
    schedule, sent = _Schedule(10, 4.0), list[tuple[float, int]]()

    def send(count: int) -> None:
        sent.append((clock.now - 100, count))
        # The third send takes a second; the next ones catch up.
        clock.now += 1.0 if len(sent) == 3 else 0.125

    schedule.follow(send)
    assert sent == [(0, 1), (0.25, 1), (0.5, 1), (1.5, 4), (1.75, 1), (2.0, 1), (2.25, 1)]
    assert schedule.sent == 10
    assert schedule.pause() >= 0
    assert _Schedule(10**30, None).due() == send_command.AT_ONCE
    assert _Schedule(1, None).pause() == 0


def test_a_single_error_in_groups_is_unwrapped() -> None:
    with pytest.raises(KeyboardInterrupt), alone():
        raise BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])])
    with pytest.raises(ExceptionGroup), alone():
        raise ExceptionGroup("", [ValueError(), ValueError()])


def test_send_starts_without_importing_trio(tmp_path: Path) -> None:
    (tmp_path / "message_6_trig").touch()
    (tmp_path / "message_5_state").touch()
    for words in (["send", "redun_notify_irq"], ["wait", "ihub_hwwd_irq", "--timeout", "0"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "inco_trio", *words, "--irq-dir", str(tmp_path), "-q"],
            capture_output=True, text=True, timeout=HANG, check=False,
        )  # fmt: skip
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "inco_trio.cli.signalling" in imported
        assert "trio" not in imported
