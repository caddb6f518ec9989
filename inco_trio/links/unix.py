"""A link over a Unix datagram socket: each datagram is one Ethernet frame, as with QEMU's `-netdev dgram`.

The socket is bound but not connected: a connected socket would refuse a peer that restarted. Each datagram is sent to
the peer's path, so that it reaches the process that is bound to this path at that moment. See unix(7).

If another user may change the peer's directory, each datagram is sent to a descriptor of the peer's socket instead.
First, the link checks whether the path may have changed: a socket still receives datagrams after its path was removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import select
import socket
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import trio

from inco_trio.errors import STRERROR, ConfigError, IncoError, LinkNotFoundError, ResourceError, from_os_error
from inco_trio.frame import FRAME_MAX, encode
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names, Watched
from inco_trio.links.peer_socket import directory_of, open_socket
from inco_trio.linux.files import EXHAUSTED, Resolver, kind_of_file
from inco_trio.linux.sockets import SO_PEEK_OFF, refuse_descriptors
from inco_trio.problems import report
from inco_trio.trust import UnfitFileError

__all__ = ["UnixLink"]

logger = logging.getLogger(__name__)

ETHERTYPE_PLACE = slice(12, 14)
NO_PEER = frozenset({
    errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EPROTOTYPE, errno.ELOOP,
    errno.ECONNRESET, errno.ENXIO, errno.EPIPE, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE,
})  # fmt: skip
"""Error numbers that sendto(2) reports when no process can receive at the peer's path.

EPIPE: the peer has called shutdown(2). EPERM: it has connected its socket to another one. ENOTCONN, ECONNABORTED and
ESTALE: the filesystem's server (FUSE, NFS) is gone.
"""
AFTERWARDS = (0.005, 0.02, 0.08)
"""Pauses in seconds between checks after an event: a socket's file appears shortly before the socket can receive."""
UNWATCHED = 0.08
"""Seconds between checks when no event reports changes, such as in an unreadable directory or when a process ends."""
FALLBACK = 1.0
"""Seconds between checks of a peer that could not receive a frame, and of a running link in an unreadable directory. No
event reports some changes, such as a free descriptor, or a peer that binds the target of a symlink."""
PEEKED_MAX = 64
"""Maximum number of frames that `peek` returns or drops; net.unix.max_dgram_qlen is usually less."""
SENDERS_MAX = 16
"""Number of paths in the cache `UnixLink._senders`. Datagrams from further paths are foreign until the next `refresh`,
because resolving a path that another user has made can take milliseconds. The peer's path is always in the cache, and
the last path that led to the peer is always resolved."""
IN_USE = "in use by a running process (stop that process, or use another path)"


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    refuse_descriptors(sock)
    return sock


def _identify(file: os.stat_result, sock: socket.socket) -> tuple[int, int]:
    """Return the two 64-bit numbers of `UnixLink`'s note. In Linux, a device and a socket's inode have 32 bits each."""
    return (file.st_dev ^ os.fstat(sock.fileno()).st_ino << 32) % (1 << 64), file.st_ino


class UnixLink:
    """The `Link` of the socket at `address.local`.

    `note` keeps the device and inode of the socket's file, and the inode of the socket itself: a process may be killed
    after it has bound a new socket, and before an fd store has it. The next process then inherits the former socket.
    """

    def __init__(self, sock: socket.socket, address: UnixAddress, note: memoryview, names: Names) -> None:
        self.name = address.local
        self.fd = sock.fileno()
        self.mac = address.mac
        self.granted = None
        self.renewal = ""
        self.foreign = 0
        self.downs = 0
        self.malformed = 0
        """Number of malformed frames from the peer that `peek` dropped."""
        self._address = address
        self._socket = sock
        self._bound = False
        self._note = note.cast("Q")
        self._former: list[socket.socket] = []
        self._frames: dict[str, bytes] = {}
        self._names = names
        self._watched = Watched((Path(address.local), Path(address.peer)))
        self._all_watched = False
        self._ours = False
        self._looks: Iterator[float] = iter(())
        self._failure = ""
        """Why the last frame could not be sent, or why the peer is not trusted, until the next `refresh`."""
        self._pause = trio.CancelScope()
        """The last wait of `changed`."""
        self._room: socket.socket | None = None
        self._refusal: IncoError = LinkNotFoundError(self.name, "not bound yet")
        self._senders: dict[object, bool] = {address.peer: True}
        self._alias: object = None
        """The other path under which the peer has sent its last frame. If no descriptor is left, it is not checked."""
        self._closed = False
        self._target = address.peer
        """The path to which frames are sent: the peer's path, a path of `_peer`, or empty if the peer has no socket."""
        self._peer: int | None = None
        """The peer's socket (O_PATH), if untrusted users can replace it."""
        self._is_direct = False
        """Whether no symlink leads to `_peer`. The events of `names` then report each change."""
        self._not_found: OSError | None = None
        self._identity: tuple[int, int] | None = None
        """The device and inode of the peer's socket at the last `refresh`, or None if there was none."""

    @classmethod
    def open(cls, address: UnixAddress, note: memoryview, names: Names) -> UnixLink:
        """Open a socket; `refresh` binds it. Raises ResourceError."""
        try:
            return cls(_new_socket(), address, note, names)
        except OSError as error:
            raise ResourceError(address.local, f"cannot open a socket: {error.strerror}") from error

    @classmethod
    def take(cls, address: UnixAddress, held: int, note: memoryview, names: Names) -> UnixLink:
        """Take over the inherited descriptor `held`. The caller must check `fits`."""
        sock = socket.socket(fileno=held)
        sock.setblocking(False)
        refuse_descriptors(sock)  # A version without this option may have opened the socket.
        link = cls(sock, address, note, names)
        link._bound = True
        if link.fits and not link._is_ours():
            link._recognize()
        return link

    @property
    def fits(self) -> bool:
        try:
            return (
                self._socket.family == socket.AF_UNIX
                and self._socket.type == socket.SOCK_DGRAM
                and self._socket.getsockname() == self._address.local
            )
        except OSError:
            return False

    @property
    def description(self) -> str:
        return f"address {self.mac.hex(':')}, peer {self._address.peer}"

    @property
    def running(self) -> bool:
        """Whether our socket is bound and a process has bound a socket at the peer's path."""
        return not self._closed and not self.down_reason

    @property
    def down_reason(self) -> str:
        if not self._ours:
            return self.absence
        if self._target != self._address.peer:
            self._find_peer()
        try:
            with _new_socket() as probe:
                probe.connect(self._target)
        except OSError as error:
            # EPERM: the peer has connected its socket, probably to ours. Only sending shows whether it accepts frames.
            if error.errno != errno.EPERM:
                return self._why_not(error)
        return ""

    def _why_not(self, error: OSError) -> str:
        """Describe why frames cannot reach the peer."""
        error = self._not_found or error
        if isinstance(error, UnfitFileError):
            return f"{error.filename}: {error.strerror} ({error.remedy})"
        peer, absent = self._address.peer, error.errno in (errno.ENOENT, errno.ECONNREFUSED)
        why = f"no process has bound {peer}" if absent else f"{peer} accepts no frames"
        return f"{why} ({error.strerror})"

    @property
    def absence(self) -> str:
        return self._refusal.reason

    def missing(self) -> IncoError:
        return self._refusal

    def refresh(self) -> bool:
        """Bind the socket if its file is missing or was replaced. Return whether the socket is bound.

        If the socket was bound before, a new socket replaces it. Frames in the old socket's queue are received first.
        """
        self._failure = ""
        self._all_watched = self._names.watch(self._watched)
        self._senders = {self._address.peer: True}
        if self._room is not None:
            trio.lowlevel.notify_closing(self._room)  # The peer may have changed.
        self._find_peer()
        if isinstance(self._not_found, UnfitFileError):
            # No event reports a new owner or mode of a directory above the peer's directory.
            self._failure = self._why_not(self._not_found)
        self._ours = self._bound and self._is_ours()
        reason = "the file was removed or replaced"
        if self._is_held_by_former_peer() and self._ours:
            reason = "the peer was removed or replaced before it had read all frames"
            self._unlink()
            self._ours = False
        if not self._ours:
            try:
                self._bind(reason)
                self._ours = True
            except IncoError as error:
                self._refusal = error
        return self._ours

    def _is_held_by_former_peer(self) -> bool:
        """Return whether a former peer still holds frames that fill the send buffer of our socket.

        They occupy our send buffer until the former peer reads them or ends. If it hangs, only a new socket can send.
        """
        before, self._identity = self._identity, None
        with contextlib.suppress(OSError):
            found = os.stat(self._target)  # noqa: PTH116 - an empty path must not be the working directory
            self._identity = found.st_dev, found.st_ino
        if before in (None, self._identity):
            return False
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return not poll.poll(0)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError), directory_of(self.name) as (directory, _):
            os.unlink(Path(self.name).name, dir_fd=directory)

    def _find_peer(self) -> bool:
        """Choose the target of frames. Return whether it has changed, so that sending again may succeed.

        Untrusted users may be able to replace the peer's socket, for example by a symlink to another user's socket. The
        target is then a descriptor of the socket.
        """
        before, target = self._peer, self._target
        self._peer, self._not_found = None, None
        try:
            self._peer = open_socket(self._address.peer)
            self._target = self._address.peer
            if self._peer is not None:
                self._target = f"/proc/self/fd/{self._peer}"
                self._is_direct = str(Path(self._target).readlink()) == self._address.peer
        except OSError as error:
            self._target, self._not_found = "", error
        if before is None or self._peer is None:
            changed = self._target not in ("", target)
        else:
            changed = not os.path.samestat(os.fstat(before), os.fstat(self._peer))
        if before is not None:
            os.close(before)
        return changed

    def _is_ours(self) -> bool:
        try:
            found = os.lstat(self.name)
        except OSError:
            return False
        return _identify(found, self._socket) == tuple(self._note)

    def _recognize(self) -> None:
        """Fill `note` again if our inherited socket is the only socket that is bound to its path.

        The fd store may have lost the memory that contains the note, or another version of inco-trio may have written
        it.
        """
        from inco_trio.linux.processes import unix_sockets  # Import lazily: this is rarely needed.

        try:
            found = os.lstat(self.name)
            with _new_socket() as probe:
                probe.connect(self.name)
        except OSError:
            return  # The file is missing, or left over from a process that has ended.
        if set(unix_sockets(self.name)) <= {os.fstat(self.fd).st_ino}:
            self._note[0], self._note[1] = _identify(found, self._socket)

    def _bind(self, reason: str) -> None:
        """Bind the socket. If it was bound before, log the reason and bind a new socket instead. Raises IncoError."""
        try:
            # No untrusted user can redirect a path that is trusted here. So bind(2) and unlink(2) may use it.
            with directory_of(self.name):
                self._clear_path()
            sock = _new_socket() if self._bound else self._socket
            try:
                sock.bind(self.name)
                found = os.lstat(self.name)
            except BaseException:
                if self._bound:
                    sock.close()
                raise
        except IncoError:
            raise
        except UnfitFileError as error:
            raise ConfigError(self.name, f"{error.strerror} ({error.remedy})") from error
        except OSError as error:
            raise from_os_error(
                error,
                self.name,
                f"cannot bind the socket: {STRERROR}",
                ((errno.ENOENT,), LinkNotFoundError, "the directory does not exist (create it)"),
                ((errno.EADDRINUSE,), LinkNotFoundError, IN_USE),
                ((errno.EROFS,), ResourceError, f"cannot bind the socket: {STRERROR}"),
            ) from error
        self._note[0], self._note[1] = _identify(found, sock)
        if sock is not self._socket:
            report(logger, logging.WARNING, f"{self.name}: {reason}: bound a new socket")
            trio.lowlevel.notify_closing(self._socket)
            # Make senders fail with EPIPE. Otherwise, a blocked sender could queue a frame after the last read, and
            # closing the socket would discard it.
            self._socket.shutdown(socket.SHUT_RD)
            self._former.append(self._socket)
            self._socket, self.fd = sock, sock.fileno()
        self._bound = True

    def _clear_path(self) -> None:
        """Remove the socket file of a process that has ended. Raises OSError, or IncoError if the path is in use."""
        try:
            found = os.lstat(self.name)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            kind = kind_of_file(found.st_mode)
            raise LinkNotFoundError(self.name, f"the path is {kind}, not a socket (remove it, or use another path)")
        with _new_socket() as probe:
            try:
                probe.connect(self.name)
            except ConnectionRefusedError:
                pass
            except OSError as error:
                if error.errno == errno.EPROTOTYPE:
                    text = "in use by a running process, as another type of socket"
                    raise LinkNotFoundError(self.name, text) from error
                if error.errno == errno.EPERM:  # The process has connected its socket.
                    raise LinkNotFoundError(self.name, IN_USE) from error
                raise
            else:
                raise LinkNotFoundError(self.name, IN_USE)
        again = os.lstat(self.name)
        if (again.st_dev, again.st_ino) == (found.st_dev, found.st_ino):
            Path(self.name).unlink()

    async def wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self.fd)
        except trio.ClosedResourceError:
            if self._closed:
                raise
            # `refresh` has replaced the socket. The caller reads the old and the new socket.

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        lengths: list[int] = []
        for room in rooms:
            length = self.receive_one(room)
            if length < 0:
                break
            lengths.append(length)
            if length > step:
                break
        return lengths

    def receive_one(self, room: memoryview) -> int:
        while self._former:
            try:
                return self._receive(self._former[0], room)
            except OSError:  # Usually BlockingIOError: the queue is empty.
                self._former.pop(0).close()
        try:
            return self._receive(self._socket, room)
        except BlockingIOError:
            return -1

    def _receive(self, sock: socket.socket, room: memoryview) -> int:
        length, sender = sock.recvfrom_into(room, 0, socket.MSG_TRUNC)
        if not self._knows(sender):
            self.foreign += 1
            # Make the frame malformed, so that this process and a later one ignore it.
            room[ETHERTYPE_PLACE] = bytes(2)
        return length

    def _knows(self, sender: object) -> bool:
        known = self._senders.get(sender)
        return self._meet(sender) if known is None else known

    def peek(self) -> list[bytes]:
        """Return the peer's oldest frames. They stay queued until `dequeue` removes them. Raises OSError.

        If the oldest datagram is from another sender, empty or longer than FRAME_MAX, it is dropped and counted in
        `foreign` or `malformed`. The list may be empty after PEEKED_MAX of them, although the socket is still readable.
        """
        dropped = 0
        room = memoryview(bytearray(FRAME_MAX))
        while True:
            sock = self._oldest
            # First peek without an offset: with an offset, the kernel skips an empty datagram.
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
            frames: list[bytes] = []
            try:
                while len(frames) < PEEKED_MAX:
                    length, sender = sock.recvfrom_into(room, 0, socket.MSG_PEEK | socket.MSG_TRUNC)
                    foreign = not self._knows(sender)
                    if foreign or not 0 < length <= FRAME_MAX:
                        if frames:
                            break
                        sock.recv(1)
                        self.foreign += foreign
                        self.malformed += not foreign
                        dropped += 1
                        if dropped >= PEEKED_MAX and sock is self._socket:
                            return frames  # A sender may be as fast as this loop. Let other tasks run.
                        continue
                    frames.append(bytes(room[:length]))
                    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, sum(map(len, frames)))
            except BlockingIOError:
                pass
            if frames or sock is self._socket:
                return frames
            self._former.pop(0).close()

    def dequeue(self) -> None:
        """Remove from the queue the oldest frame that `peek` returned."""
        while not self._oldest.recv(1):  # An empty datagram may precede the frame.
            self.malformed += 1

    @property
    def queue(self) -> int:
        """The inode of the socket that `peek` and `dequeue` use; it identifies the queue."""
        return os.fstat(self._oldest.fileno()).st_ino

    @property
    def _oldest(self) -> socket.socket:
        return self._former[0] if self._former else self._socket

    def _meet(self, sender: object) -> bool:
        """Return whether a new sender is the peer under another path, such as a symlink. Cache the result."""
        known = is_final = False
        may_resolve = len(self._senders) < SENDERS_MAX or sender == self._alias
        if may_resolve and isinstance(sender, str) and sender.startswith("/"):
            is_final = True
            try:
                # By path, stat(2) could wait for a FUSE filesystem that the sender has mounted.
                with contextlib.closing(Resolver()) as resolver:
                    theirs, peer = (os.fstat(resolver.open(path)) for path in (sender, self._address.peer))
                known = os.path.samestat(theirs, peer)
            except OSError as error:
                is_final = error.errno not in EXHAUSTED
                known = not is_final and sender == self._alias
        if known:
            self._alias = sender
        elif sender == self._alias:
            self._alias = None
        if not known and not self.foreign:
            logger.warning(
                "%s: ignoring datagrams from %s, because the peer is %s (they are counted as `foreign`)",
                self.name,
                repr(sender) if sender else "a socket without a path",
                self._address.peer,
            )
        if is_final:  # Do not keep senders without a path: they could fill the cache, and need no resolution.
            self._senders[sender] = known
        return known

    def expect(self, inbound: Collection[bytes], outbound: Collection[bytes]) -> None:
        """Do nothing: only the peer can send frames, and its queue is short."""

    def restrict(self, on: bool) -> bool:  # noqa: ARG002 - see `expect`
        return False

    def stands_for(self, frame: memoryview, length: int) -> int:  # noqa: ARG002 - see `expect`
        return 1

    def frame(self, name: str) -> bytes:
        frame = self._frames.get(name)
        if frame is None:
            frame = self._frames[name] = encode(name.encode("ascii"), self.mac)
        return frame

    def send(self, name: str) -> None:
        self.send_frame(self._frames.get(name) or self.frame(name))

    def send_frame(self, frame: bytes) -> None:
        if self._peer is not None and self._may_be_replaced():
            self._find_peer()
        try:
            self._socket.sendto(frame, self._target)
        except OSError as error:
            if self._target and error.errno not in NO_PEER:
                raise
            if self._find_peer():
                self._send_again(frame)
                return
            raise self._down(self._not_found or error) from None

    def _may_be_replaced(self) -> bool:
        """Return whether another socket may have replaced `_peer`, which would still accept frames."""
        return not (self._is_direct and self._all_watched) or self._watched.changed or self._names.unread

    def _send_again(self, frame: bytes) -> None:
        """Send a frame to the socket that has replaced the peer's former socket."""
        try:
            self._socket.sendto(frame, self._target)
        except OSError as error:
            if error.errno in NO_PEER:
                raise self._down(error) from None
            raise

    def _down(self, error: OSError) -> LinkDownError:
        """Return the error of a frame that could not be sent, and let `changed` check the peer again."""
        self._failure = self._why_not(error)
        if self._pause.deadline == math.inf:
            self._pause.cancel()
        return LinkDownError(error.errno, self._failure)

    async def wait_for_room(self) -> None:
        """Wait until the peer's queue has room, or the peer changes."""
        try:
            # First wait until our send buffer has room. It holds each frame until the peer has received it.
            await trio.lowlevel.wait_writable(self.fd)
            # Then wait until the peer's queue has room. poll(2) checks that queue only for a connected socket.
            with _new_socket() as self._room:
                self._room.connect(self._target)
                await trio.lowlevel.wait_writable(self._room)
        except trio.ClosedResourceError:
            if self._closed:
                raise
        except OSError:
            # The next `send` reports the error. Pause, because without a free descriptor, or if the peer has connected
            # its socket, this method fails immediately.
            await trio.sleep(UNWATCHED)
        finally:
            self._room = None

    async def changed(self) -> None:
        # If another process uses the path of our socket, no event reports when that process ends.
        has_events = self._all_watched and self._ours
        look = next(self._looks, None) if has_events else None
        delay = look or (math.inf if has_events else FALLBACK if self.running else UNWATCHED)
        while True:
            with trio.move_on_after(min(delay, FALLBACK) if self._failure else delay) as self._pause:
                await self._names.wait(self._watched)
                self._looks = iter(AFTERWARDS)
                return
            if self._pause.deadline == math.inf:
                continue  # Sending has failed meanwhile.
            if self._failure and look is None and self._is_ours() and self.down_reason == self._failure:
                continue
            self._watched.moved |= bool(self._failure)
            return

    def dropped(self) -> int:
        """Return 0: the kernel blocks the sender instead of dropping frames."""
        return 0

    def close(self, *, remove: bool = False) -> None:
        self._closed = True
        if remove and self._bound and self._is_ours():
            self._unlink()
        if self._peer is not None:
            os.close(self._peer)
            self._peer, self._target = None, ""
        self._names.forget(self._watched)
        trio.lowlevel.notify_closing(self.fd)
        for sock in (*self._former, self._socket):
            if remove:
                # An fd store may keep a copy of the socket. Senders must not wait for room in its queue.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)
            sock.close()
