"""Tests of the link's socket and of the interface watcher on the real kernel."""

from __future__ import annotations

import errno
import functools
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from inco_trio.cli.exit_codes import exit_code
from inco_trio.errors import PermissionDeniedError, ResourceError
from inco_trio.frame import ETHERTYPE, FRAME_MAX, decode, encode
from inco_trio.links.name_filter import FORMS, SAMPLE
from inco_trio.links.packet import HEAD, RECEIVE_BUFFER, PacketLink
from inco_trio.linux import bpf
from inco_trio.linux.capabilities import CAP_NET_ADMIN, CAP_NET_RAW
from inco_trio.linux.rtnetlink import IFF_LOWER_UP, OPERSTATES, Interface, Rtnetlink
from inco_trio.linux.sockets import SO_LOCK_FILTER
from inco_trio.simulation.world import Cores, Peer, veth
from netns.hang import HANG
from tests.support_bpf import accepted
from tests.support_capabilities import without_capability

pytestmark = pytest.mark.netns

SO_DETACH_FILTER = 27
PACKET_OTHERHOST = 3
ROOM = 200

StartLink = Callable[[], PacketLink]


def close(link: PacketLink) -> None:
    """Close the link's sockets outside Trio. `PacketLink.close` needs Trio, because it notifies waiting tasks."""
    link._socket.close()
    link._rtnetlink.close()


def change(cores: Cores, interface: str, **attributes: Any) -> None:
    """Change the attributes of an interface on core 0, and wait until all interfaces with a carrier can send."""
    from pyroute2 import IPRoute

    def inside() -> None:
        with IPRoute() as links:
            links.link("set", ifname=interface, **attributes)

    def settle() -> None:
        # The kernel activates an interface's queue some time after the carrier appears, and drops frames until then.
        with IPRoute() as links:
            while any(
                each["flags"] & IFF_LOWER_UP and each.get_attr("IFLA_OPERSTATE") == "DOWN" for each in links.get_links()
            ):
                pass

    cores.core0.run(inside)
    for core in (cores.core0, cores.core1):
        core.run(settle)


@pytest.fixture
def opened(cores: Cores) -> Iterator[StartLink]:
    """Return a function that opens a link in core 0 without binding its socket."""
    with ExitStack() as stack:

        def start() -> PacketLink:
            link = cores.core0.run(functools.partial(PacketLink.open, cores.link))
            stack.callback(close, link)
            return link

        yield start


@pytest.fixture
def link(opened: StartLink, cores: Cores) -> PacketLink:
    """Return a bound link in core 0."""
    made = opened()
    assert made.refresh()
    return made


@pytest.fixture
def watcher(cores: Cores) -> Iterator[Rtnetlink]:
    made = cores.core0.run(Rtnetlink)
    yield made
    made.close()


def changed(interface: Interface, **fields: Any) -> Interface:
    """Return a copy of `interface` with other values of some fields."""
    return Interface(**{**vars(interface), **fields})


def run(function: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(HANG):
            await function()

    trio.run(guarded)


def receive(link: PacketLink, count: int = 100, step: int = ROOM) -> list[bytes]:
    """Return at most `count` queued frames, each read into a buffer of ROOM bytes."""
    rooms = [memoryview(bytearray(ROOM)) for _ in range(count)]
    return [bytes(room[:length]) for room, length in zip(rooms, link.receive_into(rooms, step), strict=False)]


def test_no_frame_is_queued_before_the_bind(opened: StartLink, cores: Cores, core1: Peer) -> None:
    link = opened()
    core1.send(b"early")
    assert receive(link) == []
    assert link.refresh()
    core1.send(b"in_time")
    assert receive(link) == [encode(b"in_time", core1.mac)]


def test_frames_are_read_in_order_until_the_queue_is_empty(link: PacketLink, core1: Peer) -> None:
    for number in range(7):
        core1.send(b"%d" % number)
    assert [frame[14:] for frame in receive(link, 5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert [frame[14:] for frame in receive(link, 5)] == [b"5", b"6"]
    assert receive(link, 5) == []


def test_one_frame_is_read(link: PacketLink, core1: Peer) -> None:
    core1.send(b"one")
    room = memoryview(bytearray(ROOM))
    length = link.receive_one(room)
    assert bytes(room[:length]) == encode(b"one", core1.mac)
    assert link.receive_one(room) == -1


def test_a_long_frame_is_truncated_and_its_full_length_returned(link: PacketLink, core1: Peer) -> None:
    core1.send(b"long", pad=1000)
    core1.send(b"next")
    room = memoryview(bytearray(ROOM))
    assert link.receive_one(room) == 1000
    assert receive(link) == [encode(b"next", core1.mac)]


def test_a_batch_ends_with_a_frame_longer_than_its_step(link: PacketLink, core1: Peer) -> None:
    for pad in (0, 150, 0):
        core1.send(b"name", pad=pad)
    assert [len(frame) for frame in receive(link, step=100)] == [18, 150]
    assert [len(frame) for frame in receive(link, step=100)] == [18]


WITHOUT_OPTION = ("linux.if_packet.PACKET_IGNORE_OUTGOING", 9999)
"""A patch that simulates a kernel before 4.20, which does not support the option PACKET_IGNORE_OUTGOING."""
WITHOUT_FILTER = ("links.packet.HEAD", (bpf.ACCEPT,))
"""A patch that replaces the filter with one that accepts every frame."""


@pytest.mark.parametrize("without", [WITHOUT_OPTION, WITHOUT_FILTER], ids=["the filter", "the option"])
def test_own_frames_are_not_received(
    cores: Cores, core1: Peer, monkeypatch: pytest.MonkeyPatch, without: tuple[str, object]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"inco_trio.{without[0]}", without[1])
        link = cores.core0.run(functools.partial(PacketLink.open, cores.link))
        assert link.refresh()
    link.send("redun_notify_irq")
    assert core1.receive() == encode(b"redun_notify_irq", link.mac)
    core1.send(b"ihub_reset_irq")
    assert receive(link) == [encode(b"ihub_reset_irq", core1.mac)]
    close(link)


@pytest.mark.parametrize("random", range(2))
def test_frames_that_the_kernel_hands_to_a_vlan_are_rejected(link: PacketLink, random: int) -> None:
    """The kernel first passes a VLAN frame to the parent interface's sockets, but with the VLAN interface's index."""
    index = link._index
    link.expect({b"ihub_reset_irq"}, ())
    for restricted in (False, True):
        link.restrict(restricted)
        code = instructions(link)
        frame = encode(b"ihub_reset_irq", bytes(6))
        assert accepted(code, frame, interface=index, random=random)
        assert not accepted(code, frame, interface=index + 1, random=random)
        assert not accepted(code, frame, interface=index, kind=PACKET_OTHERHOST, random=random)
        assert not accepted(code, frame, interface=index, tagged=0x8100, random=random)


def instructions(link: PacketLink) -> list[bpf.Instruction]:
    """Return the filter that the kernel has attached to the socket."""
    return [(a, b, c, d) for a, b, c, d in struct.iter_unpack("=HBBI", bpf.filter_of(link._socket))]


def test_a_restricted_link_receives_the_expected_names_and_a_sample(link: PacketLink, core1: Peer) -> None:
    link.expect({b"ihub_reset_irq", b"ihub_hwwd_irq"}, ())
    assert link.restrict(True)
    for number in range(20 * SAMPLE):
        core1.send(b"unknown_%d" % number)
        if not number % SAMPLE:
            core1.send(b"ihub_reset_irq")
            core1.send(b"ihub_hwwd_irq", pad=46)
    names = [decode(frame) for frame in receive(link, 20 * SAMPLE)]
    expected = [b"ihub_reset_irq", b"ihub_hwwd_irq"] * 20
    assert [name for name in names if name in expected] == expected
    sample = [name for name in names if name is not None and name.startswith(b"unknown_")]
    assert len(names) == len(sample) + len(expected)
    # The probability that the sample is empty or exceeds five times its mean (20 frames) is below 1e-8.
    assert 0 < len(sample) < 100


def test_a_restricted_link_drops_a_known_name_before_other_bytes(link: PacketLink, core1: Peer) -> None:
    link.expect({b"known"}, ())
    assert link.restrict(True)
    junk = encode(b"known", core1.mac) + bytes(20) + b"x"
    for _ in range(2 * SAMPLE):
        core1.send_raw(junk)
    core1.send(b"known", pad=46)
    names = [decode(frame) for frame in receive(link, 2 * SAMPLE + 1)]
    if link._form == FORMS[0]:
        # The probability that the sample exceeds this number is below 1e-20.
        assert len(names) < 40
    else:  # The kernel has refused the longest filter because of net.core.optmem_max.
        assert len(names) == 2 * SAMPLE + 1
    assert names[-1] == b"known"


def test_new_names_replace_the_names_of_a_restricted_link(link: PacketLink, core1: Peer) -> None:
    link.expect({b"former"}, ())
    link.restrict(True)
    core1.send(b"former")
    link.expect({b"former", b"new"}, ())
    core1.send(b"former")
    core1.send(b"new")
    link.expect({b"new"}, ())
    core1.send(b"new")
    link.restrict(False)
    core1.send(b"any")
    names = [decode(frame) for frame in receive(link)]
    assert names == [b"former", b"former", b"new", b"new", b"any"]


def stands_for(link: PacketLink, frame: bytes) -> int:
    """Return how many frames a frame represents. The proxy reads only its first FRAME_MAX bytes."""
    return link.stands_for(memoryview(frame)[:FRAME_MAX], len(frame))


def test_a_filter_for_more_names_than_the_kernel_accepts_compares_less(link: PacketLink, core1: Peer) -> None:
    names = {b"signal_%04d" % number for number in range(2000)}
    link.expect(names, ())
    assert link.restrict(True)
    for name in (b"signal_0000", b"signal_1999", b"signal_1xxx"):
        core1.send(name)
    assert [decode(frame) for frame in receive(link)] == [b"signal_0000", b"signal_1999", b"signal_1xxx"]
    assert receive(link) == []
    assert stands_for(link, encode(b"signal_1xxx", bytes(6))) == 1
    assert stands_for(link, encode(b"stranger", bytes(6))) == SAMPLE
    # The shorter filter accepts any frame with a known name and one NUL, up to the maximum length.
    malformed = encode(b"signal_1999", bytes(6)).ljust(FRAME_MAX - 1, b"\0")
    assert decode(malformed + b"x") is None
    assert stands_for(link, malformed[:-1] + b"x") == 1
    assert stands_for(link, malformed + b"x") == 1
    assert stands_for(link, malformed + b"x\0") == SAMPLE


def test_a_link_that_cannot_be_restricted_receives_everything(
    link: PacketLink, core1: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = bpf.attach_filter

    def refuse(sock: socket.socket, code: bytes) -> None:
        if bpf.program([(bpf.LOAD_WORD, 0, 0, bpf.RANDOM)]) in code:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        attach(sock, code)

    monkeypatch.setattr(bpf, "attach_filter", refuse)
    link.expect({b"known"}, ())
    assert not link.restrict(True)
    core1.send(b"unknown")
    assert [decode(frame) for frame in receive(link)] == [b"unknown"]
    assert stands_for(link, encode(b"unknown", bytes(6))) == 1


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return a function that makes the kernel refuse each filter, as with net.core.optmem_max = 0, or accept them."""
    accept = bpf.attach_filter

    def refuse(_sock: socket.socket, _code: bytes) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    return lambda on: monkeypatch.setattr(bpf, "attach_filter", refuse if on else accept)


def test_a_refused_filter_for_a_new_interface_is_tried_again(
    link: PacketLink, cores: Cores, refusing: Callable[[bool], None]
) -> None:
    refusing(True)
    cores.delete_link()
    cores.make_link()
    for _ in range(2):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            link.refresh()
        assert not link.running
    refusing(False)
    assert link.refresh()
    with cores.peer() as peer:
        peer.send(b"after")
    assert [decode(frame) for frame in receive(link)] == [b"after"]


def test_a_refused_filter_leaves_the_former_one(
    link: PacketLink, core1: Peer, refusing: Callable[[bool], None]
) -> None:
    link.expect({b"known"}, ())
    refusing(True)
    assert not link.restrict(True)
    refusing(False)
    assert link.restrict(True)
    refusing(True)
    assert link.restrict(False)
    with pytest.raises(ResourceError, match="cannot attach a filter: Cannot allocate memory"):
        link.expect({b"new"}, ())
    core1.send(b"known")
    assert [decode(frame) for frame in receive(link)] == [b"known"]
    assert receive(link) == []
    assert stands_for(link, encode(b"known", bytes(6))) == 1
    refusing(False)
    assert not link.restrict(False)


def test_without_memory_for_a_filter_opening_is_refused(cores: Cores, refusing: Callable[[bool], None]) -> None:
    refusing(True)
    with pytest.raises(ResourceError, match="eth0: cannot attach a filter: Cannot allocate memory"):
        cores.core0.run(lambda: PacketLink.open("eth0"))


def test_frames_from_before_the_restriction_stand_for_themselves(link: PacketLink, core1: Peer) -> None:
    unknown = encode(b"unknown", bytes(6))
    core1.send(b"unknown")
    core1.send(b"unknown")
    link.expect({b"known"}, ())
    assert link.restrict(True)
    assert len(receive(link, 1)) == 1
    assert stands_for(link, unknown) == 1
    assert len(receive(link, 2)) == 1
    assert stands_for(link, unknown) == 1
    assert receive(link) == []
    assert stands_for(link, unknown) == SAMPLE
    link.restrict(False)
    assert stands_for(link, unknown) == 1


def test_a_socket_without_a_filter_does_not_fit(link: PacketLink) -> None:
    assert link.fits
    with socket.socket(fileno=os.dup(link.fd)) as other:
        other.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    assert not link.fits


def test_the_granted_buffer_size_is_reported(link: PacketLink) -> None:
    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert link.granted in (RECEIVE_BUFFER, min(limit, RECEIVE_BUFFER))


def test_without_cap_net_admin_rmem_max_limits_the_buffer(cores: Cores) -> None:
    def start() -> int:
        with without_capability(CAP_NET_ADMIN):
            link = PacketLink.open(cores.link)
        close(link)
        return link.granted

    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert cores.core0.run(start) == min(limit, RECEIVE_BUFFER)


def test_without_cap_net_raw_opening_is_refused(cores: Cores) -> None:
    def start() -> None:
        with without_capability(CAP_NET_RAW):
            PacketLink.open(cores.link)

    with pytest.raises(PermissionDeniedError, match=f"{cores.link}: opening a packet socket needs CAP_NET_RAW"):
        cores.core0.run(start)


def test_too_many_open_files_is_an_error(cores: Cores) -> None:
    def start() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            PacketLink.open("eth0")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(ResourceError, match="eth0: cannot open a packet socket: Too many open files"):
        cores.core0.run(start)


def test_a_failed_opening_leaks_no_descriptor(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Rtnetlink:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("inco_trio.links.packet.Rtnetlink", broken)

    def start() -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(ResourceError, match=r"eth0: cannot watch interfaces .rtnetlink.: Operation not permitted"):
            PacketLink.open("eth0")
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    cores.core0.run(start)


def test_refresh_updates_mac_and_running(opened: StartLink, cores: Cores) -> None:
    link = opened()
    assert (link.mac, link.running) == (b"", False)
    cores.delete_link()
    assert not link.refresh()
    assert not link.running
    assert link.down_reason == "no such interface yet"
    cores.make_link()
    assert link.refresh()
    assert link.running
    assert link.down_reason == ""
    assert len(link.mac) == 6
    cores.link_down()
    assert link.refresh()
    assert not link.running
    assert link.down_reason == "the interface was set down"
    cores.delete_link()
    assert not link.refresh()
    assert link.down_reason == "the interface is gone or was renamed"


@pytest.mark.parametrize("seen", [True, False])
def test_a_replaced_interface_is_named_once(link: PacketLink, cores: Cores, watcher: Rtnetlink, seen: bool) -> None:
    def place() -> tuple[int, str]:
        assert link.refresh()
        assert link.running
        found = watcher.interface(cores.link)
        assert found is not None
        return found.index, found.address.hex(":")

    index, address = place()
    cores.link_down()
    link.refresh()
    cores.link_up()
    place()
    assert link.renewal == ""
    cores.delete_link()
    if seen:
        assert not link.refresh()
    cores.make_link()
    again, new = place()
    assert link.renewal == f"a new interface (index {index}, now {again}; address {address}, now {new})"
    place()
    assert link.renewal == ""


def test_no_carrier_is_not_running(link: PacketLink, cores: Cores, watcher: Rtnetlink) -> None:
    async def main() -> None:
        cores.core1.run(other_end_down)
        # The kernel reports the loss of the carrier asynchronously.
        while link.refresh() and link.running:
            await watcher.wait()

    def other_end_down() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as links:
            links.link("set", ifname=cores.link, state="down")

    run(main)
    assert link.down_reason == "no carrier"
    with pytest.raises(OSError, match="Network is down") as caught:
        link.send("redun_notify_irq")
    assert caught.value.errno == errno.ENETDOWN


def test_an_interface_with_a_carrier_names_its_state(watcher: Rtnetlink, cores: Cores) -> None:
    found = watcher.interface(cores.link)
    assert found is not None
    dormant = changed(found, running=False, carrier=True, operstate=OPERSTATES.index("DORMANT"))
    assert dormant.down_reason == "the interface is not RUNNING, but DORMANT"


def test_the_queue_outlives_the_interface(link: PacketLink, cores: Cores, core1: Peer) -> None:
    fd = link.fd
    core1.send(b"before")
    cores.delete_link()
    assert not link.refresh()
    cores.make_link()
    core1.rebind()
    assert link.refresh()
    core1.send(b"after")
    assert [frame[14:] for frame in receive(link)] == [b"before", b"after"]
    assert link.fd == fd
    assert link.fits


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_deleted_interface_does_not_hide_its_queue(link: PacketLink, cores: Cores, core1: Peer, at_once: int) -> None:
    """The kernel reports ENETDOWN before the queued frames. A link that is replaced is read until it has no frame."""
    core1.send(b"queued")
    cores.delete_link()
    room = memoryview(bytearray(ROOM))
    length = link.receive_one(room) if at_once == 1 else link.receive_into([room], ROOM)[0]
    assert decode(room, length) == b"queued"


def test_a_link_that_goes_down_is_not_an_error(link: PacketLink, cores: Cores, core1: Peer) -> None:
    room = memoryview(bytearray(ROOM))
    cores.link_down()
    assert receive(link) == []
    cores.link_up()
    cores.link_down()
    assert link.receive_one(room) == -1
    cores.link_up()
    core1.send(b"again")
    assert receive(link) == [encode(b"again", core1.mac)]


def test_other_socket_errors_are_raised(link: PacketLink) -> None:
    other = PacketLink(socket.socket(socket.AF_INET, socket.SOCK_STREAM), "tcp")
    try:
        with pytest.raises(OSError, match="not connected"):
            receive(other)
        with pytest.raises(OSError, match="not connected"):
            other.receive_one(memoryview(bytearray(ROOM)))
    finally:
        close(other)


def test_a_changed_mac_is_used_for_sending(link: PacketLink, cores: Cores, core1: Peer) -> None:
    link.send("redun_notify_irq")
    change(cores, cores.link, address="02:00:00:00:00:77")
    assert link.refresh()
    link.send("redun_notify_irq")
    first, second = core1.receive(), core1.receive()
    assert first[6:12] != second[6:12]
    assert second == encode(b"redun_notify_irq", bytes.fromhex("020000000077"))


def test_drops_are_counted_once(link: PacketLink, core1: Peer) -> None:
    assert link.dropped() == 0
    sent = 0
    large = encode(b"ihub_reset_irq", core1.mac).ljust(1514, b"\0")
    for _ in range(40_000):
        core1.send_raw(large)
        sent += 1
    dropped = link.dropped()
    assert dropped > 0
    assert link.dropped() == 0
    received = 0
    while lengths := len(receive(link)):
        received += lengths
    assert received + dropped == sent


def test_error_names_the_missing_interface_and_existing_ones(cores: Cores) -> None:
    link = cores.core0.run(lambda: PacketLink.open("rpmsg16"))
    error = link.missing()
    close(link)
    assert str(error) == f"rpmsg16: no such interface (available: lo, {cores.link}); --wait-link waits for it"
    assert exit_code(error) == 69


def packet_socket(interface: str = "", protocol: int = ETHERTYPE) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    if interface:
        made.bind((interface, protocol))
    return made


def test_an_inherited_socket_keeps_queue_and_filter(link: PacketLink, cores: Cores, core1: Peer) -> None:
    core1.send(b"before")
    heir = cores.core0.run(lambda: PacketLink.take(cores.link, os.dup(link.fd)))
    close(link)
    assert heir.fits
    assert heir.refresh()
    core1.send(b"after")
    assert [frame[14:] for frame in receive(heir)] == [b"before", b"after"]
    assert not os.get_blocking(heir.fd)
    close(heir)


def test_an_unbound_socket_fits(opened: StartLink, cores: Cores) -> None:
    heir = PacketLink.take(cores.link, os.dup(opened().fd))
    assert heir.fits
    close(heir)


def test_an_inherited_socket_with_a_filter_for_other_names_is_reused(
    link: PacketLink, cores: Cores, core1: Peer
) -> None:
    link.expect({b"former"}, ())
    assert link.restrict(True)
    core1.send(b"former")
    heir = cores.core0.run(lambda: PacketLink.take(cores.link, os.dup(link.fd)))
    assert heir.fits
    heir.expect({b"new"}, ())
    assert heir.refresh()
    core1.send(b"new")
    core1.send(b"any")
    assert [decode(frame) for frame in receive(heir)] == [b"former", b"new", b"any"]
    close(heir)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(packet_socket, id="no filter"),
        pytest.param(lambda: packet_socket("lo"), id="another interface"),
        pytest.param(lambda: packet_socket("rpmsg4000", 0x0800), id="another protocol"),
        pytest.param(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), id="UDP"),
        pytest.param(lambda: socket.socket(socket.AF_UNIX), id="Unix"),
    ],
)
def test_other_sockets_do_not_fit(cores: Cores, make: Callable[[], socket.socket]) -> None:
    stranger = PacketLink.take(cores.link, cores.core0.run(make).detach())
    assert not stranger.fits
    close(stranger)


def test_a_socket_whose_filter_is_locked_does_not_fit(cores: Cores) -> None:
    locked = cores.core0.run(functools.partial(PacketLink.open, cores.link))
    assert locked.fits
    locked._socket.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    assert not locked.fits
    close(locked)


def test_a_socket_of_another_link_does_not_fit(link: PacketLink) -> None:
    other = PacketLink.take("rpmsg16", os.dup(link.fd))
    assert not other.fits
    close(other)


def test_a_socket_with_a_wider_filter_does_not_fit(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("inco_trio.links.packet.HEAD", (bpf.ACCEPT, *HEAD))
        wide = cores.core0.run(functools.partial(PacketLink.open, cores.link))
    assert not wide.fits
    close(wide)


def test_the_bridge_of_a_port_is_named(link: PacketLink, cores: Cores, caplog: pytest.LogCaptureFixture) -> None:
    from pyroute2 import IPRoute

    def enslave(master: str) -> None:
        def inside() -> None:
            with IPRoute() as links:
                if not links.link_lookup(ifname="br0"):
                    links.link("add", ifname="br0", kind="bridge")
                index = links.link_lookup(ifname=master)[0] if master else 0
                links.link("set", ifname=cores.link, master=index)

        cores.core0.run(inside)

    caplog.set_level("INFO")
    assert link.refresh()
    assert caplog.messages == []
    for _ in range(2):
        enslave("br0")
        assert link.refresh()
    assert caplog.messages == [
        f"{cores.link}: a port of the bridge br0, which takes all frames (use br0 as the interface)"
    ]
    for _ in range(2):
        enslave("")
        assert link.refresh()
    assert caplog.messages[1:] == [f"{cores.link}: no longer a port of the bridge br0"]


def test_a_renamed_interface_is_not_followed(link: PacketLink, cores: Cores, core1: Peer) -> None:
    core1.send(b"before")
    rename(cores, cores.link, "other0")
    assert not link.refresh()
    assert link.absence == "the interface is gone or was renamed"
    core1.send(b"meanwhile")
    rename(cores, "other0", cores.link)
    assert link.refresh()
    core1.send(b"after")
    assert [decode(frame) for frame in receive(link) + receive(link)] == [b"before", b"after"]


def test_another_interface_that_gets_the_name_is_used(link: PacketLink, cores: Cores, core1: Peer) -> None:
    rename(cores, cores.link, "other0")
    veth(cores.core0, cores.link, cores.core0, "peer0")
    change(cores, cores.link, state="up")
    change(cores, "peer0", state="up")
    assert link.refresh()
    core1.send(b"meanwhile")
    with cores.core0.run(lambda: Peer("peer0")) as peer:
        peer.send(b"after")
    assert [decode(frame) for frame in receive(link) + receive(link)] == [b"after"]


def rename(cores: Cores, former: str, name: str) -> None:
    change(cores, former, state="down")
    command = ["ip", "link", "set", "dev", former, "name", name]
    cores.core0.run(lambda: subprocess.run(command, check=True))
    change(cores, name, state="up")


def test_an_alternative_name_is_accepted(cores: Cores, core1: Peer) -> None:
    command = ["ip", "link", "property", "add", "dev", cores.link, "altname", "alternative"]
    cores.core0.run(lambda: subprocess.run(command, check=True))
    link = cores.core0.run(lambda: PacketLink.open("alternative"))
    assert link.refresh()
    core1.send(b"name")
    assert [decode(frame) for frame in receive(link)] == [b"name"]
    close(link)


class FakeRtnetlink(Rtnetlink):
    """A fake rtnetlink socket that describes the link as a port of `master` or as a VLAN."""

    def __init__(self, master: str = "", kind: str = "", port_of: str = "") -> None:
        super().__init__()
        self.master, self.kind, self.port_of = master, kind, port_of

    def interface(self, name: str = "", index: int = 0) -> Interface | None:
        found = super().interface(name or "lo")
        assert found is not None
        if index:
            return changed(found, name=self.master)
        return changed(found, master=7 if self.master else 0, port_of=self.port_of, kind=self.kind)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bond", "a port of the bond m0, which takes all frames (use m0 as the interface)"),
        ("team", "a port of the team m0, which takes all frames (use m0 as the interface)"),
        ("openvswitch", "a port of the openvswitch m0, which takes all frames (use m0 as the interface)"),
        ("", "a port of the master device m0, which takes all frames (use m0 as the interface)"),
        ("vrf", None),
    ],
)
def test_every_kind_of_master_that_takes_frames_is_named(
    link: PacketLink, cores: Cores, caplog: pytest.LogCaptureFixture, kind: str, text: str | None
) -> None:
    link._rtnetlink.close()
    link._rtnetlink = cores.core0.run(lambda: FakeRtnetlink("m0", port_of=kind))
    assert link.refresh()
    assert link.refresh()
    assert caplog.messages == ([] if text is None else [f"{cores.link}: {text}"])


def test_names_that_are_too_short_for_a_vlan_are_warned_of(
    link: PacketLink, cores: Cores, caplog: pytest.LogCaptureFixture
) -> None:
    link.expect((), {b"a"})
    assert link.refresh()
    assert caplog.messages == []
    link._rtnetlink.close()
    link._rtnetlink = cores.core0.run(lambda: FakeRtnetlink(kind="vlan"))
    for _ in range(2):
        assert link.refresh()
    fault = "the kernel may drop frames with a name of one character on a VLAN (use a longer name)"
    assert caplog.messages == [f"{cores.link}: a: {fault}"]
    link.expect((), {b"ab"})
    link.expect((), {b"c", b"b", b"bc"})
    assert caplog.messages[1:] == [f"{cores.link}: b, c: {fault}"]


def test_the_kind_of_an_interface_is_read(watcher: Rtnetlink, cores: Cores) -> None:
    found = watcher.interface(cores.link)
    assert found is not None
    assert (found.kind, found.port_of, found.is_taken) == ("veth", "", False)


def test_the_watcher_wakes_for_each_change(watcher: Rtnetlink, cores: Cores) -> None:
    async def main() -> None:
        for happen in (cores.link_down, cores.link_up, cores.delete_link, cores.make_link):
            happen()
            await watcher.wait()
        # The watcher has no further changes in its queue.
        with trio.move_on_after(0) as scope:
            await watcher.wait()
        assert scope.cancelled_caught

    run(main)


def test_the_watcher_survives_an_overflow_of_its_buffer(watcher: Rtnetlink, cores: Cores) -> None:
    from pyroute2 import IPRoute

    def many_changes() -> None:
        with IPRoute() as links:
            for number in range(600):
                links.link("set", ifname=cores.link, mtu=1400 + number % 2)

    async def main() -> None:
        watcher._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        cores.core0.run(many_changes)
        await watcher.wait()
        cores.link_down()
        await watcher.wait()

    run(main)


def test_closing_wakes_a_waiter(opened: StartLink, cores: Cores) -> None:
    async def main() -> None:
        link = opened()
        assert link.refresh()
        held = os.dup(link.fd)

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(link.fd)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            link.close()
        os.close(held)

    run(main)
