"""The standard streams of a command, as a child process finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support_proxy import write_udrv

SAMPLE = Path(__file__).parent / "data" / "udrv.json"
RUN = [sys.executable, "-m", "inco_trio"]


def finished(
    command: Sequence[str], *, closed: Sequence[int] = (), out: str | None = None, **environment: str
) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of a command that ends; `out` is what standard output is."""
    redirections = "".join(f" {fd}<&-" if fd == 0 else f" {fd}>&-" for fd in closed) + (f" >{out}" if out else "")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@"{redirections}', "sh", *RUN, *command],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


SAY_MUCH = [["check", "--config", str(SAMPLE)], ["check", "--json", "--config", str(SAMPLE)], ["--version"], ["--help"]]
UNIT = ["s6", "--systemd", "--config", str(SAMPLE)]


@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_full_standard_output(command: list[str]) -> None:
    assert finished(command, out="/dev/full") == (
        71,
        b"",
        b"inco-trio: error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_closed_standard_output(command: list[str]) -> None:
    code, out, err = finished(command, closed=[1])
    assert out == b""
    if command == ["--help"]:
        assert (code, err.splitlines()[0]) == (0, b"usage: inco-trio [-h] [--version] COMMAND ...")
    else:
        assert (code, err) == (71, b"inco-trio: error: standard output is closed\n")


@pytest.mark.parametrize("command", [*SAY_MUCH, UNIT], ids=" ".join)
def test_a_reader_that_has_gone(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*RUN, *command], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.parametrize("closed", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
def test_closed_streams_are_no_reason_to_fail(closed: list[int], tmp_path: Path) -> None:
    code, _, err = finished(["s6", str(tmp_path / "scan"), "--config", str(SAMPLE)], closed=closed)
    assert (code, err) == (71 if 1 in closed else 0, b"")
    # Nothing was written into a file that had taken the number of a stream.
    service = tmp_path / "scan" / "inco-trio-rpmsg4000"
    assert (service / "run").read_text().startswith("#!/bin/sh\n")
    assert (service / "notification-fd").read_text() == "3\n"


@pytest.mark.parametrize("command", [["check"], UNIT[:2]], ids=" ".join)
def test_a_standard_output_of_ascii(command: list[str], tmp_path: Path) -> None:
    config = write_udrv(tmp_path / "ü\udcff.json", tmp_path / "dir-ü")
    code, out, err = finished([*command, "--config", str(config)], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, err) == (0, b"")
    if command == ["check"]:
        assert out.isascii()
        assert b"/dir-\\xfc/message_4_state" in out
    else:
        # A unit is the same whatever standard output takes for text.
        assert (code, out, err) == finished([*command, "--config", str(config)])


def test_a_complaint_shows_what_cannot_be_printed_as_escapes() -> None:
    code, out, err = finished(["check", "--config", "/no\nsuch\x1b[2Jfile\udcff"])
    assert (code, out) == (78, b"")
    assert err == b"inco-trio: error: /no\\nsuch\\x1b[2Jfile\\udcff: cannot be read: No such file or directory\n"
