"""`inco-trio s6`: writes an s6 scan directory, or prints a systemd unit."""

from __future__ import annotations

import argparse
import os

from inco_trio.commands.configuration import (
    BOARDS_HELP,
    LINK,
    LINK_HELP,
    absolute,
    boards_directory,
    boards_label,
    check_link,
    config_path,
    configuration_argument,
)
from inco_trio.commands.streams import say, say_bytes
from inco_trio.errors import UsageError
from inco_trio.service import scandir

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `s6`."""
    sub.epilog = "example: inco-trio s6 /run/service --config /etc/udrv.json && s6-svscan /run/service"
    sub.add_argument("scandir", nargs="?", metavar="SCANDIR", help="the scan directory")
    sub.add_argument("--iface", metavar="LINK", help=LINK_HELP)
    configuration_argument(sub)
    sub.add_argument("--boards", metavar="DIR", help=BOARDS_HELP)
    sub.add_argument("--user", help="run as USER, with CAP_NET_RAW only")
    sub.add_argument("--systemd", action="store_true", help="print a systemd unit instead")


def run(args: argparse.Namespace) -> int:
    """Write the scan directory, or print the unit."""
    if args.boards is not None:
        boards = boards_directory(args, "--iface", "--config")
        service = scandir.boards_service(boards, boards_label(boards))
    else:
        link = LINK if args.iface is None else args.iface
        check_link(link)
        service = scandir.link_service(link, absolute(config_path(args), "--config"))
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
