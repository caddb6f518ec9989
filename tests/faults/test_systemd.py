"""Tests that run the unit printed by `inco-trio s6 --systemd` in a real systemd user manager."""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.simulation.world import Cores, Namespace, Peer
from netns.hang import HANG
from tests.faults.applications import Applications, Wire, write_config
from tests.faults.processes import wait_stopped
from tests.faults.supervised import wait_path

INBOUND = [f"in_{number:03}" for number in range(300)]
OUTBOUND = [f"out_{number:03}" for number in range(300)]

# A user manager needs cgroups and a system that was booted with systemd. The mount namespace simulates both.
# When standard input closes, the script kills the whole cgroup.
MANAGER = """
mount -t tmpfs inco-trio-test /run
mkdir -p /run/systemd/system
ln -s "$XDG_RUNTIME_DIR/systemd/inaccessible" /run/systemd/inaccessible
mount -t tmpfs inco-trio-test /sys/fs/cgroup
mount -t cgroup2 inco-trio-test /sys/fs/cgroup
cgroup=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/inco-trio-test.$$
mkdir "$cgroup"
(
    echo 0 > "$cgroup/cgroup.procs"
    exec /lib/systemd/systemd --user --unit=basic.target < /dev/null
) &
read -r _ || true
echo 1 > "$cgroup/cgroup.kill"
wait || true
until find "$cgroup" -depth -type d -exec rmdir {} + 2> /dev/null; do sleep 0.02; done
"""


class Unit:
    """The unit of `link` and the systemd that runs the unit in `namespace`. All files are below `directory`."""

    def __init__(self, namespace: Namespace, directory: Path, link: str, config: Path) -> None:
        self.name = f"inco-trio-{link}.service"
        self._log = directory / "log"
        units = directory / "units"
        # The path of the control socket, which is below this directory, must be short.
        self._short = tempfile.TemporaryDirectory(prefix="inco-trio-")
        runtime = Path(self._short.name, "run")
        (units / f"{self.name}.d").mkdir(parents=True)
        runtime.mkdir(mode=0o700)
        command = [
            sys.executable,
            "-m",
            "inco_trio",
            "s6",
            "--systemd",
            "--user",
            "root",
            "--iface",
            link,
            "--config",
            str(config),
        ]
        (units / self.name).write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        # No journal runs in the mount namespace, so the unit writes its log to a file.
        (units / f"{self.name}.d/log.conf").write_text(f"[Service]\nStandardError=append:{self._log}\n")
        for target in ("basic", "shutdown"):
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        self._environment = {
            "PATH": os.environ["PATH"],
            "SYSTEMD_UNIT_PATH": str(units),
            "XDG_RUNTIME_DIR": str(runtime),
        }
        start = functools.partial(
            subprocess.Popen[bytes],
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", MANAGER],
            stdin=subprocess.PIPE,
            env=self._environment,
        )
        self._manager = namespace.run(start)
        wait_path(runtime / "systemd/private")
        deadline = time.monotonic() + HANG
        with socket.socket(socket.AF_UNIX) as private:
            # systemd first binds the socket, and then listens.
            while private.connect_ex(str(runtime / "systemd/private")) == errno.ECONNREFUSED:
                assert time.monotonic() < deadline
                time.sleep(0.01)  # Poll, because the kernel does not report a listening socket.

    @property
    def log(self) -> str:
        """Return the proxy's log."""
        return self._log.read_text() if self._log.exists() else ""

    def wait_log(self, text: str) -> None:
        """Wait until the log contains `text`."""
        wait_path(self._log, lambda: text in self.log)

    def control(self, verb: str, *options: str) -> int:
        """Run systemctl on the unit, wait until it is done, and return its exit code."""
        return subprocess.run(["systemctl", "--user", *options, verb, self.name], env=self._environment).returncode

    def property(self, name: str) -> str:
        """Return a property of the unit."""
        command = ["systemctl", "--user", "show", "--value", "--property", name, self.name]
        return subprocess.run(command, env=self._environment, check=True, capture_output=True, text=True).stdout.strip()

    def close(self) -> None:
        """End systemd and all its processes."""
        self._manager.communicate()
        self._short.cleanup()
        assert self._manager.returncode == 0
        sys.stderr.write(f"log of the unit:\n{self.log}")


class Board:
    """The unit's proxy, with its core 1 and its applications."""

    def __init__(self, unit: Unit, core1: Peer, applications: Applications, wire: Wire) -> None:
        self.unit = unit
        self._core1 = core1
        self._applications = applications
        self._wire = wire

    def send_all(self) -> None:
        """Send each signal once in both directions."""
        self._applications.reset()
        self._wire.seen.clear()
        for name in INBOUND:
            self._core1.send(name.encode())
        for name in OUTBOUND:
            self._applications.trigger(name)

    def all_arrived(self) -> None:
        """Wait until all notifications have arrived."""
        closes, seen = self._applications.closes, self._wire.seen
        self._applications.wait(lambda: all(closes[name] for name in INBOUND), "not all have been delivered")
        self._wire.wait(lambda: all(seen[name] for name in OUTBOUND), "not all have been sent")


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a cgroup")


@pytest.fixture
def board(cores: Cores, core1: Peer, tmp_path: Path) -> Iterator[Board]:
    """Start the unit and yield the board once it is ready."""
    config, directory = tmp_path / "udrv.json", tmp_path / "irq"
    write_config(config, directory, INBOUND, OUTBOUND)
    with ExitStack() as stack:
        unit = Unit(cores.core0, tmp_path / "systemd", cores.link, config)
        stack.callback(unit.close)
        assert unit.control("start") == 0
        applications = Applications(directory, INBOUND, OUTBOUND)
        stack.callback(applications.close)
        wire = Wire(core1)
        stack.callback(wire.close)
        yield Board(unit, core1, applications, wire)


def test_the_unit_loses_nothing_on_kill_restart_and_reload(board: Board, tmp_path: Path) -> None:
    unit = board.unit
    assert unit.property("NFileDescriptorStore") == "3"
    pids = []
    for end in ("kill", "restart", "reload"):
        pid = int(unit.property("MainPID"))
        pids.append(pid)
        wait_stopped(pid)
        board.send_all()
        if end == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            # Continue the process first: systemctl waits until the process has handled the request.
            os.kill(pid, signal.SIGCONT)
            assert unit.control(end) == 0
        board.all_arrived()
        assert unit.property("NFileDescriptorStore") == "3"
    pids.append(int(unit.property("MainPID")))
    # The kill and the restart each start a new process. The reload keeps the process.
    assert len(set(pids)) == 3
    unit.wait_log("reloaded")

    # `inco-trio check` accepts this configuration, but a directory exists at the path of a register.
    directory = tmp_path / "irq"
    (directory / "late_trig").mkdir()
    write_config(tmp_path / "udrv.json", directory, INBOUND, [*OUTBOUND, "late"])
    assert unit.control("reload") != 0
    assert "late_trig: not a regular file but a directory" in unit.property("StatusText")

    (tmp_path / "udrv.json").write_text("{")
    assert unit.control("reload") != 0
    assert int(unit.property("MainPID")) == pids[-1]
    board.send_all()
    board.all_arrived()
    assert unit.control("restart") != 0
    assert unit.property("ActiveState") == "failed"
    assert unit.property("ExecMainStatus") == "78"
    assert "Traceback" not in unit.log
