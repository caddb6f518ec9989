"""Tests that users who own directories of sockets cannot redirect the proxy's sockets and frames."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from inco_trio.control import place
from inco_trio.doctor import links
from inco_trio.errors import ConfigError
from inco_trio.frame import decode
from inco_trio.links import peer_socket
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names
from inco_trio.links.unix import UnixLink
from inco_trio.trust import UnfitFileError
from netns.hang import HANG

pytestmark = pytest.mark.netns  # Changing owners needs root.

STRANGER = 12345
SIGNAL = "redun_notify_irq"


class World:
    """A link of root. `theirs` belongs to another user, and `victim` to root. Both contain a socket of root."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        home.chmod(0o755)
        self.home, self.theirs, self.victim = home, home / "theirs", home / "victim"
        self._stack = stack
        self.names = Names()
        stack.callback(self.names.close)
        self.victim.mkdir()
        for path in (self.theirs, self.theirs / "link"):
            path.mkdir()
            os.chown(path, STRANGER, STRANGER)

    def socket(self, path: Path) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._stack.callback(made.close)
        made.bind(str(path))
        return made

    def address(self, local: Path, peer: Path) -> UnixAddress:
        return UnixAddress(str(local), str(peer), bytes.fromhex("02005e100001"))

    def link(self, local: Path, peer: Path) -> UnixLink:
        link = UnixLink.open(self.address(local, peer), memoryview(bytearray(16)), self.names)

        def close() -> None:
            for sock in (*link._former, link._socket):
                sock.close()
            if link._peer is not None:
                os.close(link._peer)

        self._stack.callback(close)
        return link


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def closed(link: UnixLink) -> None:
    async def close() -> None:
        link.close(remove=True)

    trio.run(close)


def redirect(world: World) -> Path:
    """Let the other user replace the directory of the link by a symlink to the victim."""
    link = world.theirs / "link"
    link.rename(world.theirs / "old")
    link.symlink_to(world.victim)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    return link


def own(world: World) -> Path:
    return world.theirs / "link"


def in_sticky_directory(world: World) -> Path:
    """Return a directory of another user in a sticky directory. The owner can rename it."""
    path = world.home / "sticky" / "link"
    path.mkdir(parents=True)
    path.parent.chmod(0o1777)
    os.chown(path, STRANGER, STRANGER)
    return path


@pytest.mark.parametrize("prepare", [redirect, own, in_sticky_directory])
def test_a_path_that_another_user_can_redirect_is_refused(world: World, prepare: Callable[[World], Path]) -> None:
    world.socket(world.victim / "core0").close()
    before = (world.victim / "core0").lstat()
    directory = prepare(world)
    link = world.link(directory / "core0", world.home / "core1")
    assert not link.refresh()
    assert isinstance(link.missing(), ConfigError)
    assert f"belongs to uid {STRANGER} (run the proxy as this user, or use a directory below /run)" in link.absence
    assert os.path.samestat((world.victim / "core0").lstat(), before)
    assert [path.name for path in world.victim.iterdir()] == ["core0"]


def test_closing_removes_no_file_elsewhere(world: World) -> None:
    """A version of inco-trio without these checks may have bound the socket."""
    link = world.link(world.home / "own" / "core0", world.home / "core1")
    (world.home / "own").mkdir()
    assert link.refresh(), link.absence
    os.link(world.home / "own" / "core0", world.victim / "core0")
    (world.home / "own").rename(world.theirs / "own")
    (world.home / "own").symlink_to(world.theirs / "link")
    redirect(world)
    closed(link)
    assert (world.victim / "core0").is_socket()


def test_the_user_of_the_other_core_may_own_the_directory(world: World) -> None:
    """As for QEMU of another user: the user cannot replace the directory itself."""
    shared = world.home / "shared"
    shared.mkdir()
    os.chown(shared, STRANGER, STRANGER)
    core1 = world.socket(shared / "core1")
    link = world.link(shared / "core0", shared / "core1")
    assert link.refresh(), link.absence
    assert link.running
    link.send(SIGNAL)
    assert core1.recv(200)
    core1.sendto(b"frame", str(shared / "core0"))
    assert link.receive_one(memoryview(bytearray(200))) == len(b"frame")
    assert not link.foreign
    (shared / "core1").unlink()
    again = world.socket(shared / "core1")
    core1.close()
    link.send(SIGNAL)
    assert again.recv(200)
    again.close()
    with pytest.raises(LinkDownError, match="no process has bound"):
        link.send(SIGNAL)
    (shared / "core1").unlink()
    with pytest.raises(LinkDownError, match="no process has bound"):
        link.send(SIGNAL)
    assert not link.running
    assert world.socket(shared / "core1")
    assert link.running
    closed(link)
    assert sorted(path.name for path in shared.iterdir()) == ["core1"]


def give(path: Path) -> Path:
    """Create a directory of another user."""
    path.mkdir()
    os.chown(path, STRANGER, STRANGER)
    return path


@pytest.mark.parametrize("place", ["own", "shared", "behind a symlink"])
@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "a directory"), (os.mkfifo, "a FIFO"), (Path.touch, "a file")])
def test_the_text_names_a_file_that_is_not_a_socket(
    world: World, place: str, make: Callable[[Path], None], kind: str
) -> None:
    directory = world.home / "own"
    directory.mkdir() if place == "own" else give(directory)
    peer = found = directory / "core1"
    if place == "behind a symlink":
        found = directory / "target"
        peer.symlink_to(found)
    make(found)
    link = world.link(world.home / "core0", peer)
    assert link.refresh(), link.absence
    with pytest.raises(LinkDownError) as caught:
        link.send(SIGNAL)
    text, remedy = f"not a socket but {kind}", "remove it, or use another path"
    assert link.down_reason == caught.value.strerror == f"{found}: {text} ({remedy})"
    (result,) = links.peer(link._address)
    assert (result.subject, result.found) == (str(found), f"{text}; {remedy}")
    found.rmdir() if found.is_dir() else found.unlink()
    world.socket(found)
    link.refresh()
    assert link.running
    link.send(SIGNAL)
    closed(link)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize(
    "change", ["removed", "renamed", "directory renamed", "directory behind a symlink", "behind a symlink"]
)
def test_frames_reach_the_new_socket_while_the_former_one_is_open(
    world: World, change: str, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = give(world.home / "shared")
    place = new_place = peer = shared / "core1"
    if change == "directory behind a symlink":
        new_place = give(world.home / "new") / "core1"
        peer = world.home / "current" / "core1"
        peer.parent.symlink_to(shared)
    elif change == "behind a symlink":
        peer = world.home / "core1"
        peer.symlink_to(place)
    former = world.socket(place)
    if not watched:
        monkeypatch.setattr(world.names, "watch", lambda _: False)
    link = world.link(world.home / "core0", peer)
    assert link.refresh(), link.absence
    link.send("before")
    if change == "renamed":
        place.rename(shared / "former")
    elif change == "directory renamed":
        shared.rename(world.home / "former")
        give(shared)
    elif change == "directory behind a symlink":
        peer.parent.unlink()
        peer.parent.symlink_to(new_place.parent)
    else:
        place.unlink()
    new = world.socket(new_place)
    link.send("after")
    assert decode(former.recv(200)) == b"before"
    assert decode(new.recv(200)) == b"after"
    with pytest.raises(BlockingIOError):
        former.recv(200)


@pytest.mark.parametrize("mode", [0o1777, 0o2775])
def test_a_directory_may_be_shared(world: World, mode: int) -> None:
    shared = world.home / "shared"
    shared.mkdir()
    shared.chmod(mode)
    os.chown(shared, 0, STRANGER)
    core1 = world.socket(shared / "core1")
    link = world.link(shared / "core0", shared / "core1")
    assert link.refresh(), link.absence
    link.send(SIGNAL)
    assert core1.recv(200)


@pytest.fixture
def shared(world: World) -> Path:
    """A directory of another user."""
    return give(world.home / "shared")


def by_symlink(path: Path, target: Path) -> None:
    path.symlink_to(target)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def by_symlink_of_root(path: Path, target: Path) -> None:
    """Let a symlink of root lead to the symlink of the other user."""
    by_symlink(path.with_name("other"), target)
    path.symlink_to("other")


def by_hard_link(path: Path, target: Path) -> None:
    os.link(target, path)


@pytest.mark.parametrize("attack", [by_symlink, by_symlink_of_root, by_hard_link])
@pytest.mark.parametrize("late", [False, True])
def test_frames_reach_no_socket_of_another_user(
    world: World, shared: Path, attack: Callable[[Path, Path], None], late: bool
) -> None:
    victim = world.socket(world.victim / "socket")
    core1 = world.socket(shared / "core1")
    link = world.link(world.home / "core0", shared / "core1")
    if late:
        assert link.refresh(), link.absence
    (shared / "core1").unlink()
    core1.close()
    attack(shared / "core1", world.victim / "socket")
    assert link.refresh() or late
    with pytest.raises(LinkDownError, match=r"not trusted: a (symlink|hard link)"):
        link.send(SIGNAL)
    with pytest.raises(BlockingIOError):
        victim.recv(200)
    assert "not trusted" in link.down_reason


def test_a_symlink_in_a_directory_of_root_leads_to_no_other_socket(world: World, shared: Path) -> None:
    victim = world.socket(world.victim / "socket")
    by_symlink(shared / "core1", world.victim / "socket")
    (world.home / "core1").symlink_to(shared / "core1")
    link = world.link(world.home / "core0", world.home / "core1")
    assert link.refresh(), link.absence
    with pytest.raises(LinkDownError, match="not trusted: a symlink"):
        link.send(SIGNAL)
    with pytest.raises(BlockingIOError):
        victim.recv(200)


def test_symlinks_of_root_are_followed(world: World, shared: Path) -> None:
    core1 = world.socket(shared / "socket")
    (shared / "core1").symlink_to("socket")
    link = world.link(world.home / "core0", shared / "core1")
    assert link.refresh(), link.absence
    link.send(SIGNAL)
    assert core1.recv(200)


def test_a_loop_of_symlinks_is_not_followed(world: World, shared: Path) -> None:
    (shared / "core1").symlink_to("core1")
    link = world.link(world.home / "core0", shared / "core1")
    assert link.refresh(), link.absence
    with pytest.raises(LinkDownError, match="too many symlinks"):
        link.send(SIGNAL)


def test_the_peers_directory_cannot_be_redirected(world: World) -> None:
    victim = world.socket(world.victim / "core1")
    directory = redirect(world)
    link = world.link(world.home / "core0", directory / "core1")
    assert link.refresh(), link.absence
    with pytest.raises(LinkDownError, match=f"not trusted: {world.theirs} belongs to uid {STRANGER}"):
        link.send(SIGNAL)
    with pytest.raises(BlockingIOError):
        victim.recv(200)


COVER = """
import ctypes, os, socket, sys
import trio
from inco_trio.links.address import UnixAddress
from inco_trio.links.names import Names
from inco_trio.links.peer_socket import open_socket
from inco_trio.links.unix import UnixLink
place, local, peer, user = sys.argv[1:]
link = UnixLink.open(UnixAddress(local, peer, bytes(6)), memoryview(bytearray(16)), Names())

def cover():
    below, fd = os.open(place, os.O_RDONLY) if os.path.isdir(place) else None, os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode={os.lstat(place).st_mode:o},user_id={user},group_id=0,allow_other".encode()
    assert ctypes.CDLL(None).mount(b"x", os.fsencode(place), b"fuse", 0, options) == 0
    return below
"""
"""The beginning of a program that mounts an unresponsive FUSE filesystem of another user."""
FIND = """
cover()
try:
    open_socket(peer)
except OSError as error:
    print(error.strerror)
"""
SENDER = """
assert link.refresh()
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.bind(f"{place}/sender")
cover()
sender.sendto(b"frame", local)
print(link.receive_one(memoryview(bytearray(200))), link.foreign)
"""
WATCH = """
assert link.refresh()
below = cover()
os.fchmod(below, 0o750)  # This causes the event IN_ATTRIB.
trio.run(link.changed)
assert link.refresh()
print(link.down_reason)
"""


def covered(program: str, cover: Path, local: Path, peer: Path) -> str:
    """Run a program in a mount namespace, and return its output."""
    words = (str(path) for path in (cover, local, peer))
    command = ["unshare", "--mount", sys.executable, "-c", COVER + program, *words, str(STRANGER)]
    return subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize(
    ("cover", "mode"), [("shared", 0o755), ("shared/core1", 0o755), ("theirs", 0o755), ("shared", 0o1777)]
)
def test_a_fuse_filesystem_over_the_peer_does_not_block(world: World, shared: Path, cover: str, mode: int) -> None:
    world.home.chmod(mode)
    peer = (world.theirs / "link" if cover == "theirs" else shared) / "core1"
    world.socket(peer)
    found = covered(FIND, world.home / cover, world.home / "core0", peer)
    assert "FUSE filesystem of" in found


def test_a_fuse_filesystem_over_a_sender_does_not_block(world: World, shared: Path) -> None:
    found = covered(SENDER, shared, world.victim / "core0", world.victim / "core1")
    assert found == f"{len(b'frame')} 1\n"


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_fuse_filesystem_over_a_watched_directory_does_not_block(world: World, shared: Path, mode: int) -> None:
    world.home.chmod(mode)
    found = covered(WATCH, shared, world.victim / "core0", shared / "core1")
    assert f"{shared} is a FUSE filesystem of uid {STRANGER}, which can block the proxy" in found


async def is_woken(link: UnixLink) -> bool:
    """Return whether the link wakes up within a minute of simulated time."""
    with trio.move_on_after(60) as minute:  # simulated time
        await link.changed()
    return not minute.cancelled_caught


def test_a_directory_that_becomes_trusted_is_used(world: World) -> None:
    peer = world.theirs / "link" / "core1"
    world.socket(peer)
    link = world.link(world.home / "core0", peer)

    async def main() -> None:
        assert link.refresh(), link.absence
        while await is_woken(link):
            link.refresh()
        assert "not trusted" in link.down_reason
        os.chown(world.theirs, 0, 0)
        assert await is_woken(link)
        link.refresh()
        assert link.running

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_without_proc_the_socket_of_a_shared_directory_is_not_used(
    world: World, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_socket, "_OF_PROCESS", str(world.home / "missing"))
    world.socket(shared / "core1")
    link = world.link(world.home / "core0", shared / "core1")
    assert link.refresh(), link.absence
    assert link.down_reason == f"{shared}/core1: not trusted: other users can replace it (mount /proc)"


def test_the_control_socket_is_not_redirected(world: World) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(world.victim / "control"))
    stale.close()
    before = (world.victim / "control").lstat()
    with pytest.raises(UnfitFileError, match=f"not trusted: {world.theirs} belongs to uid {STRANGER}"):
        place.bind(redirect(world) / "control")
    assert os.path.samestat((world.victim / "control").lstat(), before)


def test_the_doctor_names_a_directory_that_another_user_can_redirect(world: World) -> None:
    directory = world.theirs / "link"
    (found,) = links.socket_path(world.address(directory / "core0", world.home / "core1"))
    assert str(found).startswith(f"{directory}: not trusted: {world.theirs} belongs to uid {STRANGER}; ")


def test_the_doctor_names_a_peer_that_another_user_can_redirect(world: World, shared: Path) -> None:
    address = world.address(world.home / "core0", shared / "core1")
    world.socket(world.victim / "socket")
    by_symlink(shared / "core1", world.victim / "socket")
    (found,) = links.peer(address)
    assert str(found).startswith(f"{shared}/core1: not trusted: a symlink of uid {STRANGER}, ")
    (shared / "core1").unlink()
    (found,) = links.peer(address)
    assert str(found).endswith("(No such file or directory): start core 1")
    world.socket(shared / "core1")
    (found,) = links.peer(address)
    assert str(found) == f"{shared}/core1: core 1 has bound this socket"


def test_a_directory_of_root_that_is_created_later_is_used(world: World) -> None:
    link = world.link(world.home / "core0", world.home / "later" / "core1")
    assert link.refresh(), link.absence
    with pytest.raises(LinkDownError, match="no process has bound"):
        link.send(SIGNAL)
    (world.home / "later").mkdir()
    core1 = world.socket(world.home / "later" / "core1")
    link.send(SIGNAL)
    assert core1.recv(200)
    assert link._target == f"{world.home}/later/core1"
