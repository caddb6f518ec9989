"""Tests of the exporter with real proxies: its metrics, the dashboard and the alerts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from inco_trio.errors import ResourceError
from inco_trio.metrics import http_server
from inco_trio.metrics.http_server import Boards
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.mosquitto import Gateway, free_port
from tests.support_control import COMMAND, Board, no_descriptors, no_threads

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[1]
GREETING = b'{"protocol": 1, "boards": [], "name": "x", "pid": 1, "boot": "5f0c"}\n'
PAGE = (ROOT / "docs/metrics.md").read_text()
Samples = dict[str, list[tuple[dict[str, str], float]]]


LIMITS = ("PATIENCE", "BUSY", "ALL", "REQUEST_PATIENCE")
"""The limits of the exporter in seconds that a slow process could reach."""
PATIENT = f"""
import os
from inco_trio.cli import main
from inco_trio.metrics import http_server
for limit in {LIMITS}:
    setattr(http_server, limit, {HANG})
converse = http_server.converse
def converse_or_give_up(path, patience):
    return converse(path, 0.1 if os.path.exists(f"{{path}}.stopped") else patience)
http_server.converse = converse_or_give_up
main()
"""
"""A program that runs inco-trio, but waits for slow proxies, except for those with a file `SOCKET.stopped`."""


class Bench:
    """A directory of control sockets, and an exporter for all sockets in it."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.stack = home, stack
        self.port = free_port()

    def exporter(self, *controls: Path) -> Gateway:
        words = [word for path in controls for word in ("--control", str(path))]
        log = self.home / "exporter.log"
        exporter = Gateway(log, "exporter", "--listen", f"127.0.0.1:{self.port}", *words, program=("-c", PATIENT))
        self.stack.callback(exporter.close)
        exporter.wait_ready()
        return exporter

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=HANG) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            text: str = answer.read().decode()
            return text

    def samples(self) -> Samples:
        found: Samples = {}
        for family in parse(self.scrape()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in LIMITS:
        monkeypatch.setattr(http_server, limit, HANG)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def board(bench: Bench, name: str) -> Board:
    home = bench.home / name
    home.mkdir()
    return Board(home, bench.stack)


@contextlib.contextmanager
def answering(path: Path, lines: bytes) -> Iterator[None]:
    """Listen on a control socket and send `lines` to each client."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.sendall(lines)
                        client.recv(4096)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_counters_of_a_board_are_exported(bench: Bench) -> None:
    one = board(bench, "one")
    peer = one.core1()
    one.running()
    client = one.client()
    client.ask({"request": "follow"})
    watching = one.client()
    watching.ask({"request": "monitor"})
    bench.exporter(one.path)
    for _ in range(3):
        one.inbound(peer)
        watching.until(event="notification")
    samples = bench.samples()
    name = f"{one.home}/core0"
    where = {"proxy": name, "board": name, "link": one.link}
    signal_of = {**where, "direction": "inbound", "signal": "ihub_hwwd_irq"}
    assert (signal_of, 3.0) in samples["inco_trio_notifications_total"]
    assert (where, 3.0) in samples["inco_trio_received_frames_total"]
    assert (where, 1.0) in samples["inco_trio_link_up"]
    assert (where, 3.0) in samples["inco_trio_unacknowledged_notifications"]
    assert (where, 1.0) in samples["inco_trio_followed"]
    assert samples["inco_trio_proxy_up"] == [({"proxy": name}, 1.0)]


def test_a_stopped_or_dead_proxy_does_not_delay_others(bench: Bench) -> None:
    one, two = board(bench, "one"), board(bench, "two")
    proxies = [one.running(), two.running()]
    exporter = bench.exporter(one.path, two.path)
    names = [f"{each.home}/core0" for each in (one, two)]

    def up() -> dict[str, float]:
        return {labels["proxy"]: value for labels, value in bench.samples()["inco_trio_proxy_up"]}

    assert up() == dict.fromkeys(names, 1.0)
    wait_stopped(proxies[0].pid)
    stopped = Path(f"{one.path}.stopped")
    stopped.touch()
    for _ in range(2):
        assert up() == {names[0]: 0.0, names[1]: 1.0}
    stopped.unlink()
    proxies[0].process.send_signal(signal.SIGCONT)
    assert up() == dict.fromkeys(names, 1.0)
    proxies[1].stop()
    assert up() == {names[0]: 1.0, names[1]: 0.0}
    assert exporter.log.count("does not answer") == 1
    assert "Traceback" not in exporter.log
    assert exporter.end() == 0


def test_stopped_proxies_time_out_in_parallel(bench: Bench) -> None:
    paths = [bench.home / f"{number}.sock" for number in range(40)]
    listening = [bench.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in paths]
    for one, path in zip(listening, paths, strict=True):
        one.settimeout(HANG)
        one.bind(os.fspath(path))
        one.listen(1)
    with ThreadPoolExecutor(1) as pool, ExitStack() as asked:
        scraped = pool.submit(trio.run, Boards(paths).metrics)
        # The exporter queries all proxies before the first one times out.
        clients = [asked.enter_context(one.accept()[0]) for one in listening]
        for client in clients:
            client.close()
        (up,) = [family for family in parse(scraped.result()) if family.name == "inco_trio_proxy_up"]
    assert [sample.value for sample in up.samples] == [0.0] * 40


def test_duplicate_and_unusual_names_are_distinguished(bench: Bench) -> None:
    """Two network namespaces can have interfaces, and thus proxies, with the same name."""
    odd = ["eth0", "eth0", 'a"b\\c', "\N{SNOWMAN}", "line\nbreak"]
    paths = []
    for number, name in enumerate(odd):
        greeting = {"protocol": 1, "boards": [], "name": name, "pid": 1, "boot": "5f0c"}
        answers = json.dumps(greeting) + "\n" + json.dumps({"status": []}) + "\n"
        paths.append(bench.home / f"{number}.sock")
        bench.stack.enter_context(answering(paths[-1], answers.encode()))
    bench.exporter(*paths)
    samples = bench.samples()
    up = {labels["proxy"]: value for labels, value in samples["inco_trio_proxy_up"]}
    assert up == dict.fromkeys(["eth0", str(paths[1]), *odd[2:]], 1.0)
    assert samples["inco_trio_proxies"] == [({}, 5.0)]


@pytest.mark.parametrize(
    "lines",
    [
        b'{"protocol": 1, "boards": []}\n',
        GREETING + b"{}\n",
        GREETING + b'{"status": [{"open": true, "board": "b"}]}\n',
        GREETING + b'{"status": [3]}\n',
        b"nonsense\n",
    ],
)
def test_a_foreign_process_at_a_socket_does_not_delay_others(bench: Bench, lines: bytes) -> None:
    one = board(bench, "one")
    one.running()
    path = bench.home / "other.sock"
    with answering(path, lines):
        exporter = bench.exporter(one.path, path)
        values = [value for _, value in bench.samples()["inco_trio_proxy_up"]]
        assert sorted(values) == [0.0, 1.0]
    assert "Traceback" not in exporter.log


def test_concurrent_scrapes_share_one_query(tmp_path: Path) -> None:
    """100 concurrent scrapes open only one connection to the proxy."""
    path, number = tmp_path / "x.sock", 100
    connections = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await stream.send_all(GREETING)
        await stream.receive_some(4096)
        # Answer only when all scrapes are waiting.
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(b'{"status": []}\n')

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            sock.listen()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            boards = Boards([path])
            answers: list[str] = []

            async def scrape() -> None:
                answers.append(await boards.metrics())

            async with trio.open_nursery() as server:
                server.start_soon(trio.serve_listeners, answer, [listener])
                async with trio.open_nursery() as scrapes:
                    for _ in range(number):
                        scrapes.start_soon(scrape)
                server.cancel_scope.cancel()
            assert len(answers) == number
            assert set(answers) == {answers[0]}
            assert 'inco_trio_proxy_up{proxy="x"} 1' in answers[0]

    trio.run(main)
    assert connections == 1


BUSY = b'{"error": "busy", "message": "256 clients are connected already"}\n'


@pytest.mark.parametrize("attempts", [3, 0])
def test_a_proxy_with_too_many_clients_is_not_reported_as_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attempts: int
) -> None:
    path, connections = tmp_path / "x.sock", 0
    monkeypatch.setattr(http_server, "BUSY", HANG if attempts else 0)

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        if connections < attempts or not attempts:
            await stream.send_all(BUSY)
        else:
            await stream.send_all(GREETING)
            await stream.receive_some(4096)
            await stream.send_all(b'{"status": []}\n')

    async def main() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            sock.listen()
            async with trio.open_nursery() as server:
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                server.start_soon(trio.serve_listeners, answer, [listener])
                metrics = await Boards([path]).metrics()
                server.cancel_scope.cancel()
                return metrics
        raise AssertionError

    assert f'inco_trio_proxy_up{{proxy="{"x" if attempts else path}"}} 1' in trio.run(main)
    assert caplog.messages == ([] if attempts else [f"{path}: 256 clients are connected already"])


def test_a_lack_of_descriptors_is_no_failure_of_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.sock"
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    monkeypatch.setattr(http_server, "BUSY", 0)

    async def main() -> str:
        boards = Boards()
        with answering(path, GREETING + b'{"status": []}\n'):
            await boards.metrics()
            with no_descriptors():
                return await boards.metrics()

    assert 'inco_trio_proxy_up{proxy="x"} 1' in trio.run(main)
    assert caplog.messages == [
        f"control: {tmp_path}: cannot search for control sockets: Too many open files; querying the known proxies",
        f"{path}: cannot connect: Too many open files",
    ]


def test_control_sockets_are_found_even_if_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    with answering(tmp_path / "x.sock", GREETING + b'{"status": []}\n'), no_threads():
        assert 'inco_trio_proxy_up{proxy="x"} 1' in trio.run(Boards().metrics)


def test_a_lack_of_threads_for_a_host_look_up_is_an_error() -> None:
    with (
        no_threads(),
        pytest.raises(ResourceError, match=r"^--listen no\.invalid:1: cannot look up this address: can't"),
    ):
        trio.run(http_server.serve, "no.invalid", 1, None, lambda: None)


def test_more_scrapes_at_once_than_connections_get_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 20)
    answers = []

    async def read(client: socket.socket) -> None:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            answers.append(b"".join([chunk async for chunk in stream]))

    async def main() -> None:
        port = free_port()
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_started, port, [tmp_path / "nowhere"])
            async with trio.open_nursery() as scrapes:
                # Trio runs no other task during this loop, so all requests arrive before the exporter accepts one.
                for _ in range(100):
                    client = socket.create_connection(("127.0.0.1", port), timeout=HANG)
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                    scrapes.start_soon(read, client)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(answers) == 100
    assert set(answers) == {answers[0]}
    assert answers[0].startswith(b"HTTP/1.1 200 OK\r\n")


async def serve_started(port: int, paths: list[Path], *, task_status: trio.TaskStatus[None]) -> None:
    await http_server.serve("127.0.0.1", port, paths, task_status.started)


def test_idle_connections_are_limited_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 20)
    clock = trio.testing.MockClock()

    async def main() -> None:
        port = free_port()
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(http_server.serve, "127.0.0.1", port, [tmp_path / "nowhere"], ready.set)
            await ready.wait()
            idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
            half = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
            for stream in half:
                await stream.send_all(b"GET /metrics HTTP/1.1\r\n")
            async with await trio.open_tcp_stream("127.0.0.1", port) as scrape:
                await scrape.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b"".join([chunk async for chunk in scrape])
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"# EOF\n")
            # The exporter closed the oldest connection because of its limit, and closes the rest at their deadline.
            assert await idle[0].receive_some() == b""
            clock.jump(http_server.REQUEST_PATIENCE)
            assert (
                caplog.messages.count(
                    "connections: 20 are open: new ones wait, and replace old ones that send no request"
                )
                == 1
            )
            for stream in (*idle, *half):
                assert await stream.receive_some() == b""
                await stream.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b""),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed\r\n", b""),
        (b"x" * 9000, b"", b""),
    ],
)
def test_other_paths_and_methods_are_refused(tmp_path: Path, request_: bytes, status: bytes, body: bytes) -> None:
    async def main() -> None:
        client, server = trio.testing.memory_stream_pair()
        await client.send_all(request_)
        await http_server._Scrapes(Boards([tmp_path / "nowhere"])).answer(server)  # type: ignore[arg-type]
        with contextlib.suppress(trio.ClosedResourceError):
            answer = b"".join([chunk async for chunk in client])
        assert answer.startswith(status)
        assert answer.partition(b"\r\n\r\n")[2] == body

    trio.run(main)


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.thorough)])
def test_many_boards_are_exported(bench: Bench, count: int) -> None:
    boards, control = bench.home / "boards", bench.home / "control.sock"
    boards.mkdir()
    for number in range(count):
        home = bench.home / f"b{number}"
        link = f"unix:{home}-0,peer={home}-1"
        (boards / f"b{number}.json").write_text(json.dumps({"link": link, "irq_dir": str(home)}))
    proxy = Proxy(None, ["--boards", str(boards), "--control", str(control)], {}, bench.home / "log")
    bench.stack.callback(proxy.close)
    proxy.wait_ready()
    bench.exporter(control)
    samples = bench.samples()
    assert {labels["board"] for labels, value in samples["inco_trio_open"] if value} == {f"b{n}" for n in range(count)}


def exported(bench: Bench) -> Samples:
    one = board(bench, "one")
    one.core1()
    one.running()
    one.client().ask({"request": "follow"})
    watching = one.client()
    watching.ask({"request": "monitor"})
    one.trigger()
    watching.until(event="notification")
    bench.exporter(one.path)
    return bench.samples()


def check_expressions(expressions: list[str], samples: Samples) -> None:
    """Check that the exporter exports each metric and each label in the expressions."""
    named: set[str] = set()
    for expression in expressions:
        labels_of = set(re.findall(r"(\w+)=~?\"", expression))
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            labels_of |= {label.strip() for label in group.split(",")} - {"instance"}
        metrics = re.findall(r"inco_trio_\w+", expression)
        assert metrics, expression
        for metric in metrics:
            assert metric in samples, expression
        known: set[str] = set().union(*(labels for metric in metrics for labels, _ in samples[metric]))
        assert labels_of <= known, expression
        named |= set(metrics)
    assert len(named) > 8


def test_dashboard_queries_use_exported_metrics(bench: Bench) -> None:
    text = subprocess.run([*COMMAND, "exporter", "--dashboard"], capture_output=True, text=True, check=True).stdout
    dashboard = json.loads(text)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    samples = exported(bench)
    check_expressions(expressions, samples)
    for variable in dashboard["templating"]["list"][1:]:
        metric, label = re.match(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert all(label in labels for labels, _ in samples[metric])
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in target["expr"] or re.fullmatch(r"\w+\(?inco.*", target["expr"]), target


def alerts(home: Path) -> Path:
    path = home / "alerts.yml"
    text = subprocess.run([*COMMAND, "exporter", "--alerts"], capture_output=True, text=True, check=True).stdout
    path.write_text(text)
    return path


def test_alerts_are_valid_and_use_exported_metrics(bench: Bench) -> None:
    path = alerts(bench.home)
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expressions = re.findall(r"expr: (.*)", path.read_text())
    check_expressions(expressions, exported(bench))


GONE = 'inco_trio_start_time_seconds{proxy="p",board="b",link="l"}'
FOUND = "inco_trio_proxies"
FIRES = "{value: 1, labels: '{}'}"
QUIET = {
    "IncoTrioProxyGone": (GONE, "1x9 stale _x10"),  # The series ends because the exporter has stopped.
    "IncoTrioProxyGone over a restart": (GONE, "1x9 _x1 2x10", FOUND, "1x20"),
    "IncoTrioRestarts": (GONE, "0x10 1x10"),
    "IncoTrioGatewaySilent": ('inco_trio_followed{proxy="p",board="b",link="l"}', "1x20"),
}
"""Input series that must not cause an alert."""
CASES = {
    "IncoTrioProxySilent": ('inco_trio_proxy_up{proxy="p"}', "0x20"),
    "IncoTrioProxyGone": (GONE, "1x9 stale _x10", FOUND, "1x20"),
    "IncoTrioBoardNotOpen": ('inco_trio_open{proxy="p",board="b"}', "0x20"),
    "IncoTrioLinkDown": ('inco_trio_link_up{proxy="p",board="b",link="l"}', "0x20"),
    "IncoTrioFramesDropped": ('inco_trio_dropped_frames_total{proxy="p",board="b",link="l"}', "0x10 5x10"),
    "IncoTrioInotifyOverflow": ('inco_trio_inotify_overflows_total{proxy="p",board="b",link="l"}', "0x10 1x10"),
    "IncoTrioUnsendable": ('inco_trio_unsendable_notifications_total{proxy="p",board="b",link="l"}', "0x10 1x10"),
    "IncoTrioPending": ('inco_trio_pending_notifications{proxy="p",board="b",signal="s"}', "3x20"),
    "IncoTrioFailures": ('inco_trio_notification_failures_total{proxy="p",board="b",signal="s"}', "0+20x20"),
    "IncoTrioProblem": ('inco_trio_problems{proxy="p",board="b",link="l"}', "2x20"),
    "IncoTrioRestarts": ('inco_trio_start_time_seconds{proxy="p",board="b",link="l"}', "0+1x20"),
    "IncoTrioRestarts of a task": ('inco_trio_task_restarts_total{proxy="p",board="b",link="l"}', "0+1x20"),
    "IncoTrioGatewaySilent": ('inco_trio_followed{proxy="p",board="b",link="l"}', "0x20"),
    "IncoTrioGatewaySilent, behind": (
        'inco_trio_unacknowledged_notifications{proxy="p",board="b",link="l"}',
        "2000x20",
    ),
    "IncoTrioMerged": ('inco_trio_merged_notifications_total{proxy="p",board="b",link="l"}', "0x10 100x10"),
}


def test_each_alert_fires_for_its_fault(tmp_path: Path) -> None:
    path = alerts(tmp_path)
    assert set(re.findall(r"alert: (\w+)", path.read_text())) == {case.split()[0].strip(",") for case in CASES}
    lines = [f"rule_files: [{path}]", "evaluation_interval: 1m", "tests:"]
    for case, told in [*CASES.items(), *QUIET.items()]:
        lines += ["  - interval: 1m", "    input_series:"]
        lines += [f"      - {{series: '{told[n]}', values: '{told[n + 1]}'}}" for n in range(0, len(told), 2)]
        lines += [
            "    promql_expr_test:",
            f'      - expr: \'count(ALERTS{{alertname="{case.split()[0].strip(",")}", alertstate="firing"}})\'',
            "        eval_time: 13m",
            # Check only that the alert fires, not its text.
            f"        exp_samples: [{'' if told is QUIET.get(case) else FIRES}]",
        ]
    (tmp_path / "test.yml").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    first, *others = re.findall(r"^ {4}(inco-trio exporter [^#\n]*?) *(?:#.*)?$", PAGE, re.MULTILINE)
    assert first == "inco-trio exporter --listen 127.0.0.1:9478"
    listen = f"127.0.0.1:{free_port()}"
    exporter = Gateway(tmp_path / "log", *first.split()[1:3], listen)
    try:
        exporter.wait_ready()
        assert f"http://{listen}/metrics" in exporter.log
        assert exporter.end(signal.SIGINT) == 0
    finally:
        exporter.close()
    for line in others:
        words, _, file = line.partition(" > ")
        done = subprocess.run([*COMMAND, *words.split()[1:]], capture_output=True, text=True, check=True)
        assert done.stdout
        assert file in ("dashboard.json", "alerts.yml")


def test_the_configuration_of_the_page_is_valid(tmp_path: Path) -> None:
    (code,) = re.findall(r"^( {4}scrape_configs:.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(code)
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "listen", ["", "x", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", ":1", "127.0.0.1:x", "[]:1"]
)
def test_invalid_addresses_are_refused(listen: str) -> None:
    done = subprocess.run([*COMMAND, "exporter", "--listen", listen], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "ADDRESS:PORT" in done.stderr


def test_unavailable_addresses_are_one_error_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_at = f"127.0.0.1:{taken.getsockname()[1]}"
        for listen, code, text in (
            (taken_at, 71, "already"),
            ("192.0.2.1:9478", 2, "cannot listen"),
            ("no.invalid:1", 2, ""),
        ):
            done = subprocess.run(
                [*COMMAND, "exporter", "--listen", listen],
                capture_output=True, text=True, check=False, timeout=HANG, env={**os.environ},
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            assert text in done.stderr
            assert len(done.stderr.splitlines()) == 1
