"""The command line: one module for each command; `line` has the options, the exit codes, and what an error looks like.

Here is only where a process begins. The signals of a daemon are held before anything else is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inco_trio.cli import process_signals

__all__ = ["inco_proxy", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `inco-trio`; returns its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["run"]:
        process_signals.hold()
    try:
        from inco_trio.cli.parser import run_command

        return run_command(words)
    except KeyboardInterrupt:
        process_signals.end_by_interrupt()
        raise


def inco_proxy(arguments: Sequence[str] | None = None) -> int:
    """The command `inco_proxy`, as the start scripts of the program that came before call it; returns its exit code."""
    process_signals.hold()
    from inco_trio.cli.parser import run_drop_in

    return run_drop_in(sys.argv[1:] if arguments is None else list(arguments))
