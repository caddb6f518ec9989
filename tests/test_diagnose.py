"""Tests of the warnings about conditions that prevent notifications."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from inco_trio.config import Config
from inco_trio.linux import files, processes
from inco_trio.persist.fdstore import NoFdStore
from inco_trio.proxy.proxy import Proxy
from inco_trio.registers.diagnose import (
    UNREPORTED,
    diagnose,
    filesystem,
    filesystem_type,
    open_registers,
    unreported,
)  # fmt: skip
from inco_trio.service import daemon, rivals
from inco_trio.signals import builtin_signals
from netns.hang import HANG

MOUNTS = """\
21 28 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
22 28 0:21 / /proc rw,relatime - proc proc rw
29 28 0:99 / /board rw,relatime shared:2 master:1 - 9p board rw,trans=virtio
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
"""


@pytest.mark.parametrize(
    ("device", "kind"),
    [((0, 20), "sysfs"), ((0, 21), "proc"), ((0, 99), "9p"), ((254, 1), "ext4"), ((254, 2), None)],
)
def test_filesystem_type_is_read(device: tuple[int, int], kind: str | None) -> None:
    assert filesystem_type(MOUNTS, os.makedev(*device)) == kind


@pytest.mark.parametrize("name", ["a\u2028b", "a\x1c\x1cb", "a\rb", "a\v1 0:99\fb", "a\x853\u20022\u20020:31\u2002/b"])
def test_mount_points_with_unusual_separators_are_read(name: str, tmp_path: Path) -> None:
    escaped = name.replace(" ", "\\040")
    mounts = f"1 2 0:30 / /mnt/{escaped} rw shared:9 - fuse.{escaped} {escaped} rw\n3 2 0:31 / /y rw - ext4 z rw\n"
    assert filesystem_type(mounts, os.makedev(0, 30)) == f"fuse.{escaped}"
    assert filesystem_type(mounts, os.makedev(0, 31)) == "ext4"
    assert filesystem_type(mounts, os.makedev(0, 99)) is None


@pytest.mark.parametrize("path", ["/proc", "/proc/self/missing/also", "/sys/kernel"])
def test_filesystems_without_inotify_are_named(path: str) -> None:
    problem = unreported(Path(path))
    assert problem is not None
    assert problem.startswith(path[:5].rstrip("/"))
    assert "of type " + {"/proc": "proc", "/sys/": "sysfs"}[path[:5]] in problem


def test_a_process_that_does_not_answer_does_not_end_the_diagnosis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, released = tmp_path / "message_5_state", threading.Event()

    def descriptors(_: processes.Search, process: Path) -> Iterator[tuple[str, str]]:
        if process.name == "1":
            released.wait()
        yield from [("0", str(path))] * 2

    monkeypatch.setattr(processes, "processes_in", lambda proc: [proc / "1", proc / str(os.getppid())])
    monkeypatch.setattr(processes, "_is_of_another_user", lambda _: True)
    monkeypatch.setattr(processes.Search, "descriptors", descriptors)
    try:
        found = [(signal.path, pid) for signal, pid, _ in open_registers(builtin_signals(tmp_path))]
    finally:
        released.set()
    assert found == [(path, os.getppid())]


def test_an_ordinary_directory_has_no_warning(tmp_path: Path) -> None:
    assert unreported(tmp_path / "made" / "later") is None
    assert list(diagnose(builtin_signals(tmp_path))) == []


def test_the_daemon_warns_about_a_shared_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test cannot mount a shared filesystem, so it makes the diagnosis treat this directory's filesystem as shared.
    kind = filesystem_type(Path("/proc/self/mountinfo").read_text(), tmp_path.stat().st_dev)
    assert kind is not None
    monkeypatch.setitem(UNREPORTED, kind, UNREPORTED["9p"])
    (line,) = diagnose(builtin_signals(tmp_path))
    assert line.startswith(f"{tmp_path}: on a filesystem of type {kind}: ")


def test_the_type_of_an_inaccessible_filesystem_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert filesystem(tmp_path / "loop") == (tmp_path / "loop", None)
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()
    assert filesystem(Path("irq")) == (Path("irq"), None)


def test_a_filesystem_of_another_user_is_named_but_not_accessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fuse_user", lambda _: 12345)
    assert filesystem(tmp_path) == (tmp_path, "fuse")


@contextmanager
def holder(path: Path, mode: str) -> Iterator[int]:
    """Start another process that holds `path` open."""
    program = f"import sys; held = open({str(path)!r}, {mode!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


@pytest.mark.parametrize(
    ("register", "mode", "said"),
    [
        ("message_6_trig", "a", "for writing: only closing the file causes a notification"),
        ("message_6_trig", "r+", "for writing: only closing the file causes a notification"),
        ("message_5_state", "r", "it must read the file again, or watch it, to see a notification"),
        ("message_6_trig", "r", None),
        ("another", "a", None),
    ],
)
def test_the_process_that_holds_a_register_open_is_named(
    tmp_path: Path, register: str, mode: str, said: str | None
) -> None:
    (tmp_path / register).touch()
    with holder(tmp_path / register, mode) as pid:
        lines = list(diagnose(builtin_signals(tmp_path)))
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"{tmp_path / register}: process {pid} (python")
        assert line.endswith(said)


def test_the_thread_of_the_diagnosis_does_not_read_the_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop may close a board while the thread reads, and the thread would fail."""
    config = Config(f"unix:{tmp_path}/core0,peer={tmp_path}/core1", builtin_signals(tmp_path / "irq"))
    readers: set[threading.Thread] = set()
    diagnosed: list[Collection[Any]] = []

    class Watched(daemon.OneBoard):
        def proxies(self) -> Mapping[str, Proxy]:
            readers.add(threading.current_thread())
            return super().proxies()

    async def main() -> None:
        ended = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def find_rivals(boards: Collection[Any]) -> list[str]:
            diagnosed.append(boards)
            token.run_sync_soon(ended.set)
            return []

        monkeypatch.setattr(rivals, "rivals", find_rivals)
        monkeypatch.setattr(daemon, "raise_descriptor_limit", lambda: None)
        service = daemon.Daemon(Watched(lambda: config), "x", "none", NoFdStore())
        async with trio.open_nursery() as nursery:
            runner: Any = SimpleNamespace(ready=lambda: None, follow_reloads=trio.sleep_forever, background=nursery)
            nursery.start_soon(service.run, runner)
            with trio.fail_after(HANG):
                await ended.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert readers == {threading.main_thread()}
    assert diagnosed == [[(config.address, config.netns, config.signals)]]
