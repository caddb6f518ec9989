"""`inco-trio mqtt`: the gateway to an MQTT broker, which `mqtt.gateway` implements."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable

from inco_trio.cli.options import absolute, add_clients_option, add_service_options, control_paths, needing
from inco_trio.service import process_signals


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "example: inco-trio mqtt mqtts://broker.example.org/lab/host1 --config /etc/inco-trio/gateway.json\n"
        "SIGHUP reloads the configuration."
    )
    sub.add_argument("url", metavar="URL", help="broker: mqtt://HOST[:PORT][/PREFIX], or mqtts:// for TLS")
    sub.add_argument("--config", metavar="FILE", help="file with the permitted signals and MQTT credentials")
    add_clients_option(sub)
    add_service_options(sub)


def run(args: argparse.Namespace) -> int:
    """Run the gateway until a stop signal arrives; return the exit code. Raises IncoError."""
    with process_signals.held():
        with needing("mqtt5", "mqtt5", "mqtt"):
            from inco_trio.mqtt.gateway import Gateway
        from inco_trio.mqtt.configuration import GatewayConfig, parse_broker, read_gateway
        from inco_trio.mqtt.connection import check_certificates
        from inco_trio.service.runner import Restarting, run_service

        broker = parse_broker(args.url)
        path = None if args.config is None else absolute(args.config, "--config")
        controls = control_paths(args)

        def prepare() -> Callable[[Callable[[], None]], Awaitable[None]]:
            config = GatewayConfig() if path is None else read_gateway(path)
            config.check_response_prefix(broker)
            config.broker.read()  # Report invalid credentials before the service starts, and refuse them in a reload.
            check_certificates(broker, config.broker)
            return Gateway(broker, config, controls).run

        return run_service(
            lambda: Restarting(str(broker), prepare),
            args.notification_fd,
            args.log_format,
            args.verbose,
            timestamps=args.log_timestamps,
        )
