"""`inco-trio replay`: play one side of a recording, and report which notifications came back."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import absolute, check_link, configuration_argument, configured_board, path_of, rate, seconds
from inco_trio.cli.signalling import check_core1, left_out
from inco_trio.cli.streams import say, say_text
from inco_trio.errors import RecordingError, unwrapped
from inco_trio.signals import SignalTable, builtin_signals

if TYPE_CHECKING:
    from pathlib import Path

    from inco_trio.capture.player import Played, Side
    from inco_trio.capture.recording import Recording

SLOW = 1.0
"""Seconds after which the command starts to show progress."""
BETWEEN = 0.2
"""Seconds between two progress updates."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] FILE [LINK]"
    sub.epilog = (
        "The direction of a frame comes from the flags of an inco-trio recording, the signal table, or other\n"
        "frames of the same sender.\n"
        "example: inco-trio replay night.pcapng rpmsg4000 --speed 10\n"
        "exit codes: 0 all expected notifications came back, 1 some are missing, 65 no recording, 69 no link or\n"
        "registers, 77 no permission"
    )
    sub.add_argument("file", metavar="FILE", help="recording, or any pcapng or pcap file with Ethernet frames")
    sub.add_argument("link", nargs="?", metavar="LINK", help="play core 1 on this interface or unix:LOCAL,peer=REMOTE")
    sub.add_argument(
        "--as", dest="side", choices=("core0", "core1"), help="core to act as (default: core1 with LINK, else core0)"
    )
    sub.add_argument("--irq-dir", metavar="DIR", help="use the built-in signals, with their registers in DIR")
    configuration_argument(sub)
    sub.add_argument("--speed", type=rate, metavar="X", help="play X times as fast as recorded (default: 1)")
    sub.add_argument("--fast", action="store_true", help="play as fast as possible")
    sub.add_argument(
        "--wait", type=seconds, default=1.0, metavar="TIME", help="keep listening for TIME at the end (default: 1s)"
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Replay the recording; return 0 if all expected notifications came back, else 1. Raises IncoError."""
    path = path_of(args.file, "FILE")
    _check(args)
    table = _table(args)

    from inco_trio.capture.player import Played, applications, core1
    from inco_trio.capture.recording import open_recording

    played = Played()
    with open_recording(path, table) as recording:
        side: AbstractAsyncContextManager[Side] = core1(args.link) if args.side == "core1" else applications(table)
        _play(args, side, recording, played)
        cut = recording.reader.cut
        notes = left_out(recording)
    if cut is not None:
        notes.append(f"{path}: {cut}: the packets before this position were played")
    if len(recording.boards) > 1:
        names = ", ".join(sorted(recording.boards))
        what, hint = ("boards", "`record --board NAME` records") if recording.is_ours else ("interfaces", "capture")
        text = f"contains {len(recording.boards)} {what}, {names}: all were played together ({hint} only one)"
        notes.append(f"{path}: {text}")
    if played.overflowed:
        notes.append("the inotify queue overflowed: the counts are too low")
    _report(args, path, played, recording.left_out, notes)
    if not played.sent:
        raise RecordingError(path, f"nothing was played: the file contains no notifications that {args.side} sends")
    return 1 if played.missing or played.overflowed else 0


def _check(args: argparse.Namespace) -> None:
    """Set the default of `--as`. Raises UsageError if the arguments contradict each other."""
    if args.side is None:
        args.side = "core0" if args.link is None else "core1"
    if args.side == "core1" and args.link is None:
        raise UsageError("--as core1 requires LINK, which carries the frames")
    if args.side == "core0" and args.link is not None:
        raise UsageError("--as core0 writes trigger files and does not use LINK: give --irq-dir or --config")
    if args.link is not None:
        check_link(args.link)
        check_core1(args.link)
    if args.irq_dir is not None and args.config is not None:
        raise UsageError("--irq-dir and --config are mutually exclusive")
    if args.fast and args.speed is not None:
        raise UsageError("--fast and --speed are mutually exclusive")


def _table(args: argparse.Namespace) -> SignalTable:
    """Return the signal table that the arguments select. Raises UsageError, ConfigError."""
    if args.irq_dir is not None:
        return SignalTable(builtin_signals(absolute(args.irq_dir, "--irq-dir")))
    if args.side == "core1" and args.config is None and not os.environ.get("UDRV_JSON_PATH"):
        # Core 1 has no registers, so only the directions of the signals matter.
        return SignalTable(builtin_signals(absolute(".", "--irq-dir")))
    return SignalTable(configured_board(args).signals)


def _play(
    args: argparse.Namespace, made: AbstractAsyncContextManager[Side], recording: Recording, played: Played
) -> None:
    import trio

    from inco_trio.capture.player import play

    async def main() -> None:
        async with made as side, trio.open_nursery() as nursery:
            if sys.stderr.isatty():
                nursery.start_soon(_show_progress, played, recording)
            speed = None if args.fast else args.speed or 1.0
            await play(side, recording, played, speed=speed, wait=args.wait)
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise unwrapped(group) from None


async def _show_progress(played: Played, recording: Recording) -> None:
    import trio

    shown = False
    try:
        await trio.sleep(SLOW)
        while True:
            text = f"{recording.progress}, {played.sent.total()} sent, {played.came.total()} came back"
            width = _width()
            sys.stderr.write(f"\r{text[:width]:{width}}")
            sys.stderr.flush()
            shown = True
            await trio.sleep(BETWEEN)
    finally:
        if shown:
            sys.stderr.write(f"\r{'':{_width()}}\r")
            sys.stderr.flush()


def _width() -> int:
    # A terminal of unknown width reports 0 columns.
    return max(os.get_terminal_size(sys.stderr.fileno()).columns or 80, 2) - 1


def _report(args: argparse.Namespace, path: Path, played: Played, skipped: Mapping[str, int], notes: list[str]) -> None:
    if args.json:
        result = {
            "version": 1,
            "file": str(path),
            "as": args.side,
            "sent": played.sent,
            "expected": played.expected,
            "came": played.came,
            "missing": played.missing,
            "surplus": played.surplus,
            "unknown": played.unknown,
            "left_out": skipped,
            "notes": notes,
        }
        say_text(json.dumps(result, indent=2))
        return
    lines = [f"{name}: {count} sent" for name, count in sorted(played.sent.items())]
    for name in sorted(played.expected | played.came):
        came, expected = played.came[name], played.expected[name]
        lines.append(f"{name}: {came} of {expected} came back" if expected else f"{name}: {came} came back, 0 expected")
        if came < expected:
            lines[-1] += f", {expected - came} missing"
        elif 0 < expected < came:
            lines[-1] += f", {came - expected} more than recorded"
    lines += [f"{name}: {count} left out: not in the signal table" for name, count in sorted(played.unknown.items())]
    say(*lines, *(f"note: {note}" for note in notes))
