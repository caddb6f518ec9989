"""Tests of the gateway and the exporter as separate services: under a real s6, and as systemd units."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.errors import InvalidArgumentError
from inco_trio.service.descriptions import Service as Described
from inco_trio.service.descriptions import (
    access_warnings,
    bridge_service,
    exporter_service,
    gateway_service,
    link_service,
)
from inco_trio.service.scandir import write_scandir
from inco_trio.service.systemd import systemd_unit
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.supervised import Service, main_process
from tests.mosquitto import Mosquitto, Reader, free_port
from tests.support_control import COMMAND, Board

PROGRAM = [sys.executable, "-m", "inco_trio"]


def s6(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "s6", "--user", "root", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def running(stack: ExitStack, scandir: Path, label: str) -> Service:
    service = stack.enter_context(Service(Here(), scandir, label))  # type: ignore[arg-type]
    service.wait("U")
    return service


@pytest.mark.s6
def test_the_gateway_runs_under_s6(tmp_path: Path, stack: ExitStack) -> None:
    board = Board(tmp_path, stack)
    board.core1()
    board.running()
    broker = Mosquitto(tmp_path / "broker", "allow_anonymous true")
    stack.callback(broker.end)
    broker.start()
    reader = Reader(broker)
    stack.callback(reader.close)
    (tmp_path / "gateway.json").write_text("{}")
    done = s6(tmp_path / "scan", "--mqtt", broker.url, "--gateway", tmp_path / "gateway.json")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "scan/inco-trio-mqtt/run"
    # Select the test's proxy, because other proxies might be running on this machine.
    run.write_text(run.read_text().replace(" --notification-fd", f" --control {board.path} --notification-fd"))
    service = running(stack, tmp_path / "scan", "mqtt")
    board.wait_followed()
    board.trigger()
    assert next(reader.notifications()).body["sequence"] == 1
    pid = main_process(service.directory)
    os.kill(pid, signal.SIGKILL)
    board.trigger()
    assert next(each for each in reader.notifications() if each.body["sequence"] == 2)
    service.wait("U")
    assert main_process(service.directory) != pid
    service.control("-h")
    service.wait_log("reloaded")
    assert not (tmp_path / "scan/inco-trio-fdholder").exists()


@pytest.mark.s6
def test_the_exporter_runs_under_s6(tmp_path: Path, stack: ExitStack) -> None:
    listen = f"127.0.0.1:{free_port()}"
    assert s6(tmp_path / "scan", "--exporter", listen).returncode == 0
    service = running(stack, tmp_path / "scan", "exporter")
    with urllib.request.urlopen(f"http://{listen}/metrics", timeout=HANG) as answer:
        assert b"inco_trio_proxy_up" in answer.read()
    service.control("-wD", "-d")
    assert "Traceback" not in service.log


def test_gateway_and_exporter_need_no_fd_store_and_no_rights(tmp_path: Path) -> None:
    write_scandir(tmp_path, service=gateway_service("mqtt://h", None), user="nobody", program=["inco-trio"])
    write_scandir(tmp_path, service=exporter_service("127.0.0.1:1"), user=None, program=["inco-trio"])
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    each = {"run", "finish", "log/run", "notification-fd", "timeout-kill"}
    assert files == {f"inco-trio-{name}/{file}" for name in ("mqtt", "exporter") for file in each}
    run = (tmp_path / "inco-trio-mqtt/run").read_text()
    assert "--reuid nobody" in run
    assert "+net_raw" not in run
    command = shlex.split(run.replace("\\\n", " ").splitlines()[-1])
    assert command[-7:] == ["inco-trio", "mqtt", "mqtt://h", "--notification-fd", "3", "--log-format", "text"]
    # A proxy in the same scan directory uses the fd store. The gateway and the exporter get no access to it.
    write_scandir(tmp_path, service=link_service("core0", Path("/dev/null")), user="nobody", program=["inco-trio"])
    rules = [path.read_text() for path in (tmp_path / "inco-trio-fdholder/data/rules").rglob("S6_FDHOLDER_STORE_REGEX")]
    assert not any("mqtt" in rule for rule in rules)


@pytest.mark.parametrize("label", ["mqtt", "exporter", "fdholder", "wire-x"])
def test_a_link_cannot_take_a_reserved_service_name(label: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"inco-trio-{label} is reserved for|reserved for bridges"):
        link_service(label, Path("/dev/null"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--mqtt", "mqtt://h", "--exporter"], "are mutually exclusive"),
        (["--mqtt", "mqtt://h", "--iface", "x"], "are mutually exclusive"),
        (["--exporter", "127.0.0.1:1", "--boards", "/x"], "are mutually exclusive"),
        (["--gateway", "/x"], "--mqtt URL"),
        (["--mqtt-link", "mqtt://h", "--end", "core0"], "--mqtt-link requires LINK (unix:"),
        (["--mqtt-link", "mqtt://h", "--iface", "unix:/a,peer=/b"], "and --end core0 or core1"),
        (["--mqtt-link", "mqtt://h", "--iface", "x", "--end", "core0"], "a bridge joins Unix sockets"),
        (["--mqtt-link", "http://h", "--iface", "unix:/a,peer=/b", "--end", "core0"], "mqtt://HOST"),
        (
            ["--mqtt-link", "mqtt://h", "--iface", "unix:/a,peer=/b", "--end", "core0", "--boards", "/x"],
            "mutually exclusive",
        ),
        (["--end", "core0"], "--mqtt-link URL"),
        (["--mqtt", "mqtt://me:word@h"], "contains a user name or password"),
        (["--mqtt", "mqtt://h", "--config", "/x"], "--config applies only to proxies"),
        (["--exporter", "nowhere"], "ADDRESS:PORT"),
        (["--mqtt", "mqtt://h", "--user", "no-such-user"], "no such user"),
        (["--mqtt", "mqtt://h", "--irq-owner", "12"], "--irq-owner applies only to proxies"),
        (["--boards", "/x", "--irq-owner", "12"], "--boards and --irq-owner are mutually exclusive"),
    ],
)
def test_invalid_options_are_refused(words: list[str], text: str) -> None:
    done = s6("--systemd", *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert text in done.stderr


def test_no_text_names_the_former_command() -> None:
    root = Path(__file__).parents[1]
    former = {root / f"inco_trio/cli/{name}.py" for name in ("s6", "parser")}
    texts = [*(root / "inco_trio").rglob("*"), *(root / "docs").glob("*.md"), root / "README.md"]
    naming = [
        path
        for path in texts
        if path.is_file() and path.suffix != ".pyc" and path not in former
        if re.search(rb"inco-trio s6\b|`s6 --systemd", path.read_bytes())
    ]
    assert naming == []


def test_an_invalid_gateway_configuration_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text('{"board": []}')
    done = s6(tmp_path / "scan", "--mqtt", "mqtt://h", "--gateway", tmp_path / "gateway.json")
    assert done.returncode == 0
    assert "warning: " in done.stdout
    assert "unknown key" in done.stdout


@pytest.mark.tools
@pytest.mark.parametrize(
    "service",
    [
        gateway_service("mqtts://h/a%20b", Path("/x/a b$.json")),
        exporter_service("[::1]:1"),
        bridge_service("mqtts://h/a%20b", "unix:/x/a b,peer=/x/c", "core0", Path("/x/a b$.json")),
    ],
    ids=lambda service: service.label,
)
def test_the_units_pass_systemd_analyze(service: Described, tmp_path: Path) -> None:
    # A bridge, like a proxy, can bind its socket in any directory, so its exposure level is higher.
    exposure = 20 if service.is_client else 25
    kind = service.label.replace(" ", "-")
    unit = tmp_path / f"inco-trio-{kind}.service"
    unit.write_text(systemd_unit(service=service, user="daemon", program=PROGRAM))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    # Versions of systemd before 254 do not support FileDescriptorStorePreserve=.
    mine = [line for line in done.stderr.splitlines() if kind in line and "FileDescriptorStorePreserve" not in line]
    assert mine == []
    level = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={exposure}", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert level.returncode == 0, level.stdout[-2000:]


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a private directory. Do not use pytest's directories: another run of pytest may change their modes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.netns
def test_a_service_whose_user_may_not_use_its_paths_is_warned_about(home: Path) -> None:
    config, directory = home / "udrv.json", home / "irq"
    config.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": str(directory)}}}))
    command = f"install -d -o daemon -g {pwd.getpwnam('daemon').pw_gid} {directory}"
    remedy = "change its mode, or move it to a public directory, such as /etc"
    read = f"{config}: the user daemon may not read it or enter {home}, so the service cannot start: {remedy}"
    create = f"{directory}: the user daemon may not create it: run as root at each boot: {command}"
    words = ["--user", "daemon", "--config", str(config)]
    written = subprocess.run(
        [*COMMAND, "service", "s6", str(home / "scan"), *words], capture_output=True, text=True, check=True
    )
    assert f"\nwarning: {read}\n" in written.stdout
    assert f"\nwarning: {create}\n" in written.stdout
    printed = subprocess.run([*COMMAND, "service", "systemd", *words], capture_output=True, text=True, check=True)
    assert f"inco-trio: warning: {read}\n" in printed.stderr
    assert f"inco-trio: warning: {create}\n" in printed.stderr
    directory.mkdir(mode=0o700)
    service = link_service("x", config)
    # The user might be unable to run this test's Python interpreter, for example if it is in root's home directory.
    # Every user can run /bin/sh.
    found = list(access_warnings(service, "daemon", "/bin/sh"))
    write = f"warning: {directory}: the user daemon may not write to it: run as root: {command}"
    assert found == [f"warning: {read}", write]
    assert list(access_warnings(service, "daemon", "/bin/sh", check_directories=False)) == found[:1]
    assert list(access_warnings(service, "root", sys.executable)) == []
    assert list(access_warnings(service, "no-such-user", sys.executable)) == []


@pytest.mark.netns
def test_registers_that_the_user_of_a_service_may_not_use_are_warned_about(home: Path) -> None:
    home.chmod(0o755)
    config, irq = home / "udrv.json", home / "irq"
    config.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": str(irq)}}}))
    irq.mkdir()
    daemon = pwd.getpwnam("daemon")
    os.chown(irq, daemon.pw_uid, daemon.pw_gid)
    state, trigger, fine = (irq / f"message_{number}" for number in ("5_state", "6_trig", "4_state"))
    for path in (state, trigger, fine):
        path.touch(0o600)
    os.chown(fine, daemon.pw_uid, daemon.pw_gid)
    service = link_service("x", config)
    assert list(access_warnings(service, "daemon", "/bin/sh")) == [
        f"warning: {state}: the user daemon may not write to it: run as root: chown daemon: {state}",
        f"warning: {trigger}: the user daemon may not read it: run as root: chown daemon: {trigger}",
    ]
    state.chmod(0o606)
    trigger.chmod(0o604)
    assert list(access_warnings(service, "daemon", "/bin/sh")) == []


@pytest.mark.netns
def test_an_interpreter_behind_a_symlink_into_a_private_directory_is_warned_about(home: Path) -> None:
    home.chmod(0o755)
    closed, program = home / "private", home / "python3"
    closed.mkdir(0o700)
    (closed / "python3").touch(0o755)
    program.symlink_to(closed / "python3")
    [warning] = access_warnings(link_service("x", home / "missing.json"), "daemon", str(program))
    reason = f"the user daemon may not read it or enter {closed}, so the service cannot start"
    remedy = "write the service with an inco-trio that is installed in /opt/inco-trio"
    assert warning == f"warning: {program}: {reason}: {remedy}"
