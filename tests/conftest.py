"""Load the fixtures that all tests share; see netns/README.md."""

import signal

pytest_plugins = ["netns.fixtures"]

# A shell starts background jobs with these signals ignored, and every program that the tests start would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
