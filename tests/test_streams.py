"""Tests of the standard streams that a command inherits from its parent process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from netns.hang import HANG
from tests.support_proxy import write_udrv

SAMPLE = Path(__file__).parent / "data" / "udrv.json"
RUN = [sys.executable, "-m", "inco_trio"]
DROP_IN = Path(sys.executable).with_name("inco_proxy")

INTERNAL = """
import inco_trio.cli.check as check
from inco_trio.cli import main

def run(args):
    raise ZeroDivisionError

check.run = run
raise SystemExit(main(["check"]))
"""
"""A program that runs `inco-trio check` and makes it raise an unexpected exception."""


def finished(
    command: Sequence[str], *, closed: Sequence[int] = (), out: str | None = None, **environment: str
) -> tuple[int, bytes, bytes]:
    """Run a command after closing the descriptors in `closed` and redirecting standard output to the file `out`.

    Return the exit code, standard output and standard error.
    """
    redirections = "".join(f" {fd}<&-" if fd == 0 else f" {fd}>&-" for fd in closed) + (f" >{out}" if out else "")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@"{redirections}', "sh", *RUN, *command],
        capture_output=True,
        check=False,
        timeout=HANG,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


BUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
SAY_MUCH = [
    ["check", "--config", str(SAMPLE)],
    ["check", "--json", "--config", str(SAMPLE)],
    ["--version"],
    ["dissector"],
    ["--help"],
]
UNIT = ["s6", "--systemd", "--config", str(SAMPLE)]


@BUFFERED
@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_full_standard_output_is_an_error(command: list[str], unbuffered: str) -> None:
    assert finished(command, out="/dev/full", PYTHONUNBUFFERED=unbuffered) == (
        71,
        b"",
        b"inco-trio: error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_closed_standard_output_is_an_error(command: list[str]) -> None:
    code, out, err = finished(command, closed=[1])
    assert out == b""
    if command == ["--help"]:
        assert (code, err.splitlines()[0]) == (0, b"usage: inco-trio [OPTION ...] COMMAND ...")
    else:
        assert (code, err) == (71, b"inco-trio: error: standard output is closed\n")


@BUFFERED
@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_closed_pipe_is_not_an_error(command: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [*RUN, *command], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=HANG, env=environment
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 0


@BUFFERED
@pytest.mark.parametrize("place", ["/dev/full", "a closed pipe"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ([*RUN, "nonsense"], 2),
        ([*RUN, "check", "--config", "/nonexistent"], 78),
        ([*RUN, "run", "none0", "--irq-dir", "irq"], 69),
        ([*RUN, "run", "none0", "--irq-dir", "irq", "--log-format", "json"], 69),
        ([str(DROP_IN)], 2),
        ([str(DROP_IN), "none0"], 69),
        ([sys.executable, "-c", INTERNAL], 70),
    ],
    ids=lambda value: " ".join(value[1:]).partition("\n")[0] if isinstance(value, list) else "",
)
def test_the_exit_code_is_right_when_stderr_cannot_be_written(
    command: list[str], code: int, place: str, unbuffered: str, tmp_path: Path
) -> None:
    if place == "/dev/full":
        nowhere = os.open(place, os.O_WRONLY)
    else:
        reader, nowhere = os.pipe()
        os.close(reader)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=nowhere,
        check=False,
        timeout=HANG,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "UDRV_JSON_PATH": str(SAMPLE)},
    )
    os.close(nowhere)
    # The drop-in command logs to standard output, not to standard error.
    assert done.returncode == code
    assert done.stdout.startswith(b"inco-trio: info: ") or done.stdout == b""


@BUFFERED
@pytest.mark.parametrize("help_option", ["-h", "--help"])
def test_an_unwritable_help_of_the_drop_in_is_an_error(help_option: str, unbuffered: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [DROP_IN, help_option],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=HANG,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 71
    assert done.stderr == b"inco-trio: error: standard output: No space left on device\n"


@pytest.mark.parametrize("closed", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
def test_closed_streams_do_not_cause_a_failure(closed: list[int], tmp_path: Path) -> None:
    code, _, err = finished(["s6", str(tmp_path / "scan"), "--user", "root", "--config", str(SAMPLE)], closed=closed)
    assert (code, err) == (71 if 1 in closed else 0, b"")
    # Output must not go to a file that was opened with the descriptor number of a closed stream.
    service = tmp_path / "scan" / "inco-trio-rpmsg4000"
    assert (service / "run").read_text().startswith("#!/bin/sh\n")
    assert (service / "notification-fd").read_text() == "3\n"


@pytest.mark.parametrize("command", [["check"], UNIT[:2]], ids=" ".join)
def test_an_ascii_standard_output_works(command: list[str], tmp_path: Path) -> None:
    config = write_udrv(tmp_path / "ü\udcff.json", tmp_path / "dir-ü")
    code, out, err = finished([*command, "--config", str(config)], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, err) == (0, b"")
    if command == ["check"]:
        assert out.isascii()
        assert b"/dir-\\xfc/message_4_state" in out
    else:
        # The encoding of standard output must not change the text of a unit.
        assert (code, out, err) == finished([*command, "--config", str(config)])


def test_unprintable_characters_in_an_error_are_escaped() -> None:
    code, out, err = finished(["check", "--config", "/no\nsuch\x1b[2Jfile\udcff"])
    assert (code, out) == (78, b"")
    assert err == b"inco-trio: error: /no\\nsuch\\x1b[2Jfile\\udcff: cannot be read: No such file or directory\n"


def test_a_long_key_does_not_fill_a_line(tmp_path: Path) -> None:
    """The logger of s6 splits lines of more than 8192 bytes: the next line would begin with the rest of the key."""
    file = tmp_path / "udrv.json"
    file.write_text(
        json.dumps({"file": {"ihub-irq-dev": {"path": "/x"}}, "misc": {"inco_proxy": {"signals": {"d" * 20_000: 3}}}})
    )
    done = subprocess.run([*RUN, "check", "--config", file], capture_output=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (78, b"")
    assert max(map(len, done.stderr.splitlines())) <= 8192
