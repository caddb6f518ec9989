"""Tests of the process launcher and of the register watch for blocking code."""

from __future__ import annotations

import os
import select
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inco_trio.cores.watch import Watch
from inco_trio.errors import IncoError
from inco_trio.service.launch import Launched, _isolation
from inco_trio.signals import Direction, Signal
from netns.hang import HANG


def launch(home: Path) -> Launched:
    link = f"unix:{home}/core0,peer={home}/core1"
    return Launched("run", link, "--irq-dir", home / "irq", "--control", "none", log=home / "log")


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    made = launch(tmp_path)
    try:
        assert made.wait_ready(HANG), made.log
        yield made
    finally:
        made.close()


def test_modules_of_the_current_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attrs.py").write_text("raise SystemExit('a module of the current directory')")
    (tmp_path / "json.py").write_text("raise SystemExit('a module of PYTHONPATH')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = launch(tmp_path)
    try:
        assert made.wait_ready(HANG), made.log
    finally:
        made.close()


def test_a_user_installation_stays_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _isolation() == "-I"
    monkeypatch.setattr(site, "getsitepackages", list)
    assert _isolation() == "-P"


def test_a_process_is_stopped_or_killed(launched: Launched, tmp_path: Path) -> None:
    assert launched.wait_log("ready", HANG) is not None
    assert launched.stop() == 0
    assert launched.wait_log("not logged", HANG) is None
    again = launch(tmp_path)
    again.wait_ready(HANG)
    again.process.send_signal(signal.SIGSTOP)
    assert again.stop(timeout=0) == -signal.SIGKILL
    again.close()


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from tests.test_launch import launch
launched = launch(Path({str(tmp_path)!r}))
launched.wait_ready({HANG})
print(launched.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        end = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert select.select([end], [], [], HANG)[0]
    os.close(end)


def test_a_registers_directory_may_contain_another_one(tmp_path: Path) -> None:
    outer = Signal("outer", Direction.INBOUND, tmp_path / "irq", "state")
    inner = Signal("inner", Direction.OUTBOUND, tmp_path / "irq/inner", "trig")
    inner.directory.mkdir(parents=True)
    seen: list[Signal | IncoError] = []
    watch = Watch()
    for signals in ([inner], [outer]):
        watch.follow(signals, seen.append)
    for _ in range(3):
        outer.path.write_text("1")
        inner.path.write_text("1")
    watch.drain()
    assert [each.name for each in seen if isinstance(each, Signal)] == ["outer", "inner"] * 3
    # The watch on the outer directory must report that the inner directory was replaced.
    inner.directory.rename(tmp_path / "old")
    inner.directory.mkdir()
    watch.drain()
    (inner.directory / "new").write_text("1")
    (inner.directory / "new").rename(inner.path)
    watch.drain()
    assert seen[6:] == [inner]
    watch.forget(seen.append)
    inner.path.write_text("1")
    watch.drain()
    assert seen[6:] == [inner]
    watch.close()
