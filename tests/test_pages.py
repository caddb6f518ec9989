"""The pages of docs/: every shell line and program in them is run, and what they name exists."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inco_trio
from docs.fields import described, table
from inco_trio.boards import KEYS, BoardFile
from inco_trio.commands.line import COMMANDS, parser
from inco_trio.simulation.world import Cores
from netns.fixtures import DEADLINE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"systemctl enable --now ./inco-trio.service\n": "it would change the machine"}
SHELL = {"&&", "||", "|", ">", "&", ";"}
UDRV = '{"file": {"ihub-irq-dev": {"path": "%s"}}}'


def blocks(language: str, *pages: str) -> list[tuple[str, str]]:
    """The code of a language on all pages, or on these: the page, and the text."""
    paths = [DOCS / f"{page}.md" for page in pages] or sorted(DOCS.glob("*.md"))
    return [
        (path.stem, text)
        for path in paths
        for found, text in BLOCK.findall(path.read_text())
        if found == language and text not in NOT_RUN
    ]


def run(cores: Cores, home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as somebody would who has inco-trio installed, in `home`, on core 0."""
    (home / "udrv.json").write_text(UDRV % (home / "irq"))
    (home / "bin").mkdir()
    for name, arguments in (("python3", ""), ("inco-trio", "-m inco_trio")):
        program = home / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    ending = "trap 'for job in $(jobs -p); do kill $job; wait $job; done' EXIT"
    whole = f"set -e\n{ending}\n{script}"
    # Without the sockets of others in /run: they may have a link of this name, too.
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs inco-trio-test /run && exec "$@"', "sh"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [*hidden, "/bin/bash", "-c", whole], cwd=home, capture_output=True, text=True, timeout=2 * DEADLINE,
        check=False, preexec_fn=cores.core0.enter, env=environment,
    )  # fmt: skip


@pytest.mark.netns
@pytest.mark.parametrize(("page", "text"), blocks("sh", "first-steps", "supervision"))
def test_shell_lines_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    done = run(cores, tmp_path, text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.netns
def test_the_lines_of_troubleshooting_run(cores: Cores, tmp_path: Path) -> None:
    """One after the other, beside a proxy."""
    start = f"""
        export IRQ=$PWD/irq CONTROL=/run/inco-trio/{cores.link}.sock
        inco-trio run {cores.link} --irq-dir $IRQ &
        until inco-trio status > status; do sleep 0.1; done
    """
    lines = "\n".join(text for _, text in blocks("sh", "troubleshooting"))
    done = run(cores, tmp_path, start + lines)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "outbound redun_notify_irq" in done.stdout


@pytest.mark.netns
@pytest.mark.parametrize(("page", "text"), blocks("python", "first-steps"))
def test_programs_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "program.py").write_text(text)
    done = run(cores, tmp_path, "python3 program.py")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def commands() -> list[list[str]]:
    """The command lines of inco-trio in README and pages, without what a shell makes of the rest of the line."""
    code = re.findall(r"^    (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    code += "".join(text for _, text in blocks("sh")).replace("\\\n", " ").splitlines()
    found = []
    for line in code:
        # What may be left out is in brackets.
        words = shlex.shlex(re.sub(r"\[.*?\]", "", line), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        if line.startswith("inco-trio "):
            found.append([*itertools.takewhile(lambda word: word not in SHELL, words)][1:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_parser_takes_every_command_line(words: list[str]) -> None:
    parser(words[0]).parse_args(words)


def test_every_command_is_shown() -> None:
    assert {words[0] for words in commands()} == set(COMMANDS)


def test_the_tests_that_prove_promises_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (DOCS / "promises.md").read_text())
    assert len(named) > 20
    for file, test in named:
        texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {test}(" in text for text in texts) or (texts and not test), f"{file}::{test}"


def test_the_page_of_the_configuration_has_each_key() -> None:
    assert [*described(BoardFile)] == [*KEYS]
    assert table(BoardFile)[2:4] == [
        "| `link` | required | The address of the link: an interface, or `unix:LOCAL,peer=REMOTE`. |",
        "| `config` | optional | The absolute path of a udrv.json. |",
    ]


def test_the_page_of_the_library_has_each_name() -> None:
    page = (DOCS / "api.md").read_text()
    assert set(re.findall(r":: inco_trio\.([A-Z]\w*|[a-z]+_\w+|serve)$", page, re.MULTILINE)) == set(inco_trio.__all__)
