"""Tests of `inco-trio demo`: its result, its errors, and how it cleans up when it is stopped."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inco_trio.cores.peer import Peer
from inco_trio.cores.watch import Watch
from inco_trio.errors import InvalidArgumentError
from inco_trio.frame import encode
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.demonstration import _play, run_demo
from inco_trio.simulation.traffic import Applications, Traffic, duration, quantile, verdict
from inco_trio.simulation.waiter import Waiter
from netns.fixtures import Canary
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_pages import comparable, parts

PATIENT = f"""
import os, sys
from inco_trio.cli import main
from inco_trio.simulation import traffic
class Limit:
    def __mul__(self, _):
        return 0 if os.path.exists(os.path.join(os.environ.get("TMPDIR", ""), "give-up")) else {HANG}e9
traffic._LOST_AFTER = Limit()
sys.exit(main())
"""
"""A program that runs inco-trio, but waits for slow processes until the file `give-up` exists in its TMPDIR."""
DEMO = [sys.executable, "-c", PATIENT, "demo"]
SHORT = ["--count", "5", "--rate", "1000"]
ALL_ARRIVED = re.compile(r"all 30 notifications arrived, median \d+(\.\d)? (us|ms|s): the proxy works on this machine")


@pytest.mark.parametrize(("count", "rate"), [(0, 100.0), (1, 0.0), (1, -1.0), (1, float("inf")), (1, float("nan"))])
def test_invalid_counts_and_rates_are_refused(count: int, rate: float) -> None:
    with pytest.raises(InvalidArgumentError, match="count of 1 or more and a rate above 0"):
        run_demo(count, rate, io.StringIO())


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 us"),
        (87_400, "87 us"),
        (999_499, "999 us"),
        (999_500, "1.0 ms"),
        (999_499_999, "999.5 ms"),
        (2e9, "2.0 s"),
    ],
)
def test_durations_are_readable(nanoseconds: float, text: str) -> None:
    assert duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("last", "part", "expected"),
    [(1, 0.5, 1), (2, 0.5, 1), (100, 0, 1), (100, 0.5, 50), (100, 0.99, 99), (100, 1, 100)],
)
def test_quantile_is_the_nearest_rank(last: int, part: float, expected: int) -> None:
    assert quantile(range(1, last + 1), part) == expected


def test_a_full_standard_output_is_one_error_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [*DEMO, *SHORT], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=HANG
        )
    assert (done.returncode, done.stderr) == (71, "inco-trio: error: standard output: No space left on device\n")


def finish(command: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    return done.returncode, done.stdout, done.stderr


def table(said: str) -> list[list[str]]:
    """Return the words in each row of the final table."""
    return [row.split() for row in said.splitlines() if row.startswith("  ") and "core" in row]


def test_the_path_of_the_firmware_is_printed() -> None:
    command = [sys.executable, "-m", "inco_trio", "demo", "--firmware"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG)
    assert Path(done.stdout.removesuffix("\n")).read_bytes().startswith(b"\x7fELF")


@pytest.mark.netns
def test_all_notifications_arrive() -> None:
    code, said, complaints = finish([*DEMO, *SHORT])
    *_, verdict = said.splitlines()
    assert ALL_ARRIVED.fullmatch(verdict)
    assert (code, complaints) == (0, "")
    assert [row[0] for row in table(said)] == [
        "ihub_reset_irq",
        "ihub_hwwd_irq",
        "redun_notify_irq",
        "ihub_crash_log_irq",
        "ihub_uart_irq",
        "ihub_type_b_irq",
    ]
    assert all(row[6:8] == ["5", "5"] for row in table(said))
    (shown,) = (block.text for block in parts("README") if block.value.endswith("test_all_notifications_arrive"))
    assert comparable(shown) <= comparable(said)
    assert len(table(shown)) == len(table(said))
    (line,) = (block.text for block in parts("installation") if block.value.endswith("test_all_notifications_arrive"))
    assert ALL_ARRIVED.fullmatch(line.rstrip("\n").replace("120", "30"))


class _Stopping(Waiter):
    """A waiter in whose first wait nothing happens. Then the process is stopped, and meanwhile `arrive` is called."""

    arrive: Callable[[], object] | None = None

    def wait(self, until: float) -> None:
        if (arrive := self.arrive) is None:
            super().wait(until)
        else:
            self.arrive = None
            arrive()


def test_what_arrived_while_the_demonstration_was_stopped_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("inco_trio.simulation.traffic._LOST_AFTER", 0)
    names = ("a", "b", "c")
    traffic = [Traffic(Signal(name, Direction.OUTBOUND, tmp_path, name), 1) for name in names]
    link = f"unix:{tmp_path}/core1,peer={tmp_path}/core0"
    with (
        contextlib.closing(_Stopping()) as waiter,
        contextlib.closing(Watch()) as watch,
        Peer(link) as peer,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as proxy,
    ):
        for name in names:
            (tmp_path / name).touch()
        applications = Applications(waiter, peer, watch, traffic)
        for one in traffic:
            applications.send(one)

        def arrive() -> None:
            for name in names:
                proxy.sendto(encode(name.encode(), bytes(6)), f"{tmp_path}/core1")

        waiter.arrive = arrive
        _play(waiter, applications, traffic, 1.0, io.StringIO())
    assert verdict(traffic)[1] == 0


@pytest.mark.netns
def test_ordinary_user_can_run_the_demonstration(nobody: list[str]) -> None:
    code, said, complaints = finish([*nobody, *DEMO, *SHORT])
    *_, verdict = said.splitlines()
    assert ALL_ARRIVED.fullmatch(verdict)
    assert (code, complaints) == (0, "")


def limited(limit: str, value: int, command: list[str]) -> list[str]:
    """Return a command that runs `command` in a new user namespace with a limit in /proc/sys/user (namespaces(7))."""
    script = (
        "import os, sys; from pathlib import Path; from inco_trio.simulation.world import new_user_namespace; "
        "new_user_namespace(); Path('/proc/sys/user', sys.argv[1]).write_text(sys.argv[2]); "
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    return [sys.executable, "-c", script, limit, str(value), *command]


@pytest.mark.netns
@pytest.mark.parametrize(
    ("kind", "as_nobody", "refusal"),
    [
        ("user", True, "a user namespace (No space left on device)"),
        ("net", False, "a network namespace (No space left on device)"),
        # A user without capabilities can create the user namespace, but the kernel refuses a write to its uid map.
        ("net", True, "a user namespace (Operation not permitted)"),
    ],
    ids=["user", "network", "maps"],
)
def test_forbidden_namespaces_are_replaced_by_a_unix_socket(
    nobody: list[str], kind: str, as_nobody: bool, refusal: str
) -> None:
    command = [*(nobody if as_nobody else []), *DEMO, *SHORT]
    code, said, complaints = finish(limited(f"max_{kind}_namespaces", 0, command))
    assert (code, complaints) == (0, "")
    told, stage, *_, verdict = said.splitlines()
    assert told.startswith(
        f"Using a Unix socket, because this system forbids namespaces: cannot create {refusal}: run as root, or"
    )
    assert stage.startswith("Two cores, joined by a pair of Unix sockets; process ")
    assert ALL_ARRIVED.fullmatch(verdict)
    assert len(table(said)) == 6
    assert all(row[6:8] == ["5", "5"] for row in table(said))


@pytest.mark.qemu
@pytest.mark.netns
def test_ordinary_user_gets_answers_from_real_firmware(nobody: list[str]) -> None:
    code, said, complaints = finish([*nobody, *DEMO, "--qemu", *SHORT])
    assert (code, complaints) == (0, "")
    *_, verdict = said.splitlines()
    assert re.fullmatch(
        r"all 15 round trips arrived, median \d+(\.\d)? (us|ms|s): the proxy works on this machine", verdict
    )
    assert "\nEach latency is a round-trip time.\n" in said
    for name, answer in {
        "redun_notify_irq": "ihub_hwwd_irq",
        "ihub_crash_log_irq": "ihub_reset_irq",
        "ihub_uart_irq": "ihub_type_b_irq",
    }.items():
        assert f"{name} by {answer}" in said
        assert [row[1:8] for row in table(said) if row[0] == name] == [["core", "0", "->", "1", "->", "0", "5"]], said


def test_missing_qemu_is_one_error_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--qemu"], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        "inco-trio: error: qemu-system-riscv64 is not installed (Debian: install qemu-system-misc)\n"
    )


def test_temporary_directory_too_long_for_a_socket_is_one_error_line(tmp_path: Path) -> None:
    scratch = tmp_path / ("long" * 25)
    scratch.mkdir()
    done = subprocess.run(
        [*DEMO, "--qemu"], env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "TMPDIR: cannot create the link's sockets in this directory: " in line
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
def test_proxy_that_cannot_start_is_an_error() -> None:
    # The demonstration itself uses the only permitted inotify instance, so the proxy gets none.
    code, said, complaints = finish(limited("max_inotify_instances", 1, DEMO))
    assert (code, said) == (70, "")
    reason, verdict = complaints.splitlines()
    assert "inotify" in reason
    assert verdict.endswith("the proxy has ended with exit code 71 (see its log above)")


class Running:
    """A demonstration that is sending, with its child processes. The last child is the proxy."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.wait_line("Sending")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        self.children = [int(child) for child in children.split()]
        self.proxy = self.children[-1]
        self._ends = [os.pidfd_open(child) for child in self.children]

    def wait_children_ended(self, timeout: float = HANG) -> None:
        for end in self._ends:
            assert select.select([end], [], [], timeout)[0]

    def wait_line(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.rstrip("\n")
        return pytest.fail(
            f"the demonstration ended with exit code {self.process.wait()}: {self.process.communicate()[1]}"
        )

    def wait_lost(self, scratch: Path) -> str:
        """Wait until the demonstration reports the notifications in flight as lost. `scratch` is its TMPDIR."""
        (scratch / "give-up").touch()
        verdict = self.wait_line("LOST")
        (scratch / "give-up").unlink()
        return verdict

    def finish(self) -> tuple[int, str, str]:
        said, complaints = self.process.communicate(timeout=HANG)
        return self.process.returncode, said, complaints

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for end in self._ends:
            os.close(end)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a TMPDIR for the demonstration; its path is short, because sockets are created in it (unix(7))."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def start(scratch: Path, command: list[str]) -> Running:
    process = subprocess.Popen(
        [*command, "--count", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    return Running(process)


@pytest.fixture
def running(scratch: Path) -> Iterator[Running]:
    started = start(scratch, DEMO)
    yield started
    started.close()


@pytest.fixture
def running_qemu(scratch: Path) -> Iterator[Running]:
    """Yield a demonstration with QEMU; the QEMU process is its first child."""
    started = start(scratch, [*DEMO, "--qemu"])
    assert len(started.children) == 2
    yield started
    started.close()


@pytest.fixture
def running_sockets(scratch: Path) -> Iterator[Running]:
    """Yield a demonstration that cannot create network namespaces and therefore uses a Unix socket."""
    started = start(scratch, limited("max_net_namespaces", 0, DEMO))
    yield started
    started.close()


@pytest.fixture
def canaries(running: Running, canary: Callable[[int], Canary]) -> list[Canary]:
    """Return a canary for each core's network namespace. It detects when the namespace is destroyed."""
    seen = {}
    for path in Path(f"/proc/{running.process.pid}/fd").iterdir():
        # The demonstration might have closed other descriptors since the directory was listed.
        with contextlib.suppress(FileNotFoundError):
            if str(path.readlink()).startswith("net:"):
                inherited = os.open(path, os.O_RDONLY)
                seen[path.readlink()] = canary(inherited)
                os.close(inherited)
    assert len(seen) == 2
    return list(seen.values())


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_demonstration_leaves_nothing_behind(
    running: Running, canaries: list[Canary], scratch: Path, number: signal.Signals
) -> None:
    running.process.send_signal(number)
    code, _said, complaints = running.finish()
    assert (code, complaints) == (128 + number, "")
    running.wait_children_ended(0)
    assert list(scratch.iterdir()) == []
    for one in canaries:
        one.wait_gone()


@pytest.mark.netns
def test_killed_demonstration_leaves_no_process_and_no_namespace(running: Running, canaries: list[Canary]) -> None:
    running.process.kill()
    running.wait_children_ended()
    for one in canaries:
        one.wait_gone()


@pytest.mark.netns
def test_lost_notifications_are_reported_as_failure(running: Running, scratch: Path) -> None:
    wait_stopped(running.proxy)
    verdict = running.wait_lost(scratch)
    os.kill(running.proxy, signal.SIGCONT)
    assert re.fullmatch(r"LOST 6 of \d+ notifications \(ihub_reset_irq, .*\): the proxy does not work .*", verdict)
    assert running.finish() == (1, "", "")
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
def test_dead_proxy_is_an_error(running: Running, scratch: Path) -> None:
    os.kill(running.proxy, signal.SIGKILL)
    code, _said, complaints = running.finish()
    assert code == 70
    assert complaints.splitlines()[-1].endswith("the proxy has ended with exit code -9 (see its log above)")
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_demonstration_over_a_socket_leaves_nothing_behind(
    running_sockets: Running, scratch: Path, number: signal.Signals
) -> None:
    running_sockets.process.send_signal(number)
    code, _said, complaints = running_sockets.finish()
    assert (code, complaints) == (128 + number, "")
    running_sockets.wait_children_ended(0)
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
def test_dead_proxy_over_a_socket_is_an_error(running_sockets: Running, scratch: Path) -> None:
    os.kill(running_sockets.proxy, signal.SIGKILL)
    code, _said, complaints = running_sockets.finish()
    assert code == 70
    assert complaints.splitlines()[-1].endswith("the proxy has ended with exit code -9 (see its log above)")
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
def test_stuck_proxy_over_a_socket_is_reported_as_failure(running_sockets: Running, scratch: Path) -> None:
    wait_stopped(running_sockets.proxy)
    verdict = running_sockets.wait_lost(scratch)
    os.kill(running_sockets.proxy, signal.SIGCONT)
    assert re.fullmatch(r"LOST 6 of \d+ notifications \(ihub_reset_irq, .*\): the proxy does not work .*", verdict)
    assert running_sockets.finish() == (1, "", "")
    assert list(scratch.iterdir()) == []


@pytest.mark.qemu
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_demonstration_with_qemu_leaves_nothing_behind(
    running_qemu: Running, scratch: Path, number: signal.Signals
) -> None:
    running_qemu.process.send_signal(number)
    code, _said, complaints = running_qemu.finish()
    assert (code, complaints) == (128 + number, "")
    running_qemu.wait_children_ended(0)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demonstration_stops_at_once_while_qemu_starts(tmp_path: Path, scratch: Path, number: signal.Signals) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    started = tmp_path / "started"
    os.mkfifo(started)
    # This program stands in for QEMU and never answers on its monitor.
    qemu = programs / "qemu-system-riscv64"
    qemu.write_text(
        f"#!{sys.executable}\nimport os, signal\nopen({str(started)!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n"
    )
    qemu.chmod(0o755)
    with subprocess.Popen(
        [*DEMO, "--qemu"],
        env={**os.environ, "PATH": str(programs), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        child = int(started.read_text())
        end = os.pidfd_open(child)
        process.send_signal(number)
        said, complaints = process.communicate(timeout=HANG)
    assert (process.returncode, said, complaints) == (128 + number, "", "")
    assert select.select([end], [], [], 0)[0]
    os.close(end)
    assert list(scratch.iterdir()) == []


@pytest.mark.qemu
def test_killed_demonstration_with_qemu_leaves_no_process(running_qemu: Running) -> None:
    running_qemu.process.kill()
    running_qemu.wait_children_ended()


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("child", "code", "complaint"),
    [
        (0, 69, "QEMU has ended with exit code -9; its last output: core1: ready"),
        (1, 70, "the proxy has ended with exit code -9 (see its log above)"),
    ],
    ids=["qemu", "proxy"],
)
def test_dead_qemu_or_proxy_is_an_error(
    running_qemu: Running, scratch: Path, child: int, code: int, complaint: str
) -> None:
    os.kill(running_qemu.children[child], signal.SIGKILL)
    ended, _said, complaints = running_qemu.finish()
    assert ended == code
    assert complaints.splitlines()[-1].startswith(f"inco-trio: error: {complaint}")
    running_qemu.wait_children_ended(0)
    assert list(scratch.iterdir()) == []


@pytest.mark.qemu
def test_lost_round_trips_are_reported_as_failure(running_qemu: Running, scratch: Path) -> None:
    wait_stopped(running_qemu.children[0])
    verdict = running_qemu.wait_lost(scratch)
    assert re.fullmatch(r"LOST 3 of \d+ round trips \(redun_notify_irq, .*\): the proxy does not work .*", verdict)
    assert running_qemu.finish() == (1, "", "")
    assert list(scratch.iterdir()) == []


@pytest.mark.netns
def test_terminal_updates_one_line_per_signal_in_place() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*DEMO, *SHORT], stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        said = b""
        # Once the other side is closed, read(2) on a pty fails with EIO instead of returning end of file (pty(7)).
        try:
            while select.select([ours], [], [], HANG)[0]:
                said += os.read(ours, 65536)
        except OSError:
            os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[6A" in said
    assert b"ihub_uart_irq           5 [####################]" in said
    assert b"LOST" not in said
