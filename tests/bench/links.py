"""Run many proxies in one process through the library: one `serve` for each link, each with its own directory.

usage: links.py DIR NOTIFICATION_FD IFACE...
"""

import functools
import os
import signal
import sys
from pathlib import Path

import trio

import inco_trio
from inco_trio.config import Config
from inco_trio.signals import builtin_signals


async def main(directory: Path, notification_fd: int, interfaces: list[str]) -> None:
    """Serve until SIGTERM; write a newline to the descriptor once all proxies are ready."""
    with trio.open_signal_receiver(signal.SIGTERM) as stops:
        async with trio.open_nursery() as nursery:
            for interface in interfaces:
                place = directory / interface
                place.mkdir()
                await nursery.start(functools.partial(inco_trio.serve, Config(interface, builtin_signals(place))))
            os.write(notification_fd, b"\n")
            await anext(stops)
            nursery.cancel_scope.cancel()


trio.run(main, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
