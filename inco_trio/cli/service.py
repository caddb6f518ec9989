"""`inco-trio service`: write an s6 scan directory, or print a systemd unit."""

from __future__ import annotations

import argparse
import os

from inco_trio.cli import options
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.mqtt_link import ENDS, check_end
from inco_trio.cli.run import SANDBOX
from inco_trio.cli.streams import remark, say, say_bytes
from inco_trio.service import descriptions
from inco_trio.service.scandir import write_scandir
from inco_trio.service.systemd import systemd_unit

SUPERVISORS = ("s6", "systemd")


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s s6 SCANDIR [LINK] [OPTION ...], or %(prog)s systemd [LINK] [OPTION ...]"
    sub.epilog = (
        "example: inco-trio service s6 /run/service rpmsg4000 --config /etc/udrv.json && s6-svscan /run/service\n"
        "example: inco-trio service systemd rpmsg4000 --config /etc/udrv.json"
    )
    sub.add_argument("supervisor", metavar="SUPERVISOR", choices=SUPERVISORS, help="supervisor: s6 or systemd")
    sub.add_argument("scandir", nargs="?", metavar="SCANDIR", help="s6 scan directory")
    sub.add_argument("iface", nargs="?", metavar="LINK", help=options.LINK_HELP)
    add_options(sub)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `service` and `s6` share."""
    options.configuration_argument(sub)
    sub.add_argument("--boards", metavar="DIR", help=options.BOARDS_HELP)
    sub.add_argument("--mqtt", metavar="URL", help="write a service for the MQTT gateway to the broker at URL")
    sub.add_argument("--mqtt-link", metavar="URL", help="write a service for one side of the bridge at URL")
    sub.add_argument("--end", metavar="CORE", choices=ENDS, help="the core on this side of the bridge: core0 or core1")
    sub.add_argument("--gateway", metavar="FILE", help="configuration file of the gateway or bridge")
    sub.add_argument(
        "--exporter",
        metavar="ADDR",
        nargs="?",
        const=options.LISTEN,
        help=f"write a service for the exporter at ADDR (default: {options.LISTEN})",
    )
    sub.add_argument("--user", help=f"run the service as USER (default for root: {descriptions.USER})")
    options.irq_owner_argument(sub)
    sub.add_argument("--lock-memory", action="store_true", help="let the proxy lock its memory (see `run`)")
    sub.add_argument("--sandbox", metavar="MODE", choices=SANDBOX, help="sandbox mode of the proxy (see `run`)")


def run(args: argparse.Namespace) -> int:
    """Write the scan directory, or print the unit; return the exit code. Raises IncoError."""
    if args.supervisor == "systemd":
        if args.iface is not None:
            raise UsageError(f"{args.scandir}: `service systemd` prints a unit and does not use a SCANDIR")
        args.iface, args.scandir = args.scandir, None
    service = _service(args)
    program = descriptions.find_program()
    if "-I" not in program:
        remark("warning: an isolated Python (-I) does not find inco_trio, so the service runs without isolation")
    user = descriptions.USER if args.user is None and os.geteuid() == 0 else args.user
    extra = ["--lock-memory"] if args.lock_memory else []
    if args.sandbox is not None:
        extra += ["--sandbox", args.sandbox]
    if args.irq_owner is not None:
        extra += ["--irq-owner", args.irq_owner]
    if extra and service.words[0] != "run":
        raise UsageError(f"{extra[0]} applies only to proxies")
    warnings = list(descriptions.access_warnings(service, user, program[0], check_directories=args.irq_owner is None))
    if args.supervisor == "systemd":
        if args.user is not None:
            descriptions.account_of(args.user)
        unit = systemd_unit(service=service, user=user, program=program, options=extra)
        # Print bytes: paths may be invalid text, and the unit must not depend on the encoding of standard output.
        say_bytes(os.fsencode(f"{unit}\n"))
        for warning in (*service.warnings, *warnings):
            remark(warning)
        return 0
    if args.scandir is None:
        raise UsageError("SCANDIR: missing (expected the scan directory to write to)")
    directory = options.absolute(args.scandir, "SCANDIR")
    changes = write_scandir(directory, service=service, user=user, program=program, options=extra)
    say(*(changes or ["nothing changed"]), *warnings)
    return 0


def _service(args: argparse.Namespace) -> descriptions.Service:
    """Return the service that the arguments describe. Raises UsageError."""
    if args.gateway is not None and args.mqtt is None and args.mqtt_link is None:
        raise UsageError("--gateway requires --mqtt URL or --mqtt-link URL")
    if args.mqtt_link is not None:
        return _bridge(args)
    if args.end is not None:
        raise UsageError("--end requires --mqtt-link URL")
    kinds = {name: getattr(args, name) for name in ("iface", "boards", "mqtt", "exporter")}
    named = ["LINK" if name == "iface" else f"--{name}" for name, value in kinds.items() if value is not None]
    if len(named) > 1 and set(named) != {"LINK", "--boards"}:
        raise UsageError(f"{' and '.join(named)} are mutually exclusive: each call writes one service")
    if (args.mqtt or args.exporter) is not None and args.config is not None:
        raise UsageError(f"--config and {named[0]} are mutually exclusive: --config applies only to proxies")
    if args.mqtt is not None:
        return descriptions.gateway_service(
            args.mqtt, None if args.gateway is None else options.absolute(args.gateway, "--gateway")
        )
    if args.exporter is not None:
        options.check_listen(args.exporter)
        return descriptions.exporter_service(args.exporter)
    if args.boards is not None:
        boards = options.boards_directory(args, "IFACE", "--config", "--irq-owner")
        return descriptions.boards_service(boards, options.boards_label(boards))
    link = options.LINK if args.iface is None else args.iface
    options.check_link(link)
    return descriptions.link_service(link, options.absolute(options.config_path(args), "--config"))


def _bridge(args: argparse.Namespace) -> descriptions.Service:
    """Return the service that runs one side of a bridge. Raises UsageError."""
    if args.iface is None or args.end is None:
        raise UsageError("--mqtt-link requires LINK (unix:LOCAL,peer=REMOTE) and --end core0 or core1")
    for name in ("boards", "mqtt", "exporter", "config"):
        if getattr(args, name) is not None:
            raise UsageError(f"--mqtt-link and --{name} are mutually exclusive: each call writes one service")
    check_end(args.iface)
    config = None if args.gateway is None else options.absolute(args.gateway, "--gateway")
    return descriptions.bridge_service(args.mqtt_link, args.iface, args.end, config)
