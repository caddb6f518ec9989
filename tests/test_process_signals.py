"""Tests of Unix signals to the daemon at every stage of its life: a stop signal must end it with exit code 0."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inco_trio.simulation.world import Cores
from netns.fixtures import StartProxy
from netns.hang import HANG
from tests.support_proxy import write_udrv

STOPS = [signal.SIGTERM, signal.SIGINT]

AT_IMPORT = """
import os, signal, sys
from inco_trio.cli import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            for number in sys.argv[2].split(","):
                os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Finder())
sys.exit(main(sys.argv[3:]))
"""
"""A program that runs inco-trio and sends signals to itself when a given module is about to be imported."""

AT_CALL = """
import importlib, os, signal, sys
from inco_trio.cli import main

module, _, name = sys.argv[1].partition(":")
owner = importlib.import_module(module)
called = getattr(owner, name)

def calling(*arguments, **named):
    setattr(owner, name, called)
    for number in sys.argv[2].split(","):
        os.kill(os.getpid(), int(number))
    return called(*arguments, **named)

setattr(owner, name, calling)
sys.exit(main(sys.argv[3:]))
"""
"""A program that runs inco-trio and sends signals to itself when a given function is called."""

AT_THE_WAKEUP_FD = """
import os, signal, sys
from inco_trio.cli import main

set_wakeup_fd, numbers = signal.set_wakeup_fd, [signal.SIGTERM]

def setting(*arguments, **named):
    os.kill(os.getpid(), numbers.pop(0))
    numbers.append(int(sys.argv[2]))
    return set_wakeup_fd(*arguments, **named)

signal.set_wakeup_fd = setting
sys.exit(main(sys.argv[3:]))
"""
"""A program that runs inco-trio and sends signals to itself before each change of the signal wakeup fd.

The first signal is SIGTERM.
"""

AT_THE_END = """
import os, signal, sys
from inco_trio.cli import main

class Last:
    def __del__(self, kill=os.kill, me=os.getpid()):
        for number in (signal_numbers):
            kill(me, number)

signal_numbers = [int(number) for number in sys.argv[2].split(",")]
last = Last()
sys.exit(main(sys.argv[3:]))
"""
"""A program that runs inco-trio and sends signals to itself while the interpreter shuts down."""


def run(
    script: str, place: str, numbers: list[signal.Signals], *arguments: str | Path, command: str = "run"
) -> tuple[int, str]:
    sent = ",".join(str(int(number)) for number in numbers)
    done = subprocess.run(
        [sys.executable, "-c", script, place, sent, command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.stdout == ""
    return done.returncode, without_times(done.stderr)


def without_times(log: str) -> str:
    """Remove the time from each log line that has one. Lines written before logging is set up have none."""
    return re.sub(r"^[\d-]+ [\d:.]+ ", "", log, flags=re.MULTILINE)


@pytest.mark.parametrize("numbers", [[stop] * n for stop in STOPS for n in (1, 2)], ids=str)
@pytest.mark.parametrize(
    "module",
    ["argparse", "inco_trio.errors", "inco_trio.cli.run", "trio", "inco_trio.proxy.proxy", "inco_trio.counters"],
)
def test_a_stop_while_modules_are_imported(module: str, numbers: list[signal.Signals], tmp_path: Path) -> None:
    assert run(AT_IMPORT, module, numbers, "none0", "--irq-dir", tmp_path / "irq") == (
        0,
        "inco-trio: info: none0: stopped before it was ready\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["argparse", "trio"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mqtt", ["mqtt://127.0.0.1:1"]),
        ("mqtt-link", ["mqtt://127.0.0.1:1", "--end", "core0", "--link", "unix:{}/wire,peer={}/core"]),
        ("exporter", ["--listen", "127.0.0.1:9"]),
    ],
)
def test_signals_while_another_service_imports_modules(
    module: str, command: str, words: list[str], tmp_path: Path
) -> None:
    """The first signal must not end the process."""
    words = [word.replace("{}", str(tmp_path)) for word in words]
    code, said = run(AT_IMPORT, module, [signal.SIGHUP, signal.SIGTERM], *words, command=command)
    assert (code, said.splitlines()[-1].endswith(": stopped before it was ready")) == (0, True), said


@pytest.mark.parametrize("numbers", [[stop] * n for stop in STOPS for n in (1, 2)], ids=str)
@pytest.mark.parametrize("place", ["inco_trio.config:parse_board", "trio:run", "inco_trio.service.daemon:Daemon"])
def test_a_stop_before_anything_is_open(place: str, numbers: list[signal.Signals], tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    code, said = run(AT_CALL, place, numbers, "none0", "--config", udrv)
    assert (code, said.splitlines()[-1]) == (0, "inco-trio: info: none0: stopped before it was ready")
    assert "Traceback" not in said


def test_a_third_stop_exits_at_once(tmp_path: Path) -> None:
    assert run(AT_IMPORT, "trio", [signal.SIGTERM, signal.SIGINT, signal.SIGTERM], "--irq-dir", tmp_path) == (
        0,
        "inco-trio: warning: third stop signal: exiting immediately\n",
    )


@pytest.mark.parametrize("number", [*STOPS, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_signals_while_the_interpreter_shuts_down_are_ignored(number: signal.Signals, tmp_path: Path) -> None:
    code, said = run(AT_THE_END, "", [number], "none0", "--config", tmp_path / "none")
    assert (code, said) == (
        78,
        f"inco-trio: error: {tmp_path}/none: cannot be read: No such file or directory\n",
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_a_signal_while_the_event_loop_closes(number: signal.Signals, tmp_path: Path) -> None:
    # Trio closes its descriptor before it resets the wakeup fd. A signal in between makes Python print a traceback.
    assert run(AT_THE_WAKEUP_FD, "", [number], "none0", "--irq-dir", tmp_path / "irq") == (
        0,
        "inco-trio: info: none0: stopped before it was ready\n",
    )


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_that_the_parent_blocked_before_exec_is_obeyed(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "inco_trio", "run", "none0", "--irq-dir", str(tmp_path)],
        stderr=subprocess.PIPE,
        preexec_fn=functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOPS),
    ) as process:
        process.send_signal(number)
        said = without_times(process.communicate(timeout=HANG)[1].decode())
    assert (process.returncode, said) == (0, "inco-trio: info: none0: stopped before it was ready\n")


def test_other_commands_die_of_sigint() -> None:
    # Restore the handler of SIGINT: if a shell runs the tests in the background, SIGINT might be ignored.
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = heeded + AT_IMPORT.replace("sys.argv[3:]", "['check', '--config', '/dev/null']")
    assert run(script, "inco_trio.cli.check", [signal.SIGINT]) == (-signal.SIGINT, "")


IN_CORE = """
import os, signal, sys
from inco_trio.cli import main
from inco_trio.service import daemon, runner

def signal_at(name, number):
    module = runner if hasattr(runner, name) else daemon
    called = getattr(module, name)
    def calling(*arguments):
        os.kill(os.getpid(), number)
        called(*arguments)
    setattr(module, name, calling)

for place in sys.argv[1].split(","):
    signal_at(place, int(sys.argv[2]))
sys.exit(main(sys.argv[3:]))
"""
"""A program that runs inco-trio and sends a signal to itself when given functions of the daemon are called."""


def in_core(cores: Cores, places: str, number: signal.Signals, irq_dir: Path) -> str:
    """Run the daemon, send it the Unix signal `number` at each call of the functions in `places`, and return its log.

    The daemon must exit with 0.
    """
    start = functools.partial(
        subprocess.run,
        [sys.executable, "-c", IN_CORE, places, str(int(number)), "run", cores.link, "--irq-dir", str(irq_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    done = cores.core0.run(start)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said: str = done.stderr
    return said


@pytest.mark.netns
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_at_the_moment_of_readiness(cores: Cores, irq_dir: Path, number: signal.Signals) -> None:
    assert "unfinished=0" in in_core(cores, "notify_ready", number, irq_dir).splitlines()[-1]


@pytest.mark.netns
@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("place", ["notify_stopping", "log_statistics"])
def test_a_second_stop_while_the_daemon_stops(cores: Cores, irq_dir: Path, place: str, number: signal.Signals) -> None:
    assert "unfinished=0" in in_core(cores, f"notify_ready,{place}", number, irq_dir).splitlines()[-1]


@pytest.mark.netns
def test_a_reload_requested_while_waiting_for_the_link_runs_later(
    proxy: StartProxy, cores: Cores, irq_dir: Path, tmp_path: Path
) -> None:
    udrv = write_udrv(tmp_path / "u.json", irq_dir)
    cores.delete_link()
    running = proxy("--config", udrv, "--wait-link", ready=False)
    running.wait_log("no such interface yet")
    running.process.send_signal(signal.SIGUSR1)
    running.wait_log("not ready yet: no counters to log")
    write_udrv(udrv, irq_dir, {}, {})
    running.process.send_signal(signal.SIGHUP)
    running.wait_log("not ready yet: the configuration will be reloaded once the service is ready")
    cores.make_link()
    running.wait_ready()
    assert '"reloaded: 3 signals"' in running.wait_log('"reloaded"')


@pytest.mark.netns
@pytest.mark.parametrize("kind", ["FIFO", "directory", "huge"])
def test_a_reload_of_a_file_that_is_not_regular_is_refused(
    proxy: StartProxy, irq_dir: Path, tmp_path: Path, kind: str
) -> None:
    udrv = write_udrv(tmp_path / "u.json", irq_dir)
    running = proxy("--config", udrv)
    udrv.unlink()
    if kind == "FIFO":
        os.mkfifo(udrv)
    elif kind == "directory":
        udrv.mkdir()
    else:
        with udrv.open("wb") as file:
            file.truncate(1 << 40)
    running.process.send_signal(signal.SIGHUP)
    running.wait_log("reload refused, keeping the old configuration: ")
    assert running.stop() == 0


HANGING = """
import sys
import trio
import inco_trio.proxy.proxy
from inco_trio.cli import main

async def reload(self, config):
    sys.stderr.write("hanging\\n")
    sys.stderr.flush()
    await trio.sleep_forever()

inco_trio.proxy.proxy.Proxy.reload = reload
sys.exit(main(sys.argv[1:]))
"""
"""A program that runs inco-trio and hangs during a reload, as the real proxy does while the link is down."""


@pytest.mark.netns
def test_a_stop_does_not_wait_for_a_reload(cores: Cores, irq_dir: Path) -> None:
    start = functools.partial(
        subprocess.Popen[str],
        [sys.executable, "-c", HANGING, "run", cores.link, "--irq-dir", str(irq_dir)],
        stderr=subprocess.PIPE,
        text=True,
    )
    with cores.core0.run(start) as running:
        try:
            assert running.stderr is not None
            while "ready" not in (line := running.stderr.readline()):
                assert line
            running.send_signal(signal.SIGHUP)
            while line != "hanging\n":
                line = running.stderr.readline()
                assert line
            running.terminate()
            assert running.wait(HANG) == 0
            assert "unfinished=0" in running.stderr.read()
        finally:
            running.kill()
