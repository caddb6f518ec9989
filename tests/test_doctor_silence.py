"""Tests of `inco-trio doctor` with a FUSE filesystem whose server never answers requests, or answers them slowly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.doctor import silence
from netns.hang import HANG
from tests.support_proxy import write_udrv

SERVER = """
import ctypes, os, struct, subprocess, sys, threading, time
pause, place, *command = sys.argv[1:]
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode={os.stat(place).st_mode:o},user_id=0,group_id=0".encode()
assert ctypes.CDLL(None).mount(b"x", os.fsencode(place), b"fuse", 0, options) == 0

def serve():
    unique = struct.unpack_from("=Q", os.read(fd, 1 << 17), 8)[0]
    os.write(fd, struct.pack("=IiQ", 80, 0, unique) + struct.pack("=II", 7, 31).ljust(64, b"\\0"))  # FUSE_INIT
    while request := os.read(fd, 1 << 17):
        if float(pause):
            time.sleep(float(pause))
            unique = struct.unpack_from("=Q", request, 8)[0]
            os.write(fd, struct.pack("=IiQ", 16, -2, unique))  # ENOENT

threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run(command).returncode)
"""
"""A program that mounts a FUSE filesystem over a file or directory, and runs a command.

It accepts each request. After a pause, it answers that the file does not exist. If the pause is 0, it never answers.
"""


def doctor(place: Path, *words: object, pause: float = 0.0) -> tuple[int, list[dict[str, str]]]:
    """Return the exit code and the results of `doctor` while such a FUSE filesystem covers `place`."""
    command = ["unshare", "--mount", sys.executable, "-c", SERVER, str(pause), str(place)]
    command += [sys.executable, "-m", "inco_trio", "doctor", "--json", *map(str, words)]
    done = subprocess.run(command, check=False, timeout=HANG, stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout)["results"]


def silences(results: list[dict[str, str]]) -> list[dict[str, str]]:
    return [result for result in results if result["found"].startswith("does not answer: ")]


CASES = {
    "directory": ("directory", "dead", "--irq-dir {0}/dead/irq"),
    "directory itself": ("directory", "dead", "--irq-dir {0}/dead"),
    "symlink": ("directory", "dead", "--irq-dir {0}/link/irq"),
    "state file": ("directory", "irq/message_5_state", "--irq-dir {0}/irq"),
    "trigger file": ("directory", "irq/message_6_trig", "--irq-dir {0}/irq"),
    "configuration": ("configuration", "dead", "--config {0}/dead/udrv.json"),
    "boards": ("configuration", "dead", "--boards {0}/dead"),
    "local socket": ("socket", "dead", "unix:{0}/dead/a,peer={0}/b --irq-dir {0}/irq"),
    "peer's socket": ("peer", "dead", "unix:{0}/a,peer={0}/dead/b --irq-dir {0}/irq"),
}
"""The check that fails, the covered file or directory, and the arguments."""


@pytest.mark.parametrize("case", CASES)
def test_a_filesystem_that_does_not_answer_is_reported(tmp_path: Path, case: str) -> None:
    check, covered, words = CASES[case]
    for name in ("dead", "irq"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("dead")
    for name in ("message_5_state", "message_6_trig"):
        (tmp_path / "irq" / name).touch()
    code, results = doctor(tmp_path / covered, *words.format(tmp_path).split())
    assert code == 1
    assert [(result["check"], result["level"]) for result in silences(results)] == [(check, "fail")]
    if case != "boards":  # The doctor still runs the other checks.
        assert "inotify-limits" in [result["check"] for result in results]


def test_a_filesystem_that_is_not_used_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "dead").mkdir()
    udrv = write_udrv(tmp_path / "udrv.json", tmp_path / "irq")
    _, results = doctor(tmp_path / "dead", "--config", udrv)
    assert silences(results) == []
    assert ("configuration", "ok") in [(result["check"], result["level"]) for result in results]


@pytest.mark.parametrize(
    ("mount", "tries"),
    [("fuse.sshfs host:/ rw", True), ("fusectl fusectl rw", False), ("autofs host rw", True),
     ("autofs systemd-1 rw", False), ("tmpfs tmpfs rw", False)],
)  # fmt: skip
def test_only_a_filesystem_that_may_wait_is_tried_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mount: str, tries: bool
) -> None:
    used: list[object] = []

    def ends(use: object) -> bool:
        used.append(use)
        return True

    monkeypatch.setattr(silence, "lines_of", lambda _: [f"1 2 0:3 / /mnt rw - {mount}"])
    monkeypatch.setattr(silence, "_ends", ends)
    assert silence.silent("registers", tmp_path, list) is None
    assert bool(used) is tries


def compute() -> None:
    while time.process_time() < 1:
        pass


def sleep_often() -> None:
    for _ in range(50):
        time.sleep(0.02)  # Each wait is short, but all of them together are long.


@pytest.mark.parametrize("use", [compute, sleep_often])
def test_a_check_that_takes_long_does_not_hang(monkeypatch: pytest.MonkeyPatch, use: Callable[[], None]) -> None:
    """On a busy host, any check may take long. A check that waits as long without a result hangs."""
    monkeypatch.setattr(silence, "_PAUSE", 0.01)
    assert silence._ends(use)
    assert not silence._ends(lambda: time.sleep(HANG))


def test_a_filesystem_that_answers_slowly_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    _, results = doctor(tmp_path / "slow", "--irq-dir", tmp_path / "slow/irq", pause=1.0)
    assert silences(results) == []
    assert ("directory", "warn") in [(result["check"], result["level"]) for result in results]
