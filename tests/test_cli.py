"""Tests of the command line that do not need a link: arguments, exit codes, `check`."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inco_trio.cli import check, inco_proxy, main
from inco_trio.cli.doctor import EXITS
from inco_trio.cli.exit_codes import CODES, EXIT_INTERNAL
from inco_trio.cli.options import number_of_seconds, rate, seconds, size
from inco_trio.cli.parser import COMMANDS, EXIT_CODES, GROUPS
from inco_trio.cli.send import EXIT_NOT_SENT
from inco_trio.cli.wait import EXIT_COMMAND, EXIT_NOT_ARRIVED
from inco_trio.config import UDRV_SIZE_MAX
from inco_trio.service import process_signals
from netns.hang import HANG
from tests.support_proxy import write_udrv

SAMPLE = Path(__file__).parent / "data" / "udrv.json"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove configuration variables; restore the package's logger and the signal handlers afterwards."""
    monkeypatch.delenv("UDRV_JSON_PATH", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    package = logging.getLogger("inco_trio")
    before = package.handlers, package.propagate, package.level
    handlers = {number: signal.getsignal(number) for number in process_signals.HELD}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int | str | None, str, str]]:
    """Return a function that runs a command in this process and returns its exit code, stdout and stderr."""

    def run(*arguments: str | Path, command: Callable[[list[str]], int] = main) -> tuple[int | str | None, str, str]:
        code: int | str | None
        try:
            code = command(list(map(str, arguments)))
        except SystemExit as end:  # argparse exits after a usage error.
            code = end.code
        return (code, *capsys.readouterr())

    return run


Say = Callable[..., tuple[int | str | None, str, str]]


def finished(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(say: Say, command: str) -> None:
    code, out, err = say(command, "--help")
    assert (code, err) == (0, "")
    assert f"example: inco-trio {command}" in out
    assert len(out.splitlines()) <= 25


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_file_that_the_wheel_lacks(say: Say, command: str) -> None:
    _, out, _ = say(command, "--help")
    assert not re.search(r"docs/|\w\.md\b", out)


def test_help_names_the_site(say: Say) -> None:
    _, out, _ = say("--help")
    project = tomllib.loads((SAMPLE.parents[2] / "pyproject.toml").read_text())["project"]
    assert f"\nDocumentation: {project['urls']['Documentation']}\n" in f"{out}\n"


def test_help_names_the_commands(say: Say) -> None:
    code, out, _ = say("--help")
    assert code == 0
    grouped = [command for commands in GROUPS.values() for command in commands]
    assert sorted([*grouped, "s6", "help"]) == sorted(COMMANDS)
    assert all(re.search(rf"^  {command} .*{re.escape(COMMANDS[command])}$", out, re.MULTILINE) for command in grouped)
    assert all(f"\n{purpose}:\n" in out for purpose in GROUPS)
    # The help has one line for each command and at most 18 other lines.
    assert len(out.splitlines()) <= len(grouped) + 18
    for words in ((), ("help",)):
        assert say(*words) == (0, out, "")


def test_help_explains_a_command_and_the_exit_codes(say: Say) -> None:
    assert say("help", "send") == say("send", "--help")
    code, out, err = say("help", "exit-codes")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{number:3}  {meaning}" for number, meaning in EXIT_CODES.items()]
    assert {*CODES.values(), EXIT_INTERNAL, 0, *EXITS.values(), EXIT_NOT_ARRIVED, EXIT_COMMAND, EXIT_NOT_SENT, 130} == {
        *EXIT_CODES
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("stat",), "inco-trio: error: unknown command 'stat': did you mean status?"),
        (("xyz",), "inco-trio: error: unknown command 'xyz'"),
        (("status", "--jso"), "inco-trio status: error: unrecognized arguments: --jso: did you mean --json?"),
        (("status", "--watcj=1"), "inco-trio status: error: unrecognized arguments: --watcj=1: did you mean --watch?"),
        (("record", "x", "--xyz"), "inco-trio record: error: unrecognized arguments: --xyz"),
        (("help", "exit"), "inco-trio help: error: argument TOPIC: invalid choice: 'exit'"),
        (
            ("send", "redun_notif_irq", "--irq-dir", "/x"),
            "inco-trio: error: redun_notif_irq: no such signal (expected one of: redun_notify_irq); did you mean redun",
        ),
    ],
)
def test_similar_words_are_suggested(say: Say, words: tuple[str, ...], complaint: str) -> None:
    code, out, err = say(*words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(complaint)
    # A usage error from argparse begins with the usage of the command.
    assert len(err.splitlines()) == 1 or err.startswith(f"usage: {complaint.partition(':')[0]} ")


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (seconds, "0", 0),
        (seconds, "1.5", 1.5),
        (seconds, "1e-3", 1e-3),
        (number_of_seconds, "250ms", 0.25),
        (number_of_seconds, "10s", 10),
        (number_of_seconds, "5m", 300),
        (number_of_seconds, "2h", 7200),
        (number_of_seconds, "1.5d", 129600),
        (rate, "2k", 2000),
        (size, "100", 100),
        (size, "500k", 500_000),
        (size, "10M", 10_000_000),
        (size, "1Gi", 2**30),
    ],
)
def test_numbers_have_units(read: Callable[[str], float], text: str, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize("text", ["", "s", "1x", "1 s", "-1s", "nan", "inf", "1.2.3", "0x10", "1e999", "1S"])
def test_other_units_are_refused(text: str) -> None:
    for read in (seconds, number_of_seconds, rate, size):
        with pytest.raises(ArgumentTypeError, match=re.escape(f"{text!r}: expected a ")):
            read(text)


def test_the_example_configuration_is_valid(say: Say, tmp_path: Path) -> None:
    code, out, err = say("check", "--example")
    assert (code, err) == (0, "")
    (tmp_path / "u.json").write_text(out)
    code, out, err = say("check", "--config", tmp_path / "u.json")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 5
    assert "note: " not in out


def test_help_of_inco_proxy_has_an_example(say: Say) -> None:
    code, out, _ = say("--help", command=inco_proxy)
    assert code == 0
    assert "example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("run", "--nonsense"),
        ("run", "rpmsg4000", "surplus"),
        ("run", "--log-format", "xml"),
        ("run", "--notification-fd", "three"),
        ("demo", "--count", "many"),
        ("demo", "--count", "0"),
        ("demo", "--count", "9" * 30),
        ("demo", "--rate", "1e400"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_print_the_usage(say: Say, arguments: tuple[str, ...]) -> None:
    code, out, err = say(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: inco-trio")


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--config", "x", "a")], ids=" ".join)
def test_wrong_arguments_of_inco_proxy_print_the_usage(say: Say, arguments: tuple[str, ...]) -> None:
    code, _, err = say(*arguments, command=inco_proxy)
    assert code == 2
    assert err.startswith("usage: inco_proxy")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run",), "no configuration: use --config FILE or set UDRV_JSON_PATH (`run` also accepts --irq-dir DIR)"),
        (("check",), "no configuration: use --config FILE or set UDRV_JSON_PATH (`run` also accepts --irq-dir DIR)"),
        (("run", "--config", "a", "--irq-dir", "b"), "--irq-dir and --config are mutually exclusive"),
        (("s6", "--config", str(SAMPLE)), "SCANDIR: missing (expected the scan directory to write to)"),
        (
            ("run", "--irq-dir", "b", "--notification-fd", "1"),
            "--notification-fd 1: 0, 1 and 2 are the standard streams (3 is customary)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_contradictory_arguments_are_one_error_line(arguments: tuple[str, ...], complaint: str) -> None:
    # Use a separate process, because the command `run` changes the signal handlers.
    done = finished(sys.executable, "-m", "inco_trio", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"inco-trio: error: {complaint}\n")


def test_inco_proxy_reads_the_variable_udrv_json_path(tmp_path: Path) -> None:
    done = finished(Path(sys.executable).with_name("inco_proxy"), "rpmsg4000", UDRV_JSON_PATH=str(tmp_path / "none"))
    assert done.returncode == 78
    assert done.stderr == f"inco-trio: error: {tmp_path}/none: cannot be read: No such file or directory\n"


def test_check_prints_the_signal_table(say: Say) -> None:
    code, out, err = say("check", "--config", SAMPLE)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if not line.startswith("note: ")]
    assert {tuple(row[:2]) for row in rows} >= {
        ("ihub_reset_irq", "inbound"),
        ("ihub_hwwd_irq", "inbound"),
        ("redun_notify_irq", "outbound"),
    }
    assert all(row[2].startswith("/") for row in rows)


UNIX_EXPLANATION = (
    "a Unix datagram socket at /x/a, which needs no privilege; the other side, such as QEMU, is bound at /x/b; "
    "the MAC address is 02:00:00:00:00:01"
)


@pytest.mark.parametrize("option", [(), ("--iface",)], ids=["argument", "former option"])
@pytest.mark.parametrize(
    ("link", "explanation"),
    [
        ("rpmsg0", "the network interface rpmsg0, through an AF_PACKET socket, which needs CAP_NET_RAW"),
        (
            "unix:/x/a,peer=/x/b,mac=02:00:00:00:00:01",
            UNIX_EXPLANATION,
        ),
    ],
)
def test_check_explains_a_link(say: Say, link: str, explanation: str, option: tuple[str, ...]) -> None:
    code, out, err = say("check", "--config", SAMPLE, *option, link)
    assert (code, err) == (0, "")
    assert f"link: {explanation}" in out.splitlines()
    _, out, _ = say("check", "--config", SAMPLE, *option, link, "--json")
    found = json.loads(out)
    mac = "02:00:00:00:00:01" if link.startswith("unix:") else None
    assert (found["link"], found["mac"], found["peer"]) == (link, mac, mac and "/x/b")


def test_check_refuses_an_invalid_link(say: Say) -> None:
    code, out, err = say("check", "--config", SAMPLE, "--iface", "unix:/x/a")
    assert (code, out) == (2, "")
    assert err.startswith("inco-trio: error: link 'unix:/x/a': peer=REMOTE is missing")


def test_check_prints_json(say: Say, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", Path("/irq"), {"a_irq": "a_state"}, {"b_irq": "b_trig"})
    code, out, _ = say("check", "--config", udrv, "--json")
    assert code == 0
    found = json.loads(out)
    assert {"signal": "b_irq", "direction": "outbound", "register": "/irq/b_trig"} in found["signals"]
    assert [signal["direction"] for signal in found["signals"]] == ["inbound"] * 3 + ["outbound"] * 2
    regs = ("ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_trig")
    assert [note.partition(" is missing")[0] for note in found["notes"]] == [
        f"misc.ihub_config_dev.regs.{reg}" for reg in regs
    ]


def test_check_notes_defaults_that_it_used(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UDRV_JSON_PATH", str(write_udrv(tmp_path / "u.json", Path("/irq"), {}, {})))
    code, out, _ = say("check")
    assert code == 0
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    assert "note: misc.ihub_config_dev.regs.redun_notify_trig is missing: using ihub-irq-dev.message_6_trig" in notes


def test_check_reports_all_mistakes_at_once(say: Say, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", Path("irq"), {"a b": "a_state"}, {"c": "../c"})
    code, out, err = say("check", "--config", udrv)
    assert (code, out) == (78, "")
    lines = err.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith(f"inco-trio: error: {udrv}: ") for line in lines)


def test_a_closed_standard_output_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "inco_trio", "check", "--config", str(SAMPLE)],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_scan_directory_is_written_once(say: Say, tmp_path: Path) -> None:
    scandir = tmp_path / "service"
    code, out, _ = say("s6", scandir, "--user", "root", "--config", SAMPLE)
    assert code == 0
    assert str(scandir) in out
    assert say("s6", scandir, "--user", "root", "--config", SAMPLE) == (0, "nothing changed\n", "")


def test_a_systemd_unit_is_printed(say: Say) -> None:
    code, out, _ = say("s6", "--systemd", "--iface", "rpmsg16", "--config", SAMPLE)
    assert code == 0
    assert "[Service]" in out
    assert "rpmsg16" in out


def test_service_writes_what_s6_writes(say: Say, tmp_path: Path) -> None:
    unit = say("s6", "--systemd", "--iface", "rpmsg16", "--config", SAMPLE)
    assert say("service", "systemd", "rpmsg16", "--config", SAMPLE) == unit
    options = ("--config", SAMPLE, *(("--user", "root") if os.geteuid() == 0 else ()))
    code, out, _ = say("service", "s6", tmp_path / "scan", "rpmsg16", *options)
    assert code == 0
    assert f"created {tmp_path}/scan/inco-trio-rpmsg16/run" in out
    assert say("s6", tmp_path / "scan", "--iface", "rpmsg16", *options) == (0, "nothing changed\n", "")
    for words, said in (
        (("systemd", "a", "b"), "a: `service systemd` prints a unit and does not use a SCANDIR"),
        (("s6",), "SCANDIR: missing (expected the scan directory to write to)"),
    ):
        assert say("service", *words, "--config", SAMPLE) == (2, "", f"inco-trio: error: {said}\n")


def test_importing_the_package_has_no_side_effect() -> None:
    script = """
import signal, sys, threading
before = {n: signal.getsignal(n) for n in signal.valid_signals()}
import inco_trio
import logging
assert {n: signal.getsignal(n) for n in signal.valid_signals()} == before
assert threading.active_count() == 1
assert not logging.getLogger("inco_trio").handlers
assert not {"trio_asyncio", "cattrs"} & set(sys.modules)
print(sorted(inco_trio.__all__) == inco_trio.__all__)
"""
    done = finished(sys.executable, "-c", script)
    assert (done.stdout, done.stderr) == ("True\n", "")


IMPORTED = """
import sys
from inco_trio.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""

NEVER = {"asyncio", "trio_asyncio", "inco_trio.aio", "inco_trio.cli.demo", "inco_trio.simulation"}
NOT_FOR_RUN = {
    "cattrs", "email", "importlib.metadata", "inco_trio.cli.check", "inco_trio.cli.s6", "inco_trio.notification",
    "inco_trio.proxy_status", "inco_trio.stats",
}  # fmt: skip
NOT_FOR_OTHERS = {"inco_trio.service.daemon", "inco_trio.proxy.proxy", "inco_trio.registers", "pyinotify", "trio"}


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        (["--version"], NOT_FOR_OTHERS | NEVER - {"inco_trio.cli.demo"}),
        (["--help"], NOT_FOR_OTHERS | NEVER - {"inco_trio.cli.demo"}),
        (["check", "--config", str(SAMPLE)], NOT_FOR_OTHERS | NEVER | {"inco_trio.service.descriptions"}),
        (["s6", "--systemd", "--config", str(SAMPLE)], NOT_FOR_OTHERS | NEVER | {"cattrs"}),
        (
            ["run", "none0", "--irq-dir", "/proc/nowhere"],
            NOT_FOR_RUN | NEVER | {"inco_trio.links.unix", "inco_trio.service.descriptions"},
        ),
        (
            ["run", "unix:/proc/a,peer=/b", "--irq-dir", "/proc/nowhere"],
            NOT_FOR_RUN | NEVER | {"inco_trio.links.packet", "inco_trio.service.descriptions"},
        ),
        (["run", "none0", "--config", str(SAMPLE)], NOT_FOR_RUN | NEVER),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_needs(command: list[str], unwanted: set[str]) -> None:
    done = finished(sys.executable, "-c", IMPORTED, *command)
    imported = set(done.stderr.splitlines()[-1].split())
    assert "inco_trio.cli.parser" in imported
    assert imported & unwanted == set()


COLLECTOR = """
import contextlib, gc, sys, trio
from inco_trio.cli import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "inco_trio.service.daemon":
            print(gc.isenabled())

sys.meta_path.insert(0, Finder())
trio.run = lambda *_: print(gc.isenabled(), gc.get_freeze_count() > 10_000)
main(["run", "none0", "--irq-dir", "/proc/nowhere"])
gc.disable()
with contextlib.suppress(SystemExit):
    main(["run", "--no-such-option"])
print(gc.isenabled())
"""


def test_the_garbage_collector_is_disabled_only_while_the_daemon_starts() -> None:
    assert finished(sys.executable, "-c", COLLECTOR).stdout.splitlines() == ["False", "True True", "True"]


# The following tests run the command in this process, because coverage cannot measure these failures in a child.


def test_a_configuration_can_be_standard_input(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SAMPLE.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert say("check", "--config", "-") == say("check", "--config", SAMPLE)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    code, _, err = say("check", "--config", "-")
    assert code == 78
    assert err.startswith("inco-trio: error: standard input: ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" " * (UDRV_SIZE_MAX + 1))))
    assert say("check", "--config", "-")[0] == 78
    monkeypatch.setattr(sys, "stdin", None)
    assert say("check", "--config", "-") == (71, "", "inco-trio: error: standard input is closed\n")
    said = "--config -: this command can read its configuration only from a file"
    assert say("service", "systemd", "--config", "-") == (2, "", f"inco-trio: error: {said}\n")
    said = "--record -: must be a path, not standard input or standard output"
    assert say("demo", "--record", "-") == (2, "", f"inco-trio: error: {said}\n")


def test_a_removed_working_directory_is_an_error(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    said = "inco-trio: error: --config u.json: the working directory was removed (use an absolute path)\n"
    assert say("s6", "--systemd", "--config", "u.json") == (2, "", said)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_an_invalid_path_is_an_error(say: Say, path: str) -> None:
    assert say("check", "--config", path) == (2, "", f"inco-trio: error: --config {path!r}: not a valid path\n")


def test_out_of_memory_is_one_error_line(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(check, "run", run)
    assert say("check") == (71, "", "inco-trio: error: out of memory\n")


def test_an_interrupted_command_ends_with_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        raise KeyboardInterrupt

    raised: list[int] = []
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with pytest.raises(KeyboardInterrupt):
        main(["check"])
    assert raised == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
