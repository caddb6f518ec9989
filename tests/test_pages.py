"""The pages of docs/: every shell line and program in them is run, and what they name exists."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import inco_trio
from docs.fields import described, table
from inco_trio.boards import KEYS, BoardFile
from inco_trio.commands.line import COMMANDS, parser
from inco_trio.simulation.world import Cores, Peer
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
    with subprocess.Popen(
        [*hidden, "/bin/bash", "-c", whole], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=cores.core0.enter, env=environment, process_group=0,
    ) as shell:  # fmt: skip
        try:
            out, err = shell.communicate(timeout=2 * DEADLINE)
        except subprocess.TimeoutExpired:
            # With what it left in the background.
            os.killpg(shell.pid, signal.SIGKILL)
            out, err = shell.communicate()
            raise AssertionError(f"not at its end:\n{out}{err}") from None
    return subprocess.CompletedProcess(shell.args, shell.returncode, out, err)


@pytest.mark.netns
@pytest.mark.parametrize(("page", "text"), blocks("sh", "first-steps", "supervision"))
def test_shell_lines_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    done = run(cores, tmp_path, text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


SCENES = {
    "Nothing arrives": """
        inco-trio run rpmsg4000 --irq-dir /run/irq 2> log &
        until inco-trio status > status 2>&1; do sleep 0.1; done
        inco-trio wait ihub_hwwd_irq --count 2 --timeout 20
    """,
    "It arrives twice": """
        inco-trio run rpmsg4000 --irq-dir /run/irq --control /run/second 2> second &
        until inco-trio status --control /run/second > status 2>&1; do sleep 0.1; done
    """,
    "It was fine until the restart": "kill $!; wait $!",
    "It is slow": """
        until rm -f /run/irq/message_5_state && mkdir /run/irq/message_5_state; do :; done
        until inco-trio status | grep -q 'cannot write'; do :; done
    """,
    "No permission": 'inco-trio() { setpriv --bounding-set=-net_raw --inh-caps=-net_raw inco-trio "$@"; }',
}
"""What happens on the page of troubleshooting before the lines of a section are run."""


@contextmanager
def signalling(core1: Peer) -> Iterator[None]:
    """Core 1 sends again and again: a signal that is not in the table, and one that is."""
    stop = threading.Event()

    def send() -> None:
        for name in itertools.cycle((b"something_else", b"ihub_hwwd_irq")):
            core1.send(name)
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def comparable(text: str) -> set[str]:
    """Its lines, without what is another at each time: numbers, times, addresses, names of processes, columns."""
    for varying, constant in (
        (r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", "MAC"),
        (r"receive buffer of .*", "BUFFER"),
        (r"never|[\d.]+ \w+ ago", "WHEN"),
        (r"[\d.]+ m?s\b", "TIME"),
        (r"(\d+) \([\w.-]+\)", r"\1 (PROGRAM)"),
        (r"\b\d[\d.]*", "N"),
        (r" +", " "),
    ):
        text = re.sub(varying, constant, text)
    return {line.strip() for line in text.splitlines()}


@pytest.mark.netns
@pytest.mark.tools
def test_the_lines_of_troubleshooting_say_what_the_page_shows(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    """One after the other, beside a proxy whose core 1 signals."""
    script, shown = "exec 2>&1\n", list[str]()
    for section in re.split(r"^## ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]:
        script += SCENES[section.partition("\n")[0]] + "\n"
        for line, text in re.findall(
            r"^```sh\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", section, re.MULTILINE | re.DOTALL
        ):
            script += f"echo '=== {len(shown)}'\n{line}\necho ===\n"
            shown.append(text)
    with signalling(core1):
        done = run(cores, tmp_path, script)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    said = re.findall(r"^=== \d+\n(.*?)^===$", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(said) == len(shown)
    for text, output in zip(shown, said, strict=True):
        assert comparable(text) <= comparable(output), output


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
