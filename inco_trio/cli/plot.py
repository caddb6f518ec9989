"""`inco-trio plot`: plot a recording."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import STREAM, absolute, configuration_argument, configured_board, path_of
from inco_trio.cli.signalling import left_out
from inco_trio.cli.streams import remark, say, say_bytes, say_text
from inco_trio.errors import STRERROR, ProgramNotFoundError, RecordingError, from_os_error
from inco_trio.linux.files import open_output, remove_output
from inco_trio.service.lines import printable
from inco_trio.signals import SignalTable, builtin_signals

if TYPE_CHECKING:
    from inco_trio.capture.recording import Recording
    from inco_trio.capture.summary import Summary

FORMATS = (".svg", ".png")
SHOWN = 0.5
"""Seconds between two progress messages on a terminal."""
NOTIFICATION = 32
"""Estimated memory in bytes for a notification that was not delayed, in the statistics and while they are drawn."""
OFTEN = 1024
"""Number of notifications after which the command checks whether to update the progress message."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "The plot shows a timeline, the rate and the longest gap of each signal, and marks where the link went down\n"
        "or frames were dropped. --json works without matplotlib.\n"
        "example: inco-trio plot night.pcapng --pair redun_notify_irq ihub_hwwd_irq\n"
        "exit codes: 0 success, 65 no recording, 69 matplotlib not installed, 71 disk full, 77 no permission"
    )
    sub.add_argument(
        "file", nargs="?", metavar="FILE", help="recording, or any pcapng or pcap file with Ethernet frames"
    )
    sub.add_argument(
        "--past", nargs="?", const="", metavar="LINK",
        help="plot the history of LINK's proxy (default: the only proxy) instead of FILE",
    )  # fmt: skip
    sub.add_argument("--control", metavar="PATH", help="with --past: control socket of the proxy")
    sub.add_argument(
        "--out",
        metavar="FILE",
        help="output file (.svg or .png), or - for SVG on standard output (default: FILE with the suffix .svg)",
    )
    sub.add_argument(
        "--pair", action="append", nargs=2, default=[], metavar=("SIGNAL", "ANSWER"),
        help="measure the time from SIGNAL to ANSWER; may be repeated",
    )  # fmt: skip
    configuration_argument(sub, "the built-in signals")
    sub.add_argument("--json", action="store_true", help="print statistics (times in seconds); plot only with --out")


def run(args: argparse.Namespace) -> int:
    """Plot the recording; return the exit code. Raises IncoError."""
    if (args.file is None) == (args.past is None):
        raise UsageError("give either FILE or --past")
    if args.control is not None and args.past is None:
        raise UsageError("--control applies only to --past (add --past, or omit --control)")
    if args.past is None:
        return _plot(args, path_of(args.file, "FILE"))
    from inco_trio.cli.record import record_past

    with tempfile.TemporaryDirectory(prefix="inco-trio-") as directory:
        path = Path(directory) / "history.pcapng"
        record_past(path, args.past or None, args.control)
        args.out = args.out or (None if args.json else "history.svg")
        return _plot(args, path)


def _plot(args: argparse.Namespace, path: Path) -> int:
    out = _out(args, path)
    draws = args.out is not None or not args.json
    if draws:
        if args.out != STREAM and _is_one_file(path, out):
            raise UsageError(f"--out {out}: is the recording itself (use another file)")
        # Import matplotlib before the file is read, because reading can take a long time and the import can fail.
        try:
            from inco_trio.capture.picture import draw
        except ImportError as error:
            hint = "pip install 'inco-trio[plot]', or use --json"
            raise ProgramNotFoundError(f"matplotlib is not installed ({error}): {hint}") from error
    summary = _read(path, _table(args), args.pair)
    if args.json:
        say_text(json.dumps({"version": 1, "file": str(path), **summary.numbers()}, indent=2))
    if draws:
        total = sum(len(flow.times) for flow in summary.flows.values())
        title = f"{printable(path.name)}: {total} notifications"
        if args.out == STREAM:
            say_bytes(draw(summary, title, FORMATS[0]))
            return 0
        _save(draw(summary, title, out.suffix), out)
        if not args.json:
            say(f"{total} notifications and {len(summary.marks)} marks plotted to {out}")
    return 0


def _save(picture: bytes, out: Path) -> None:
    """Write the plot to a file. Raises ResourceError, PermissionDeniedError."""
    try:
        fd = open_output(out)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                os.set_blocking(fd, True)
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    file.truncate()
                file.write(picture)
        except OSError:
            with contextlib.suppress(OSError):
                remove_output(out)  # Do not leave an incomplete plot.
            raise
    except OSError as error:
        raise from_os_error(error, out, f"cannot be written: {STRERROR}") from error


def _out(args: argparse.Namespace, path: Path) -> Path:
    """Return the path of the plot. Raises UsageError."""
    if args.out is None:
        return path.parent / f"{path.stem}{FORMATS[0]}"
    if args.out == STREAM:
        if args.json:
            raise UsageError("--out -: cannot be used with --json (write the plot to a file)")
        return Path(STREAM)
    out = path_of(args.out, "--out")
    if out.suffix not in FORMATS:
        raise UsageError(f"--out {out}: unknown format (expected one of {', '.join(FORMATS)})")
    return out


def _is_one_file(path: Path, out: Path) -> bool:
    try:
        return out.samefile(path)
    except OSError:  # One of the files does not exist. If it is the recording, the error is reported later.
        return False


def _table(args: argparse.Namespace) -> SignalTable:
    """Return the signal table, which contains the direction of each signal. Raises UsageError, ConfigError."""
    if args.config is None:
        return SignalTable(builtin_signals(absolute(".", "FILE")))
    return SignalTable(configured_board(args).signals)


def _read(path: Path, table: SignalTable, pairs: list[tuple[str, str]]) -> Summary:
    """Return the statistics of a recording. Raises RecordingError, PermissionDeniedError, UsageError."""
    from inco_trio.capture.recording import open_recording
    from inco_trio.capture.summary import Pair, Summary

    summary = Summary([Pair(signal, answer) for signal, answer in pairs])
    with open_recording(path, table) as recording:
        _follow(recording, summary, path)
        if recording.reader.cut is not None:
            remark(f"{path}: {recording.reader.cut}: only the packets before this position are plotted")
        for note in left_out(recording):
            remark(f"{path}: {note}")
    summary.left_out = recording.left_out
    if summary.ignored:
        remark(f"{path}: {summary.ignored} frames that the proxy ignored are not plotted")
    for pair in summary.pairs:
        pair.end()
    if not summary.flows and not summary.marks:
        raise RecordingError(path, "contains no notifications")
    names = sorted({signal for signal, *_ in summary.flows})
    for name in (name for pair in pairs for name in pair):
        if name not in names:
            raise UsageError(f"--pair: {name!r} is not in {path} (expected one of: {', '.join(names) or 'none'})")
    return summary


def _follow(recording: Recording, summary: Summary, path: Path) -> None:
    from inco_trio.capture.pcapng import OBJECT
    from inco_trio.capture.recording import Mark
    from inco_trio.capture.summary import TIME_MAX

    shows, shown = sys.stderr.isatty(), time.monotonic()
    try:
        for number, each in enumerate(recording):
            if not 0 <= each.time_ns <= TIME_MAX:
                when = "is from 2262 or later, or from before 1970"
                raise RecordingError(path, f"damaged: packet {recording.packets} {when}")
            if isinstance(each, Mark):
                recording.reader.keep(2 * OBJECT, each.text)
            else:
                recording.reader.keep(OBJECT if each.delay else NOTIFICATION)
            summary.take(each)
            if shows and number % OFTEN == 0 and time.monotonic() - shown > SHOWN:
                shown = time.monotonic()
                sys.stderr.write(f"\r\x1b[K{recording.progress}")
                sys.stderr.flush()
    finally:
        if shows:
            sys.stderr.write("\r\x1b[K")
