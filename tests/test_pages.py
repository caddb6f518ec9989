"""Tests of the pages in docs/: every shell line and program on a page runs, and everything that a page names exists."""

from __future__ import annotations

import argparse
import grp
import itertools
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from docs import plots
from docs.diagrams import DIAGRAMS, IMAGES
from docs.fields import described, figures, table
from docs.terminals import TERMINALS, draw, visible
from inco_trio.board_files import BoardFile, read_boards
from inco_trio.cli.parser import COMMANDS, EXIT_CODES, GROUPS, parse, parser
from inco_trio.simulation.world import Cores, Peer
from netns.hang import HANG
from tests.kernels.__main__ import BOOTS, SYSTEMS
from tests.support_control import Board
from tests.support_pages import DOCS, ROOT, Block, Script, comparable, parts, run, scripts, signalling

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "serve(config)": "a picture",
    "host A ": "a picture",
}
"""The unmarked code blocks that no test runs. The key is the start of the block, and the value is the reason."""
PAGES = (
    "README",
    "boards",
    "commands",
    "configuration",
    "first-steps",
    "lost",
    "metrics",
    "migrating",
    "mqtt",
    "mqtt-link",
    "recording",
    "shell",
    "supervision",
    "troubleshooting",
)
"""The pages whose shell blocks run one after another; see tests/support_pages.py."""
RUN_BY = {
    ("api", ""): "test_api.py::test_the_examples_run",
    ("metrics", "inco-trio exporter"): "test_exporter.py::test_the_commands_of_the_page_run",
    ("metrics", "scrape_configs"): "test_exporter.py::test_the_configuration_of_the_page_is_valid",
    ("mqtt", "inco-trio mqtt"): "test_mqtt.py::test_the_command_of_the_page_runs",
    ("mqtt", '{"sequence"'): "test_mqtt.py::test_notifications_are_published",
    ("mqtt", '{"send"'): "test_mqtt_configuration.py::test_the_file_of_the_page_is_valid",
    ("asyncio", '"""Answer each'): "test_aio.py::test_documented_asyncio_program",
    (
        "asyncio",
        '"""Print each notification of a running',
    ): "test_aio.py::test_documented_client_of_the_control_socket",
    ("asyncio", '"""Print each notification, and'): "test_aio.py::test_documented_callback",
    ("asyncio", '"""Connect a board'): "test_aio.py::test_documented_connection_to_mqtt",
    ("control", '{"protocol"'): "test_pages.py::test_the_control_socket_answers_as_its_page_shows",
    ("control", '{"request": "status"'): "test_pages.py::test_the_control_socket_answers_as_its_page_shows",
    (
        "control",
        '{"request": "history"}',
    ): "test_history_command.py::test_the_history_has_what_happened_before_it_was_asked",
    ("control", "inco-trio history"): "test_history_command.py::test_the_history_has_what_happened_before_it_was_asked",
    ("control", '{"request": "follow"}'): "test_control.py::test_a_follower_receives_all_it_did_not_acknowledge",
    ("control", '{"event": "notifications"'): (
        "test_control.py::test_a_follower_may_receive_and_acknowledge_notifications_in_batches"
    ),
    ("control", '{"event": "merged"'): "test_control.py::test_notifications_beyond_the_limit_are_merged_by_signal",
    ("testing", ""): "test_pages.py::test_the_tests_on_the_testing_page_pass",
}
"""The test that runs each unmarked code block. The key is the page and the first characters of the block."""
LONG_PAGES = {"recording", "supervision", "troubleshooting"}
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


def all_blocks() -> Iterator[Block]:
    """Yield each code block that is not a Sphinx directive."""
    for path in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))):
        yield from (block for block in parts(path.stem) if block.language)
        indented = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?:^    .*\n)+", indented, re.MULTILINE):
            yield Block(path.stem, "", textwrap.dedent(code))


def named(script: Script) -> str:
    return script.page


@pytest.mark.netns
@pytest.mark.s6
@pytest.mark.tools
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=[pytest.mark.thorough] if script.page in LONG_PAGES else [])
        for page in PAGES
        for script in scripts(page)
    ],
    ids=named,
)
def test_the_commands_of_a_page_print_what_it_shows(cores: Cores, core1: Peer, tmp_path: Path, script: Script) -> None:
    with signalling(core1):
        done = run(cores, tmp_path, "\n".join(["exec 2>&1", *script.lines]))
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    said = re.findall(r"^=== \d+\n(.*?)^===$", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(said) == len(script.shown)
    for (_, shown), output in zip(script.shown, said, strict=True):
        assert comparable(shown) - {"..."} <= comparable(output), output


@pytest.mark.netns
@pytest.mark.parametrize(("page", "text"), blocks("python", "first-steps"))
def test_the_programs_on_the_pages_run(cores: Cores, tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "program.py").write_text(text)
    done = run(cores, tmp_path, f"echo '{UDRV % '/run/irq'}' > udrv.json; python3 {tmp_path}/program.py")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def run_pytest(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests in a directory, with no other plugin than ours."""
    plugins = [f"-pno:{name}" for name in ("asyncio", "trio", "anyio", "cacheprovider")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *plugins],
        cwd=directory,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.mark.qemu
def test_the_tests_on_the_testing_page_pass(tmp_path: Path) -> None:
    page = [block for block in parts("testing") if block.mark != "not run:"]
    *tests, program = [block.text for block in page if block.language == "python"]
    (watch,) = (text for _, text in blocks("c", "application") if "int main" in text)
    (tmp_path / "watch.c").write_text(watch)
    subprocess.run(["gcc", "-o", "watch", "watch.c"], cwd=tmp_path, check=True)
    readme = next(block.text for block in parts("README") if block.text.startswith("def test_"))
    for number, text in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(text)
    # The README's test uses this page's fixture, so write both to one file.
    fixture = tests[0].partition("\n\ndef test_")[0]
    (tmp_path / "test_readme.py").write_text(f"{fixture}\n\n\n{readme}\n")
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (0, "ihub_hwwd_irq\n")


@pytest.mark.tools
def test_a_failed_test_prints_what_the_testing_page_shows(tmp_path: Path) -> None:
    """The page shows the first test with a program that does not answer."""
    test = next(block.text for block in parts("testing") if block.language == "python")
    for before, after in (
        ('await core0.send("redun_notify_irq")', "pass"),
        # Fail soon, but not before the notification has arrived at core 0.
        ("    inco_board.core1.expect", '    inco_board.core0.expect("ihub_hwwd_irq")\n    inco_board.core1.expect'),
        ('expect("redun_notify_irq")', 'expect("redun_notify_irq", timeout=0.01)'),
    ):
        assert test.count(before) == 1
        test = test.replace(before, after)
    (tmp_path / "test_watchdog.py").write_text(test)
    done = run_pytest(tmp_path)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    (shown,) = (block.text for block in parts("testing") if block.language == "text")
    said = re.sub(r"\S+/(?=test_watchdog_is_answered0/)", "/tmp/pytest-of-you/pytest-0/", done.stdout)  # noqa: S108 - a text
    assert comparable(shown) - {"..."} <= comparable(said.replace(", timeout=0.01)", ")")), done.stdout


def commands() -> list[list[str]]:
    """Return the inco-trio command lines of the README and the pages, without redirections, pipes and comments."""
    shells = [block.text for block in all_blocks() if block.language in ("", "sh")]
    code = "".join(text for text in shells if not text.startswith(tuple(NOT_RUN)))
    lines = code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        # Remove optional words, which are in brackets.
        words = shlex.shlex(re.sub(r"\[.*?\]", "", line), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        if start := re.match(r"(?:ip netns exec \w+ )?inco-trio (?=[a-z])", line):
            found.append([*itertools.takewhile(lambda word: word not in SHELL, words)][len(start[0].split()) :])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_parser_accepts_every_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The pages name users and groups that this machine does not have.
    monkeypatch.setattr(pwd, "getpwnam", lambda _: pwd.getpwuid(0))
    monkeypatch.setattr(grp, "getgrnam", lambda _: grp.getgrgid(0))
    parse(words)


def test_every_command_appears_on_a_page() -> None:
    # `s6` is the earlier name of `service s6`.
    assert {words[0] for words in commands()} == COMMANDS.keys() - {"s6"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_commands_in_the_prose_have_the_options_that_are_named(page: Path) -> None:
    for name, rest in re.findall(r"`inco-trio ([a-z0-9]+)( [^`]*)?`", page.read_text()):
        assert name in COMMANDS
        (commands,) = (each for each in parser(name)._actions if isinstance(each, argparse._SubParsersAction))
        assert set(re.findall(r"--[a-z-]+", rest)) <= commands.choices[name]._option_string_actions.keys()


def up(page: Path) -> str:
    """Return the relative path from a page's directory to the project's root, as used in links on the page."""
    return "" if page.parent == ROOT else "../"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_every_link_has_a_target(page: Path) -> None:
    """Links must also work for readers of the plain Markdown files, without the website."""
    text = page.read_text().replace("](https://github.com/inco-trio/inco-trio/blob/main/", f"]({up(page)}")
    text = re.sub(
        r"^\[[\w-]+\]: https://github.com/inco-trio/inco-trio/blob/main/(.*)$",
        rf"]({up(page)}\1)",
        text,
        flags=re.MULTILINE,
    )
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
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


def test_every_code_block_is_run_or_exempt_for_a_reason() -> None:
    left: set[object] = {*RUN_BY, *NOT_RUN}
    for block in all_blocks():
        if block.mark == "run by":
            assert exists(block.value), f"{block.page}: {block.value}"
        elif not block.mark and not (block.page in PAGES and block.language in ("sh", "text")):
            found: list[object] = [key for key in RUN_BY if key[0] == block.page and block.text.startswith(key[1])]
            found += [key for key in NOT_RUN if block.text.startswith(key)]
            assert len(found) == 1, f"{block.page}: {block.text}"
            left -= set(found)
    assert not left
    assert [test for test in RUN_BY.values() if not exists(test)] == []


def test_the_tests_named_in_promises_exist() -> None:
    rows = re.findall(r"^\| (.*) \| (.*) \|$", (DOCS / "promises.md").read_text(), re.MULTILINE)[1:]
    named = {promise: re.findall(r"`(test_[^`]+)`", tests) for promise, tests in rows}
    assert len(named) > 10
    assert [promise for promise, tests in named.items() if not tests] == []
    assert [test for tests in named.values() for test in tests if not exists(test)] == []


def test_contributing_lists_the_boots_of_other_kernels() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Tests on other kernels\n")[2].partition("\n## ")[0]
    header, *rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    assert header.split(" | ")[2:] == [*SYSTEMS]
    assert [row.split(" | ")[0] for row in rows] == [f"`{start.name}`" for start in BOOTS]


def test_the_board_files_on_the_pages_are_valid(tmp_path: Path) -> None:
    texts = [block.text for block in parts("boards") if block.mark == "file"]
    (tmp_path / "b2").mkdir()
    (tmp_path / "b2/udrv.json").write_text(UDRV % (tmp_path / "irq"))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.json").write_text(text.replace("/etc/", f"{tmp_path}/"))
    boards = read_boards(tmp_path)
    assert not boards.refused
    assert [config.link for config in boards.configs.values()] == [json.loads(text)["link"] for text in texts]


@pytest.mark.tools
def test_the_control_socket_answers_as_its_page_shows(tmp_path: Path) -> None:
    codes = [block.text for block in all_blocks() if block.page == "control" and not block.language][:2]
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


def test_the_client_on_the_control_page_prints_a_notification(tmp_path: Path) -> None:
    program, _, shown = [block.text for block in parts("control") if block.mark == "run by"]
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        board.running()
        client = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", program, board.path], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(client.kill)
        assert client.stdout is not None
        first, second = shown.splitlines(keepends=True)
        assert client.stdout.readline() == first.replace("rpmsg4000", f"{tmp_path}/core0")
        board.inbound(peer)
        assert client.stdout.readline() == second


def test_the_commands_page_lists_each_command_and_exit_code() -> None:
    text = (DOCS / "commands.md").read_text()
    rows = re.findall(r"^\| (?:(\w+) )?\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE)
    assert rows == [
        ("" if number else purpose, command, COMMANDS[command])
        for purpose, commands in GROUPS.items()
        for number, command in enumerate(commands)
    ]
    codes = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert codes == [(str(code), meaning) for code, meaning in EXIT_CODES.items()]


def test_the_configuration_page_lists_each_key() -> None:
    assert [*described(BoardFile)] == [field.name for field in attrs.fields(BoardFile)]
    assert table(BoardFile)[2:4] == [
        "| `link` | required | The address of the link: an interface, or `unix:LOCAL,peer=REMOTE`. |",
        "| `config` | optional | The absolute path of a udrv.json. |",
    ]


def test_the_figures_page_leaves_out_the_earlier_commit() -> None:
    results = """
| figure | goal | result | spread | met | medians | note |
| latency | <= 2 x floor | x 1.5 | 1..2 | yes | inco-trio 3, inco-trio 4e59515 4,000, C 2 us | 3 pairs |
| latency, against inco-trio 4e59515 |  | x 0.5 | 0..1 |  | inco-trio 3, inco-trio 4e59515 4,000 us |  |
| memory |  | 3 | 3..3 |  | inco-trio 3, inco-trio 4e59515 4 MiB |  |

Measured on a machine.
"""
    assert figures(results) == [
        "| figure | goal | result | met | medians |",
        "| latency | <= 2 x floor | x 1.5 | yes | inco-trio 3, C 2 us |",
        "| memory |  | 3 |  | inco-trio 3 MiB |",
    ]
    assert len(figures((DOCS / "bench/results.md").read_text())) > 30


def test_the_diagrams_are_up_to_date() -> None:
    old = [name for name, draw in DIAGRAMS.items() if (IMAGES / f"{name}.svg").read_text() != draw().svg()]
    assert not old, "run `python -m docs.diagrams`, and commit"


def test_the_terminal_screenshots_are_up_to_date() -> None:
    # Compare only the text, because the SVG differs between versions of rich.
    old = [name for name in TERMINALS if visible((IMAGES / f"terminal-{name}.svg").read_text()) != visible(draw(name))]
    assert not old, "run `python -m docs.terminals`, and commit"


@pytest.mark.tools
def test_the_plot_is_up_to_date() -> None:
    # Compare only the text, because the SVG differs between versions of matplotlib.
    is_old = plots.visible(plots.PLOT.read_text()) != plots.visible(plots.draw())
    assert not is_old, "run `python -m docs.plots`, and commit"
