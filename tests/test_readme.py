"""Tests that the program does what the README shows."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from inco_trio.cli.exit_codes import UsageError, exit_code
from inco_trio.errors import ConfigError, IncoError, LinkNotFoundError, PermissionDeniedError, ResourceError
from inco_trio.frame import decode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, Inotify
from inco_trio.simulation.world import Cores, Peer
from netns.hang import HANG
from tests import fresh
from tests.faults.supervised import wait_path
from tests.support_pages import comparable, parts
from tests.support_proxy import trigger

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
UDRV = '{"file": {"ihub-irq-dev": {"path": "%s"}}}'


@pytest.mark.parametrize("error", [UsageError, LinkNotFoundError, ResourceError, PermissionDeniedError, ConfigError])
def test_exit_codes_are_documented(error: type[IncoError]) -> None:
    assert f"| {exit_code(error('x'))} |" in (ROOT / "docs/commands.md").read_text()


@pytest.mark.parametrize(("section", "program"), [("Try it", "inco-trio demo"), ("Tests", "nox")])
def test_the_commands_create_their_environment(section: str, program: str) -> None:
    create, install, run = fresh.readme_command(section).split(" && ")
    assert create == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install ")
    assert run == f".venv/bin/{program}"


# The nox session `unit` skips tests with this marker, because it runs in a copy of the tree without .ci.
@pytest.mark.tools
def test_ci_runs_the_second_command_and_nothing_else() -> None:
    script = (Path(__file__).parents[1] / ".ci/run").read_text()
    lines = [line for line in script.splitlines() if not line.startswith(("#", "set ", "cd "))]
    assert lines == [fresh.readme_command("Tests")]


@pytest.mark.netns
def test_the_library_example_runs(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    (program,) = (block.text for block in parts("README") if block.text.startswith("import inco_trio"))
    board = tmp_path / "udrv.json"
    board.write_text(UDRV % (tmp_path / "irq"))
    assert "/etc/udrv.json" in program
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("/etc/udrv.json", str(board))],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=cores.core0.enter,
    ) as process:
        try:
            # The program misses signals that arrive before it is listening, so send one every 0.05 s until it answers.
            while not select.select([core1], [], [], 0.05)[0]:
                core1.send(b"ihub_hwwd_irq")
                assert process.poll() is None
            assert decode(core1.receive(HANG)) == b"redun_notify_irq"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=HANG)
            assert process.returncode == 0, said
            assert "Traceback" not in said
        finally:
            process.kill()


@pytest.mark.tools
def test_the_c_example_counts_every_close(tmp_path: Path) -> None:
    (lines,) = (block.text for block in parts("README") if block.language == "c")
    (tmp_path / "irq").mkdir()
    watch, loop = textwrap.indent(lines.replace("/run/irq", str(tmp_path / "irq")), " " * 4).split("\n", 1)
    (tmp_path / "watch.c").write_text(f"""
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

static int count;
static void on_watchdog_interrupt(void) {{ count++; }}

int main(void)
{{
    _Alignas(struct inotify_event) char buffer[65536];
    struct inotify_event *event;
    int fd = inotify_init1(IN_CLOEXEC);
{watch}
    puts("watching");
    fflush(stdout);
    getchar();
{loop}
    printf("%d\\n", count);
}}
""")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", "watch", "watch.c"], cwd=tmp_path, check=True)
    with subprocess.Popen([tmp_path / "watch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        for _ in range(100):
            trigger(tmp_path / "irq/message_5_state")
        out, _ = process.communicate("\n", timeout=HANG)
    assert out == "100\n"


@pytest.mark.qemu
@pytest.mark.netns
def test_the_rootless_qemu_example_runs(nobody: list[str]) -> None:
    begin, send, end = (block.text for block in parts("qemu") if block.language == "sh" and block.mark == "run by")
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile("w+") as log:
        Path(home).chmod(0o1777)
        # Use this environment's Python interpreter and programs. They exit when their standard input closes, so that
        # no process outlives this test.
        script = f"""
            export TMPDIR={home}
            python3() {{ exec {sys.executable} "$@"; }}
            inco-trio() {{ exec {sys.executable} -m inco_trio "$@"; }}
            {begin}
            echo $PWD; read
            {send}
            read
            {end}
            wait
        """
        with subprocess.Popen(
            [*nobody, "/bin/bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        ) as shell:
            assert shell.stdin is not None
            assert shell.stdout is not None
            try:
                irq = Path(shell.stdout.readline().rstrip("\n")) / "irq"
                wait_path(irq.parent, irq.exists)
                state, changes = irq / "message_5_state", Inotify()
                wait_path(irq, lambda: (irq / "message_6_trig").exists() and state.exists())
                with contextlib.closing(changes):
                    changes.watch(str(state), IN_CLOSE_WRITE)
                    shell.stdin.write("\n")
                    shell.stdin.flush()
                    while state.read_text() != "1":
                        assert select.select([changes.fd], [], [], HANG)[0], "core 1 has not answered"
                        changes.read_into(memoryview(bytearray(4096)))
                shell.communicate("\n", timeout=HANG)
                with pytest.raises(ProcessLookupError):
                    os.killpg(shell.pid, 0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
        log.seek(0)
        said = log.read()
    (shown,) = (block.text for block in parts("qemu") if block.language == "text")
    assert comparable(shown) <= comparable(said)
