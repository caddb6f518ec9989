"""Every command line of the README runs with the daemon that it needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from inco_trio.simulation.world import Cores, Peer
from netns.hang import HANG
from tests.faults.supervised import wait_path
from tests.support_proxy import ADD_USER

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    re.sub(r" +#.*", "", line)
    for line in re.findall(r"^    ((?:inco-trio|tshark|s6-svscan) .*[^&\\\n])$", README, re.MULTILINE)
]
ELSEWHERE = {
    "s6-svscan /run/service": "test_scandir.py",
    "inco-trio mqtt mqtts://broker.example.org/lab/host1 --config /etc/inco-trio/gateway.json": "test_mqtt.py",
    "inco-trio mqtt-link mqtt://broker.example.org/lab/b1 --end core0 --link unix:/run/b1/bridge,peer=/run/b1/core0": (
        "test_mqtt_link.py"
    ),
    "inco-trio exporter --listen 127.0.0.1:9478": "test_exporter.py",
}
FRAME = b"ihub_hwwd_irq"


class Shell:
    """A shell on core 0 that runs command lines of the README, in a directory with the files that they name."""

    def __init__(self, cores: Cores, home: Path) -> None:
        self._cores, self.home = cores, home
        self.left = list(LINES)
        (home / "bin").mkdir()
        program = home / "bin/inco-trio"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m inco_trio "$@"\n')
        program.chmod(0o755)
        (home / "udrv.json").write_text(json.dumps({"file": {"ihub-irq-dev": {"path": f"{home}/irq"}}}))
        (home / "boards").mkdir()
        board = {"link": f"unix:{home}/core0,peer={home}/core1", "irq_dir": f"{home}/board"}
        (home / "boards/b1.json").write_text(json.dumps(board))

    def _start(self, beginning: str) -> subprocess.Popen[str]:
        """Start the README line that begins with `beginning`, with its paths moved into the directory."""
        found = [line for line in self.left if line.startswith(beginning)]
        assert len(found) == 1, (beginning, found)
        self.left.remove(found[0])
        line = re.sub(r" \[.*?\]", "", found[0])
        for there, here in (
            ("/etc/", ""), ("/run/service", "service"), ("/dev/shm/irq", "other"), (" DIR", " irq"),  # noqa: S108
        ):  # fmt: skip
            line = line.replace(there, f"{self.home}/{here}" if here != " irq" else here)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{self.home}/bin:{os.environ['PATH']}"}
        # Hide the control sockets of other proxies in /run: they may serve a link of the same name.
        run = f"mkdir -p {self.home}/run; mount --bind {self.home}/run /run; {ADD_USER}exec {line}"
        return subprocess.Popen(
            ["unshare", "--mount", "/bin/sh", "-c", run], cwd=self.home, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=self._cores.core0.enter, env={**environment, "HOME": str(self.home)},
        )  # fmt: skip

    def run(self, beginning: str, *codes: int) -> str:
        """Run a README line and return its output. Its exit code must be one of `codes` (default: 0)."""
        with self._start(beginning) as process:
            try:
                out, _ = process.communicate(timeout=HANG)
            except BaseException:
                process.kill()
                raise
        assert process.returncode in (codes or (0,)), f"{beginning}: {process.returncode}\n{out}"
        assert "Traceback" not in out
        return out

    @contextmanager
    def running(self, beginning: str, sign: str) -> Iterator[list[str]]:
        """Run a README line in the background and yield its output up to `sign`; then send SIGINT and add the rest."""
        said: list[str] = []
        with self._start(beginning) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said.append(line)
                    if sign in line:
                        break
                yield said
            finally:
                process.send_signal(signal.SIGINT)
                said += process.stdout.read().splitlines(keepends=True)


@contextmanager
def signalling(core1: Peer) -> Iterator[None]:
    """Send a signal from core 1 repeatedly while the block runs."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.05):  # Limit the rate of the signals.
            core1.send(FRAME)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.tools
def test_every_line_runs(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    shell = Shell(cores, tmp_path)
    assert "ihub_hwwd_irq" in shell.run("inco-trio check --config")
    assert "ok " in shell.run("inco-trio doctor", 0, 3)
    with ExitStack() as stack:
        said = stack.enter_context(shell.running("inco-trio run rpmsg4000 --config", "ready"))
        wait_path(tmp_path, lambda: (tmp_path / "irq/message_6_trig").exists())
        assert "rpmsg4000: up" in shell.run("inco-trio status")
        with (
            shell.running("inco-trio monitor", "listening") as monitored,
            shell.running("inco-trio record", "recording") as recorded,
            signalling(core1),
        ):
            assert "100 sent" in shell.run("inco-trio send")
            assert "inbound ihub_hwwd_irq" in shell.run("inco-trio wait ihub_hwwd_irq")
            assert "outbound redun_notify_irq" in shell.run("inco-trio wait redun_notify_irq")
        assert any(" in  ihub_hwwd_irq" in line for line in monitored)
        assert " notifications in night.pcapng" in recorded[-1]
        assert "inco_trio.lua: installed" in shell.run("inco-trio dissector")
        assert "core 1 > core 0  ihub_hwwd_irq" in shell.run("tshark -r")
        assert "plotted to night.svg" in shell.run("inco-trio plot")
        # Core 1 does not answer here, so the expected notification never arrives.
        assert "ihub_hwwd_irq: " in shell.run("inco-trio replay night.pcapng rpmsg4000", 1)
        assert "redun_notify_irq: " in shell.run("inco-trio replay night.pcapng --irq-dir", 0, 1)
        assert said
    with shell.running("inco-trio run rpmsg4000 --irq-dir", "ready"):
        pass
    assert "Recorded: " in shell.run("inco-trio demo")
    assert "b1" in shell.run("inco-trio check --boards")
    with shell.running("inco-trio run --boards", "ready"):
        pass
    shell.run("inco-trio s6 /run/service --iface")
    shell.run("inco-trio s6 /run/service --boards")
    assert shell.left == list(ELSEWHERE)
