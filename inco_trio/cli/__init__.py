"""The entry points of the command line. Each command has its own module in this package.

The services start to record process signals before they import anything else. They also disable the garbage collector,
because the imports create few cycles. `service.runner.run_service` enables it again.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from inco_trio.service import process_signals

__all__ = ["inco_proxy", "main"]

_SERVICES = ("run", "mqtt", "mqtt-link", "exporter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `inco-trio`; return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in _SERVICES:
        process_signals.hold()
        gc.disable()
    try:
        from inco_trio.cli.parser import run_command

        return run_command(words)
    except KeyboardInterrupt:
        process_signals.end_by_interrupt()
        raise
    finally:
        gc.enable()


def inco_proxy(arguments: Sequence[str] | None = None) -> int:
    """Run `inco_proxy`, the command that start scripts of inco-trio's predecessor call; return its exit code."""
    process_signals.hold()
    gc.disable()
    try:
        from inco_trio.cli.parser import run_drop_in

        return run_drop_in(sys.argv[1:] if arguments is None else list(arguments))
    finally:
        gc.enable()
