"""`inco-trio exporter`: serve metrics to Prometheus. `metrics.http_server` implements the server."""

from __future__ import annotations

import argparse
import functools
from importlib import resources

from inco_trio.cli import options
from inco_trio.cli.streams import say_text
from inco_trio.service import process_signals

PRIVILEGED = 1024
"""The lowest port that does not require CAP_NET_BIND_SERVICE (ip(7))."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = "example: inco-trio exporter --listen 127.0.0.1:9478"
    listen_help = f"address to listen on (default: {options.LISTEN})"
    sub.add_argument("--listen", metavar="ADDRESS:PORT", default=options.LISTEN, help=listen_help)
    options.add_clients_option(sub)
    sub.add_argument("--dashboard", action="store_true", help="print a Grafana dashboard and exit")
    sub.add_argument("--alerts", action="store_true", help="print Prometheus alert rules and exit")
    options.add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Answer scrapes until a stop signal arrives; return the exit code. Raises IncoError."""
    if args.dashboard or args.alerts:
        name = "dashboard.json" if args.dashboard else "alerts.yml"
        say_text(resources.files("inco_trio.metrics").joinpath(name).read_text().rstrip("\n"))
        return 0
    with process_signals.held():
        from inco_trio.linux.capabilities import CAP_NET_BIND_SERVICE
        from inco_trio.metrics.http_server import serve
        from inco_trio.service.runner import Restarting, run_service

        address, port = options.check_listen(args.listen)
        controls = options.control_paths(args)
        kept = {CAP_NET_BIND_SERVICE} if port < PRIVILEGED else ()
        work = functools.partial(serve, address, port, controls)
        make = functools.partial(Restarting, args.listen, lambda: work, kept=kept)
        return run_service(make, args.notification_fd, args.log_format, args.verbose, timestamps=args.log_timestamps)
