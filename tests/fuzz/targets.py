"""The fuzz targets. Each target reads arbitrary bytes and raises an exception only if it has found a bug.

A target ignores the documented errors of the code under test, and checks properties of each result.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from inco_trio.board_files import read_boards
from inco_trio.capture.pcapng import Reader, interface_block, packet_block, section_block
from inco_trio.config import parse_board
from inco_trio.control import protocol
from inco_trio.errors import IncoError
from inco_trio.frame import FRAME_MAX, decode, encode
from inco_trio.links.address import parse_address
from inco_trio.links.name_filter import DEPTHS, name_filter
from inco_trio.linux.inotify import pack_event, parse_events
from inco_trio.mqtt import bridge_codec
from inco_trio.mqtt.configuration import parse_broker, read_gateway
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.fdstore import NoFdStore
from inco_trio.persist.inflight import Inflight
from inco_trio.signals import Direction
from tests.support_bpf import accepted

__all__ = ["TARGETS", "Target"]

MAC = bytes.fromhex("020000000001")
NAMES = frozenset({b"ihub_reset_irq", b"ihub_hwwd_irq", b"i", b"x" * 64})
EXACT = name_filter(NAMES, DEPTHS[0])
UDRV = (Path(__file__).parents[1] / "data/udrv.json").read_bytes()
WORK = Path(tempfile.gettempdir())


@attrs.frozen
class Target:
    """A fuzz target and its initial inputs (seeds)."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


def frames(data: bytes) -> None:
    """Decode a frame from the link."""
    name = decode(data)
    assert decode(memoryview(data).toreadonly(), len(data)) == name
    if name is not None:
        assert decode(encode(name, MAC)) == name
        assert len(data) <= FRAME_MAX
    if len(data) >= 14 and data[12:14] == b"\x88\x00" and len(data) <= FRAME_MAX:
        # During a flood, the kernel's filter must not drop frames that carry known signals.
        assert name not in NAMES or accepted(EXACT, data)


def events(data: bytes) -> None:
    """Parse events that were read from an inotify descriptor."""
    for event in parse_events(data):
        assert -(1 << 31) <= event.wd < 1 << 31


def udrv(data: bytes) -> None:
    """Parse a udrv.json file."""
    with contextlib.suppress(IncoError):
        for signal in parse_board(data, "udrv.json").signals:
            assert encode(signal.name.encode("ascii"), MAC)
            assert signal.path.is_absolute()


def boards(data: bytes) -> None:
    """Read a board file."""
    directory = WORK / f"inco-trio-fuzz-{os.getpid()}"
    directory.mkdir(exist_ok=True)
    (directory / "b1.json").write_bytes(data)
    found = read_boards(directory)
    assert found.configs.keys() | found.refused.keys() == {"b1"}


def addresses(data: bytes) -> None:
    """Parse a link address and a broker URL."""
    text = os.fsdecode(data)
    with contextlib.suppress(IncoError):
        address = parse_address(text)
        assert address.name
        assert "/" not in address.label
    with contextlib.suppress(IncoError):
        assert parse_broker(text).port


def requests(data: bytes) -> None:
    """Decode the requests that a client sends to the control socket."""
    received = protocol.LineBuffer(protocol.LINE_MAX)
    with contextlib.suppress(protocol.MessageError):
        for start in range(0, len(data), 7):
            for line in received.split(data[start : start + 7]):
                try:
                    request, tag = protocol.decode_request(line)
                except protocol.RequestError as error:
                    protocol.encode_error(error)
                else:
                    again, _ = protocol.decode_request(protocol.encode_request(request))
                    assert again == request
                    assert json.loads(protocol.encode_response(request, True, tag))


def replies(data: bytes) -> None:
    """Decode the replies that a client receives from a proxy, or from a program that pretends to be a proxy."""
    for read in (protocol.decode_greeting, protocol.decode_reply):
        with contextlib.suppress(protocol.MessageError):
            found = read(data)
            if isinstance(found, protocol.Event):
                assert found.json()
            elif isinstance(found, protocol.Response):
                for board in found.status:
                    assert "".join(protocol.encode_board(board))


def recordings(data: bytes) -> None:
    """Read a recording in pcapng or pcap format."""
    with contextlib.suppress(IncoError):
        reader = Reader(io.BytesIO(data), "file")
        for packet in reader:
            assert isinstance(packet.time_ns, int)
        assert reader.position <= len(data)


def bundles(data: bytes) -> None:
    """Open a descriptor bundle. Its socket contains both halves of the input; the first half carries a descriptor."""
    entry, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with entry, queue:
        entry.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            half = len(data) // 2
            if data[:half]:
                socket.send_fds(entry, [data[:half]], [entry.fileno()])
            entry.send(data[half:])
        outer = NoFdStore()
        outer.inherited = {"bundle": os.dup(queue.fileno())}
        with contextlib.suppress(IncoError):
            Bundle(outer).close()
        with contextlib.suppress(OSError):
            os.close(outer.inherited.get("bundle", -1))


def bridges(data: bytes) -> None:
    """Decode the payloads that the other side of a bridge sends."""
    with contextlib.suppress(ValueError):
        batch = bridge_codec.Batch.decode(data)
        assert bridge_codec.Batch.decode(batch.encode()) == batch
    with contextlib.suppress(ValueError):
        boot, number = bridge_codec.decode_report(data)
        assert bridge_codec.decode_report(bridge_codec.encode_report(boot, number)) == (boot, number)
    with contextlib.suppress(ValueError):
        state = bridge_codec.decode_status(data)
        assert bridge_codec.decode_status(bridge_codec.encode_status(*state)) == state


def gateways(data: bytes) -> None:
    """Read a gateway's configuration file."""
    file = WORK / f"inco-trio-fuzz-{os.getpid()}.json"
    file.write_bytes(data)
    with contextlib.suppress(IncoError):
        read_gateway(file)


def memory(data: bytes) -> None:
    """Use a stored in-flight buffer that `_mutation` has changed."""
    from tests.test_mutated_memory import changed, use

    found = Inflight.open(changed(_mutation(data)))
    use(found)
    found.close()


def proxies(data: bytes) -> None:
    """Run a proxy that inherits an in-flight buffer that `_mutation` has changed."""
    import trio

    from tests.support_proxy import Cupboard
    from tests.test_mutated_memory import changed, run_proxy

    with tempfile.TemporaryDirectory(prefix="inco-trio-fuzz-") as directory:
        store = Cupboard({"inflight": changed(_mutation(data))})
        try:
            trio.run(run_proxy, Path(directory), store, "a")
        finally:
            store.close()


def _mutation(data: bytes) -> Callable[[memoryview, dict[str, int]], None]:
    """Return a function that patches memory: of every 12 input bytes, 4 select an offset and 8 are the new content."""

    def write(whole: memoryview, at: dict[str, int]) -> None:
        places = sorted(at.values())
        for start in range(0, len(data), 12):
            head, new = data[start : start + 4], data[start + 4 : start + 12]
            if new:
                place = places[head[0] % len(places)] + int.from_bytes(head[1:], "big") % 4096
                whole[place : place + len(new)] = new

    return write


BOARD = {"link": "unix:/run/b1/core0,peer=/run/b1/core1", "irq_dir": "/run/b1/irq"}
GATEWAY = {"boards": ["b1"], "send": {"*": ["*"]}, "status_seconds": 60, "broker": {"user_file": "/etc/u"}}
RECORDING = section_block("inco-trio") + interface_block("rpmsg4000")
PACKET = packet_block(0, 1_700_000_000_000_000_000, encode(b"ihub_reset_irq", MAC), Direction.INBOUND, "comment")
EVENT = {"event": "notification", "direction": "inbound", "signal": "a", "sequence": 1, "time": 1.5, "frame": "00ff"}
STATUS: dict[str, object] = {"status": [{"board": "b1", "open": False, "problem": "none"}]}
GREETING = protocol.encode_greeting(protocol.Greeting("b1", 1, "boot", ("b1",)))
REQUESTS = (
    protocol.StatusRequest(),
    protocol.SendRequest("redun_notify_irq", 3),
    protocol.MonitorRequest(direction=Direction.INBOUND, signals=["a"], frames=True),
    protocol.AcknowledgeRequest("b1", 7, "boot"),
)

TARGETS: Mapping[str, Target] = {
    "frames": Target(frames, [*(encode(name, MAC) for name in NAMES), encode(b"i", MAC).ljust(60, b"\0")]),
    "events": Target(events, [pack_event(1, 8), pack_event(-1, 0x4000), b"\1\0\0\0\0\1\0\0" + bytes(7) + b"\1a" * 8]),
    "udrv": Target(udrv, [UDRV, b'{"file": {"ihub-irq-dev": {"path": "/run/irq"}}}']),
    "boards": Target(boards, [json.dumps(BOARD).encode()]),
    "addresses": Target(addresses, [b"rpmsg4000", BOARD["link"].encode(), b"mqtt://host:1883/prefix", b"mqtts://[::1]"]),
    "requests": Target(requests, [protocol.encode_request(request) for request in REQUESTS]),
    "replies": Target(replies, [GREETING, json.dumps(EVENT).encode(), json.dumps(STATUS).encode()]),
    "recordings": Target(recordings, [RECORDING + PACKET, RECORDING]),
    "bundles": Target(bundles, [b"+a\n+b\n-a\n", b"+a\n-a\n"]),
    "bridges": Target(bridges, [
        bridge_codec.Batch(bytes(8), 1, [b"frame", b"x"], True).encode(),
        bridge_codec.encode_report(bytes(8), 5),
        bridge_codec.encode_status("online", "a", 1),
    ]),
    "gateways": Target(gateways, [json.dumps(GATEWAY).encode()]),
    "memory": Target(memory, [bytes(4) + b"12345678", b"\5\0\0\x08" + b"\xff" * 8]),
    "proxies": Target(proxies, [bytes(4) + b"12345678", b"\5\0\0\x08" + b"\xff" * 8]),
}  # fmt: skip
