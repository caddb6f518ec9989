"""Load the fixtures that all tests share; see netns/README.md."""

import logging
import signal
from collections.abc import Iterator

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


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the coverage of the processes that the test starts.

    Modules whose many processes execute only lines that other tests also reach use this fixture, because coverage.py
    nearly doubles the CPU time of a short process.
    """
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
