"""Tests in which the IRQ directory or its files are removed, replaced, moved, unwritable or of the wrong type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns.fixtures import StartProxy
from tests.faults.applications import exchange, remove_tree
from tests.faults.conftest import Board
from tests.faults.processes import wait_idle, wait_stopped
from tests.faults.supervised import wait_path

DIRECTORY_FAULTS: dict[str, Callable[[Board], None]] = {
    "removed": lambda board: board.applications.remove_directory(),
    "moved": lambda board: board.applications.move_away(board.directory),
    "parent moved": lambda board: board.applications.move_away(board.directory.parent),
    "replaced": lambda board: board.applications.replace_directory(),
}


@pytest.mark.parametrize("fault", DIRECTORY_FAULTS.values(), ids=DIRECTORY_FAULTS)
def test_notifications_pass_after_a_directory_fault(board: Board, fault: Callable[[Board], None]) -> None:
    for _ in range(3):
        fault(board)
        begin = time.monotonic()
        board.works()
        sys.stdout.write(f"works {1e3 * (time.monotonic() - begin):.1f} ms after the directory exists again\n")
    assert "Traceback" not in board.proxy.log
    # The proxy must have sent only the signal that was triggered.
    assert set(board.wire.order) == {"out_b"}


def test_a_trigger_opened_before_the_directory_was_replaced_counts(board: Board) -> None:
    with (board.directory / "out_a_trig").open("w") as trigger:
        board.applications.replace_directory()
        wait_path(board.directory / "out_a_trig")
        trigger.write("1")
    board.wire.wait_seen("out_a")


def test_a_new_directory_that_contains_triggers_counts_as_written(board: Board) -> None:
    new = board.directory.with_name("prepared")
    new.mkdir()
    (new / "out_a_trig").touch()
    board.directory.rename(board.directory.with_name("old"))
    new.rename(board.directory)
    board.wire.wait_seen("out_a")


def test_a_directory_that_appears_without_an_event_counts_as_written(board: Board, tmp_path: Path) -> None:
    parent = board.directory.parent
    # Suspend the proxy, so that none of its timeouts expires between the rename and the symlink.
    wait_stopped(board.proxy.pid)
    parent.rename(tmp_path / "old")
    parent.symlink_to("nowhere")
    os.kill(board.proxy.pid, signal.SIGCONT)
    board.proxy.wait_log("is missing")
    prepared = tmp_path / "prepared" / board.directory.name
    prepared.mkdir(parents=True)
    (prepared / "out_a_trig").touch()
    (tmp_path / "link").symlink_to(prepared.parent)
    (tmp_path / "link").rename(parent)
    board.wire.wait_seen("out_a")
    # Wait until the proxy has created the file. If an application creates and writes it, the proxy can send two frames.
    wait_path(board.directory / "out_b_trig")
    board.applications.trigger("out_b")
    board.wire.wait_seen("out_b")
    assert board.wire.order == ["out_a", "out_b"]


def test_a_directory_that_cannot_be_opened_is_retried(board: Board) -> None:
    # Put a file where the directory was, so that the proxy can neither open nor create the directory.
    board.directory.rename(board.directory.with_name("old"))
    board.directory.touch()
    board.core1.send(b"in_a")
    board.proxy.wait_log("irq: cannot open: ")
    board.directory.unlink()
    board.directory.mkdir()
    wait_path(board.directory / "in_a_state")
    wait_content(board.directory / "in_a_state")
    assert board.proxy.log.count("irq: cannot open: ") == 1
    board.proxy.wait_log("irq: works again")


@pytest.mark.parametrize("above", [False, True], ids=["itself", "its parent"])
def test_the_proxy_does_not_hinder_removing_the_directory(board: Board, above: bool) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            for _ in range(50):
                board.core1.send(b"in_a")
            # Limit the rate of the frames, because removing the directory also needs CPU time.
            stop.wait(0.001)

    gone = board.directory.parent if above else board.directory
    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(5):
            remove_tree(gone)
            # Wait longer than 0.03 s, the time that the proxy gives an application to replace a file.
            stop.wait(0.3)
            board.directory.mkdir(parents=above)
            wait_content(board.directory / "in_a_state")
    finally:
        stop.set()
        thread.join()
    board.applications.trigger("out_b")
    board.wire.wait_seen("out_b")


def wait_content(path: Path) -> None:
    """Wait until a register contains 1."""
    wait_path(path, lambda: path.is_file() and path.read_bytes() == b"1")


@pytest.mark.parametrize("kind", ["directory", "FIFO", "symlink"])
def test_a_blocked_state_register_loses_nothing(board: Board, kind: str, tmp_path: Path) -> None:
    blocked = board.applications.block_state("in_a", kind)
    sent = board.applications.mark()
    for _ in range(3):
        board.core1.send(b"in_a")
    board.proxy.wait_log("cannot write")
    # The proxy must still deliver other signals, and must not write to the target of the symlink.
    board.core1.send(b"in_b")
    board.applications.wait(lambda: board.applications.delivered("in_b", sent), "in_b has not been delivered")
    board.applications.unblock_state(blocked)
    board.applications.wait(
        lambda: board.applications.closes["in_a"] >= 3, "pending notifications have not been delivered"
    )
    board.proxy.wait_log("works again")
    assert board.applications.closes["in_a"] == 3
    assert board.proxy.log.count("in_a_state: cannot write") == 1
    assert board.proxy.counters()["delivered"] == 4


@pytest.mark.parametrize("fault", ["removed", "replaced"])
def test_a_changed_state_register_is_written(board: Board, fault: str) -> None:
    for _ in range(3):
        if fault == "removed":
            board.applications.remove_state("in_b")
        else:
            board.applications.replace_state("in_b")
        board.works()


def test_a_removed_state_register_is_recreated(board: Board) -> None:
    (board.directory / "in_a_state").unlink()
    wait_path(board.directory / "in_a_state")
    assert (board.directory / "in_a_state").read_bytes() == b""


def test_a_read_only_state_register_loses_nothing(only_net_raw: None, start_board: Callable[..., Board]) -> None:
    board = start_board()
    state = board.directory / "in_a_state"
    state.chmod(0o444)
    for _ in range(5):
        board.core1.send(b"in_a")
    board.proxy.wait_log("in_a_state: cannot write: Permission denied")
    board.works()
    state.chmod(0o644)
    board.applications.wait(
        lambda: board.applications.closes["in_a"] >= 5, "pending notifications have not been delivered"
    )
    board.proxy.wait_log("works again")
    assert board.proxy.log.count("cannot write") == 1
    assert board.proxy.counters()["delivered"] == 6


def test_a_read_only_directory_loses_nothing(only_net_raw: None, start_board: Callable[..., Board]) -> None:
    board = start_board()
    board.directory.chmod(0o555)
    (board.directory / "in_a_state").unlink()
    board.core1.send(b"in_a")
    board.proxy.wait_log("cannot")
    board.works()
    board.directory.chmod(0o755)
    wait_content(board.directory / "in_a_state")
    board.proxy.wait_log("works again")


def next_frames(board: Board, *expected: str) -> None:
    """Assert that exactly the frames `expected` were sent. A final trigger of out_b marks their end."""
    board.applications.trigger("out_b")
    wanted = [*expected, "out_b"]
    board.wire.wait(lambda: "out_b" in board.wire.order, "out_b has not been sent")
    assert board.wire.order == wanted
    board.wire.order.clear()


def test_trigger_replaced_by_rename(board: Board) -> None:
    for _ in range(5):
        board.applications.trigger_by_rename("out_a")
        board.wire.wait(lambda: "out_a" in board.wire.order, "the rename has not been sent")
        next_frames(board, "out_a")
        board.applications.trigger("out_a")
        next_frames(board, "out_a")


def test_a_trigger_removed_and_written_again_counts(board: Board) -> None:
    trigger = board.directory / "out_a_trig"
    trigger.unlink()
    board.applications.trigger("out_a")
    board.wire.wait(lambda: "out_a" in board.wire.order, "the new trigger has not been sent")


def test_a_removed_trigger_is_recreated_and_sends_nothing(board: Board) -> None:
    (board.directory / "out_a_trig").unlink()
    wait_path(board.directory / "out_a_trig")
    next_frames(board)
    board.applications.trigger("out_a")
    next_frames(board, "out_a")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/hostname")])
def test_a_trigger_replaced_by_another_type_of_file_is_retried(board: Board, make: Callable[[Path], None]) -> None:
    trigger = board.directory / "out_a_trig"
    other = board.directory.with_name("other")
    make(other)
    exchange(other, trigger)
    other.unlink()
    board.proxy.wait_log("out_a_trig: cannot watch")
    board.works()
    if trigger.is_dir():
        trigger.rmdir()
    else:
        trigger.unlink()
    board.applications.trigger("out_a")
    board.wire.wait(lambda: "out_a" in board.wire.order, "the restored trigger has not been sent")
    assert board.proxy.log.count("cannot watch") == 1


def test_a_process_that_holds_registers_open_is_named(
    board_config: Path, start_board: Callable[..., Board], proxy: StartProxy
) -> None:
    first = start_board()
    trigger, state = first.directory / "out_a_trig", first.directory / "in_a_state"
    assert first.proxy.stop() == 0
    script = "import sys, time; held = open(sys.argv[1], 'w'), open(sys.argv[2]); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, trigger, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        again = proxy("--config", board_config)
        assert f"process {holder.pid} " in again.wait_log(str(trigger))
        assert f"process {holder.pid} " in again.wait_log(str(state))
        holder.communicate(b"\n")


@pytest.mark.parametrize(("place", "kind"), [("/proc/inco-trio", "proc"), ("/sys/inco-trio", "sysfs")])
def test_a_filesystem_without_inotify_is_refused(proxy: StartProxy, place: str, kind: str) -> None:
    running = proxy("--irq-dir", place, ready=False)
    assert running.wait() == 78
    assert f"type {kind}" in running.log
    assert "Traceback" not in running.log
    assert len(running.log.splitlines()) == 1


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a filesystem with room for a few files and pages."""
    place = tmp_path / "board"
    place.mkdir()
    options = ["-o", "size=16k,nr_inodes=12"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "inco-trio-test", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing(small: Path, start_board: Callable[..., Board]) -> None:
    board = start_board()
    filler = small / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 16))
    for _ in range(3):
        board.core1.send(b"in_a")
    board.proxy.wait_log("No space left on device")
    filler.unlink()
    wait_content(board.directory / "in_a_state")
    board.proxy.wait_log("works again")
    assert board.proxy.log.count("No space left") == 1
    wait_idle(board.proxy.pid)
    board.works()
    assert board.proxy.counters()["delivered"] == 4


def test_retries_on_a_full_disk_do_not_count_as_notifications(small: Path, start_board: Callable[..., Board]) -> None:
    board = start_board()
    filler = small / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 16))
    board.core1.send(b"in_a")
    board.proxy.wait_log("No space left on device")
    while board.proxy.counters()["write_failures"] < 5:
        assert board.applications.closes["in_a"] == 0
    filler.unlink()
    wait_content(board.directory / "in_a_state")
    board.proxy.wait_log("works again")
    board.core1.send(b"in_b")
    board.applications.wait(lambda: board.applications.closes["in_b"] == 1, "in_b has not been delivered")
    assert board.applications.closes["in_a"] == 1


def test_a_full_disk_at_start_is_an_error(small: Path, board_config: Path, proxy: StartProxy) -> None:
    for number in range(9):
        (small / f"filler{number}").touch()
    running = proxy("--config", board_config, ready=False)
    assert running.wait() == 71
    assert "No space left on device" in running.log
    assert "Traceback" not in running.log
