"""Short names of the fixtures, enabled in `conftest.py`: `pytest_plugins = ["inco_trio.testing.short_names"]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from inco_trio.testing.plugin import MakeBoard

if TYPE_CHECKING:
    from inco_trio.testing.board import Board

__all__ = ["board", "make_board"]


@pytest.fixture
def board(inco_board: Board) -> Board:
    """Open a board. This is a short name for `inco_board`."""
    return inco_board


@pytest.fixture
def make_board(make_inco_board: MakeBoard) -> MakeBoard:
    """Return a function that opens boards. This is a short name for `make_inco_board`."""
    return make_inco_board
