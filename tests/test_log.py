"""The log: text for people, JSON for programs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from inco_trio.service.log import log_statistics, set_up_logging

logger = logging.getLogger("inco_trio.somewhere")


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """The package's logger as it was before."""
    package = logging.getLogger("inco_trio")
    before = package.handlers, package.propagate, package.level
    yield
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


def test_text(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=False)
    logger.warning("%s: is gone", "rpmsg4000")
    logger.debug("unheard")
    log_statistics({"received": 2, "sent": 0})
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "inco-trio: warning: rpmsg4000: is gone",
        "inco-trio: info: statistics: received=2 sent=0",
    ]


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("json", verbose=True)
    logger.debug('"quoted"\nand more')
    logger.info("ready", extra={"event": "ready"})
    log_statistics({"received": 2, "sent": 0})
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    times = [entry.pop("time") for entry in entries]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert entries == [
        {"level": "debug", "event": "message", "message": '"quoted"\nand more'},
        {"level": "info", "event": "ready", "message": "ready"},
        {
            "level": "info",
            "event": "statistics",
            "message": "statistics: received=2 sent=0",
            "received": 2,
            "sent": 0,
        },
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_keeps_its_traceback(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging(log_format, verbose=False)
    try:
        int("no number")
    except ValueError:
        logger.exception("internal error")
    said = capfd.readouterr().err
    if log_format == "json":
        (line,) = said.splitlines()
        said = json.loads(line)["traceback"]
    assert "Traceback" in said
    assert said.rstrip().endswith("ValueError: invalid literal for int() with base 10: 'no number'")


def test_set_up_again_replaces(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("text", verbose=True)
    set_up_logging("text", verbose=False)
    logger.debug("unheard")
    logger.info("once")
    assert capfd.readouterr().err == "inco-trio: info: once\n"
