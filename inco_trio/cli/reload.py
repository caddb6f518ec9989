"""`inco-trio reload`: reload the configuration of a running proxy, and report what it refused."""

from __future__ import annotations

import argparse

from inco_trio.cli.options import add_place
from inco_trio.cli.streams import say
from inco_trio.control.client import connect
from inco_trio.control.protocol import ReloadRequest
from inco_trio.errors import ConfigError

PATIENCE = 60.0
"""Timeout for the reload in seconds."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "The proxy reloads as after SIGHUP. What it refuses is printed, and the exit code is then 78.\n"
        "example: inco-trio reload rpmsg4000"
    )
    add_place(sub)


def run(args: argparse.Namespace) -> int:
    """Reload the configuration; return the exit code. Raises IncoError."""
    with connect(args.link, args.control) as client:
        refused = client.request(ReloadRequest(), PATIENCE).refused
    if refused:
        raise ConfigError("", [f"refused, keeping the old configuration: {problem}" for problem in refused])
    say(f"{client.greeting.name}: reloaded")
    return 0
