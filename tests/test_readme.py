"""Tests that the program does what the README shows."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from inco_trio.cli.exit_codes import UsageError, exit_code
from inco_trio.cli.parser import COMMANDS
from inco_trio.errors import ConfigError, IncoError, LinkNotFoundError, PermissionDeniedError, ResourceError
from inco_trio.frame import decode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, Inotify
from inco_trio.simulation.world import Cores, Peer
from netns.hang import HANG
from tests import fresh
from tests.faults.supervised import wait_path
from tests.support_proxy import trigger

README = (Path(__file__).parents[1] / "README.md").read_text()
UDRV = '{"file": {"ihub-irq-dev": {"path": "%s"}}}'


@pytest.mark.parametrize("error", [UsageError, LinkNotFoundError, ResourceError, PermissionDeniedError, ConfigError])
def test_exit_codes_are_documented(error: type[IncoError]) -> None:
    assert f"| {exit_code(error('x'))} |" in README


def test_documented_options_exist() -> None:
    said = "".join(
        subprocess.run(
            [sys.executable, "-m", "inco_trio", *command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for command in ([], *([name] for name in COMMANDS))
    )
    own = README[: README.index("## Tests")]
    options = set(re.findall(r"(?<![\w<-])--[a-z]+(?:-[a-z]+)*(?![\w>-])", own))
    assert options
    assert [option for option in options if option not in said] == []


@pytest.mark.parametrize(("section", "program"), [("Try it", "inco-trio demo"), ("Tests", "nox")])
def test_the_commands_create_their_environment(section: str, program: str) -> None:
    create, install, run = fresh.readme_command(section).split(" && ")
    assert create == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install ")
    assert run == f".venv/bin/{program}"


# The nox session `unit` skips tests with this marker: it runs in a copy of the tree without .ci.
@pytest.mark.tools
def test_ci_runs_the_second_command_and_nothing_else() -> None:
    script = (Path(__file__).parents[1] / ".ci/run").read_text()
    lines = [line for line in script.splitlines() if not line.startswith(("#", "set ", "cd "))]
    assert lines == [fresh.readme_command("Tests")]


@pytest.mark.netns
def test_the_library_example_runs(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    (program,) = re.findall(r"^    import inco_trio.*?trio.run\(answer\)\n", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "udrv.json").write_text(UDRV % (tmp_path / "irq"))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=cores.core0.enter,
    ) as process:
        try:
            # The program misses signals that arrive before it listens, so send one every 0.05 s until it answers.
            while not select.select([core1], [], [], 0.05)[0]:
                core1.send(b"ihub_hwwd_irq")
                assert process.poll() is None
            assert decode(core1.receive(HANG)) == b"redun_notify_irq"
        finally:
            process.kill()


def test_the_example_of_core1_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"^    async with inco_trio.Core1.*?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    body = textwrap.indent(textwrap.dedent(example), " " * 8).replace("/tmp", str(tmp_path))  # noqa: S108
    program = f"""
import inco_trio, pathlib, trio

async def answer(proxy, *, task_status):
    with proxy.events(signals=["ihub_hwwd_irq"]) as events:
        task_status.started()
        async for event in events:
            await proxy.send("redun_notify_irq")

async def main():
    signals = inco_trio.builtin_signals(pathlib.Path("{tmp_path}/irq"))
    config = inco_trio.Config("unix:{tmp_path}/core0,peer={tmp_path}/core1", signals)
    async with inco_trio.open_proxy(config) as proxy, trio.open_nursery() as nursery:
        await nursery.start(answer, proxy)
{body}
        nursery.cancel_scope.cancel()

trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False)
    # Core 1 ends before the proxy does.
    assert (done.returncode, re.sub(".*: the link went down after .* s\n", "", done.stderr)) == (0, "")


def trigger_until_answered(irq: Path) -> None:
    """Notify core 1 until it answers: QEMU drops frames that arrive before the guest has started its network card."""
    state, changes = irq / "message_5_state", Inotify()
    try:
        changes.watch(str(state), IN_CLOSE_WRITE)
        deadline = time.monotonic() + HANG
        while state.read_text() != "1":
            assert time.monotonic() < deadline, "core 1 has not answered"
            trigger(irq / "message_6_trig")
            select.select([changes.fd], [], [], 0.2)  # Wait 0.2 s before the next attempt.
    finally:
        changes.close()


@pytest.mark.qemu
@pytest.mark.netns
def test_the_rootless_qemu_example_runs(nobody: list[str]) -> None:
    section = README[README.index("## Without root: QEMU") :]
    (lines,) = re.findall(r"^    cd .*?(?=\n\n)", section, re.MULTILINE | re.DOTALL)
    assert lines.count("\n") == 4
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile("w+") as log:
        Path(home).chmod(0o777)
        # Use the Python and the programs of this environment. They exit when their standard input closes, so that no
        # process outlives this test.
        script = f"""
            export TMPDIR={home}
            python3() {{ exec {sys.executable} "$@"; }}
            inco-trio() {{ exec {sys.executable} -m inco_trio "$@"; }}
            {textwrap.dedent(lines)}
            echo $PWD; read; kill $(jobs -p); wait
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
                wait_path(irq, lambda: (irq / "message_6_trig").exists() and (irq / "message_5_state").exists())
                trigger_until_answered(irq)
                shell.communicate(timeout=HANG)
                with pytest.raises(ProcessLookupError):
                    os.killpg(shell.pid, 0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
        log.seek(0)
        said = log.read()
    assert "outbound: redun_notify_irq" in said
    assert "inbound: ihub_hwwd_irq" in said
