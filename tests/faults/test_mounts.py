"""Tests in which a filesystem is mounted over the IRQ directory, its parent or a register, and then unmounted."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Board
from tests.faults.supervised import wait_path
from tests.faults.test_directory_faults import wait_content

TMPFS = ("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs")


@pytest.fixture
def mounted() -> Iterator[list[Path]]:
    """Return a list of mount points, which are unmounted after the test."""
    places: list[Path] = []
    yield places
    for place in reversed(places):
        subprocess.run(["umount", "-l", place], check=True)


def mount(mounted: list[Path], place: Path, *words: str | Path) -> None:
    subprocess.run([*words, place], check=True)
    mounted.append(place)


def unmount(mounted: list[Path]) -> None:
    subprocess.run(["umount", "-l", mounted.pop()], check=True)


def uncover(board: Board, mounted: list[Path]) -> None:
    """Unmount, and wait for one frame per trigger file that reappears: the proxy treats these files as written."""
    seen = len(board.wire.order)
    unmount(mounted)
    board.wire.wait(lambda: len(board.wire.order) >= seen + 3, "the uncovered directory has not been noticed")


def passes(board: Board) -> None:
    """Assert that a trigger sends a frame, and that a frame from core 1 updates the state file."""
    sent = board.wire.seen["out_b"]
    wait_path(board.directory / "out_b_trig")
    # The proxy must notice the trigger even without an inbound notification.
    board.applications.trigger("out_b")
    board.wire.wait(lambda: board.wire.seen["out_b"] > sent, "out_b has not been sent")
    (board.directory / "in_b_state").write_text("")
    board.core1.send(b"in_b")
    wait_content(board.directory / "in_b_state")


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_over_the_directory_is_noticed(board: Board, mounted: list[Path], tmp_path: Path, kind: str) -> None:
    for number in range(3):
        if kind == "tmpfs":
            mount(mounted, board.directory, *TMPFS)
        else:
            (tmp_path / f"other{number}").mkdir()
            mount(mounted, board.directory, "mount", "--bind", tmp_path / f"other{number}")
        passes(board)
        uncover(board, mounted)
        passes(board)
    assert Counter(board.wire.order) == {"out_a": 3, "out_b": 9, "redun_notify_irq": 3}
    assert "Traceback" not in board.proxy.log


def test_a_mount_above_the_directory_is_noticed(board: Board, mounted: list[Path]) -> None:
    for _ in range(3):
        mount(mounted, board.directory.parent, *TMPFS)
        board.proxy.wait_log("is missing")
        board.directory.mkdir()
        passes(board)
        uncover(board, mounted)
        passes(board)
    assert Counter(board.wire.order) == {"out_a": 3, "out_b": 9, "redun_notify_irq": 3}


def test_a_trigger_that_was_written_before_the_mount_is_sent(board: Board, mounted: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "out_a_trig").write_text("1")
    mount(mounted, board.directory, "mount", "--bind", tmp_path / "other")
    board.wire.wait_seen("out_a")
    assert board.wire.order == ["out_a"]


def test_a_mount_over_a_trigger_is_noticed(board: Board, mounted: list[Path], tmp_path: Path) -> None:
    trigger = board.directory / "out_b_trig"
    (tmp_path / "other").touch()
    mount(mounted, trigger, "mount", "--bind", tmp_path / "other")
    board.wire.wait_seen("out_b")  # The proxy treats a replaced trigger as written.
    passes(board)
    unmount(mounted)
    board.wire.wait(lambda: board.wire.seen["out_b"] == 3, "the file below the mount has not been noticed")
    passes(board)
    assert board.wire.order == ["out_b"] * 4


def test_a_mount_of_another_filesystem_over_a_trigger_is_refused(
    board: Board, mounted: list[Path], tmp_path: Path
) -> None:
    trigger, elsewhere = board.directory / "out_b_trig", tmp_path / "elsewhere"
    elsewhere.mkdir()
    mount(mounted, elsewhere, *TMPFS)
    (elsewhere / "file").touch()
    mount(mounted, trigger, "mount", "--bind", elsewhere / "file")
    board.proxy.wait_log("out_b_trig: cannot watch: not on the same filesystem as its directory")
    unmount(mounted)
    board.proxy.wait_log("out_b_trig: works again")
    passes(board)
