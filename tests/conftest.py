"""Load the fixtures that all tests share; see netns/README.md."""

import logging
import os
import posix
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import coverage
import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["netns.fixtures"]

# Shells start background jobs with SIGINT and SIGQUIT ignored. Programs that the tests start would inherit these
# settings.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


# Set no deadline, because the duration of an example depends on the machine.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def restore_level() -> Iterator[None]:
    """Restore the level of the package's logger after the test, because tests compare what `caplog` receives."""
    package = logging.getLogger("inco_trio")
    before = package.level
    yield
    package.setLevel(before)


UNMEASURED = frozenset(Path(__file__).with_name("unmeasured.txt").read_text().split())
"""Tests that run without coverage.py, which takes half of the CPU time of the measured tests.

Other tests execute the same lines and branches. A new test is measured. If `coverage` reports a line that one of these
tests executes, remove the test from the file.
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Do not measure the tests in UNMEASURED and the processes that they start."""
    measurement = coverage.Coverage.current()
    if measurement is None or item.nodeid.partition("[")[0] not in UNMEASURED:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        # coverage.py replaces this function, in order to write data when a forked child ends.
        patch.setattr(os, "_exit", posix._exit)
        measurement.stop()
        try:
            return (yield)
        finally:
            measurement.start()
