"""Tests of the pages in docs/: every shell line and program on a page runs, and everything that a page names exists."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

from docs.fields import described, table
from inco_trio.board_files import BoardFile, read_boards
from inco_trio.cli.parser import COMMANDS, parse, parser
from inco_trio.simulation.world import Cores, Peer
from inco_trio.testing.happenings import History
from inco_trio.testing.report import side_by_side
from netns.hang import HANG
from tests.support_control import Board
from tests.support_proxy import ADD_USER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "systemctl enable --now ./inco-trio.service": "it would change the machine",
    "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/inco-trio demo": "the session `fresh` runs it",
    "python3 -m venv .venv && .venv/bin/pip install 'nox[uv]' && .venv/bin/nox": "the session `fresh` runs it",
    "core 0 (Linux)": "a picture",
    "serve(config)": "a picture",
    "host A ": "a picture",
}
"""The code blocks that no test runs: their first characters, and the reason."""
RUN_BY = {
    ("api", ""): "test_api.py::test_the_examples_run",
    ("application", "/* Print"): "test_application.py::test_a_program_reports_each_notification_of_a_burst",
    ("application", "gcc "): "test_application.py::test_a_program_reports_each_notification_of_a_burst",
    ("application", "watching"): "test_application.py::test_a_program_reports_each_notification_of_a_burst",
    ("application", "#!/bin/sh"): "test_application.py::test_a_program_reports_each_notification_of_a_burst",
    ("application", '"""Print'): "test_application.py::test_a_program_reports_each_notification_of_a_burst",
    ("application", "inco-trio wait"): "test_send_wait.py",
    ("application", "int fd"): "test_application.py::test_each_trigger_makes_one_notification",
    ("application", "echo 1"): "test_application.py::test_each_trigger_makes_one_notification",
    ("application", "Path("): "test_application.py::test_each_trigger_makes_one_notification",
    ("metrics", "inco-trio exporter"): "test_exporter.py::test_the_commands_of_the_page_run",
    ("metrics", "scrape_configs"): "test_exporter.py::test_the_configuration_of_the_page_is_valid",
    ("mqtt", "inco-trio mqtt"): "test_mqtt.py::test_the_command_of_the_page_runs",
    ("mqtt", '{"time"'): "test_mqtt.py::test_notifications_are_published",
    ("mqtt", '{"send"'): "test_mqtt_configuration.py::test_the_file_of_the_page_is_valid",
    ("mqtt-link", "core1="): "test_pages.py::test_shell_lines_run",
    ("README", "inco-trio "): "test_readme_lines.py::test_every_line_runs",
    ("README", "cd $(mktemp -d)"): "test_readme.py::test_the_rootless_qemu_example_runs",
    ("README", '{"link"'): "test_pages.py::test_the_board_files_on_the_pages_are_valid",
    ("README", "share="): "test_manual.py::test_the_commands_of_the_readme_enable_completion",
    ("README", "import inco_trio"): "test_readme.py::test_the_library_example_runs",
    ("README", "async def answer"): "test_readme.py::test_the_library_example_runs",
    ("README", "trio.run(answer)"): "test_readme.py::test_the_library_example_runs",
    ("README", "async with"): "test_readme.py::test_the_example_of_core1_runs",
    ("README", "def test_"): "test_pages.py::test_the_tests_on_the_testing_page_pass",
    ("asyncio", '"""Answer each'): "test_aio.py::test_documented_asyncio_program",
    ("asyncio", '"""Say which'): "test_aio.py::test_documented_callback",
    ("asyncio", '"""Join a board'): "test_aio.py::test_documented_bridge_to_mqtt",
    ("control", '{"protocol"'): "test_pages.py::test_the_control_socket_answers_as_its_page_shows",
    ("control", '{"request": "status"'): "test_pages.py::test_the_control_socket_answers_as_its_page_shows",
    (
        "control",
        '{"request": "history"}',
    ): "test_history_command.py::test_the_history_has_what_happened_before_it_was_asked",
    ("control", "inco-trio history"): "test_history_command.py::test_the_history_has_what_happened_before_it_was_asked",
    ("control", '{"request": "follow"}'): "test_control.py::test_a_follower_receives_all_it_did_not_acknowledge",
    ("control", '{"event": "merged"'): "test_control.py::test_notifications_beyond_the_limit_are_merged_by_signal",
    ("first-steps", "import inco_trio"): "test_pages.py::test_the_programs_on_the_pages_run",
    ("first-steps", "inco-trio "): "test_pages.py::test_shell_lines_run",
    ("supervision", "inco-trio "): "test_pages.py::test_shell_lines_run",
    ("testing", ""): "test_pages.py::test_the_tests_on_the_testing_page_pass",
    ("troubleshooting", ""): "test_pages.py::test_the_commands_of_the_troubleshooting_page_print_what_it_shows",
}
"""The test that runs each code block, by page and by the first characters of the block."""
SHELL = {"&&", "||", "|", ">", "&", ";"}
UDRV = '{"file": {"ihub-irq-dev": {"path": "%s"}}}'


def blocks(language: str, *pages: str) -> list[tuple[str, str]]:
    """Return the page and text of each code block in `language`, on `pages` (default: all pages)."""
    paths = [DOCS / f"{page}.md" for page in pages] or sorted(DOCS.glob("*.md"))
    return [
        (path.stem, text)
        for path in paths
        for found, text in BLOCK.findall(path.read_text())
        if found == language and not text.startswith(tuple(NOT_RUN))
    ]


def run(cores: Cores, home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `home` on core 0, as a user who has installed inco-trio would."""
    (home / "udrv.json").write_text(UDRV % (home / "irq"))
    (home / "bin").mkdir()
    for name, arguments in (("python3", ""), ("inco-trio", "-m inco_trio")):
        program = home / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    ending = "trap 'for job in $(jobs -p); do kill $job; wait $job; done' EXIT"
    whole = f"set -e\n{ADD_USER}{ending}\n{script}"
    # Hide the control sockets of other proxies in /run: they may serve a link of the same name.
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs inco-trio-test /run && exec "$@"', "sh"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(
        [*hidden, "/bin/bash", "-c", whole], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=cores.core0.enter, env=environment, process_group=0,
    ) as shell:  # fmt: skip
        try:
            out, err = shell.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            # Also kill the background processes of the script.
            os.killpg(shell.pid, signal.SIGKILL)
            out, err = shell.communicate()
            raise AssertionError(f"the script does not end:\n{out}{err}") from None
    return subprocess.CompletedProcess(shell.args, shell.returncode, out, err)


@pytest.mark.netns
@pytest.mark.parametrize(("page", "text"), blocks("sh", "first-steps", "mqtt-link", "supervision"))
def test_shell_lines_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    done = run(cores, tmp_path, re.sub(r"--timeout \d+", f"--timeout {HANG}", text))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


SCENES = {
    "Nothing arrives": """
        inco-trio run rpmsg4000 --irq-dir /run/irq 2> log &
        until inco-trio status > status 2>&1; do sleep 0.1; done
        inco-trio wait ihub_hwwd_irq --count 2
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
"""The commands that set up the problem described in each section of the troubleshooting page."""


@contextmanager
def signalling(core1: Peer) -> Iterator[None]:
    """Send two signals repeatedly from core 1 while the block runs. The signal table has only one of them."""
    stop = threading.Event()

    def send() -> None:
        for name in itertools.cycle((b"something_else", b"ihub_hwwd_irq")):
            core1.send(name)
            if stop.wait(0.05):  # Limit the rate of the signals.
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def comparable(text: str) -> set[str]:
    """Return the lines without the parts that vary: numbers, times, addresses, process names and column widths."""
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
def test_the_commands_of_the_troubleshooting_page_print_what_it_shows(
    cores: Cores, core1: Peer, tmp_path: Path
) -> None:
    """Run the commands of the page one after another, next to a proxy that receives signals from core 1."""
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
def test_the_programs_on_the_pages_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "program.py").write_text(text)
    done = run(cores, tmp_path, "python3 program.py")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.qemu
def test_the_tests_on_the_testing_page_pass(tmp_path: Path) -> None:
    *tests, program = [text for _, text in blocks("python", "testing")]
    readme = next(code for page, code in all_blocks() if page == "README" and code.startswith("def test_"))
    for number, text in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(text)
    # The test in the README uses the fixture of this page, so join the two.
    fixture = tests[0].partition("\n\ndef test_")[0]
    (tmp_path / "test_readme.py").write_text(f"{fixture}\n\n\n{readme}\n")
    plugins = [f"-pno:{name}" for name in ("asyncio", "trio", "anyio", "cacheprovider")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *plugins],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (0, "ihub_hwwd_irq\n")
    (shown,) = [text for _, text in blocks("text", "testing")]
    history = History()
    history.add(1, "sends", "ihub_hwwd_irq")
    history.add(0, "gets", "ihub_hwwd_irq")
    lines = side_by_side(history.all()).splitlines()
    assert [line[10:] for line in lines] == [line[10:] for line in shown.splitlines()[:3]]


def commands() -> list[list[str]]:
    """Return the inco-trio command lines of the README and the pages, without redirections, pipes and comments."""
    code = re.findall(r"^    (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    code += "".join(text for _, text in blocks("sh")).replace("\\\n", " ").splitlines()
    found = []
    for line in code:
        # Remove optional words, which are in brackets.
        words = shlex.shlex(re.sub(r"\[.*?\]", "", line), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        if line.startswith("inco-trio "):
            found.append([*itertools.takewhile(lambda word: word not in SHELL, words)][1:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_parser_accepts_every_command_line(words: list[str]) -> None:
    parse(words)


def test_every_command_appears_on_a_page() -> None:
    assert {words[0] for words in commands()} == set(COMMANDS)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_commands_in_the_prose_have_the_options_that_are_named(page: Path) -> None:
    for name, rest in re.findall(r"`inco-trio ([a-z0-9]+)( [^`]*)?`", page.read_text()):
        assert name in COMMANDS
        (commands,) = (each for each in parser(name)._actions if isinstance(each, argparse._SubParsersAction))
        assert set(re.findall(r"--[a-z-]+", rest)) <= commands.choices[name]._option_string_actions.keys()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem
)
def test_every_link_has_a_target(page: Path) -> None:
    """Links must also work for a reader of the plain Markdown files, without the website."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def exists(test: str) -> bool:
    """Return whether `file.py`, or the test in `file.py::test`, exists."""
    file, _, name = test.partition("::")
    texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
    return any(f"def {name}(" in text or not name for text in texts)


def all_blocks() -> Iterator[tuple[str, str]]:
    """Yield the page and text of each code block that is not a Sphinx directive."""
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text()
        for _, code in BLOCK.findall(text):
            yield path.stem, code
        indented = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?:^    .*\n)+", indented, re.MULTILINE):
            yield path.stem, textwrap.dedent(code)


def test_every_code_block_is_run_or_exempt_for_a_reason() -> None:
    left: set[object] = {*RUN_BY, *NOT_RUN}
    for page, code in all_blocks():
        found: list[object] = [key for key in RUN_BY if key[0] == page and code.startswith(key[1])]
        found += [key for key in NOT_RUN if code.startswith(key)]
        assert len(found) == 1, f"{page}: {code}"
        left -= set(found)
    assert not left
    assert [test for test in RUN_BY.values() if not exists(test)] == []


def test_the_tests_named_in_promises_exist() -> None:
    rows = re.findall(r"^\| (.*) \| (.*) \|$", (DOCS / "promises.md").read_text(), re.MULTILINE)[1:]
    named = {promise: re.findall(r"`(test_[^`]+)`", tests) for promise, tests in rows}
    assert len(named) > 10
    assert [promise for promise, tests in named.items() if not tests] == []
    assert [test for tests in named.values() for test in tests if not exists(test)] == []


def test_the_board_files_on_the_pages_are_valid(tmp_path: Path) -> None:
    lines = next(code for page, code in all_blocks() if page == "README" and code.startswith('{"link"')).splitlines()
    (tmp_path / "b1").mkdir()
    (tmp_path / "b1/udrv.json").write_text(UDRV % (tmp_path / "irq"))
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.json").write_text(line.replace("/etc/", f"{tmp_path}/"))
    boards = read_boards(tmp_path)
    assert not boards.refused
    assert [config.link for config in boards.configs.values()] == [json.loads(line)["link"] for line in lines]


@pytest.mark.tools
def test_the_control_socket_answers_as_its_page_shows(tmp_path: Path) -> None:
    codes = [code for page, code in all_blocks() if page == "control"][:2]
    greeting, *lines = [line for code in codes for line in code.splitlines()]
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        board.core1()
        board.running()
        client = board.client()
        assert client.greeting.keys() == json.loads(greeting).keys()
        for line in lines:
            request, answer = re.split(" {2,}", line)
            # An ellipsis on the page stands for any text.
            wanted, _ = json.JSONDecoder().raw_decode(answer.replace(", …", ""))
            got = client.ask(json.loads(request))
            while "event" in got:
                got = client.read()
            for key in ("status", "message"):
                if key in wanted:
                    assert got.pop(key)
                    del wanted[key]
            assert got == wanted


def test_the_configuration_page_lists_each_key() -> None:
    assert [*described(BoardFile)] == [field.name for field in attrs.fields(BoardFile)]
    assert table(BoardFile)[2:4] == [
        "| `link` | required | The address of the link: an interface, or `unix:LOCAL,peer=REMOTE`. |",
        "| `config` | optional | The absolute path of a udrv.json. |",
    ]
