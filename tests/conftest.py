"""Load the fixtures that all tests share; see netns/README.md."""

import logging
import os
import posix
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


UNMEASURED = frozenset(
    (
        *("test_api.py", "test_application.py", "test_command_lines.py", "test_core1.py", "test_core1_over_mqtt.py"),
        *("test_guest.py", "test_launch.py", "test_manual.py", "test_odd_input.py", "test_pages.py"),
        *(
            "test_process_signals.py",
            "test_proxy.py",
            "test_sandbox.py",
            "test_sandboxed_features.py",
            "test_scandir.py",
        ),
        *("test_testing.py", "test_trust.py"),
    )
)
"""Test files whose child processes run without coverage.py, which doubles the CPU time of a short process.

Other tests also execute nearly all of the lines that these processes execute.
"""


@pytest.fixture(scope="module", autouse=True)
def leave_unmeasured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Do not measure the coverage of the processes that the tests in UNMEASURED start."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name in UNMEASURED:
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
            # coverage.py replaces this function, in order to write data when a forked child ends.
            patch.setattr(os, "_exit", posix._exit)
        yield
