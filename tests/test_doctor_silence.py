"""Tests of `inco-trio doctor` with a FUSE filesystem whose server never answers requests, or answers them slowly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from inco_trio.doctor import silence
from netns.hang import HANG
from tests.support_proxy import write_udrv

SERVER = """
import ctypes, os, struct, subprocess, sys, threading
looked, place, *command = sys.argv[1:]
looks = [looked]
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode={os.stat(place).st_mode:o},user_id=0,group_id=0".encode()
assert ctypes.CDLL(None).mount(b"x", os.fsencode(place), b"fuse", 0, options) == 0

def serve():
    unique = struct.unpack_from("=Q", os.read(fd, 1 << 17), 8)[0]
    os.write(fd, struct.pack("=IiQ", 80, 0, unique) + struct.pack("=II", 7, 31).ljust(64, b"\\0"))  # FUSE_INIT
    while request := os.read(fd, 1 << 17):
        if looked:
            if looks:
                open(looks.pop()).close()
            unique = struct.unpack_from("=Q", request, 8)[0]
            os.write(fd, struct.pack("=IiQ", 16, -2, unique))  # ENOENT

threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run(command).returncode)
"""
"""A program that mounts a FUSE filesystem over a file or directory, and runs a command.

It accepts each request. Without a FIFO, it never answers. With one, it answers that the file does not exist, but waits
before the first answer until another process opens the FIFO.
"""

DOCTOR = f"""
import contextlib, os, runpy, sys
from inco_trio.doctor import silence
looked = sys.argv.pop(1)
wait_of = silence._wait_of

def look(process):
    wait = wait_of(process)
    if wait:
        with contextlib.suppress(OSError):  # The server is not waiting.
            os.close(os.open(looked, os.O_WRONLY | os.O_NONBLOCK))
    return wait

silence._wait_of = look
silence._LOOKS = silence._WAITS = round({HANG} / silence._PAUSE)
runpy.run_module("inco_trio", run_name="__main__", alter_sys=True)
"""
"""A program that runs `inco-trio` and opens a FIFO after each look of the doctor that finds a waiting child process."""


def doctor(place: Path, *words: object, looked: Path | None = None) -> tuple[int, list[dict[str, str]]]:
    """Return the exit code and the results of `doctor` while such a FUSE filesystem covers `place`."""
    command = ["unshare", "--mount", sys.executable, "-c", SERVER, str(looked or ""), str(place)]
    command += [sys.executable, *(["-c", DOCTOR, str(looked)] if looked else ["-m", "inco_trio"])]
    command += ["doctor", "--json", *map(str, words)]
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

    def problem(use: object) -> str:
        used.append(use)
        return ""

    monkeypatch.setattr(silence, "lines_of", lambda _: [f"1 2 0:3 / /mnt rw - {mount}"])
    monkeypatch.setattr(silence, "_problem", problem)
    assert silence.silent("registers", tmp_path, list) is None
    assert bool(used) is tries


def result(use: Callable[[], object]) -> str:
    """Return the level and the beginning of the result of a check that calls `use`, or an empty string."""
    found = silence.silent("registers", Path("/irq"), use, elsewhere=True)
    return "" if found is None else f"{found.level.name.lower()}: {found.found.partition(':')[0]}"


def looks_of(monkeypatch: pytest.MonkeyPatch, looks: Iterable[str]) -> tuple[str, int]:
    """Let the doctor's looks find a child process in these waits ("" if it is runnable). After them, the process ends.

    Return the result and the number of waits that were used.
    """
    read_end, write_end = os.pipe()
    used = 0

    def waits() -> Iterator[str]:
        nonlocal used
        for wait in itertools.islice(looks, 10 * silence._WAITS):
            used += 1
            yield wait
        os.write(write_end, b"x")
        yield from itertools.repeat("")

    found = waits()
    monkeypatch.setattr(silence, "_PAUSE", 0)
    monkeypatch.setattr(silence, "_wait_of", lambda _: next(found))
    try:
        return result(lambda: os.read(read_end, 1)), used
    finally:
        os.close(read_end)
        os.close(write_end)


NFS_LOOKS = round(3 / silence._PAUSE)
"""The number of looks after which the NFS client begins a new wait for an unreachable server: it retries every 3 s."""
BUSY = {
    "runnable": [""] * 10 * silence._WAITS,
    "runnable, often in the same wait": ([*["1"] * silence._LOOKS, ""] * silence._WAITS)[: silence._WAITS - 1],
    "many waits": [str(number) for number in range(silence._WAITS - 1)],
}


@pytest.mark.parametrize("case", BUSY)
def test_a_check_that_takes_long_does_not_hang(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """On a busy host, any check may take long."""
    assert looks_of(monkeypatch, BUSY[case]) == ("", len(BUSY[case]))


HANGS = "fail: does not answer"
SLOW = "warn: not checked, because it takes longer than a minute"
KILLED = "warn: not checked, because signal 9 ended the process that read it"


@pytest.mark.parametrize(
    ("looks", "found", "needed"),
    [
        (itertools.repeat("7"), HANGS, silence._LOOKS + 1),
        (map(str, itertools.count()), SLOW, silence._WAITS),
        (itertools.cycle(["1", "", "2", "2"]), SLOW, silence._WAITS // 3 * 4),
        ((str(number // NFS_LOOKS) for number in itertools.count()), HANGS, silence._LOOKS + 1),
    ],
    ids=["same wait", "endless waits", "endless waits on a busy host", "unreachable NFS server"],
)
def test_a_check_that_waits_without_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, looks: Iterable[str], found: str, needed: int
) -> None:
    assert looks_of(monkeypatch, looks) == (found, needed)


def test_a_real_wait_and_a_runnable_process_are_distinguished() -> None:
    assert silence._wait_of(os.getpid()) == ""
    assert result(lambda: time.sleep(HANG)) == HANGS
    assert result(list) == ""


def compute() -> None:
    while True:
        pass


def test_a_check_that_computes_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "_CPU", 1)
    assert result(compute) == KILLED


def test_a_check_whose_process_is_killed_does_not_hang() -> None:
    """The kernel sends SIGKILL when the host has no memory left."""
    assert result(lambda: os.kill(os.getpid(), signal.SIGKILL)) == KILLED


def test_a_filesystem_that_answers_slowly_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    os.mkfifo(looked := tmp_path / "looked")
    _, results = doctor(tmp_path / "slow", "--irq-dir", tmp_path / "slow/irq", looked=looked)
    assert silences(results) == []
    assert ("directory", "warn") in [(result["check"], result["level"]) for result in results]
