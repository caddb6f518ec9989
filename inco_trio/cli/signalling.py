"""Options, checks and messages that `send`, `wait`, `monitor` and `record` share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import add_place, check_link, configured_board, path_of
from inco_trio.cli.streams import remark
from inco_trio.errors import BoardNotOpenError, unwrapped
from inco_trio.links.address import InterfaceAddress, UnixAddress, address_fault, parse_address
from inco_trio.signals import Direction, Signal, builtin_signals, name_fault

if TYPE_CHECKING:
    from inco_trio.capture.recording import Recording
    from inco_trio.control.client import Client
    from inco_trio.control.protocol import BoardStatus, Event

OF_THE_PROXY = ("link", "control", "board")
OF_CORE_0 = ("irq_dir", "config")


def add_ways(sub: argparse.ArgumentParser) -> None:
    """Add SIGNAL, and the options that select a role: client of the proxy, application or core 1."""
    sub.add_argument("signal", metavar="SIGNAL", help="wire name of the signal")
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="board of the signal, if the proxy serves several boards")
    sub.add_argument("--irq-dir", metavar="DIR", help="act as an application that uses the built-in registers in DIR")
    sub.add_argument("--config", metavar="FILE", help="act as an application that uses the registers of this udrv.json")
    sub.add_argument(
        "--as", dest="core1", metavar="core1", help="act as core 1 on LINK, an interface or unix:CORE1,peer=CORE0"
    )


def check_ways(args: argparse.Namespace) -> None:
    """Raise UsageError if the options select more than one role; see `add_ways`."""
    # With --as, LINK is core 1's link and does not select a proxy.
    of_the_proxy = OF_THE_PROXY if args.core1 is None else OF_THE_PROXY[1:]
    given = {
        "a proxy (LINK, --control, --board)": any(getattr(args, name) is not None for name in of_the_proxy),
        "--irq-dir": args.irq_dir is not None,
        "--config": args.config is not None,
        "--as": args.core1 is not None,
    }
    both = [what for what, is_given in given.items() if is_given]
    if len(both) > 1:
        raise UsageError(f"{' and '.join(both)} are mutually exclusive")


def is_application(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) is not None for name in OF_CORE_0)


def check_known(name: str, known: Collection[str], other: Collection[str], what: str, hint: str) -> None:
    """Raise UsageError if `name` is not in `known`. If it is in `other`, the message contains `what` and `hint`."""
    if name in known:
        return
    if name in other:
        raise UsageError(name, f"is not {what}: {hint}")
    import difflib

    # A cutoff of 0 keeps all names and puts the most similar one first.
    there = difflib.get_close_matches(name, known, n=len(known) or 1, cutoff=0)
    similar = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
    raise UsageError(name, f"no such signal (expected one of: {', '.join(there) or 'none'}){hint}")


def register_of(args: argparse.Namespace, direction: str, what: str, hint: str) -> Signal:
    """Return the signal `args.signal`. Raises IncoError, for example if the signal is unknown."""
    signals: tuple[Signal, ...]
    if args.irq_dir is not None:
        signals = builtin_signals(path_of(args.irq_dir, "--irq-dir"))
    else:
        signals = configured_board(args).signals
    right = {signal.name: signal for signal in signals if signal.direction.value == direction}
    check_known(args.signal, right, [signal.name for signal in signals], what, hint)
    return right[args.signal]


def board_of(client: Client, args: argparse.Namespace) -> str | None:
    """Return the board that --board or LINK selects, or None if they select no board."""
    if args.board is None and args.link in client.greeting.boards and args.link != client.greeting.name:
        return str(args.link)
    return None if args.board is None else str(args.board)


def signals_of(client: Client, board: str | None) -> tuple[dict[str, str], bool]:
    """Return the direction of each signal by name, and whether all links are up.

    Raises BoardNotOpenError if none of the boards is open.
    """
    found = client.status(board)
    check_open(found)
    boards = [each.status for each in found if each.status is not None]
    directions = {signal.signal: signal.direction.value for each in boards for signal in each.signals}
    return directions, all(each.running for each in boards)


def check_open(boards: Sequence[BoardStatus]) -> None:
    """Raise BoardNotOpenError if none of the boards is open."""
    from inco_trio.control.client import not_open

    if boards and all(each.status is None for each in boards):
        raise not_open(boards[0])


def remark_unknown(client: Client, args: argparse.Namespace) -> None:
    """Print a note for each signal in --signal that is not in the signal table or that --direction excludes."""
    if args.signal is None:
        return
    try:
        known, _ = signals_of(client, board_of(client, args))
    except BoardNotOpenError:
        return  # The signal table is unknown until the board is open.
    for name in args.signal:
        if args.direction not in (None, known.get(name, args.direction)):
            remark(f"{name}: is {known[name]}, so --direction {args.direction} excludes it")
        elif name not in known:
            remark(f"{name}: not in the signal table (available: {', '.join(known) or 'none'})")


def clock_time(event: Event) -> str:
    """Return the local time of day of an event, with microseconds."""
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))}.{int(event.time % 1 * 1e6):06d}"


def direction_of(args: argparse.Namespace) -> Direction | None:
    return None if args.direction is None else Direction(args.direction)


def may_listen(link: str | None) -> bool:
    """Return whether `link` is an interface. If so, `monitor` and `record` can listen on it without a proxy."""
    return link is not None and not address_fault(link) and isinstance(parse_address(link), InterfaceAddress)


def link_of(args: argparse.Namespace) -> str:
    """Return the link of core 1. Raises UsageError, for example if `args.signal` is not a wire name."""
    link = args.link
    if args.core1 != "core1":
        raise UsageError(f"--as {args.core1}: unknown core (expected core1)")
    if link is None:
        raise UsageError("--as core1 requires LINK, the link of core 1")
    check_link(link)
    if fault := name_fault(args.signal):
        raise UsageError(f"{args.signal!r}: {fault}")
    check_core1(link)
    return str(link)


def check_core1(link: str) -> None:
    """Raise UsageError if a proxy on this host serves `link`. A proxy does not receive frames from its own side."""
    from inco_trio.linux.processes import named
    from inco_trio.service.rivals import serving

    address = parse_address(link)
    if proxies := serving(address):
        text = f"is core 0's side of the link: process {named(proxies)} serves it, and receives only frames from core 1"
        raise UsageError(link, f"{text}: use {_core1_of(address)}")


def _core1_of(address: InterfaceAddress | UnixAddress) -> str:
    """Describe core 1's side of a link. `address` is the address of the link on core 0."""
    if isinstance(address, UnixAddress):
        local, peer = (path.replace(",", ",,") for path in (address.local, address.peer))
        return f"unix:{peer},peer={local}"
    from inco_trio.linux.rtnetlink import Rtnetlink

    rtnetlink = Rtnetlink()
    try:
        own = rtnetlink.interface(address.name)
        other = rtnetlink.interface(index=own.below) if own is not None and own.below else None
    finally:
        rtnetlink.close()
    # The interfaces of a veth pair refer to each other. A VLAN refers to its lower interface, but not vice versa.
    if own is not None and other is not None and other.below == own.index:
        return f"core 1's interface {other.name}"
    return "core 1's interface, which may be in another network namespace"


@contextmanager
def alone() -> Iterator[None]:
    """If the block raises an exception group that contains one error, raise that error instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise unwrapped(group, only=True) from None


def left_out(recording: Recording) -> list[str]:
    """Return a note for each kind of packet in a recording that is neither a notification nor a mark.

    Also return a note if frames in a recording of inco-trio have lost the comments that describe them.
    """
    counts = sorted(recording.left_out.items())
    notes = [f"{count} packet{'' if count == 1 else 's'} left out: {reason}" for reason, count in counts]
    if count := recording.uncommented:
        frames = f"{count} frame{'' if count == 1 else 's'} without a comment of inco-trio"
        text = "another program captured them or removed the comments, so even pending ones count as delivered"
        notes.append(f"{frames}: {text}")
    return notes
