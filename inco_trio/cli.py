"""The command line: arguments, signals and exit codes around `open_proxy`.

Modules that only one command needs are imported where it runs: the start of the daemon is an outage.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, IncoError, ResourceRefused, UsageError

if TYPE_CHECKING:
    from trio import CancelScope

    from .config import Board, Config
    from .held import Holder
    from .proxy import Proxy

__all__ = ["inco_proxy", "main"]

LINK = "rpmsg4000"
EXIT_INTERNAL = 70
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

EXIT_CODES = """\
exit codes: 0 clean, 2 usage, 69 no such interface, 70 internal error, 71 the system
has no room now (descriptors, inotify limits, disk), 77 no permission, 78 invalid configuration"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `inco-trio`; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        # Nobody reads the output any more; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except IncoError as error:
        for line in str(error).splitlines():
            print(f"inco-trio: error: {line}", file=sys.stderr)  # noqa: T201 - before and beside the log
        return error.exit_code
    return code


def inco_proxy(arguments: Sequence[str] | None = None) -> int:
    """The command `inco_proxy`, as the start scripts of the program that came before call it."""
    parser = argparse.ArgumentParser(
        prog="inco_proxy",
        description="Carry inter-core interrupts between the link IFACE and the registers that $UDRV_JSON_PATH names.",
        epilog="The same as `inco-trio run IFACE`.  Example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000",
    )
    parser.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    return main(["run", parser.parse_args(arguments).iface])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inco-trio",
        description="Carries inter-core interrupts between the cores of an AMP board, and of its simulation.",
        epilog=f"Try it: inco-trio demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=globals()[f"_{name}"])
        return sub

    def configuration(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config", type=Path, metavar="FILE", help="udrv.json (default: $UDRV_JSON_PATH)")

    run = command("run", "carry signals until SIGTERM or SIGINT", "inco-trio run rpmsg4000 --irq-dir /dev/shm/irq -v")
    run.epilog = f"{run.epilog}\nSIGHUP reloads the configuration, SIGUSR1 logs the counters.\n{EXIT_CODES}"
    run.add_argument("iface", nargs="?", default=LINK, metavar="IFACE", help=f"interface of the link (default: {LINK})")
    configuration(run)
    run.add_argument("--irq-dir", type=Path, metavar="DIR", help="the built-in signals in DIR, without a file")
    run.add_argument("--wait-link", action="store_true", help="wait for an interface that does not exist yet")
    run.add_argument("--notification-fd", type=int, metavar="N", help="write a newline to descriptor N once ready (s6)")
    run.add_argument("--fd-holder", metavar="SOCKET", help="keep descriptors in the s6-fdholder-daemon at SOCKET")
    run.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    run.add_argument("-v", "--verbose", action="store_true", help="log each notification")

    check = command(
        "check", "validate the configuration and print the signal table", "inco-trio check --config udrv.json"
    )
    configuration(check)
    check.add_argument("--json", action="store_true", help="print the table as JSON")

    demo = command("demo", "show two simulated cores signalling each other; needs no root", "inco-trio demo --count 50")
    demo.add_argument("--count", type=int, default=80, metavar="N", help="notifications of each signal (default: 80)")
    demo.add_argument("--rate", type=float, default=100.0, metavar="R", help="notifications a second (default: 100)")

    s6 = command("s6", "write an s6 scan directory that runs the proxy, or print a systemd unit", "")
    s6.epilog = "example: inco-trio s6 /run/service --iface rpmsg4000 --config /etc/udrv.json && s6-svscan /run/service"
    s6.add_argument("scandir", nargs="?", type=Path, metavar="SCANDIR", help="the scan directory")
    s6.add_argument("--iface", default=LINK, metavar="IFACE", help=f"interface of the link (default: {LINK})")
    configuration(s6)
    s6.add_argument("--user", help="run as USER, with CAP_NET_RAW only")
    s6.add_argument("--systemd", action="store_true", help="print a systemd unit instead")
    return parser


def _config_path(args: argparse.Namespace) -> Path:
    path: Path | None = args.config
    if path is None and (named := os.environ.get("UDRV_JSON_PATH")):
        path = Path(named)
    if path is None:
        raise UsageError("no configuration: give --config FILE, or set UDRV_JSON_PATH (`run` also takes --irq-dir DIR)")
    return path


def _check(args: argparse.Namespace) -> int:
    from .config import read_board

    board = read_board(_config_path(args))
    rows = [
        {"name": s.name, "direction": s.direction.value, "register": str(s.path)}
        for s in sorted(board.signals, key=lambda s: s.direction.value)
    ]
    if args.json:
        import json

        lines = [json.dumps({"signals": rows, "notes": list(board.notes)}, indent=2)]
    else:
        widths = [max(len(row[key]) for row in rows) for key in ("name", "direction")]
        lines = [f"{row['name']:{widths[0]}}  {row['direction']:{widths[1]}}  {row['register']}" for row in rows]
        lines += [f"note: {note}" for note in board.notes]
    print(*lines, sep="\n")  # noqa: T201 - the command's output
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(args.count, args.rate, sys.stdout)


def _s6(args: argparse.Namespace) -> int:
    from . import scandir

    config = _config_path(args).absolute()
    program = scandir.find_program()
    if args.systemd:
        print(scandir.systemd_unit(interface=args.iface, config=config, user=args.user, program=program))  # noqa: T201
        return 0
    if args.scandir is None:
        raise UsageError("s6 needs the SCANDIR to write (or --systemd)")
    changes = scandir.write_scandir(args.scandir, interface=args.iface, config=config, user=args.user, program=program)
    print(*(changes or ["nothing changed"]), sep="\n")  # noqa: T201 - the command's output
    return 0


# ----------------------------------------------------------------------------------------------------------- the daemon


def _load(args: argparse.Namespace) -> Config:
    """The configuration that the arguments name; its defaults are logged. Raises ConfigError or UsageError."""
    from .config import Board, Config, read_board
    from .signals import builtin_signals

    board: Board
    if args.irq_dir is not None:
        if args.config is not None:
            raise UsageError("--irq-dir and --config exclude each other")
        board = Board(builtin_signals(args.irq_dir.absolute()), ())
    else:
        board = read_board(_config_path(args))
    for note in board.notes:
        _logger().info("%s", note)
    return Config(args.iface, board.signals, wait_link=args.wait_link)


def _run(args: argparse.Namespace) -> int:
    # Until their meaning is known they must not end the process.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    from .log import set_up_logging
    from .notify import check_notification_fd

    set_up_logging(args.log_format, verbose=args.verbose)
    if args.notification_fd is not None:
        check_notification_fd(args.notification_fd)
    config = _load(args)

    import trio

    from .held import holder_from_environment

    try:
        trio.run(_serve, args, config, holder_from_environment(args.fd_holder, config.interface))
    except IncoError:
        raise
    except Exception as error:  # logged whole; the exit code tells the supervisor
        if refused := _exhausted(error):
            raise ResourceRefused(f"{config.interface}: {refused.strerror}: raise the limit, or free some") from error
        _logger().exception("internal error: this is a fault of inco-trio, please report it")
        return EXIT_INTERNAL
    return 0


def _exhausted(error: Exception) -> OSError | None:
    """The cause, if `error` is, or only wraps, a limit of the system, which Trio meets too."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, OSError) and error.errno in EXHAUSTED else None


async def _serve(args: argparse.Namespace, config: Config, holder: Holder) -> None:
    import trio

    from .log import log_statistics
    from .notify import notify_ready, notify_stopping
    from .proxy import open_proxy

    failure: IncoError | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            running: list[Proxy] = []
            nursery.start_soon(_follow_signals, signals, args, running, nursery.cancel_scope)
            try:
                async with open_proxy(config, holder=holder) as proxy:
                    running.append(proxy)
                    notify_ready(args.notification_fd)
                    _logger().info("%s: ready", config.interface, extra={"event": "ready"})
                    # A thread of its own, as one of Trio's would wake up once more to end.
                    threading.Thread(target=_diagnose, args=(config,), daemon=True).start()
                    with contextlib.ExitStack() as stopping:
                        stopping.callback(notify_stopping)
                        await trio.sleep_forever()
            except IncoError as error:
                failure = error
                nursery.cancel_scope.cancel()
            finally:
                for proxy in running:
                    log_statistics(proxy.stats.as_dict())
    if failure is not None:
        raise failure


def _diagnose(config: Config) -> None:
    """Say what may keep notifications from coming; after readiness, as it reads all of /proc."""
    from .diagnose import diagnose

    # What cannot be looked at, as no descriptor is left to look with or as it is gone, is no reason to complain.
    with contextlib.suppress(OSError):
        for line in diagnose(config.signals):
            _logger().warning("%s", line)


async def _follow_signals(
    signals: AsyncIterator[int], args: argparse.Namespace, running: list[Proxy], scope: CancelScope
) -> None:
    from .log import log_statistics

    async for number in signals:
        if number in (signal.SIGTERM, signal.SIGINT):
            scope.cancel()
        for proxy in running:
            if number == signal.SIGUSR1:
                log_statistics(proxy.stats.as_dict())
            elif number == signal.SIGHUP:
                try:
                    await proxy.reload(_load(args))
                except ConfigError as error:
                    for problem in error.problems:
                        _logger().error("reload refused, the old configuration goes on: %s", problem)
                else:
                    _logger().info("reloaded: %d signals", len(proxy.config.signals), extra={"event": "reloaded"})


def _logger() -> logging.Logger:
    return logging.getLogger("inco_trio.cli")
