"""`inco-trio demo`: two simulated cores signal each other."""

from __future__ import annotations

import argparse

from inco_trio.cli.options import absolute, positive, rate
from inco_trio.cli.streams import output, say, writing


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "If user namespaces are not permitted, the link is a Unix socket. --qemu needs QEMU for RISC-V\n"
        "(Debian: qemu-system-misc).\n\nexample: inco-trio demo --qemu --count 50\n"
        "exit codes: 0 all notifications arrived, 1 some were lost"
    )
    sub.add_argument(
        "--qemu",
        action="store_true",
        help="run real firmware as core 1 in QEMU, and measure round trips (root is not required)",
    )
    sub.add_argument("--firmware", action="store_true", help="print the path of this firmware, and exit")
    sub.add_argument("--record", metavar="FILE", help="record to FILE, for Wireshark, `replay` and `plot`")
    sub.add_argument("--count", type=positive, default=80, metavar="N", help="notifications per signal (default: 80)")
    sub.add_argument("--rate", type=rate, default=100.0, metavar="R", help="notifications per second (default: 100)")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; return the exit code."""
    if args.firmware:
        from inco_trio.simulation.guest import FIRMWARE

        say(str(FIRMWARE))
        return 0
    from inco_trio.simulation.demonstration import run_demo

    record = None if args.record is None else absolute(args.record, "--record")
    return run_demo(args.count, args.rate, _Output(), with_qemu=args.qemu, record=record)


class _Output:
    """A wrapper for standard output that raises ResourceError if a write fails."""

    def __init__(self) -> None:
        self._file = output()

    def write(self, text: str) -> None:
        with writing():
            self._file.write(text)

    def flush(self) -> None:
        with writing():
            self._file.flush()

    def isatty(self) -> bool:
        return self._file.isatty()
