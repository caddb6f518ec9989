"""Tests of the Unix datagram link; the test acts as core 1."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.errors import LinkNotFoundError, PermissionDeniedError, ResourceError
from inco_trio.frame import decode, encode
from inco_trio.links import unix
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.links.unix import PEEKED_MAX, SENDERS_MAX, UnixLink
from inco_trio.linux import files
from netns.hang import HANG
from tests.support_control import descriptors_refused

ROOM = 200
MAC = bytes.fromhex("02005e100001")
FOREIGN = bytes.fromhex("02005e100099")


class World:
    """A directory for two sockets: our socket at `local`, and core 1's socket at `peer`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.local, self.peer = directory / "core0", directory / "core1"
        self.note = memoryview(bytearray(16))
        self.names = Names()
        self._stack = stack
        stack.callback(self.names.close)

    @property
    def address(self) -> UnixAddress:
        return UnixAddress(str(self.local), str(self.peer), MAC)

    def link(self) -> UnixLink:
        """Return our link, which is not bound yet."""
        link = UnixLink.open(self.address, self.note, self.names)
        self._stack.callback(close, link)
        return link

    def bound(self) -> UnixLink:
        link = self.link()
        assert link.refresh(), link.absence
        return link

    def other(self, path: Path | None = None, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Return a socket that is bound to `path` (default: the path of core 1)."""
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        self._stack.callback(sock.close)
        sock.bind(str(self.peer if path is None else path))
        return sock

    def send(self, sock: socket.socket, *names: bytes) -> None:
        for name in names:
            sock.sendto(encode(name, FOREIGN), str(self.local))


def close(link: UnixLink) -> None:
    """Close the link's sockets as `UnixLink.close` does, but outside Trio."""
    for sock in (*link._former, link._socket):
        sock.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def run(function: Callable[[], Awaitable[None]], clock: MockClock | None = None) -> None:
    async def guarded() -> None:
        with trio.fail_after(HANG):
            await function()

    trio.run(guarded, clock=clock)


def in_simulated_time(function: Callable[[], Awaitable[None]]) -> None:
    """Run a function on a clock that jumps to the next deadline when the kernel has nothing more to report."""
    run(function, MockClock(autojump_threshold=0))


def receive(link: UnixLink, count: int = 100, step: int = ROOM) -> list[bytes | None]:
    """Return the signal names in the queued frames, read into at most `count` buffers."""
    rooms = [memoryview(bytearray(ROOM)) for _ in range(count)]
    return [decode(room, length) for room, length in zip(rooms, link.receive_into(rooms, step), strict=False)]


def names_of(sock: socket.socket) -> list[bytes | None]:
    """Return the signal names in all frames that are queued on `sock`."""
    names = []
    while True:
        try:
            names.append(decode(sock.recv(ROOM)))
        except BlockingIOError:
            return names


def fill(link: UnixLink, buffer: int = 1 << 20) -> int:
    """Send frames until the queue of core 1 or our send buffer is full, and return their number.

    By default, the send buffer holds more frames than the queue, although systemd sets net.unix.max_dgram_qlen to 512.
    """
    link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    for sent in itertools.count():
        try:
            link.send("redun_notify_irq")
        except BlockingIOError:
            return sent
    raise AssertionError


async def send(link: UnixLink, attempts: list[float]) -> None:
    """Send a frame as the proxy does, and note the time of each attempt."""
    while True:
        attempts.append(trio.current_time())
        try:
            link.send("redun_notify_irq")
        except LinkDownError:
            await link.changed()
            link.refresh()
        else:
            break


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let opening a descriptor fail with EMFILE while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refuse_watches(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let inotify_add_watch(2) fail for a directory, as if it was unreadable."""
    watch = world.names._inotify.watch

    def refuse(path: str, mask: int) -> int:
        if os.path.realpath(path) == str(directory):
            raise PermissionError
        return watch(path, mask)

    monkeypatch.setattr(world.names._inotify, "watch", refuse)


def pass_descriptor(sock: socket.socket, to: Path) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, (0).to_bytes(4, sys.byteorder))]
    sock.sendmsg([encode(b"x", FOREIGN)], rights, 0, str(to))


def test_the_peer_cannot_pass_a_descriptor(world: World) -> None:
    """The kernel would close the descriptor in the proxy, which can block, for example with SO_LINGER."""
    link = world.bound()
    with descriptors_refused(link._socket):
        pass_descriptor(world.other(), world.local)


def test_the_peer_cannot_pass_a_descriptor_to_an_inherited_socket(world: World) -> None:
    peer, held = world.other(), world.other(world.local)
    pass_descriptor(peer, world.local)
    link = UnixLink.take(world.address, os.dup(held.fileno()), world.note, world.names)
    with closing(link._socket), descriptors_refused(link._socket):
        pass_descriptor(peer, world.local)


def test_frames_are_sent_from_our_path_and_address(world: World) -> None:
    link, other = world.bound(), world.other()
    link.send("redun_notify_irq")
    link.send("redun_notify_irq")
    assert other.recvfrom(ROOM) == (encode(b"redun_notify_irq", MAC), str(world.local))
    assert names_of(other) == [b"redun_notify_irq"]


def test_frames_are_read_in_order_until_the_queue_is_empty(world: World) -> None:
    link, other = world.bound(), world.other()
    world.send(other, *(b"%d" % number for number in range(7)))
    assert receive(link, 5) == [b"0", b"1", b"2", b"3", b"4"]
    assert receive(link, 5) == [b"5", b"6"]
    assert receive(link, 5) == []
    assert link.receive_one(memoryview(bytearray(ROOM))) == -1


@pytest.mark.parametrize(
    ("datagram", "name"),
    [
        pytest.param(b"", None, id="empty"),
        pytest.param(b"x" * 65000, None, id="huge"),
        pytest.param(encode(b"x", FOREIGN).ljust(60, b"\0"), b"x", id="padded"),
        pytest.param(FOREIGN * 2 + b"\x81\x00\x00\x01\x88\x00x", b"x", id="tag in front"),
        pytest.param(FOREIGN * 2 + b"\x86\xddx", None, id="IPv6"),
    ],
)
def test_any_datagram_is_a_frame_or_malformed(world: World, datagram: bytes, name: bytes | None) -> None:
    link, other = world.bound(), world.other()
    for number in range(2):
        other.sendto(datagram, str(world.local))
        world.send(other, b"behind")
        # Read one frame or a batch. A batch ends at a frame that is longer than the step between two frames.
        room = memoryview(bytearray(ROOM))
        read = [decode(room, link.receive_one(room))] if number else receive(link)
        assert read + receive(link) == [name, b"behind"]
    assert link.foreign == 0


def test_only_frames_of_the_peer_are_accepted(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    link, other = world.bound(), world.other()
    stranger = world.other(tmp_path / "stranger")
    nameless = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in (stranger, nameless, other, stranger):
        world.send(sock, b"ihub_reset_irq")
    nameless.close()
    room = memoryview(bytearray(ROOM))
    length = link.receive_one(room)
    # The buffer must not keep the rejected frame: a successor would find the frame in the in-flight buffer.
    assert (decode(room, length), decode(room)) == (None, None)
    assert receive(link) == [None, b"ihub_reset_irq", None]
    assert link.foreign == 3
    assert len(caplog.messages) == 1
    assert f"datagrams from '{tmp_path}/stranger', because the peer is {world.peer}" in caplog.messages[0]


def test_a_peer_under_another_path_is_checked_again_after_a_lack_of_descriptors(world: World, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    link = world.bound()
    other = world.other(tmp_path / "alias" / "core1")
    world.send(other, b"during", b"after")
    with no_descriptor_left():
        assert receive(link, 1) == [None]
    assert receive(link) == [b"after"]


def test_a_known_peer_under_another_path_needs_no_free_descriptor(world: World, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    link = world.bound()
    path = tmp_path / "alias" / "core1"
    with world.other(path) as other:
        world.send(other, b"before", b"during")
        assert receive(link, 1) == [b"before"]
        with no_descriptor_left():
            for _ in range(2):
                assert link.refresh()
            assert receive(link) == [b"during"]
    path.unlink()
    stranger = world.other(tmp_path / "stranger")
    (tmp_path / "alias").unlink()
    (tmp_path / "alias").mkdir()
    other = world.other(path)
    link.refresh()
    world.send(other, b"foreign", b"foreign")
    world.send(stranger, b"foreign")
    assert receive(link, 1) == [None]
    link.refresh()
    with no_descriptor_left():
        assert receive(link) == [None, None]


def test_many_unknown_senders_need_little_memory(world: World, tmp_path: Path) -> None:
    link = world.bound()
    for number in range(200):
        with world.other(tmp_path / f"stranger{number}") as stranger:
            world.send(stranger, b"ihub_reset_irq")
        assert receive(link) == [None]
    assert link.foreign == 200
    assert len(link._senders) <= SENDERS_MAX


def test_paths_are_resolved_for_a_few_senders_only(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender could otherwise block the process: resolving a path with many symlinks takes milliseconds."""
    (tmp_path / "alias").symlink_to(tmp_path)
    (tmp_path / "late").symlink_to(tmp_path)
    link, resolved = world.bound(), list[str]()

    class Counting(files.Resolver):
        def open(self, path: Path | str, *, follow: bool = True) -> int:
            resolved.append(str(path))
            return super().open(path, follow=follow)

    monkeypatch.setattr(unix, "Resolver", Counting)

    def name_of(path: Path) -> bytes | None:
        """Return the name that the link receives from a sender at `path`."""
        with world.other(path) as sender:
            world.send(sender, b"ihub_reset_irq")
            (received,) = receive(link)
        path.unlink()
        return received

    for _ in range(2):
        for number in range(SENDERS_MAX):  # A sender without a path needs no room in the cache.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
                abstract.bind(f"\0{tmp_path}{number}")
                world.send(abstract, b"ihub_reset_irq")
            assert receive(link) == [None]
        assert name_of(tmp_path / "alias" / "core1") == b"ihub_reset_irq"
        for number in range(3 * SENDERS_MAX):
            assert name_of(tmp_path / f"stranger{number}") is None
        assert len(resolved) < 2 * SENDERS_MAX
        link._senders.pop(str(tmp_path / "alias" / "core1"))  # As after a refresh during which others fill the cache.
        link._senders["/stranger"] = False
        for path in (tmp_path / "alias" / "core1", world.peer):
            assert name_of(path) == b"ihub_reset_irq"
        assert name_of(tmp_path / "late" / "core1") is None
        resolved.clear()
        link.refresh()
    assert name_of(tmp_path / "late" / "core1") == b"ihub_reset_irq"


def test_peeking_ends_although_a_stranger_keeps_sending(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, stranger, peer = world.bound(), world.other(tmp_path / "stranger"), world.other()
    world.send(stranger, b"ihub_reset_irq")
    knows, sent = link._knows, 0

    def send_another(sender: object) -> bool:
        nonlocal sent
        if sent < 1000:
            sent += 1
            with contextlib.suppress(BlockingIOError):
                world.send(stranger, b"ihub_reset_irq")
        return knows(sender)

    monkeypatch.setattr(link, "_knows", send_another)
    assert link.peek() == []
    assert link.foreign == sent == PEEKED_MAX
    sent = 1000
    world.send(peer, b"redun_notify_irq")
    assert list(map(decode, link.peek())) == [b"redun_notify_irq"]


def test_the_peer_may_be_bound_by_another_path(world: World, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    link = world.bound()
    other = world.other(tmp_path / "alias" / "core1")
    world.send(other, b"ihub_reset_irq")
    assert receive(link) == [b"ihub_reset_irq"]
    link.send("redun_notify_irq")
    assert names_of(other) == [b"redun_notify_irq"]


def test_a_missing_peer_is_an_error(world: World) -> None:
    link = world.bound()
    with pytest.raises(LinkDownError, match=r"no process has bound .*core1 .No such file or directory") as caught:
        link.send("redun_notify_irq")
    assert link.down_reason == caught.value.strerror
    world.other().close()
    with pytest.raises(LinkDownError, match="Connection refused"):
        link.send("redun_notify_irq")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_peer_of_another_socket_type_is_an_error(world: World, kind: int) -> None:
    link = world.bound()
    world.other(kind=kind).listen()
    with pytest.raises(LinkDownError, match=r"core1 accepts no frames .Protocol wrong type for socket") as caught:
        link.send("redun_notify_irq")
    assert link.down_reason == caught.value.strerror


def test_a_peer_that_has_connected_to_us_is_running(world: World) -> None:
    link, other = world.bound(), world.other()
    other.connect(str(world.local))
    assert link.down_reason == ""
    assert link.running
    link.send("redun_notify_irq")
    assert names_of(other) == [b"redun_notify_irq"]


def test_a_peer_that_connects_to_us_again_receives_what_waits(world: World, tmp_path: Path) -> None:
    """No event reports that the peer has connected its socket to another one."""
    attempts: list[float] = []

    async def main() -> None:
        link, core1 = world.bound(), world.other()
        world.other(tmp_path / "elsewhere")
        core1.connect(str(tmp_path / "elsewhere"))
        with pytest.raises(LinkDownError, match=r"core1 accepts no frames .Operation not permitted"):
            link.send("redun_notify_irq")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, link, attempts)
            await trio.sleep(60)  # simulated time
            assert 50 <= len(attempts) <= 70
            core1.connect(str(world.local))
        assert names_of(core1) == [b"redun_notify_irq"]
        link.close()

    in_simulated_time(main)


@pytest.mark.parametrize("how", ["shut down", "long name", "connected"])
def test_a_peer_that_cannot_receive_is_checked_once_per_second(world: World, how: str) -> None:
    attempts: list[float] = []

    async def main() -> None:
        link = world.bound()
        if how == "shut down":
            world.other().shutdown(socket.SHUT_RD)
        elif how == "long name":
            world.peer.symlink_to("x" * (files.FILE_NAME_MAX + 1))
        else:
            world.other().connect(world.other(world.peer.with_name("elsewhere")).getsockname())
        reason = r"core1 accepts no frames .(Broken pipe|File name too long|Operation not permitted)"
        with pytest.raises(LinkDownError, match=reason):
            link.send("redun_notify_irq")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, link, attempts)
            await trio.sleep(60)  # simulated time
            assert len(attempts) <= 70  # The events of the new socket cause some additional checks.
            world.peer.unlink()
            core1 = world.other()
        assert names_of(core1) == [b"redun_notify_irq"]
        link.close()

    in_simulated_time(main)


def test_a_new_peer_at_the_same_path_is_used(world: World) -> None:
    link, first = world.bound(), world.other()
    link.send("one")
    world.peer.unlink()
    second = world.other()
    link.send("two")
    world.send(second, b"heard")
    assert (names_of(first), names_of(second), receive(link)) == ([b"one"], [b"two"], [b"heard"])


def test_waiting_for_a_full_queue_does_not_spin(world: World) -> None:
    link, other = world.bound(), world.other()
    room = fill(link)
    assert len(names_of(other)) == room
    number = 4 * room
    sent, tries = 0, 0

    async def send() -> None:
        nonlocal sent, tries
        while sent < number:
            tries += 1
            try:
                link.send(f"number_{sent}")
            except BlockingIOError:
                await link.wait_for_room()
            else:
                sent += 1

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            names: list[bytes | None] = []
            while len(names) < number:
                await wait_all_tasks_blocked()
                assert sent <= len(names) + room
                names += names_of(other)
            assert names == [b"number_%d" % each for each in range(number)]
        # After nearly every wait, the queue had room for a frame.
        assert tries < number + 20

    run(main)


def test_waiting_for_room_without_a_free_descriptor_pauses(world: World) -> None:
    async def main() -> None:
        link, _ = world.bound(), world.other()
        # Several senders fill the queue, so our send buffer has room.
        while fill(world.link()):
            pass
        began = trio.current_time()
        with no_descriptor_left():
            await link.wait_for_room()
        assert trio.current_time() > began

    in_simulated_time(main)


@pytest.mark.parametrize("buffer", [1, 1 << 20], ids=["our buffer is full", "the queue is full"])
@pytest.mark.parametrize("end", ["replaced", "closed", "removed"])
def test_waiting_for_room_ends_with_the_peer(world: World, end: str, buffer: int) -> None:
    async def main() -> None:
        link, other = world.bound(), world.other()
        await link.changed()
        link.refresh()
        fill(link, buffer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.wait_for_room)
            await wait_all_tasks_blocked()
            if end == "closed":
                other.close()
            else:
                world.peer.unlink()
                if end == "replaced":
                    new = world.other()
                await link.changed()
                link.refresh()
        if end == "replaced":
            link.send("second")
            assert names_of(new) == [b"second"]
            world.send(new, b"heard")
            assert receive(link) == [b"heard"]

    run(main)


def test_waiting_for_our_own_full_buffer_ends_when_the_peer_reads(world: World) -> None:
    """Our own send buffer fills up first if net.unix.max_dgram_qlen is large."""

    async def main() -> None:
        link, other = world.bound(), world.other()
        fill(link, buffer=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.wait_for_room)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            assert names_of(other)

    run(main)


@pytest.mark.parametrize("there", ["directory", "directory above", "nothing above", "moved here", "allowed"])
def test_the_link_notices_a_peer_that_appears(world: World, tmp_path: Path, there: str) -> None:
    home = tmp_path / "a" / "b"
    world.peer = home / "core1"

    async def main() -> None:
        if there != "nothing above":
            (tmp_path / "a").mkdir()
        if there not in ("nothing above", "directory above"):
            home.mkdir()
        if there == "moved here":
            world.other(home / "before")
        if there == "allowed":
            world.other()
        link = world.bound()

        async def come() -> None:
            await wait_all_tasks_blocked()
            if there == "moved here":
                (home / "before").rename(world.peer)
            elif there == "allowed":
                world.peer.chmod(0o777)
            else:
                home.mkdir(parents=True, exist_ok=True)
                world.other()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            while True:
                await link.changed()
                link.refresh()
                if link._watched.places and (there == "allowed" or world.peer.exists()):
                    link.send("redun_notify_irq")
                    break

    run(main)


@pytest.mark.parametrize("how", ["no descriptor", "symlink", "ancestor moved", "unreadable"])
def test_a_frame_reaches_a_peer_whose_start_no_event_reports(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    place = world.peer = home / "core1"
    if how == "symlink":
        place = tmp_path / "target"
        world.peer.symlink_to(place)
    elif how == "unreadable":
        refuse_watches(world, monkeypatch, home)
    attempts: list[float] = []

    async def main() -> None:
        link = world.bound()
        while how != "unreadable" and await is_woken(link):
            link.refresh()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, link, attempts)
            await trio.sleep(60)  # simulated time
            before = len(attempts)
            await trio.sleep(60)  # simulated time
            assert len(attempts) == before  # Checking the peer is not a failure to send.
            if how == "ancestor moved":
                home.parent.rename(tmp_path / "away")
                home.mkdir(parents=True)
            core1 = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            with no_descriptor_left() if how == "no descriptor" else contextlib.nullcontext():
                core1.bind(str(place))
                await trio.sleep(60)  # simulated time
                assert (len(nursery.child_tasks) == 1) == (how == "no descriptor")
        assert names_of(core1) == [b"redun_notify_irq"]
        core1.close()
        link.close()

    in_simulated_time(main)


async def is_woken(link: UnixLink) -> bool:
    """Return whether the link wakes up within a minute of simulated time."""
    with trio.move_on_after(60) as minute:  # simulated time
        await link.changed()
    return not minute.cancelled_caught


def test_the_link_sleeps_while_nothing_changes(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        link = world.bound()
        world.other()
        # First handle the events that the two new sockets cause, and the checks that follow.
        while await is_woken(link):
            link.refresh()
        # Another file in the directory must not wake a waiter.
        (tmp_path / "neighbour").touch()
        assert not await is_woken(link)

    in_simulated_time(main)


def test_files_in_an_ancestor_do_not_wake_the_link(world: World, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    world.local, world.peer = home / "core0", home / "core1"

    async def main() -> None:
        link = world.link()
        assert not link.refresh()  # Only `tmp_path` exists, and is watched for the directory "a".
        world.local, world.peer = tmp_path / "c" / "core0", tmp_path / "c" / "core1"
        neighbour = world.link()
        assert not neighbour.refresh()
        home.mkdir(parents=True)
        world.other(home / "core1")
        while await is_woken(link):
            link.refresh()
        neighbour.close()
        while await is_woken(link):
            link.refresh()
        for number in range(50):
            (tmp_path / f"file{number}").touch()
            (tmp_path / f"file{number}").chmod(0o600)
        assert not world.names.unread

    in_simulated_time(main)


def test_the_socket_file_of_a_crashed_process_is_replaced(world: World) -> None:
    world.other(world.local).close()
    link, other = world.bound(), world.other()
    world.send(other, b"ihub_reset_irq")
    assert receive(link) == [b"ihub_reset_irq"]


def refuse(world: World, error: type[Exception], text: str) -> None:
    link = world.link()
    assert not link.refresh()
    refusal = link.missing()
    assert isinstance(refusal, error)
    assert str(refusal) == f"{world.local}: {text}"
    assert link.absence == text


@pytest.mark.parametrize("is_connected", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_path_used_by_a_live_process_is_refused(world: World, kind: int, is_connected: bool) -> None:
    taken = world.other(world.local, kind)
    if kind == socket.SOCK_STREAM:
        taken.listen()
        refuse(world, LinkNotFoundError, "in use by a running process, as another type of socket")
    else:
        if is_connected:
            world.other()
            taken.connect(str(world.peer))
        refuse(world, LinkNotFoundError, "in use by a running process (stop that process, or use another path)")
    assert stat.S_ISSOCK(world.local.lstat().st_mode)


@pytest.mark.parametrize(("make", "kind"), [("touch", "a file"), ("mkdir", "a directory"), ("link", "a symlink")])
def test_a_file_that_is_not_a_socket_is_left_alone(world: World, make: str, kind: str) -> None:
    if make == "link":
        world.local.symlink_to("nowhere")
    else:
        getattr(world.local, make)()
    refuse(world, LinkNotFoundError, f"the path is {kind}, not a socket (remove it, or use another path)")
    assert world.local.is_symlink() or world.local.exists()


def test_a_missing_directory_is_an_error(world: World, tmp_path: Path) -> None:
    world.local = tmp_path / "none" / "core0"
    refuse(world, LinkNotFoundError, "the directory does not exist (create it)")


@pytest.mark.parametrize("at", ["/proc/core0", "/proc/self/comm/core0"])
def test_a_place_where_no_socket_can_be_bound_is_an_error(world: World, at: str) -> None:
    world.local = Path(at)
    link = world.link()
    assert not link.refresh()
    assert str(link.missing()).startswith(f"{at}: ")


def test_a_missing_permission_is_an_error(world: World, tmp_path: Path) -> None:
    """Run in a child process, because a process that drops root privileges cannot regain them."""
    world.local = tmp_path / "closed" / "core0"
    world.local.parent.mkdir(mode=0o700)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            link = world.link()
            good = not link.refresh() and isinstance(link.missing(), PermissionDeniedError)
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("how", ["removed", "taken over", "directory moved", "ancestor moved"])
def test_a_removed_or_replaced_path_is_bound_again(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    home = tmp_path / "above" / "home"
    home.mkdir(parents=True)
    world.local = home / "core0"

    async def main() -> None:
        link, other = world.bound(), world.other()
        world.send(other, b"before")
        while await is_woken(link):
            link.refresh()
        before = link.fd
        if how.endswith("moved"):
            (home if how == "directory moved" else home.parent).rename(tmp_path / "away")
            home.mkdir(parents=True)
        else:
            world.local.unlink()
            if how == "taken over":
                world.other(world.local).close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.wait_readable)
            await wait_all_tasks_blocked()
            while link.fd == before:
                await link.changed()
                link.refresh()
        world.send(other, b"after")
        # The frames that were queued before the path changed come first.
        assert receive(link) == [b"before", b"after"]
        link.send("still")
        assert other.recvfrom(ROOM)[1] == str(world.local)
        link.close()

    in_simulated_time(main)
    assert caplog.messages == [f"{world.local}: the file was removed or replaced: bound a new socket"]


def test_a_replaced_socket_refuses_frames_that_closing_it_would_discard(world: World) -> None:
    async def main() -> None:
        link, other = world.bound(), world.other()
        other.connect(str(world.local))
        world.send(other, b"before")
        world.local.unlink()
        assert link.refresh()
        with pytest.raises(BrokenPipeError):
            other.send(encode(b"late", FOREIGN))
        world.send(other, b"after")
        assert receive(link) == [b"before", b"after"]
        link.close()

    run(main)


def test_a_copy_of_a_removed_socket_accepts_no_frames(world: World) -> None:
    """An fd store can keep a copy."""

    async def main() -> None:
        link, other = world.bound(), world.other()
        other.connect(str(world.local))
        with socket.socket(fileno=os.dup(link.fd)):
            link.close(remove=True)
            with pytest.raises(BrokenPipeError):
                other.send(encode(b"late", FOREIGN))

    run(main)


def test_the_link_waits_for_a_path_taken_by_a_live_process(world: World) -> None:
    async def main() -> None:
        link, other = world.bound(), world.other()
        world.local.unlink()
        thief = world.other(world.local)
        assert not link.refresh()
        assert "in use by a running process" in link.absence
        link.send("still")
        assert names_of(other) == [b"still"]
        thief.close()
        world.local.unlink()
        while not link.refresh():
            await link.changed()
        world.send(other, b"again")
        assert receive(link) == [b"again"]

    run(main)


def test_a_path_whose_new_owner_crashed_is_taken_back(world: World) -> None:
    async def main() -> None:
        link, other = world.bound(), world.other()
        world.local.unlink()
        thief = world.other(world.local)
        with trio.move_on_after(60):  # The checks after the change take less than a simulated minute.
            while not link.refresh():
                await link.changed()
        thief.close()  # A crash would also close the socket, and no event would report it.
        await link.changed()
        while not link.refresh():
            await link.changed()
        world.send(other, b"again")
        assert receive(link) == [b"again"]

    in_simulated_time(main)


def test_close_removes_the_path_unless_another_process_has_it(world: World) -> None:
    async def main() -> None:
        link = world.bound()
        link.close(remove=False)
        assert world.local.exists()
        world.bound().close(remove=True)
        assert not world.local.exists()
        link = world.bound()
        world.local.unlink()
        world.other(world.local)
        link.close(remove=True)
        assert world.local.exists()

    run(main)


def test_close_wakes_waiters(world: World) -> None:
    async def main() -> None:
        link = world.bound()
        held = os.dup(link.fd)

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await link.wait_readable()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            link.close()
        os.close(held)

    run(main)


def test_an_inherited_socket_keeps_its_queue(world: World) -> None:
    link, other = world.bound(), world.other()
    world.send(other, b"before")
    heir = UnixLink.take(world.address, os.dup(link.fd), world.note, world.names)
    close(link)
    assert heir.fits
    assert heir.refresh()
    world.send(other, b"after")
    assert receive(heir) == [b"before", b"after"]
    close(heir)


def test_an_inherited_socket_with_a_removed_path_is_read_to_its_end(world: World) -> None:
    async def main() -> None:
        link, other = world.bound(), world.other()
        world.send(other, b"before")
        world.local.unlink()
        heir = UnixLink.take(world.address, os.dup(link.fd), world.note, world.names)
        close(link)
        assert heir.fits
        assert heir.refresh()
        world.send(other, b"after")
        assert receive(heir) == [b"before", b"after"]
        heir.close()

    run(main)


def test_an_inherited_socket_does_not_take_the_file_of_a_socket_that_was_never_stored(world: World) -> None:
    """A process is killed after it has replaced its socket, before the fd store has the new one."""

    async def main() -> None:
        link, other = world.bound(), world.other()
        world.send(other, b"before")
        held = os.dup(link.fd)  # The fd store
        world.local.unlink()
        assert link.refresh()
        world.send(other, b"lost")
        close(link)
        assert world.local.exists()
        heir = UnixLink.take(world.address, held, world.note, world.names)
        assert heir.refresh()
        world.send(other, b"after")
        assert receive(heir) == [b"before", b"after"]
        heir.close()

    run(main)


@pytest.mark.parametrize("kind", ["stream", "another path", "packet", "file"])
def test_an_inherited_descriptor_that_does_not_match_is_replaced(world: World, tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        if kind == "file":
            held = os.open("/dev/null", os.O_RDONLY)
            with pytest.raises(OSError, match="Socket operation on non-socket"):
                UnixLink.take(world.address, held, world.note, world.names)
            os.close(held)
            return
        made = {
            "stream": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "another path": lambda: world.other(tmp_path / "another"),
            "packet": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        }[kind]()
        around = Surroundings()
        with closing(around):
            link, stale = open_link(world.address, None, made.detach(), world.note, around)
            assert stale is not None
            assert not stale.fits
            assert link.refresh()
            stale.close(remove=False)
            link.close(remove=True)

    run(main)


def test_a_lack_of_descriptors_is_an_error(world: World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(ResourceError, match=r"core0: inotify: limit reached: raise fs\.inotify"):
            open_link(world.address, None, None, world.note, Surroundings())
        with pytest.raises(ResourceError, match="core0: cannot open a socket: Too many open files"):
            UnixLink.open(world.address, world.note, world.names)


def test_each_waiting_link_gets_only_its_own_changes(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        links = []
        for number in range(4):
            world.local, world.peer = tmp_path / f"local{number}", tmp_path / f"peer{number}"
            links.append(world.bound())
        woken: list[int] = []

        async def follow(number: int) -> None:
            while True:
                await world.names.wait(links[number]._watched)
                woken.append(number)

        async with trio.open_nursery() as nursery:
            scopes = []
            for number in range(4):
                scope = trio.CancelScope()
                scopes.append(scope)

                async def scoped(number: int = number, scope: trio.CancelScope = scope) -> None:
                    with scope:
                        await follow(number)

                nursery.start_soon(scoped)
            await wait_all_tasks_blocked()
            woken.clear()
            # Cancel each waiter in turn, because one of them reads the shared descriptor for all of them.
            for ending in (0, 1, 2):
                scopes[ending].cancel()
                await wait_all_tasks_blocked()
                (tmp_path / "peer3").touch()
                (tmp_path / "peer3").unlink()
                (tmp_path / f"peer{ending}").touch()
                await wait_all_tasks_blocked()
                assert set(woken) == {3}
                woken.clear()
            nursery.cancel_scope.cancel()

    run(main)


def test_an_overflow_wakes_all_links(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        link = world.bound()
        await link.changed()
        overflow = (-1).to_bytes(4, "little", signed=True) + (0x4000).to_bytes(4, "little") + bytes(8)

        def read_into(buffer: memoryview) -> int:
            buffer[:16] = overflow
            return 16

        monkeypatch.setattr(world.names._inotify, "read_into", read_into)
        world.names._read()
        assert link._watched.changed

    run(main)


def test_a_recreated_directory_is_watched_again(world: World, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    world.peer = home / "core1"

    async def main() -> None:
        link = world.bound()
        shutil.rmtree(home)
        await link.changed()
        link.refresh()

        async def make_again() -> None:
            await wait_all_tasks_blocked()
            home.mkdir()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_again)
            while not home.is_dir():
                await link.changed()
            link.refresh()
        other = world.other()
        link.send("redun_notify_irq")
        assert names_of(other) == [b"redun_notify_irq"]
        world.names.forget(link._watched)
        assert world.names._at == {}

    run(main)


def test_an_unreadable_directory_is_checked_regularly(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_watches(world, monkeypatch, tmp_path)

    async def main() -> None:
        link = world.bound()
        assert await is_woken(link)
        world.local.unlink()
        assert await is_woken(link)
        assert link.refresh()
        assert world.local.exists()

    in_simulated_time(main)


def test_a_running_link_in_an_unreadable_directory_is_checked_once_per_second(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_watches(world, monkeypatch, tmp_path)

    async def main() -> None:
        link = world.bound()
        world.other()
        with trio.move_on_after(0.9) as period:  # simulated time
            await link.changed()
        assert period.cancelled_caught
        assert await is_woken(link)

    in_simulated_time(main)


@pytest.mark.parametrize("parent", ["file", "file/a"])
def test_a_file_in_place_of_a_directory_is_watched(world: World, tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    world.peer = tmp_path / parent / "core1"

    async def main() -> None:
        link = world.bound()
        assert link._all_watched
        while await is_woken(link):
            link.refresh()
        (tmp_path / "file").unlink()
        world.peer.parent.mkdir(parents=True)
        while await is_woken(link):
            link.refresh()
        world.other()
        assert await is_woken(link)

    in_simulated_time(main)


@pytest.mark.parametrize("target", ["missing", "existing"])
@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_symlink_with_a_new_target_is_noticed(world: World, tmp_path: Path, target: str, is_absolute: bool) -> None:
    home = tmp_path / "home"
    (home / "elsewhere" / "second").mkdir(parents=True)
    if target == "existing":
        (home / "elsewhere" / "first").mkdir()
    base = home / "elsewhere" if is_absolute else Path("elsewhere")
    (home / "current").symlink_to(base / "first")
    (home / "next").symlink_to(base / "second")
    world.peer = home / "current" / "core1"

    async def main() -> None:
        link = world.bound()
        core1 = world.other(home / "next" / "core1")
        while await is_woken(link):
            link.refresh()
        (home / "next").rename(home / "current")
        assert await is_woken(link)
        link.refresh()
        link.send("redun_notify_irq")
        assert names_of(core1) == [b"redun_notify_irq"]
        # The link follows the directory that contains the symlink, too.
        while await is_woken(link):
            link.refresh()
        home.rename(tmp_path / "away")
        assert await is_woken(link)

    in_simulated_time(main)


def test_an_unreadable_ancestor_does_not_matter(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_watches(world, monkeypatch, tmp_path.parent)
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    world.peer = tmp_path.parent / f"{tmp_path.name}-link" / "core1"
    link = world.bound()
    assert link._all_watched


@pytest.mark.parametrize("change", ["moved", "removed"])
def test_a_directory_that_is_replaced_before_it_is_watched_is_noticed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    world.peer = home / "core1"
    watch = world.names._inotify.watch

    def replace_and_watch(path: str, mask: int) -> int:
        if os.path.realpath(path) == str(home):
            monkeypatch.setattr(world.names._inotify, "watch", watch)
            if change == "moved":
                home.rename(tmp_path / "away")
            else:
                home.rmdir()
            home.mkdir()
        return watch(path, mask)

    monkeypatch.setattr(world.names._inotify, "watch", replace_and_watch)

    async def main() -> None:
        link = world.bound()
        while await is_woken(link):
            link.refresh()
        world.other()
        assert await is_woken(link)

    in_simulated_time(main)


def test_a_link_works_without_proc(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_DESCRIPTORS", str(tmp_path / "missing"))

    async def main() -> None:
        link = world.bound()
        while await is_woken(link):
            link.refresh()
        core1 = world.other()
        await link.changed()
        link.refresh()
        link.send("redun_notify_irq")
        assert names_of(core1) == [b"redun_notify_irq"]

    in_simulated_time(main)
