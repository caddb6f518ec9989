"""`inco-trio s6`: writes an s6 scan directory, or prints a systemd unit."""

from __future__ import annotations

import argparse
import os

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.mqtt_link import ENDS, check_end
from inco_trio.cli.options import (
    BOARDS_HELP,
    LINK,
    LINK_HELP,
    LISTEN,
    absolute,
    boards_directory,
    boards_label,
    check_link,
    check_listen,
    config_path,
    configuration_argument,
)
from inco_trio.cli.streams import say, say_bytes
from inco_trio.service import scandir

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `s6`."""
    sub.epilog = "example: inco-trio s6 /run/service --config /etc/udrv.json && s6-svscan /run/service"
    sub.add_argument("scandir", nargs="?", metavar="SCANDIR", help="the scan directory")
    sub.add_argument("--iface", metavar="LINK", help=LINK_HELP)
    configuration_argument(sub)
    sub.add_argument("--boards", metavar="DIR", help=BOARDS_HELP)
    sub.add_argument("--mqtt", metavar="URL", help="the gateway to the broker at URL, instead of a proxy")
    sub.add_argument("--mqtt-link", metavar="URL", help="an end of the wire at URL, with --iface and --end")
    sub.add_argument("--end", metavar="CORE", choices=ENDS, help="core0 or core1: who is at that end of the wire")
    sub.add_argument("--gateway", metavar="FILE", help="the configuration of gateway or wire")
    sub.add_argument(
        "--exporter", metavar="ADDR", nargs="?", const=LISTEN, help=f"the exporter, instead (default: {LISTEN})"
    )
    sub.add_argument("--user", help="run as USER; a proxy keeps CAP_NET_RAW only")
    sub.add_argument("--systemd", action="store_true", help="print a systemd unit instead")


def run(args: argparse.Namespace) -> int:
    """Write the scan directory, or print the unit."""
    service = _service(args)
    program = scandir.find_program()
    if args.systemd:
        unit = scandir.systemd_unit(service=service, user=args.user, program=program)
        # In bytes: a path need not be text, and the unit is the same whatever standard output takes for it.
        say_bytes(os.fsencode(f"{unit}\n"))
        return 0
    if args.scandir is None:
        raise UsageError("s6 needs the SCANDIR to write (or --systemd)")
    directory = absolute(args.scandir, "SCANDIR")
    changes = scandir.write_scandir(directory, service=service, user=args.user, program=program)
    say(*(changes or ["nothing changed"]))
    return 0


def _service(args: argparse.Namespace) -> scandir.Service | scandir.Client:
    """The service that the arguments name. Raises UsageError."""
    if args.gateway is not None and args.mqtt is None and args.mqtt_link is None:
        raise UsageError("--gateway is the configuration of the gateway: name its broker with --mqtt URL")
    if args.mqtt_link is not None:
        return _wire(args)
    if args.end is not None:
        raise UsageError("--end is that of a wire: name it with --mqtt-link URL")
    kinds = {name: getattr(args, name) for name in ("iface", "boards", "mqtt", "exporter")}
    named = [f"--{name}" for name, value in kinds.items() if value is not None]
    if len(named) > 1 and set(named) != {"--iface", "--boards"}:
        raise UsageError(f"{' and '.join(named)} exclude each other: each call writes one service")
    if (args.mqtt or args.exporter) is not None and args.config is not None:
        raise UsageError(f"--config is that of a proxy, and not of {named[0]}")
    if args.mqtt is not None:
        return scandir.gateway_service(args.mqtt, None if args.gateway is None else absolute(args.gateway, "--gateway"))
    if args.exporter is not None:
        check_listen(args.exporter)
        return scandir.exporter_service(args.exporter)
    if args.boards is not None:
        boards = boards_directory(args, "--iface", "--config")
        return scandir.boards_service(boards, boards_label(boards))
    link = LINK if args.iface is None else args.iface
    check_link(link)
    return scandir.link_service(link, absolute(config_path(args), "--config"))


def _wire(args: argparse.Namespace) -> scandir.Service:
    """The service of an end of a wire. Raises UsageError."""
    if args.iface is None or args.end is None:
        raise UsageError("--mqtt-link needs --iface unix:LOCAL,peer=REMOTE and --end core0 or core1")
    for name in ("boards", "mqtt", "exporter", "config"):
        if getattr(args, name) is not None:
            raise UsageError(f"--mqtt-link and --{name} exclude each other: each call writes one service")
    check_end(args.iface)
    config = None if args.gateway is None else absolute(args.gateway, "--gateway")
    return scandir.wire_service(args.mqtt_link, args.iface, args.end, config)
