"""Load the fixtures that all tests share; see netns/README.md."""

import signal

pytest_plugins = ["netns.fixtures"]

# Shells start background jobs with SIGINT and SIGQUIT ignored. Programs that the tests start would inherit this.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
