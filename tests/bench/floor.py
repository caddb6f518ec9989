"""The floor: the shortest Trio program with inco-trio's system calls. It shows the best performance of this design.

usage: floor.py TABLE DIR IFACE NOTIFICATION_FD

Modules of inco-trio set up the sockets, watches and files, so the filter, buffer and masks are the same. The two loops
give none of inco-trio's guarantees: they do not store, retry, count or log notifications, and ignore replaced files.
"""

import os
import signal
import socket
import sys
from pathlib import Path

import trio

from inco_trio.frame import FRAME_MAX, HEADER_LENGTH, encode
from inco_trio.links.packet import PacketLink
from inco_trio.linux.inotify import EVENT, IN_CLOSE_WRITE, Inotify
from inco_trio.persist.inflight import EVENT_BANK
from inco_trio.registers.directory import TRIGGER_MASK, WRITE_FLAGS


async def receive(link: socket.socket, states: dict[bytes, str], directory: int) -> None:
    frame = memoryview(bytearray(FRAME_MAX))
    while True:
        await trio.lowlevel.wait_readable(link.fileno())
        try:
            while length := link.recv_into(frame):
                register = states[bytes(frame[HEADER_LENGTH:length]).rstrip(b"\0")]
                file = os.open(register, WRITE_FLAGS, dir_fd=directory)
                os.write(file, b"1")
                os.close(file)
        except BlockingIOError:
            pass


async def send(link: socket.socket, frames: dict[int, bytes], inotify: int) -> None:
    events = memoryview(bytearray(EVENT_BANK))
    while True:
        await trio.lowlevel.wait_readable(inotify)
        length = os.readv(inotify, (events,))
        for wd, mask, _cookie, _length in EVENT.iter_unpack(events[:length]):
            if mask & IN_CLOSE_WRITE:
                link.send(frames[wd])


async def serve(link: PacketLink, inotify: Inotify, states: dict[bytes, str], frames: dict[int, bytes]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as stops, socket.socket(fileno=os.dup(link.fd)) as sock:
        sock.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, sock, states, os.open(directory, os.O_PATH | os.O_DIRECTORY))
            nursery.start_soon(send, sock, frames, inotify.fd)
            os.write(int(notification_fd), b"\n")
            await anext(stops)
            nursery.cancel_scope.cancel()


table, directory, interface, notification_fd = sys.argv[1:]
link, inotify = PacketLink.open(interface), Inotify()
link.refresh()
states: dict[bytes, str] = {}
frames: dict[int, bytes] = {}
for line in Path(table).read_text().splitlines():
    name, direction, register = line.split()
    path = Path(directory, register)
    path.touch()
    if direction == "inbound":
        states[name.encode()] = register
    else:
        frames[inotify.watch(str(path), TRIGGER_MASK)] = encode(name.encode(), link.mac)
trio.run(serve, link, inotify, states, frames)
sys.stderr.write(f"dropped={link.dropped()}\n")
