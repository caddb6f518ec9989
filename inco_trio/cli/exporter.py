"""`inco-trio exporter`: metrics for Prometheus. What it does is in `inco_trio.metrics.exporter`."""

from __future__ import annotations

import argparse
import functools
from importlib import resources
from pathlib import Path

from inco_trio.cli import process_signals
from inco_trio.cli.options import LISTEN, absolute, add_service_options, check_listen
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.cli.streams import say

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `exporter`."""
    sub.epilog = f"example: inco-trio exporter --listen 127.0.0.1:9478\n{EXIT_CODES}"
    sub.add_argument("--listen", metavar="ADDRESS:PORT", default=LISTEN, help=f"default: {LISTEN}")
    sub.add_argument(
        "--control", metavar="PATH", action="append", help="the proxy with this control socket (default: all that run)"
    )
    sub.add_argument("--dashboard", action="store_true", help="print a dashboard for Grafana instead")
    sub.add_argument("--alerts", action="store_true", help="print alert rules for Prometheus instead")
    add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Answer scrapes until told to stop; returns the exit code. Raises IncoError."""
    if args.dashboard or args.alerts:
        name = "dashboard.json" if args.dashboard else "alerts.yml"
        say(resources.files("inco_trio.metrics").joinpath(name).read_text().rstrip("\n"))
        return 0
    process_signals.hold()
    from inco_trio.cli import service
    from inco_trio.metrics.exporter import serve

    address, port = check_listen(args.listen)
    controls = None if args.control is None else [Path(absolute(place, "--control")) for place in args.control]
    return service.serve(args, lambda: functools.partial(serve, address, port, controls))
