"""`inco-trio mqtt-link`: one end of a wire between two hosts. What it does is in `inco_trio.mqtt.bridge`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Awaitable, Callable

from inco_trio.cli import process_signals
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import absolute, add_service_options, path_of
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.errors import InvalidArgumentError, ProgramNotFoundError
from inco_trio.links.address import UnixAddress, parse_address

__all__ = ["ENDS", "arguments", "check_end", "run"]

ENDS = ("core0", "core1")
"""The two ends of a wire, named after the cores that are there."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `mqtt-link`."""
    sub.epilog = (
        "example: inco-trio mqtt-link mqtt://broker/lab/wire1 --link unix:/run/b1/wire,peer=/run/b1/core0 --end core0\n"
        f"{EXIT_CODES}"
    )
    sub.add_argument("url", metavar="URL", help="the wire: mqtt[s]://HOST[:PORT]/PREFIX")
    sub.add_argument("--link", metavar="LINK", required=True, help="unix:LOCAL,peer=REMOTE, this end of it")
    sub.add_argument("--end", metavar="CORE", choices=ENDS, required=True, help="core0 or core1: who is at REMOTE")
    sub.add_argument("--config", metavar="FILE", help="who we are, as for `mqtt`")
    sub.add_argument("--fd-holder", metavar="SOCKET", help="s6-fdholder-daemon that keeps what waits")
    add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Carry frames until told to stop; returns the exit code. Raises IncoError."""
    process_signals.hold()
    address = check_end(args.link)
    try:
        from inco_trio.mqtt.bridge import Wire
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("paho"):
            raise
        raise ProgramNotFoundError("mqtt-link needs paho-mqtt: pip install 'inco-trio[mqtt]'") from error
    from inco_trio.cli.service import serve
    from inco_trio.mqtt.configuration import GatewayConfig, parse_broker, read_gateway
    from inco_trio.persist.fdstore import fd_store_from_environment

    broker = parse_broker(args.url)
    path = None if args.config is None else absolute(args.config, "--config")
    if args.fd_holder is not None:
        path_of(args.fd_holder, "--fd-holder")
    ends = (args.end, ENDS[1 - ENDS.index(args.end)])
    wire = Wire(broker, ends, address, fd_store_from_environment(args.fd_holder, wire_label(address)))

    def prepare() -> Callable[[Callable[[], None]], Awaitable[None]]:
        config = GatewayConfig() if path is None else read_gateway(path)
        config.broker.read()  # What is wrong with it is said at once.
        return functools.partial(wire.run, config.broker)

    return serve(args, prepare, tell=wire.tell, finish=wire.finish)


def check_end(link: str) -> UnixAddress:
    """The address of an end. Raises UsageError."""
    try:
        address = parse_address(link)
    except InvalidArgumentError as error:
        raise UsageError(f"--link {link!r}", error.reason) from None
    if not isinstance(address, UnixAddress):
        raise UsageError(f"--link {link!r}: a wire ends in a Unix socket: unix:LOCAL,peer=REMOTE")
    return address


def wire_label(address: UnixAddress) -> str:
    """What the service and the kept descriptors of an end are named after."""
    return f"wire-{address.label}"
