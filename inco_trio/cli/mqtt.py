"""`inco-trio mqtt`: the gateway to an MQTT broker. What it does is in `inco_trio.mqtt.gateway`."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

from inco_trio.cli import process_signals
from inco_trio.cli.options import absolute, add_service_options
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.errors import ProgramNotFoundError

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `mqtt`."""
    sub.epilog = (
        "example: inco-trio mqtt mqtts://broker.example.org/lab/host1 --config /etc/inco-trio/gateway.json\n"
        f"SIGHUP reads the configuration again.\n{EXIT_CODES}"
    )
    sub.add_argument("url", metavar="URL", help="the broker: mqtt://HOST[:PORT][/PREFIX], or mqtts:// for TLS")
    sub.add_argument("--config", metavar="FILE", help="what may be sent, and who we are")
    sub.add_argument(
        "--control", metavar="PATH", action="append", help="the proxy with this control socket (default: all that run)"
    )
    add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Publish until told to stop; returns the exit code. Raises IncoError."""
    process_signals.hold()
    try:
        from inco_trio.mqtt.gateway import Gateway
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("paho"):
            raise
        raise ProgramNotFoundError("mqtt needs paho-mqtt: pip install 'inco-trio[mqtt]'") from error
    from inco_trio.cli.service import serve
    from inco_trio.mqtt.configuration import GatewayConfig, parse_broker, read_gateway

    broker = parse_broker(args.url)
    path = None if args.config is None else absolute(args.config, "--config")
    controls = None if args.control is None else [Path(absolute(place, "--control")) for place in args.control]

    def prepare() -> Callable[[Callable[[], None]], Awaitable[None]]:
        config = GatewayConfig() if path is None else read_gateway(path)
        config.broker.read()  # What is wrong with it is said at once.
        return Gateway(broker, config, controls).run

    return serve(args, prepare)
