"""Tests of `inco-trio status` and `inco-trio monitor`, as users run them, with a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inco_trio.cli.monitor import Lines
from inco_trio.cli.status import _board_lines, _duration, _rate
from inco_trio.control.client import CHUNK, client_of, connect, sockets, wait_for_end
from inco_trio.control.client import Client as AskingClient
from inco_trio.control.place import silent_services
from inco_trio.control.protocol import REPLY_MAX, BoardStatus, Event, HistoryRequest, MonitorRequest
from inco_trio.errors import ProxyNotFoundError, ResourceError
from inco_trio.frame import encode
from inco_trio.metrics.openmetrics import textfile
from inco_trio.proxy_status import RivalStatus, SignalStatus, Status, TaskStatus
from inco_trio.signals import Direction
from inco_trio.simulation.world import Cores, Peer
from inco_trio.stats import Stats
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_control import LIMITS, MAC, PATIENT, Board, Client, Running, block, patient_clients
from tests.support_proxy import frame

GREETING = b'{"protocol": 1, "name": "x", "pid": 1, "boot": "5f0c", "boards": ["x"]}\n'


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patient_clients(monkeypatch)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    whole = [*PATIENT, *map(str, words)]
    return subprocess.run(
        whole, capture_output=True, text=True, timeout=HANG, check=False, env={**os.environ, **(env or {})}
    )


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:

        def started(*words: str | Path) -> Running:
            running = Running(*words)
            stack.callback(running.close)
            return running

        yield started


def test_status_shows_boards_signals_and_counters(board: Board) -> None:
    peer = board.core1()
    board.running()
    with ExitStack() as stack:
        client = Client(board.path, stack)
        client.ask({"request": "monitor"})
        board.inbound(peer)
        board.inbound(peer, encode(b"unknown", MAC))
        client.until(event="notification")
        client.until(event="ignored")
    done = run("status", "--control", board.path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, head, *rows = done.stdout.splitlines()
    assert re.fullmatch(rf"{board.home}/core0: up, open since [-\d]+ [:\d]+ \(.+\), descriptors not stored", first)
    assert second.startswith(f"  {board.link}: address ")
    assert head.split() == ["signal", "count", "per", "second", "last", "pending", "failures", "register"]
    cells = [row.split() for row in rows]
    assert [(row[0], row[1], row[2], row[-1]) for row in cells[:3]] == [
        ("in", "ihub_reset_irq", "0", f"{board.irq}/message_4_state"),
        ("in", "ihub_hwwd_irq", "1", f"{board.irq}/message_5_state"),
        ("out", "redun_notify_irq", "0", f"{board.irq}/message_6_trig"),
    ] or sorted(row[1] for row in cells[:3]) == ["ihub_hwwd_irq", "ihub_reset_irq", "redun_notify_irq"]
    assert rows[3] == "  counters: 2 received, 1 delivered, 1 unknown"


def test_status_shows_problems(board: Board) -> None:
    board.running()
    board.irq.rename(board.home / "away")
    with ExitStack() as stack:
        client = Client(board.path, stack)
        while not all(each["problem"] for each in client.ask({"request": "status"})["status"][0]["signals"]):
            pass
    out = run("status", "--control", board.path).stdout
    assert (
        f"{board.home}/core0: down (no process has bound {board.home}/core1 (No such file or directory)), open since"
        in out
    )
    assert re.search(rf"  ihub_hwwd_irq: {board.irq}/message_5_state: .*missing", out)


def test_status_as_json_and_openmetrics(board: Board) -> None:
    peer = board.core1()
    board.running()
    with ExitStack() as stack:
        client = Client(board.path, stack)
        client.ask({"request": "monitor"})
        board.inbound(peer)
        client.until(event="notification")
    shown = json.loads(run("status", "--control", board.path, "--json").stdout)
    (status,) = shown["boards"]
    assert shown["version"] == 1
    assert status["counters"]["received"] == 1
    text = run("status", "--control", board.path, "--openmetrics").stdout
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families["inco_trio_received_frames"].samples
    assert (sample.name, sample.value, sample.labels) == (
        "inco_trio_received_frames_total",
        1.0,
        {"proxy": f"{board.home}/core0", "board": f"{board.home}/core0", "link": board.link},
    )
    counts = {sample.labels["signal"]: sample.value for sample in families["inco_trio_notifications"].samples}
    assert counts == {"ihub_hwwd_irq": 1, "ihub_reset_irq": 0, "redun_notify_irq": 0}
    (last,) = families["inco_trio_last_notification_timestamp_seconds"].samples
    assert last.value == pytest.approx(status["signals"][1]["last"] or status["signals"][0]["last"] or 0, abs=1e9)
    assert {family.type for family in families.values()} <= {"counter", "gauge"}


def test_labels_of_any_kind_are_escaped() -> None:
    text = textfile({"p": [BoardStatus('a"b\\c\nd\udcff\x1b[31m\x9b\u202e', "x")]})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families["inco_trio_open"].samples
    assert (sample.labels["board"], sample.value) == ('a"b\\c\nd\\udcff\\x1b[31m\\x9b\\u202e', 0.0)


def test_status_watch_repeats_until_the_proxy_ends(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    proxy = board.running()
    watching = start("status", "--control", board.path, "--watch", "0.05", "--json")
    while json.loads(watching.line())["boards"][0]["counters"]["received"] == 0:
        if peer:
            board.inbound(peer)
    assert proxy.stop() == 0
    assert watching.end() == 69


def test_a_live_status_fits_a_narrow_terminal(board: Board) -> None:
    board.running()
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (10, 20))
    command = [*PATIENT, "status", "--control", str(board.path), "--watch", "0.05"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        try:
            while shown.count(b"\x1b[H") < 3:
                shown += os.read(master, 4096)
            # Python ignores a KeyboardInterrupt raised in a finalizer, so press Ctrl-C again, as a user would.
            interrupts = 0
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                interrupts += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)  # Wait before the next interrupt.
            with contextlib.suppress(OSError):  # EIO means that no process has the terminal open.
                while more := os.read(master, 4096):
                    shown += more
        except BaseException:
            process.kill()
            raise
    os.close(master)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.decode().replace("\r", ""))
    screens = plain.split("\x1b[H\x1b[J")[1:-1]
    for screen in screens:
        assert max(map(len, screen.splitlines())) <= 20
        assert len(screen.splitlines()) <= 10
    # A second interrupt can interrupt the end of the program.
    assert interrupts > 1 or b"Traceback" not in shown


COLOUR = b"\x1b[32mup"


def on_a_terminal(*words: str | Path, **environment: str) -> bytes:
    """Return the output of a command on a colour terminal with 200 columns."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (50, 200))
    known = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = {**known, "TERM": "xterm-256color", **environment}
    with subprocess.Popen([*map(str, words)], stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO means that no process has the terminal open.
            while more := os.read(master, 4096):
                shown += more
    os.close(master)
    assert process.returncode == 0, shown
    return shown


def test_status_uses_colours_on_a_terminal(board: Board) -> None:
    peer = board.core1()
    board.running()
    board.inbound(peer)
    while board.status()["counters"]["received"] == 0:
        pass
    status = ("status", "--control", board.path)
    assert COLOUR in on_a_terminal(*PATIENT, *status)
    assert COLOUR not in on_a_terminal(*PATIENT, *status, NO_COLOR="1")
    assert b"\x1b" not in run(*status).stdout.encode()
    hidden = f"import sys; sys.modules['rich'] = None\n{LIMITS}\nfrom inco_trio.cli import main; sys.exit(main())"
    plain = on_a_terminal(sys.executable, "-c", hidden, *status)
    assert b"\x1b" not in plain
    assert b": up, open since" in plain


def test_an_unknown_signal_is_reported_once(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    board.running()
    for words in (["monitor"], ["record", board.home / "f"]):
        monitor = start(
            *words, "--control", board.path, "--signal", "nobody", "--signal", "ihub_hwwd_irq", "--count", "1"
        )
        said = monitor.remark()
        assert said.startswith("inco-trio: nobody: not in the signal table (available: ")
        assert "ihub_hwwd_irq" in said
        monitor.remark()
        board.inbound(peer)
        assert monitor.end() == 0


def test_monitor_prints_each_notification(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    board.running()
    monitor = start("monitor", "--control", board.path, "--count", "3")
    monitor.listening()
    for sent in (None, encode(b"unknown", MAC), b"short", None):
        board.inbound(peer, *([sent] if sent else []))
    lines = [monitor.line() for _ in range(4)]
    board.trigger()
    shown = [line.split(" ", 1)[1].rstrip("\n") for line in [*lines, *iter(monitor.line, "")]]
    assert [re.sub(r"[\d.]+ s", "N s", line) for line in shown] == [
        "in  ihub_hwwd_irq",
        "ignored: unknown signal unknown",
        "ignored: malformed frame",
        "in  ihub_hwwd_irq +N s",
        "out redun_notify_irq",
    ]
    assert monitor.end() == 0


def test_monitor_explains_its_columns_except_for_json(board: Board, start: Callable[..., Running]) -> None:
    board.running()
    for words, explains in (((), True), (("--json",), False)):
        header = start("monitor", "--control", board.path, *words).remark()
        assert header.startswith("inco-trio: listening to ")
        assert ("+ time since the previous notification of the same signal" in header) is explains


@pytest.fixture
def boards(board: Board) -> dict[str, str]:
    """Start a proxy with the boards `a`, `b` and `c`, of which `c` cannot be opened. Return the environment to use."""
    runtime = board.home / "runtime/inco-trio"
    runtime.mkdir(parents=True)
    (board.home / "boards").mkdir()
    for name in "abc":
        entry = {"link": f"unix:{board.home}/{name}.0,peer={board.home}/{name}.1", "irq_dir": f"{board.home}/{name}"}
        (board.home / f"boards/{name}.json").write_text(json.dumps(entry))
    (board.home / "c").touch()
    board.path = runtime / "boards.sock"
    arguments = ["--boards", str(board.home / "boards"), "--control", str(board.path)]
    proxy = Proxy(None, arguments, {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    return {"XDG_RUNTIME_DIR": str(runtime.parent)}


def test_the_name_of_a_board_selects_the_board(board: Board, boards: dict[str, str]) -> None:
    """LINK may be the name of a board, as in `history b`. All commands that report must leave out the other boards."""
    done = run("status", "b", "--json", env=boards)
    assert [each["board"] for each in json.loads(done.stdout)["boards"]] == ["b"]
    done = run("history", "b", "--json", env=boards)
    assert {json.loads(line)["board"] for line in done.stdout.splitlines()} == {"b"}
    done = run("status", "--control", board.path, "--json")
    assert sorted(each["board"] for each in json.loads(done.stdout)["boards"]) == ["a", "b", "c"]
    for command in (["monitor", "b", "--json"], ["record", str(board.home / "f"), "b"]):
        with subprocess.Popen(
            [*PATIENT, *command, "--count", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **boards},
        ) as process:  # fmt: skip
            assert process.stderr is not None
            process.stderr.readline()
            peers = []
            for name in "ab":
                peers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                board._stack.callback(peers[-1].close)
                Path(f"{board.home}/{name}.1").unlink(missing_ok=True)
                peers[-1].bind(f"{board.home}/{name}.1")
                peers[-1].sendto(encode(b"ihub_hwwd_irq", MAC), f"{board.home}/{name}.0")
            out, _ = process.communicate(timeout=HANG)
        assert process.returncode == 0
        assert {json.loads(line)["board"] for line in out.splitlines()} <= {"b"}
    content = (board.home / "f").read_bytes()
    assert f"{board.home}/b/message_5_state".encode() in content
    assert f"{board.home}/a/".encode() not in content


@pytest.mark.parametrize("command", [["status"], ["monitor"], ["history"], ["record", "FILE"]], ids=" ".join)
def test_a_board_that_is_not_open_is_named_with_the_reason(
    board: Board, boards: dict[str, str], command: list[str]
) -> None:
    done = run(*(word.replace("FILE", str(board.home / "f")) for word in command), "c", env=boards)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith("inco-trio: error: board 'c': not open: ")
    assert f"{board.home}/c" in done.stderr


@pytest.mark.parametrize(
    "command",
    [["send", "redun_notify_irq"], ["wait", "ihub_hwwd_irq"], ["history"], ["history", "--signal", "ihub_hwwd_irq"],
     ["record", "FILE", "--past"]],
    ids=" ".join,
)  # fmt: skip
def test_a_board_that_is_not_open_and_given_as_an_option_is_named(
    board: Board, boards: dict[str, str], command: list[str]
) -> None:
    words = [word.replace("FILE", str(board.home / "f")) for word in command]
    for place in ([], ["--control", str(board.path)]):
        done = run(*words, *place, "--board", "c", env=boards)
        assert (done.returncode, done.stdout) == (69, "")
        assert re.fullmatch(r"inco-trio: error: board 'c': not open: .*\n", done.stderr)
        assert f"{board.home}/c" in done.stderr


@pytest.mark.netns
@pytest.mark.parametrize(
    "command", [["send", "redun_notify_irq"], ["wait", "ihub_hwwd_irq"], ["history"], ["record", "FILE", "--past"]],
    ids=" ".join,
)  # fmt: skip
def test_a_board_is_named_if_no_board_is_open(board: Board, tmp_path: Path, command: list[str]) -> None:
    board.link = "nothere0"
    board.start("--wait-link").wait_log("waiting for the link")
    done = run(*(word.replace("FILE", str(tmp_path / "f")) for word in command), "--control", board.path)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "inco-trio: error: board 'nothere0': not open: the link does not exist yet\n"
    refusal = board.client().ask({"request": "send", "signal": "redun_notify_irq"})
    assert refusal["error"] == "not-open"


def test_monitor_names_the_board_of_each_event_of_several_boards(
    board: Board, boards: dict[str, str], start: Callable[..., Running]
) -> None:
    for words, prefix in ((("--control", board.path), "b: "), (("--control", board.path, "--board", "b"), "")):
        monitor = start("monitor", *words)
        monitor.listening()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(f"{board.home}/b.1")
            peer.sendto(encode(b"ihub_hwwd_irq", MAC), f"{board.home}/b.0")
            while "in  ihub_hwwd_irq" not in (line := monitor.line()):
                pass
        Path(f"{board.home}/b.1").unlink()
        assert line.partition(" ")[2].startswith(f"{prefix}in  ihub_hwwd_irq")


def test_monitor_filters_and_prints_json(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    board.running()
    words = ("--signal", "redun_notify_irq", "--direction", "outbound", "--json", "--count", "1")
    monitor = start("monitor", "--control", board.path, *words)
    monitor.listening()
    board.inbound(peer)
    board.trigger()
    (line,) = iter(monitor.line, "")
    assert json.loads(line)["signal"] == "redun_notify_irq"
    assert monitor.end() == 0


def test_monitor_reports_link_changes_and_ends_with_the_proxy(board: Board, start: Callable[..., Running]) -> None:
    proxy = board.running()
    monitor = start("monitor", "--control", board.path)
    monitor.listening()
    peer = board.core1()
    assert "the link came up" in monitor.line()
    peer.close()
    line = monitor.line()
    assert "the link went down" in line
    assert line.endswith(f": no process has bound {board.home}/core1 (Connection refused)\n")
    assert proxy.stop() == 0
    assert monitor.remark() == f"inco-trio: error: {board.path}: the proxy has ended\n"
    assert monitor.end() == 69


def test_a_closed_pipe_is_not_an_error(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    board.running()
    monitor = start("monitor", "--control", board.path)
    monitor.listening()
    assert monitor.process.stdout is not None
    board.inbound(peer)
    monitor.line()
    monitor.process.stdout.close()
    ended = threading.Event()

    def keep_sending() -> None:
        while not ended.wait(0.01):  # Limit the rate of notifications.
            board.inbound(peer)

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        assert monitor.process.wait(HANG) == 0
    finally:
        ended.set()
        sender.join()
    assert monitor.process.stderr is not None
    assert monitor.process.stderr.read() == ""


@pytest.mark.netns
def test_monitor_listens_on_the_interface_without_a_proxy(
    cores: Cores, core1: Peer, proxy: StartProxy, tmp_path: Path
) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    running = proxy("--irq-dir", tmp_path / "irq", "--control", "none")
    # Hide the control sockets of other proxies in /run: they could serve a link with the same name.
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs inco-trio-test /run && exec "$@"', "sh"]
    command = [*hidden, *PATIENT, "monitor", cores.link, "--json", "--count", "2"]

    def popen() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    with cores.core0.run(popen) as monitor:
        assert monitor.stdout is not None
        try:
            assert "listening on" in json.loads(monitor.stdout.readline())["message"]
            core1.send_raw(frame(MAC, b"\0"))
            core1.send_raw(frame(MAC, b"ihub_hwwd_irq"))
            (tmp_path / "irq/message_6_trig").write_text("1")
            events = [json.loads(line) for line in monitor.stdout]
            assert monitor.wait(HANG) == 0
        finally:
            monitor.kill()
    assert [(each["event"], each.get("direction"), each["signal"]) for each in events] == [
        ("ignored", "inbound", None),
        ("notification", "inbound", "ihub_hwwd_irq"),
        ("notification", "outbound", "redun_notify_irq"),
    ]
    assert running.stop() == 0


@pytest.mark.parametrize("command", ["status", "monitor"])
def test_a_missing_proxy_is_an_error(command: str, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    done = run(command, "--control", path)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == f"inco-trio: error: {path}: no proxy is listening on this socket\n"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert run(command, "--control", path).returncode == 69
    done = run(command, "--control", path, "rpmsg0")
    assert (done.returncode, done.stderr) == (
        2,
        "inco-trio: error: --control and LINK are mutually exclusive: each selects a proxy\n",
    )
    done = run(command, "no such link", env={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert done.returncode == 69
    assert f"no proxy of no such link answers in /run/inco-trio or {tmp_path}/inco-trio" in done.stderr


def test_the_proxy_of_a_link_is_found(board: Board, tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    proxies = tmp_path / "inco-trio"
    proxies.mkdir()
    board.path = proxies / "a.sock"
    board.running()
    for link in (board.link, f"{board.home}/core0"):
        (status,) = json.loads(run("status", link, "--json", env=environment).stdout)["boards"]
        assert status["link"] == board.link
    (proxies / "b.sock").symlink_to(board.path)
    # If a proxy's socket has two paths, `status` shows the proxy only once.
    assert run("status", env=environment).stdout.count("open since") == 1
    assert len(json.loads(run("status", "--json", env=environment).stdout)["boards"]) == 1


@pytest.mark.tools
def test_status_shows_all_proxies_and_other_commands_need_one(board: Board, tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    (tmp_path / "inco-trio").mkdir()
    board.path = tmp_path / "inco-trio/a.sock"
    board.running()
    links = [board.link, f"unix:{tmp_path}/o0,peer={tmp_path}/o1"]
    other = Proxy(
        None,
        [links[1], "--irq-dir", str(tmp_path / "other"), "--control", str(tmp_path / "inco-trio/b.sock")],
        {},
        tmp_path / "other.log",
    )
    try:
        other.wait_ready()
        boards = json.loads(run("status", "--json", env=environment).stdout)["boards"]
        assert [each["link"] for each in boards] == links
        assert run("status", env=environment).stdout.count("open since") == 2
        assert [
            json.loads(run("status", "--board", each["board"], "--json", env=environment).stdout)["boards"][0]["link"]
            for each in boards
        ] == links
        done = run("status", "--board", "x", env=environment)
        assert (done.returncode, "board 'x': unknown" in done.stderr) == (2, True)
        text = run("status", "--openmetrics", env=environment).stdout
        families = {family.name: family for family in text_string_to_metric_families(text)}
        proxies = [sample.labels["proxy"] for sample in families["inco_trio_sent_frames"].samples]
        assert proxies == [f"{board.home}/core0", f"{tmp_path}/o0"]
        # node_exporter and promtool use the same parser.
        linted = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=HANG
        )
        assert "error while" not in linted.stderr
        assert linted.returncode in (0, 3), linted.stderr
        done = run("monitor", env=environment)
        assert done.returncode == 2
        assert f"2 proxies answer: name one of {board.home}/core0 (--control {board.path}, process " in done.stderr
        start = [*PATIENT, "status", "--watch", "0.05", "--json"]
        with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as watching:
            assert watching.stdout is not None
            assert len(json.loads(watching.stdout.readline())["boards"]) == 2
            assert other.stop() == 0
            for _ in watching.stdout:
                pass
        assert watching.returncode == 69
    finally:
        other.close()


def test_a_server_that_is_not_a_proxy_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    for said, code, text in (
        (b"hello\n", 69, "the process listening there is not inco-trio"),
        (b"{}\n", 69, "the process listening there is not inco-trio"),
        (b"", 69, "the proxy has ended"),
        (b'{"error": "busy", "message": "256 clients are connected already"}\n', 71, "256 clients"),
        (GREETING + b"nonsense\n", 69, "the process listening there is not inco-trio"),
        (GREETING.replace(b": 1,", b": 2,", 1), 69, "the proxy uses protocol 2, this program 1"),
        (b"[" * 100_000 + b"\n", 69, "the line is not JSON"),
        (GREETING + b'{"status": [{"board": "x", "open": true}]}\n', 69, "status[0].status.link: missing"),
        (GREETING + b'{"sent": 1}\n', 69, "the response to status lacks status"),
        (b"x" * (REPLY_MAX + 1), 69, f"a line is longer than {REPLY_MAX} bytes"),
    ):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(1)

            def answer(server: socket.socket = server, said: bytes = said) -> None:
                client, _ = server.accept()
                with client:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        client.sendall(said)
                        client.shutdown(socket.SHUT_WR)
                    select.select([client], [], [], HANG)

            thread = threading.Thread(target=answer)
            thread.start()
            done = run("status", "--control", path)
            thread.join()
        path.unlink()
        assert done.returncode == code
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """Yield `server(said)`, which starts a server that sends only `said` to its first client, and returns its path."""
    with ExitStack() as stack:

        def start(said: bytes) -> Path:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.sock"
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen(1)

            def answer() -> None:
                client, _ = listening.accept()
                stack.callback(client.close)
                client.sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            stack.callback(thread.join)
            return path

        yield start


def test_a_proxy_that_stops_answering_is_an_error(server: Callable[[bytes], Path]) -> None:
    with AskingClient(server(GREETING)) as client, pytest.raises(ProxyNotFoundError, match="the proxy does not answer"):
        client.status(patience=0.05)


def test_a_response_that_has_arrived_is_read_even_after_the_timeout(server: Callable[[bytes], Path]) -> None:
    event = b'{"event": "link", "running": true, "time": 1.5}\n'
    many = 2 * CHUNK // len(event)
    ours, theirs = socket.socketpair()
    with theirs, AskingClient(server(GREETING)) as client, contextlib.closing(client._sock):
        client._sock = ours
        theirs.sendall(many * event + b'{"monitor": true}\n')
        client.request(MonitorRequest(), patience=0)
        assert len(client.arrived()) == many
        with pytest.raises(ProxyNotFoundError, match="the proxy does not answer"):
            client.request(MonitorRequest(), patience=0)


def test_a_late_response_is_not_the_response_to_the_next_request(board: Board) -> None:
    proxy = board.running()
    with AskingClient(board.path) as client:
        wait_stopped(proxy.pid)
        with pytest.raises(ProxyNotFoundError, match="the proxy does not answer"):
            client.request(HistoryRequest(), patience=0)
        proxy.process.send_signal(signal.SIGCONT)
        assert [each.board for each in client.status()] == [*client.greeting.boards]


def test_events_that_come_before_the_answer_are_kept(server: Callable[[bytes], Path]) -> None:
    event = b'{"event": "link", "running": true, "time": 1.5}\n'
    with AskingClient(server(GREETING + event + b'{"monitor": true}\n')) as client:
        client.request(MonitorRequest())
        assert next(client.events(0.05)) == Event("link", time=1.5, running=True)
        wait_for_end([client], 0.01)


def test_the_sockets_of_systemd_units_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path, tmp_path / "missing"])
    (tmp_path / "rpmsg4000").mkdir()
    paths = [tmp_path / "b.sock", tmp_path / "rpmsg4000/control.sock"]
    for path in paths:
        path.touch()
    assert sockets() == paths


def test_proxies_of_other_links_are_skipped(
    server: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path, tmp_path / "missing"])
    with pytest.raises(ProxyNotFoundError, match=f"no proxy of y answers in {tmp_path} or "):
        connect("y", None)
    server(GREETING)
    with pytest.raises(ProxyNotFoundError, match="no proxy of y answers"):
        connect("y", None)
    for path in tmp_path.iterdir():
        path.unlink()
    server(b'{"error": "busy", "message": "later"}\n')
    with pytest.raises(ResourceError, match="later"):
        connect("y", None)
    for path in tmp_path.iterdir():
        path.unlink()
    server(GREETING)
    assert client_of(2) is None
    for path in tmp_path.iterdir():
        path.unlink()
    server(b"nonsense\n")
    assert client_of(2) is None


def test_silent_sockets_are_asked_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections must be open at the same time, so that no silent socket delays the others."""
    number = 5
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    monkeypatch.setattr("inco_trio.control.client.SEARCH", HANG)
    together = threading.Barrier(number)
    with ExitStack() as stack:

        def accept(listening: socket.socket) -> None:
            with listening.accept()[0]:
                together.wait(HANG / 2)

        threads = []
        for each in range(number):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(tmp_path / f"{each}.sock"))
            listening.listen(1)
            threads.append(threading.Thread(target=accept, args=(listening,)))
            threads[-1].start()
        with pytest.raises(ProxyNotFoundError, match="no running proxy answers"):
            connect(None, None)
        for thread in threads:
            thread.join(HANG)
        assert not together.broken


def test_a_proxy_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process still has its control socket, so "start one" would be the wrong advice."""
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    monkeypatch.setattr("inco_trio.control.client.SEARCH", 0.1)
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        text = f"{path} exists, but its proxy does not answer (`inco-trio doctor` shows why), or name its socket"
        for link, wanted in ((None, "no running proxy"), ("l0", "no proxy of l0")):
            with pytest.raises(ProxyNotFoundError) as caught:
                connect(link, None)
            assert str(caught.value).startswith(f"{wanted} answers in {tmp_path}: {text}")


def test_connect_waits_for_a_full_backlog(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(path))
        listening.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(path))
        with pytest.raises(ProxyNotFoundError, match="does not answer"):
            AskingClient(path, 0.1)

        def answer() -> None:
            for _ in range(2):
                stack.enter_context(client := listening.accept()[0])
                client.sendall(GREETING)

        thread = threading.Thread(target=answer)
        thread.start()
        with AskingClient(path) as client:
            assert client.greeting.name == "x"
        thread.join()


def test_a_slow_drip_does_not_extend_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)

        def drip() -> None:
            client, _ = listening.accept()
            with client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while not ended.wait(0.02):
                    client.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(ProxyNotFoundError, match="does not answer"):
                AskingClient(path, 0.2)
        finally:
            ended.set()
            thread.join()


@pytest.mark.netns
def test_another_user_gets_a_permission_error(board: Board, nobody: list[str]) -> None:
    board.running()
    board.home.chmod(0o711)
    board.path.parent.chmod(0o711)
    command = [*nobody[:2], str(board.home), *nobody[2:], *PATIENT, "status", "--control", str(board.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 77
    assert done.stderr == (
        f"inco-trio: error: {board.path}: only root, the user of the proxy and its group may connect"
        " (run as one of them)\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (7, "7.0 s"), (60, "1 min"), (3600 * 5 + 120, "5 h 2 min"), (86400 * 3 + 7200, "3 d 2 h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0"), (1e-6, "<0.001"), (0.0012, "0.0012"), (12.34, "12.3"), (999.4, "999"), (999.6, "1000"), (5e4, "50000")],
)
def test_rates_have_no_exponent(rate: float, text: str) -> None:
    assert _rate(rate) == text


def test_a_board_is_described_in_words() -> None:
    assert [*_board_lines(BoardStatus("b", "no room"), None, None)] == ["b: not open: no room"]
    signal = SignalStatus("s", Direction.INBOUND, "/s", 9, 1.0, 3, 2, "cannot write")
    task = TaskStatus("send", 2, None, "No buffer space available")
    status = Status("b", 1.0, 1.0, True, "d", "systemd", Stats(), (signal,), (task,))
    past = attrs.evolve(status, signals=(attrs.evolve(signal, count=5),))
    first, _, _, row, problem, restarted = _board_lines(BoardStatus("b", "", status), 2.0, past)
    assert first.endswith("descriptors stored by systemd")
    assert row.split()[:4] == ["in", "s", "9", "2"]
    assert row.split()[-3:] == ["2", "3", "/s"]
    assert problem == "  s: /s: cannot write"
    assert restarted == "  send: restarted 2 times; last: No buffer space available"
    failing = attrs.evolve(status, tasks=(TaskStatus("send", 0, "cannot send", None),))
    assert [*_board_lines(BoardStatus("b", "", failing), None, None)][-1] == "  send: cannot send"
    once = attrs.evolve(status, tasks=(attrs.evolve(task, restarts=1),), last_down=1.0, counters=Stats(link_downs=1))
    down_now = BoardStatus("b", "", attrs.evolve(status, running=False, down_reason="no carrier"))
    assert next(_board_lines(down_now, None, None)).startswith("b: down (no carrier), open since ")
    _, _, _, _, _, restarted, down, _ = _board_lines(BoardStatus("b", "", once), None, None)
    assert restarted.startswith("  send: restarted 1 time; ")
    assert down.startswith("  the link went down 1 time, last ")
    assert down.endswith(" ago")
    brief = attrs.evolve(once, last_down_duration=0.25, last_down_reason="no carrier")
    assert [*_board_lines(BoardStatus("b", "", brief), None, None)][-2].endswith(" ago for 250 ms: no carrier")
    shared = BoardStatus("b", "", attrs.evolve(status, rivals=(RivalStatus(7, 1.0, ("b", "/irq")),)))
    *_, rival = _board_lines(shared, None, None)
    assert re.fullmatch("  another proxy, process 7, has shared b, /irq for .*: run: inco-trio doctor", rival)


def test_events_are_described_in_words() -> None:
    lines = Lines()

    def line(event: str, **fields: Any) -> str:
        return lines.line(Event(event, time=0.25, **fields)).split(" ", 1)[1]

    assert line("lost", count=3) == "3 events lost: they arrived faster than they could be printed"
    assert line("problem", level="warning", message="m") == "warning: m"
    assert line("new", board="b") == "b: info: new"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("status", "--watch", "0"), "'0': expected a duration above 0"),
        (("status", "--watch", "nan"), "'nan': expected a duration above 0"),
        (("status", "--watch", "x"), "'x': expected a duration above 0"),
        (("monitor", "--count", "0"), "'0': expected an integer above 0"),
        (("monitor", "--count", "9" * 5000), "expected an integer above 0"),
        (("monitor", "--direction", "up"), "invalid choice: 'up'"),
        (("status", "--watch", "--openmetrics"), "--watch and --openmetrics are mutually exclusive"),
    ],
)
def test_invalid_options_are_refused(words: tuple[str, ...], text: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert text in done.stderr


def test_a_pending_notification_is_not_shown_as_delivered(board: Board, start: Callable[..., Running]) -> None:
    peer = board.core1()
    board.running()
    state = board.irq / "message_5_state"
    block(state)
    with ExitStack() as stack:
        client = Client(board.path, stack)
        client.ask({"request": "monitor"})
        monitor = start("monitor", "--control", board.path)
        monitor.listening()
        sent = time.monotonic_ns()
        board.inbound(peer)
        pending = client.until(event="pending")
        assert (pending["signal"], pending["direction"]) == ("ihub_hwwd_irq", "inbound")
        assert (pending["register"], pending["reason"]) == (
            str(state),
            "cannot write: not a regular file but a directory",
        )
        board.inbound(peer, encode(b"ihub_reset_irq", MAC))
        # Meanwhile, the other signal is delivered, but the pending one is not.
        assert client.until(event="notification")["signal"] == "ihub_reset_irq"
        state.rmdir()
        late = client.until(event="notification")
        assert late["signal"] == "ihub_hwwd_irq"
        # The notification became pending after the frame was sent, and before the event.
        least, most = ((late["monotonic_ns"] - begin) / 1e9 for begin in (pending["monotonic_ns"], sent))
        assert least - 1e-4 <= late["delay"] <= most + 1e-4
        shown = ""
        while "was pending for" not in shown:
            shown += monitor.line()
    assert "in  ihub_hwwd_irq pending: cannot write: not a regular file but a directory\n" in shown
    assert shown.index("in  ihub_reset_irq\n") < shown.index("in  ihub_hwwd_irq (was pending for ")


def test_a_trigger_is_pending_while_the_link_is_down(board: Board) -> None:
    board.running()
    with ExitStack() as stack:
        client = Client(board.path, stack)
        client.ask({"request": "monitor"})
        board.trigger()
        pending = client.until(event="pending")
        assert (pending["signal"], pending["direction"]) == ("redun_notify_irq", "outbound")
        (signal,) = [each for each in board.status()["signals"] if each["signal"] == "redun_notify_irq"]
        assert (signal["count"], signal["pending"]) == (0, 1)
        peer = board.core1()
        sent = client.until(event="notification")
        assert (sent["signal"], sent["sequence"]) == ("redun_notify_irq", 1)
        assert sent["delay"] > 0
        peer.recv(2000)
        board.trigger()
        assert "delay" not in client.until(event="notification")


def test_a_service_without_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("inco_trio.control.place.runtime_directories", lambda: [tmp_path, tmp_path / "missing"])
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    (tmp_path / "boards.sock").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/control.sock").touch()
    assert silent_services() == []
    (tmp_path / "rpmsg4000").mkdir()
    services = "the service of rpmsg4000 does not answer (start it, or see its log: "
    expected = f"no proxy of x answers in {tmp_path}: {services}"
    with pytest.raises(ProxyNotFoundError, match=re.escape(expected)):
        connect("x", None)
