"""`inco-trio s6`: the old name of `inco-trio service`, with its old options."""

from __future__ import annotations

import argparse

from inco_trio.cli import options, service


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] [SCANDIR]"
    sub.epilog = "Use `inco-trio service` in new scripts.\nexample: inco-trio s6 /run/service --config /etc/udrv.json"
    sub.add_argument("scandir", nargs="?", metavar="SCANDIR", help="scan directory")
    sub.add_argument("--iface", metavar="LINK", help=options.LINK_HELP)
    service.add_options(sub)
    sub.add_argument("--systemd", action="store_true", help="print a systemd unit instead")


def run(args: argparse.Namespace) -> int:
    """Write the scan directory, or print the unit; return the exit code. Raises IncoError."""
    args.supervisor = "systemd" if args.systemd else "s6"
    if args.systemd:
        # `service systemd` takes the link as its first argument.
        args.scandir, args.iface = args.iface, None
    return service.run(args)
