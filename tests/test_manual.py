"""Tests that the man pages and completions match the parser, and that they work in man and in the shells."""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from docs.manual.generated import COMPLETION, MAN, MAN5, ROOT, generate, stale
from docs.manual.page import drop_in_page, markdown
from inco_trio.cli.parser import COMMANDS, GROUPS
from inco_trio.signals import builtin_signals
from netns.hang import HANG
from tests.support_pages import parts

REMEDY = "not what the program says any more: run `nox -s generated` (or `python -m docs.manual`), and commit"
BASH, ZSH, FISH = (ROOT / COMPLETION / name for name in ("inco-trio.bash", "_inco-trio", "inco-trio.fish"))
PAGES = sorted((ROOT / MAN).glob("*"))
ALL_PAGES = [*PAGES, *(ROOT / MAN5).glob("*")]
SIGNALS = {signal.name for signal in builtin_signals(Path("/"))}


def test_generated_files_are_up_to_date() -> None:
    old = stale()
    assert not old, f"{', '.join(old)}: {REMEDY}"


def test_stale_files_are_found(tmp_path: Path) -> None:
    for path in generate():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / MAN / "inco-trio-run.1").write_text("old")
    (tmp_path / MAN / "inco-trio-s6.1").unlink()
    (tmp_path / COMPLETION / "gone").write_text("")
    page = tmp_path / "docs/configuration.md"
    page.write_text(page.read_text().replace("| required |", "| optional |", 1))
    old = ["docs/completion/gone", "docs/configuration.md", "docs/man/inco-trio-run.1", "docs/man/inco-trio-s6.1"]
    assert stale(tmp_path) == old


@pytest.mark.parametrize("columns", ["20", "300"])
def test_the_terminal_width_does_not_change_the_pages(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert {path: text == (ROOT / path).read_text() for path, text in generate().items()} == dict.fromkeys(
        generate(), True
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_page_has_its_sections(page: Path) -> None:
    headings = [line[4:] for line in page.read_text().splitlines() if line.startswith(".SH ")]
    optional = {"COMMANDS", "ENVIRONMENT", "FILES"}
    always = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SIGNALS", "EXAMPLES", "SEE ALSO"]
    assert [heading for heading in headings if heading not in optional] == always
    if "$UDRV_JSON_PATH" in page.read_text():
        assert {"ENVIRONMENT", "FILES"} <= {*headings}


def test_the_page_of_the_configuration_has_each_key() -> None:
    text = (ROOT / MAN5 / "udrv.json.5").read_text()
    assert ".B file.DEVICE.path\n" in text
    assert ".B misc.inco_proxy.signals.SIGNAL.direction\n" in text


def test_the_page_of_all_commands_lists_each_command_once_and_by_purpose() -> None:
    text = (ROOT / MAN / "inco-trio.1").read_text()
    listed = re.findall(r"^\.BR inco-trio-(\S+) \(1\)$", text.replace("\\-", "-"), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert [line[4:] for line in text.splitlines() if line.startswith(".SS ")] == [*GROUPS, "other"]
    description = text.partition(".SH DESCRIPTION\n")[2].partition(".SH ")[0]
    assert [each for each in COMMANDS.values() if each in " ".join(description.split())] == []


def test_a_page_names_only_the_variables_and_files_that_its_command_uses() -> None:
    text = (ROOT / MAN / "inco-trio-help.1").read_text()
    assert ".SH ENVIRONMENT" not in text
    assert ".SH FILES" not in text
    reads = {page.stem.removeprefix("inco-trio-") for page in PAGES if "\n.B UDRV_JSON_PATH\n" in page.read_text()}
    assert reads == {"inco-trio", "inco_proxy", "check", "doctor", "replay", "run", "s6", "service"}
    uses = {page.stem.removeprefix("inco-trio-") for page in PAGES if "\n.B udrv.json\n" in page.read_text()}
    assert uses == {*reads, "plot", "send", "wait"}


def test_an_epilog_becomes_sections_and_is_escaped_for_roff() -> None:
    parser = argparse.ArgumentParser(
        prog="inco_proxy",
        description="What it does.",
        epilog="First words,\nmore of them.\n\nexamples:\n  .run 'a' \\n\n  second --one\n"
        "exit codes: 0 fine, 1 bad, or\nworse, 9 both; see inco-trio --help\nLast words with `code --x` in them.",
    )
    parser.add_argument("--level", nargs="?", metavar="N", help="up to N of 100%% (default: %(default)s)", default=3)
    parser.add_argument("names", nargs="+", metavar="NAME", help="what is named")
    page = drop_in_page(parser)["inco_proxy.1"]
    for part in (
        "\\fBinco_proxy\\fR [\\fIOPTION\\fR ...] \\fINAME\\fR ...\n",
        ".SH DESCRIPTION\nWhat it does.\n.PP\nFirst words, more of them.\n",
        ".PP\nLast words with \\fBcode \\-\\-x\\fR in them.\n",
        ".TP\n\\fB\\-\\-level\\fR [\\fIN\\fR]\nup to \\fIN\\fR of 100% (default: 3)\n",
        ".B 1\nbad, or worse\n.TP\n.B 2\ninvalid arguments, such as an unknown signal; also if LINK is missing and\n",
        "\nseveral proxies run\n",
        ".TP\n.B 9\nboth\n",
        ".EX\n\\&.run \\(aqa\\(aq \\en\nsecond \\-\\-one\n.EE\n",
    ):
        assert part in page


def test_the_site_explains_a_command_with_the_texts_of_its_help() -> None:
    parser = argparse.ArgumentParser(
        prog="inco-trio do",
        usage="%(prog)s [OPTION ...] NAME",
        description="What it does.",
        epilog="more about it\nexit codes: 0 fine,\n1 bad\nexample: inco-trio do x",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="what is named")
    parser.add_argument("--to", metavar="PATH|none", help="one | two (default: %(default)s)", default=3)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    assert markdown(parser) == [
        *("```text", "usage: inco-trio do [OPTION ...] NAME", "```", "", "What it does.", ""),
        *("| argument | meaning |", "|---|---|", "| `NAME` | what is named |"),
        "| `-h, --help` | show this help message and exit |",
        "| `--to PATH\\|none` | one \\| two (default: 3) |",
        *("", "More about it.", "", "Exit codes: 0 fine, 1 bad.", ""),
        *("```sh", "inco-trio do x", "```"),
    ]


def test_each_command_has_a_page() -> None:
    assert {page.name for page in PAGES} == {
        "inco-trio.1",
        "inco_proxy.1",
        *(f"inco-trio-{command}.1" for command in COMMANDS),
    }


@pytest.mark.tools
@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_mandoc_and_man_report_no_warning(page: Path) -> None:
    lint = subprocess.run(["mandoc", "-T", "lint", page], capture_output=True, text=True, timeout=HANG, check=False)
    assert lint.stdout == ""
    shown = subprocess.run(
        ["man", "--warnings", "--encoding=UTF-8", "--local-file", page],
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    assert shown.stderr == ""
    assert "in $UDRV_JSON_PATH" in shown.stdout or page.stem != "inco_proxy"
    assert "--after 'inco-trio send redun_notify_irq'" in shown.stdout or page.stem != "inco-trio-wait"


Complete = Callable[[Path, str], set[str]]


def in_bash(cwd: Path, line: str) -> set[str]:
    """Return bash's completions of `line`. Call the completion function in the same way as readline does."""
    words = line.split(" ")
    script = f"""
        . {BASH}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=$(printf %s "$*" | wc -c)
        $(complete -p inco-trio | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return run(cwd, "bash", "--norc", "-c", script, "bash", *words)


def in_fish(cwd: Path, line: str) -> set[str]:
    """Return fish's completions of `line`, without their descriptions."""
    offered = run(cwd, "fish", "--no-config", "-c", f"source {FISH}; complete --do-complete $argv[1]", line)
    return {word.split("\t")[0] for word in offered}


def run(cwd: Path, *command: str) -> set[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    assert done.stderr == ""
    return {line.rstrip() for line in done.stdout.splitlines() if line}


def in_zsh(cwd: Path, line: str) -> set[str]:
    """Return zsh's completions of `line`. zsh runs on a terminal, and a wrapper for compadd writes them to a file."""
    fifo = cwd / "fifo"
    os.mkfifo(fifo)
    (cwd / ".zshrc").write_text(f"""
        fpath=({BASH.parent} $fpath)
        autoload -Uz compinit && compinit -u -D
        compadd() {{
            local -a offered
            if [[ "${{@[1,(i)(-|--)]}}" != *-(O|A|D)\\ * ]]; then
                builtin compadd -A offered "$@"
                (( $#offered )) && printf '%s\\n' "$offered[@]" >> {cwd}/offered
            fi
            builtin compadd "$@"
        }}
        finished() {{ echo finished > {fifo} }}
        ask() {{ comppostfuncs=(finished); BUFFER=$QUESTION; CURSOR=$#BUFFER; zle list-choices; exit }}
        zle -N zle-line-init ask
    """)
    shell, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            ["zsh", "--no-globalrcs", "-i"],
            cwd=cwd,
            env={"PATH": os.environ["PATH"], "HOME": str(cwd), "ZDOTDIR": str(cwd), "TERM": "dumb", "QUESTION": line},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        ) as zsh:
            try:
                assert fifo.read_text() == "finished\n"
            finally:
                zsh.kill()
    finally:
        os.close(shell)
        os.close(terminal)
    offered = cwd / "offered"
    return set(offered.read_text().split("\n")) - {""} if offered.exists() else set()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a directory for PATH like pipx's: `inco-trio` is a symlink into the wheel's environment."""
    environment = tmp_path / "environment"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, where in wheel["shared-data"].items():
        (environment / where).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, environment / where)
    for directory in (environment / "bin", tmp_path / "links"):
        directory.mkdir()
    (environment / "bin/inco-trio").write_text("#!/bin/sh\n")
    (environment / "bin/inco-trio").chmod(0o755)
    (tmp_path / "links/inco-trio").symlink_to(environment / "bin/inco-trio")
    return tmp_path / "links"


@pytest.mark.parametrize(
    ("shell", "ask", "said"),
    [
        (("bash", "--norc"), "complete -p inco-trio | grep -o 'inco-trio$'", "inco-trio"),
        pytest.param(
            *(("zsh", "-f"), "autoload -Uz compinit; compinit -u -D; echo $_comps[inco-trio]", "_inco-trio"),
            marks=pytest.mark.tools,
        ),
        pytest.param(
            *(("fish", "--no-config"), "complete -C 'inco-trio ru' | cut -f 1", "run"), marks=pytest.mark.tools
        ),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_the_commands_of_the_page_enable_completion(
    shell: tuple[str, ...], ask: str, said: str, installed: Path, tmp_path: Path
) -> None:
    (lines,) = (block.text for block in parts("installation") if block.language == shell[0])
    path = f"set -gx PATH {installed} $PATH" if shell[0] == "fish" else f"PATH={installed}:$PATH"
    assert run(tmp_path, *shell, "-c", "\n".join([path, lines, ask])) == {said}


@pytest.mark.parametrize(
    "shell",
    [
        ("bash", "--norc"),
        pytest.param(("zsh", "-f"), marks=pytest.mark.tools),
        pytest.param(("fish", "--no-config"), marks=pytest.mark.tools),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_the_commands_of_the_page_print_nothing_without_inco_trio(shell: tuple[str, ...], tmp_path: Path) -> None:
    (lines,) = (block.text for block in parts("installation") if block.language == shell[0])
    for program in ("dirname", "readlink", shell[0]):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    done = subprocess.run(
        [*shell, "-c", lines],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    "complete",
    [in_bash, pytest.param(in_zsh, marks=pytest.mark.tools), pytest.param(in_fish, marks=pytest.mark.tools)],
)
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("inco-trio r", {command for command in COMMANDS if command.startswith("r")}),
        ("inco-trio run --irq", {"--irq-dir", "--irq-owner"}),
        ("inco-trio run --log-format ", {"text", "json"}),
        ("inco-trio run l", {"lo"}),
        ("inco-trio check l", {"lo"}),
        ("inco-trio send ", {"redun_notify_irq"}),
        ("inco-trio wait ", SIGNALS),
        ("inco-trio wait --as cor", {"core1"}),
        ("inco-trio wait ihub_hwwd_irq l", {"lo"}),
        ("inco-trio monitor --signal ihub_h", {"ihub_hwwd_irq"}),
        ("inco-trio check --config ud", {"udrv.json"}),
        ("inco-trio run --irq-dir i", {"irq/"}),
        ("inco-trio s6 --user roo", {"root"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shells_complete_commands_options_and_signals(
    complete: Complete, line: str, offered: set[str], tmp_path: Path
) -> None:
    (tmp_path / "udrv.json").touch()
    (tmp_path / "irq").mkdir()
    found = complete(tmp_path, line)
    assert {word.rstrip("/") for word in found} == {word.rstrip("/") for word in offered}
