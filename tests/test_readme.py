"""What the README shows is what the program does."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from inco_trio.errors import ConfigError, LinkMissing, PermissionRefused, ResourceRefused, UsageError
from inco_trio.frame import decode
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import DEADLINE

README = (Path(__file__).parents[1] / "README.md").read_text()
UDRV = '{"file": {"ihub-irq-dev": {"path": "%s"}}}'


@pytest.mark.parametrize("error", [UsageError, LinkMissing, ResourceRefused, PermissionRefused, ConfigError])
def test_exit_codes_are_documented(error: type[UsageError]) -> None:
    assert f"| {error.exit_code} |" in README


def test_options_exist() -> None:
    said = "".join(
        subprocess.run(
            [sys.executable, "-m", "inco_trio", *command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for command in ([], ["run"], ["check"], ["demo"], ["s6"])
    )
    own = README[: README.index("## Tests")]
    options = set(re.findall(r"(?<![\w<-])--[a-z]+(?:-[a-z]+)*(?![\w>-])", own))
    assert options
    assert [option for option in options if option not in said] == []


@pytest.mark.netns
def test_the_library_example_runs(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    (example,) = re.findall(r"^    async with inco_trio.*?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "udrv.json").write_text(UDRV % (tmp_path / "irq"))
    body = textwrap.indent(textwrap.dedent(example), "    ")
    program = f"import inco_trio, trio\n\nasync def main():\n{body}\n\ntrio.run(main)\n"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        preexec_fn=cores.core0.enter,
    ) as process:
        assert process.stdout is not None
        try:
            assert decode(core1.receive(DEADLINE)) == b"redun_notify_irq"
            # The frame leaves before the stream is opened: send until one is seen.
            while not select.select([process.stdout], [], [], 0.05)[0]:
                core1.send(b"ihub_reset_irq")
                assert process.poll() is None
            assert process.stdout.readline() == b"ihub_reset_irq\n"
        finally:
            process.kill()
