"""Tests of a system clock that jumps, as on a board that receives the time only after it has started."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import Board
from tests.faults.processes import wait_idle
from tests.faults.supervised import wait_path

YEAR = 365 * 24 * 3600


def test_a_jump_of_the_system_clock_changes_no_delay(
    python_runs_under: Callable[..., None], start_board: Callable[..., Board], tmp_path: Path
) -> None:
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)], check=True)
    offset.write_text("0")
    python_runs_under("env", f"LD_PRELOAD={library}", f"CLOCK_OFFSET={offset}")
    board = start_board()
    said = []
    for years in (20, -20, 0):
        # Three timeouts run while the clock jumps: one for the watch on a replaced file, one for the missing
        # registers, and one for the link that is down.
        board.applications.trigger_by_rename("out_b")
        board.wire.wait(lambda: board.wire.order == ["out_b"], "the replaced trigger has not been sent")
        board.cores.link_down()
        board.applications.trigger("out_a")
        (board.directory / "in_a_state").unlink()
        (board.directory / "out_b_trig").unlink()
        new = tmp_path / "new"
        new.write_text(str(years * YEAR))
        new.rename(offset)
        wait_path(board.directory / "in_a_state")
        wait_path(board.directory / "out_b_trig")
        board.cores.link_up()
        board.works()
        wait_idle(board.proxy.pid)
        assert board.wire.order == ["out_b", "out_a", "out_b"]
        board.wire.order.clear()
        after = len(board.proxy.log)
        board.proxy.counters()
        said.append(int(json.loads(board.proxy.log[after:].splitlines()[-1])["time"][:4]))
    # The time stamps in the log must show the jumps.
    assert said[0] - said[1] in (39, 40)
