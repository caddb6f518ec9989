"""`inco-trio mqtt-link`: one side of a bridge between two hosts, which `mqtt.bridge` implements."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Awaitable, Callable

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import absolute, add_service_options, needing, path_of
from inco_trio.errors import InvalidArgumentError
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.service import process_signals

ENDS = ("core0", "core1")
"""The names of the two sides of a bridge. Each side is named after its core."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "example: inco-trio mqtt-link mqtt://broker/lab/bridge1 unix:/run/b1/bridge,peer=/run/b1/core0 --end core0\n"
        "SIGHUP reloads the configuration, SIGUSR1 logs the counters."
    )
    sub.add_argument("url", metavar="URL", help="topic prefix of the bridge: mqtt[s]://HOST[:PORT]/PREFIX")
    sub.add_argument("link", nargs="?", metavar="LINK", help="link of this side: unix:LOCAL,peer=REMOTE")
    sub.add_argument("--link", dest="former_link", help=argparse.SUPPRESS)
    sub.add_argument("--end", metavar="CORE", choices=ENDS, required=True, help="the core at REMOTE: core0 or core1")
    sub.add_argument("--config", metavar="FILE", help="file with MQTT credentials, as for `mqtt`")
    sub.add_argument("--fd-holder", metavar="SOCKET", help="keep descriptors in the s6-fdholder-daemon at SOCKET")
    add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Run one side of the bridge until a stop signal arrives; return the exit code. Raises IncoError."""
    with process_signals.held():
        address = check_end(args.former_link if args.link is None else args.link)
        with needing("mqtt5", "mqtt5", "mqtt"):
            from inco_trio.mqtt.bridge import Bridge
        from inco_trio.mqtt.configuration import GatewayConfig, parse_broker, read_gateway
        from inco_trio.mqtt.connection import check_certificates
        from inco_trio.persist.fdstore import fd_store_from_environment
        from inco_trio.service.runner import Restarting, run_service

        broker = parse_broker(args.url)
        path = None if args.config is None else absolute(args.config, "--config")
        if args.fd_holder is not None:
            path_of(args.fd_holder, "--fd-holder")

        def make() -> Restarting:
            ends = (args.end, ENDS[1 - ENDS.index(args.end)])
            bridge = Bridge(broker, ends, address, fd_store_from_environment(args.fd_holder, bridge_label(address)))

            def prepare() -> Callable[[Callable[[], None]], Awaitable[None]]:
                config = GatewayConfig() if path is None else read_gateway(path)
                # Report invalid credentials before the service starts, and refuse them in a reload.
                config.broker.read()
                check_certificates(broker, config.broker)
                return functools.partial(bridge.run, config.broker)

            return Restarting(str(broker), prepare, bridge.log_statistics, bridge.close)

        return run_service(make, args.notification_fd, args.log_format, args.verbose, timestamps=args.log_timestamps)


def check_end(link: str | None) -> UnixAddress:
    """Parse the link address of one side of a bridge. Raises UsageError."""
    if link is None:
        raise UsageError("LINK: missing (expected unix:LOCAL,peer=REMOTE)")
    try:
        address = parse_address(link)
    except InvalidArgumentError as error:
        raise UsageError(f"link {link!r}", error.reason) from None
    if not isinstance(address, UnixAddress):
        raise UsageError(f"link {link!r}: a bridge joins Unix sockets (expected unix:LOCAL,peer=REMOTE)")
    return address


def bridge_label(address: UnixAddress) -> str:
    """Return a bridge's label, which is part of the names of its service and stored descriptors."""
    return f"wire-{address.label}"
