"""Recordings of notifications: write pcapng files, and read the notifications in any capture.

A recording has an Ethernet interface for each link, with the original frames. The interface `registers` contains
notifications without a frame, and marks for events such as a link that went down. Its packets have the EtherType
0x88B5, which IEEE 802 reserves for local experiments, and contain a JSON object with `signal`, `direction`, `register`
and `board`, or with `mark`. Custom Blocks would not be visible in tshark, and libpcap refuses files with several link
types. The flags of a packet contain its direction as core 0 sees it. The comment of a packet contains the signal and
the register.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import attrs

from inco_trio.capture.pcapng import ETHERNET, OBJECT, Packet, Reader, interface_block, packet_block, section_block
from inco_trio.errors import STRERROR, RecordingError, ResourceError, from_os_error
from inco_trio.frame import ADDRESSES, ETHERTYPE, HEADER_LENGTH, decode, is_wire_name
from inco_trio.linux.files import open_output, remove_output
from inco_trio.signals import Direction, SignalTable
from inco_trio.wall_clock import TOLERANCE_NS, WallClock, step_text

__all__ = ["Entry", "Mark", "Recorder", "Recording", "open_recording"]

APPLICATION = "inco-trio"
REGISTERS = "registers"
"""The name of the interface for notifications without a frame and for marks."""
STREAM = Path("-")
"""The path that stands for standard input or standard output."""
_STANDARD_INPUT, _STANDARD_OUTPUT = 0, 1
LOCAL_EXPERIMENT = 0x88B5
_LONGEST = 1e9
"""Longest delay in seconds. A longer one in a recording is invalid."""
_STEP_MAX = 2**63 - 1
"""Largest jump of the wall clock in nanoseconds. A larger one in a recording is invalid."""
SERIES = 10 * OBJECT
"""Estimated memory in bytes for the statistics of a signal of a board, also as JSON."""
COUNT_MAX = 1 << 20
"""Maximum number of notifications that one packet represents."""
_STATE = re.compile(r" \[(?:pending: (.+)|after (up to )?(\d{1,9}\.\d+) s)\]$", re.DOTALL)
"""A pattern for the end of a packet's comment if the notification is or was pending."""
_UNFRAMED = bytes(ADDRESSES) + LOCAL_EXPERIMENT.to_bytes(2, "big")


class Recorder:
    """A writer that stores notifications and marks in the file at `path`. Like tcpdump, it replaces an existing file.

    The path `-` is standard output. If the file is a pipe whose reader has exited, raise BrokenPipeError.

    With `size_max` (bytes) or `seconds_max`, an entry that would exceed the limit starts a new file. The files are
    numbered: _00001 and so on before the suffix. The numbers continue after those of existing files, because a
    supervisor may restart the process. If there are more than `keep` files, the oldest one is removed. Each entry is
    written with a single write(2), so the file stays readable even if the process is killed. Raises
    PermissionDeniedError and ResourceError; after an error, the file is closed but complete up to the last entry.
    """

    def __init__(
        self, path: Path, *, size_max: int | None = None, seconds_max: float | None = None, keep: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.written: list[Path] = []
        """The files of this recorder that have not been removed, oldest first."""
        self.count = 0
        """The number of notifications in all files."""
        self._path = path
        self._interfaces: dict[str, int] = {}
        self._size_max, self._seconds_max, self._keep = size_max, seconds_max, keep
        self._fd = -1
        self._numbered = (size_max, seconds_max) != (None, None)
        self._earlier = _numbered_files(path) if self._numbered else {}
        """The files of earlier recorders, keyed by number, oldest first."""
        self._number = max(self._earlier, default=0)
        self._size = self._entries = 0
        self._clock, self._begun = clock, 0.0
        self._wall_clock: WallClock | None = None
        if self._earlier:
            _refuse_if_recording(self._earlier[self._number])
        self._open()

    @property
    def path(self) -> Path:
        return self.written[-1]

    def append(
        self, time_ns: int, direction: Direction, signal: str, register: str, frame: bytes | None, link: str,
        *, pending: str = "", delay: float = 0.0, delay_max: float = 0.0, count: int = 1,
    ) -> None:  # fmt: skip
        """Append a notification of the board `link`. `Entry` explains the other arguments.

        `frame` is None if the frame is unknown. A `count` above 1 represents several notifications without frames that
        have the same time.
        """
        while count > COUNT_MAX:
            self.append(
                time_ns, direction, signal, register, frame, link, pending=pending, delay=delay, delay_max=delay_max,
                count=COUNT_MAX,
            )  # fmt: skip
            count -= COUNT_MAX
        content: dict[str, object] = {"signal": signal, "direction": direction.value, "register": register}
        content["board"] = link
        comment = f"{_comment(direction, signal)} {register}".rstrip()
        if pending:
            content["pending"] = pending
            comment += f" [pending: {pending}]"
        elif delay:
            content["delay"] = delay
            comment += f" [after {max(delay, 1e-6):.6f} s]"
        elif delay_max:
            content["delay_max"] = delay_max
            comment += f" [after up to {max(delay_max, 1e-6):.6f} s]"
        if count > 1:
            content["count"] = count
            comment = f"{comment}, {count} times"
        if frame is None:
            self._append(time_ns, REGISTERS, _unframed(content), direction, comment)
        else:
            self._append(time_ns, link, frame, direction, comment)
        self.count += 0 if pending else count

    def ignored(self, time_ns: int, comment: str, frame: bytes, link: str) -> None:
        """Append a received frame that the proxy ignored. `comment` is the reason."""
        self._append(time_ns, link, frame, Direction.INBOUND, comment)

    def mark(self, time_ns: int, text: str, step_ns: int = 0) -> None:
        """Append a mark. `step_ns` is the number of nanoseconds by which the wall clock just jumped, or 0."""
        content: dict[str, object] = {"mark": text} | ({"step_ns": step_ns} if step_ns else {})
        self._append(time_ns, REGISTERS, _unframed(content), None, text)

    def follow_clock(self, time_ns: int, monotonic_ns: int) -> None:
        """Append a mark if the wall clock jumped since the last call. Both arguments are times of the next entry."""
        if self._wall_clock is None:
            self._wall_clock = WallClock()
            self._wall_clock.offset = time_ns - monotonic_ns
        elif step := self._wall_clock.step(time_ns, monotonic_ns):
            self.mark(time_ns, step_text(step), step)

    def _append(self, time_ns: int, interface: str, data: bytes, direction: Direction | None, comment: str) -> None:
        if self._fd < 0:
            raise ResourceError(self.path, "is closed")
        blocks = self._blocks(time_ns, interface, data, direction, comment)
        if self._is_full(len(blocks)):
            self.close()
            self._open()
            blocks = self._blocks(time_ns, interface, data, direction, comment)
        if not self._entries:
            self._begun = self._clock()
        self._write(blocks)
        self._interfaces.setdefault(interface, len(self._interfaces))
        self._entries += 1

    def _blocks(self, time_ns: int, interface: str, data: bytes, direction: Direction | None, comment: str) -> bytes:
        """Return the block of a packet. If the interface is new in the file, prepend the interface's block."""
        number = self._interfaces.get(interface, len(self._interfaces))
        head = b"" if interface in self._interfaces else interface_block(interface)
        return head + packet_block(number, time_ns, data, direction, comment)

    def _is_full(self, more: int) -> bool:
        if not self._entries:  # Each file gets at least one entry, even if it exceeds a limit.
            return False
        if self._size_max is not None and self._size + more > self._size_max:
            return True
        return self._seconds_max is not None and self._clock() - self._begun >= self._seconds_max

    def _open(self) -> None:
        self._number += 1
        path = self._path
        if self._numbered:
            path = path.with_name(f"{path.stem}_{self._number:05}{path.suffix}")
        try:
            self._fd = os.dup(_STANDARD_OUTPUT) if self._path == STREAM else open_output(path)
        except OSError as error:
            fifo = ((errno.ENXIO,), ResourceError, "cannot be written: no process reads from it")
            raise from_os_error(error, path, f"cannot be written: {STRERROR}", fifo) from error
        os.set_blocking(self._fd, True)
        if self._path != STREAM:
            self._begin(path)
        self.written.append(path)
        self._size = self._entries = 0
        self._interfaces = {REGISTERS: 0}
        self._write(section_block(APPLICATION) + interface_block(REGISTERS))
        while self._keep is not None and len(self._earlier) + len(self.written) > max(self._keep, 1):
            oldest = self._earlier.pop(min(self._earlier)) if self._earlier else self.written.pop(0)
            with contextlib.suppress(OSError):  # Another process may have removed the file.
                remove_output(oldest)

    def _begin(self, path: Path) -> None:
        """Lock and truncate the file. Raises ResourceError if another process is recording to it."""
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return
        try:
            _lock(self._fd, path)
        except ResourceError:
            self.close()
            raise
        os.ftruncate(self._fd, 0)

    def _write(self, data: bytes) -> None:
        try:
            done = os.write(self._fd, data)
            while done < len(data):  # After a short write, the next write(2) reports the error.
                done += os.write(self._fd, data[done:])
        except BrokenPipeError:
            self.close()
            raise
        except OSError as error:
            with contextlib.suppress(OSError):  # ftruncate(2) fails for a pipe.
                if self._path != STREAM:  # Standard output may contain other data.
                    os.ftruncate(self._fd, self._size)
            self.close()
            path = self.path
            if not self._size and self._numbered:  # A file without its header is not a recording.
                with contextlib.suppress(OSError):
                    remove_output(path)
                if len(self.written) > 1:
                    self.written.pop()
                    path = self.path
            raise ResourceError(
                path, f"{error.strerror}: the recording ends after {self.count} notifications, which are kept"
            ) from error
        self._size += len(data)

    @property
    def pipe(self) -> int | None:
        """The file's descriptor if the file is a pipe. select(2) reports it as readable once the reader has exited."""
        return self._fd if self._fd >= 0 and stat.S_ISFIFO(os.fstat(self._fd).st_mode) else None

    def close(self) -> None:
        """Close the file. Do nothing if it is already closed."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _numbered_files(path: Path) -> dict[int, Path]:
    """Return the files that a recorder with a limit has written for `path`, keyed by number, in ascending order."""
    # A longer number is probably a date, such as 20261128.
    numbered = re.compile(rf"{re.escape(path.stem)}_([0-9]{{5}}|[1-9][0-9]{{5}}){re.escape(path.suffix)}")
    try:
        found = {each: numbered.fullmatch(each.name) for each in path.parent.iterdir()}
    except OSError:
        return {}  # Opening the new file reports this error.
    return dict(sorted((int(match[1]), each) for each, match in found.items() if match))


def _refuse_if_recording(path: Path) -> None:
    """Raise ResourceError if another process is recording to the existing file at `path`."""
    with contextlib.suppress(OSError):  # Another process may have removed the file.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            _lock(fd, path)
        finally:
            os.close(fd)


def _lock(fd: int, path: Path) -> None:
    """Lock a recording for this process. Raises ResourceError if another process is recording to it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResourceError(path, "another process is recording to this file (use another file)") from None
    except OSError:
        pass  # Record without a lock: the filesystem does not support locks.


@attrs.frozen
class Entry:
    """A notification in a recording. An unknown `direction` is None, and an unknown `register` is empty."""

    time_ns: int
    signal: str
    direction: Direction | None
    register: str = ""
    ignored: bool = False
    """Whether the proxy ignored this frame when it was recorded."""
    pending: str = ""
    """Why the proxy could not deliver or send the notification at this time. Another entry reports its delivery."""
    delay: float = 0.0
    """How long the notification had been pending before it was delivered or sent (seconds), or 0."""
    delay_max: float = 0.0
    """If `delay` is unknown: the longest time for which the notification can have been pending (seconds), or 0."""
    board: str = ""
    """The name of the board, or of the interface on which another program captured the frame; empty if unknown."""


@attrs.frozen
class Mark:
    """An event that is not a notification, such as a link that went down, dropped frames or a restart."""

    time_ns: int
    text: str
    step_ns: int = 0
    """The number of nanoseconds by which the wall clock jumped at this time, or 0."""


class Recording:
    """An iterable of the notifications and marks in a capture. It skips all other packets, and counts them.

    The direction of a frame comes from the first available source: the flags if inco-trio recorded the packet, the
    signal in `table`, or earlier frames from the same MAC address. The flags of other programs are ignored: they
    describe the view of the capturing machine, which may be core 1. Programs such as mergecap(1) replace the header of
    a file but keep its packets, so the comment of each packet shows whether inco-trio recorded it.
    """

    def __init__(self, file: BinaryIO, name: str, table: SignalTable) -> None:
        self.reader = Reader(file, name)
        self.size = os.fstat(file.fileno()).st_size
        self.packets = 0
        self.left_out: Counter[str] = Counter()
        """The number of packets that were skipped, keyed by reason."""
        self.boards: set[str] = set()
        """The names of the boards in the recording so far, or of the interfaces if another program captured it."""
        self.is_ours = False
        """Whether inco-trio recorded at least one of the packets so far."""
        self._uncommented = 0
        self._table = table
        self._count = 1
        self._step_ns = 0
        self._last_ns: dict[str, int] = {}
        """The time of the newest entry of each board. A board that opens late may add entries older than others'."""
        self._senders: dict[bytes, Direction] = {}
        self._series: set[tuple[str, Direction | None, str]] = set()
        """The signals so far, with their directions and boards."""

    @property
    def uncommented(self) -> int:
        """The number of frames without a comment of inco-trio, or 0 if inco-trio recorded none of the packets."""
        return self._uncommented if self.is_ours else 0

    @property
    def progress(self) -> str:
        """The reading progress as text: a percentage, or kilobytes if the file size is unknown."""
        position = self.reader.position
        return f"{100 * position // self.size} %" if self.size else f"{position // 1000} kB"

    def __iter__(self) -> Iterator[Entry | Mark]:
        for packet in self.reader:
            self.packets += 1
            if entry := self._entry(packet):
                if isinstance(entry, Entry):
                    self._note_series(entry)
                yield from self._in_order(entry)
            else:
                self.left_out[_reason(packet)] += 1
        self.left_out += self.reader.skipped

    def _note_series(self, entry: Entry) -> None:
        series = entry.signal, entry.direction, entry.board
        if series not in self._series:
            self.reader.keep(SERIES, entry.board)
            self._series.add(series)
            if entry.board:
                self.boards.add(entry.board)

    def _in_order(self, entry: Entry | Mark) -> Iterator[Entry | Mark]:
        """Yield an entry. Correct its time if the wall clock has jumped, because a jump must not change durations."""
        if isinstance(entry, Mark):
            self._step_ns += entry.step_ns
        time_ns = entry.time_ns - self._step_ns
        if isinstance(entry, Entry):
            last_ns = self._last_ns.get(entry.board, time_ns)
            if (back := last_ns - time_ns) > TOLERANCE_NS:
                # The recording has no mark for this jump: another program recorded the packets or merged files.
                self._step_ns -= back
                time_ns = last_ns
                yield Mark(time_ns, f"the packet timestamps go back by {back / 1e9:.1f} s")
            self._last_ns[entry.board] = max(last_ns, time_ns)
        if self._step_ns:
            entry = attrs.evolve(entry, time_ns=time_ns)
        yield from itertools.repeat(entry, self._count)

    def _entry(self, packet: Packet) -> Entry | Mark | None:
        self._count = 1
        if packet.interface.linktype != ETHERNET:
            return None
        if packet.data.startswith(_UNFRAMED):
            entry, self._count = _content(packet)
            self.is_ours = self.is_ours or entry is not None
            return entry
        name = decode(packet.data) if len(packet.data) == packet.length else None
        if name is None:
            return None
        text = name.decode("ascii")
        ours = self.reader.application == APPLICATION or _is_recorded(packet, text)
        direction = packet.direction if ours else None
        if direction is None and name in self._table.inbound:
            direction = Direction.INBOUND
        elif direction is None and name in self._table.outbound:
            direction = Direction.OUTBOUND
        source = packet.data[ADDRESSES // 2 : ADDRESSES]
        if direction is None:
            direction = self._senders.get(source)
        else:
            if source not in self._senders:
                self.reader.keep(OBJECT)
            self._senders[source] = direction
        # If the proxy ignored a frame, the packet's comment contains the reason instead of the signal.
        recorded, board = packet.direction if ours else None, packet.interface.name
        if packet.comment:
            self.is_ours = self.is_ours or ours
        else:
            self._uncommented += 1
        if recorded is None or not packet.comment:
            return Entry(packet.time_ns, text, direction, board=board)
        if not packet.comment.startswith(_comment(recorded, text)):
            return Entry(packet.time_ns, text, direction, ignored=True, board=board)
        # Without a bracket at the end, the search would take quadratic time.
        state = _STATE.search(packet.comment) if packet.comment.endswith("]") else None
        pending, up_to, seconds = ("", "", "") if state is None else state.groups("")
        delays = (0.0, float(seconds)) if up_to else (float(seconds or 0), 0.0)
        return Entry(packet.time_ns, text, direction, "", False, pending, *delays, board)


def _is_recorded(packet: Packet, signal: str) -> bool:
    """Return whether a packet has a direction and a comment that `Recorder` would write for a frame."""
    if packet.direction is None:
        return False
    return packet.comment.startswith((_comment(packet.direction, signal), "ignored: "))


def _reason(packet: Packet) -> str:
    """Return why a packet is neither a notification nor a mark."""
    if packet.interface.linktype != ETHERNET:
        return "on an interface that is not Ethernet"
    if packet.data.startswith(_UNFRAMED):
        return "with a damaged note of inco-trio"
    if packet.data[ADDRESSES:HEADER_LENGTH] != ETHERTYPE.to_bytes(2, "big"):
        return f"with another EtherType than 0x{ETHERTYPE:04X}"
    return "truncated by the capture" if len(packet.data) < packet.length else "without a valid wire name"


def _comment(direction: Direction, signal: str) -> str:
    """Return the beginning of the packet comment for a notification."""
    return f"{direction.value} {signal}"


def _unframed(content: Mapping[str, object]) -> bytes:
    return _UNFRAMED + json.dumps(content).encode() + b"\n"


def _content(packet: Packet) -> tuple[Entry | Mark | None, int]:
    """Return the entry or mark that `_unframed` encoded (None if invalid), and how many notifications it represents."""
    try:
        content = json.loads(packet.data[HEADER_LENGTH:])
        if isinstance(content.get("mark"), str):
            step = content.get("step_ns", 0)
            step = step if type(step) is int and abs(step) <= _STEP_MAX else 0
            return Mark(packet.time_ns, content["mark"], step), 1
        signal, register = content["signal"], content["register"]
        pending, delays = content.get("pending", ""), [content.get(key, 0.0) for key in ("delay", "delay_max")]
        count, board = content.get("count", 1), content.get("board", "")
        valid = all(isinstance(text, str) for text in (register, pending, board))
        valid = valid and all(isinstance(delay, int | float) and 0 <= delay <= _LONGEST for delay in delays)
        if valid and isinstance(count, int) and 0 < count <= COUNT_MAX and is_wire_name(signal.encode("ascii")):
            direction = packet.direction or Direction(content["direction"])
            # A classic pcap file has no names of interfaces, so the boards of its frames are unknown as well.
            board = board if packet.interface.name else ""
            delay, delay_max = map(float, delays)
            return Entry(packet.time_ns, signal, direction, register, False, pending, delay, delay_max, board), count
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None, 1


@contextlib.contextmanager
def open_recording(path: Path, table: SignalTable) -> Iterator[Recording]:
    """Open the recording at `path`; `-` is standard input. Raises RecordingError, PermissionDeniedError."""
    if path == STREAM:
        os.set_blocking(_STANDARD_INPUT, True)
        with open(os.dup(_STANDARD_INPUT), "rb") as file:  # noqa: PTH123 - a descriptor
            yield Recording(file, "standard input", table)
        return
    try:
        # Without O_NONBLOCK, opening a FIFO would block until another process opens it for writing.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path, f"cannot be read: {STRERROR}", otherwise=RecordingError) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RecordingError(path, "not a recording: not a regular file")
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        yield Recording(file, str(path), table)
