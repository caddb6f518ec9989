"""Tests of the validator for JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inco_trio.board_files import read_boards
from inco_trio.errors import ConfigError
from inco_trio.mqtt.configuration import read_gateway
from inco_trio.validation import REPORTED_MAX, SIZE_MAX, parse_table, read_file


def test_at_most_20_mistakes_are_reported() -> None:
    for count in (REPORTED_MAX, REPORTED_MAX + 1):
        table = parse_table(b"{%s}" % b",".join(b'"k%d": 1' % number for number in range(count)), "x.json")
        table.only(["key"])
        with pytest.raises(ConfigError) as refused:
            table.finish("x.json")
        shown = [f"x.json: k{number}: unknown key (expected key)" for number in range(REPORTED_MAX)]
        assert list(refused.value.problems) == shown + ["x.json: and 1 more mistakes"] * (count - REPORTED_MAX)


def test_a_key_that_looks_like_a_path_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps({"send": {"b @ $.x": ["a @ $"], "c @ $": 1, "b1": [1]}}))
    with pytest.raises(ConfigError) as refused:
        read_gateway(path)
    assert refused.value.problems == (
        f"{path}: send['c @ $']: a number (expected a list of strings)",
        f"{path}: send.b1: a list (expected a list of strings)",
    )


def test_a_file_of_1_mib_is_read_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b1.json"
    path.write_bytes(b" " * SIZE_MAX)
    assert len(read_file(path)) == SIZE_MAX
    path.write_bytes(b" " * (SIZE_MAX + 1))
    expected = f"{path}: cannot be read: it is larger than 1 MiB"
    assert str(read_boards(tmp_path).refused["b1"]) == expected
    with pytest.raises(ConfigError) as refused:
        read_gateway(path)
    assert str(refused.value) == expected
