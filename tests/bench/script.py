"""A good script that a Python user might write today, with scapy's AsyncSniffer, watchdog and one socket.

usage: script.py TABLE DIR IFACE NOTIFICATION_FD
"""

import os
import signal
import sys
from pathlib import Path

from scapy.config import conf
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.sendrecv import AsyncSniffer
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

ETHERTYPE = 0x8800

table, directory, interface, notification_fd = sys.argv[1:]
rows = [line.split() for line in Path(table).read_text().splitlines()]
states = {name.encode(): Path(directory, reg) for name, direction, reg in rows if direction == "inbound"}
triggers = {str(Path(directory, reg)): name for name, direction, reg in rows if direction == "outbound"}
for path in (*states.values(), *map(Path, triggers)):
    path.touch()
link = conf.L2socket(iface=interface, type=ETHERTYPE)


class Triggers(FileSystemEventHandler):
    def on_closed(self, event: FileSystemEvent) -> None:
        name = triggers.get(str(event.src_path))
        if name is not None:
            link.send(Ether(dst="ff:ff:ff:ff:ff:ff", type=ETHERTYPE) / Raw(name.encode()))


def on_frame(frame: Packet) -> None:
    path = states.get(bytes(frame.payload).rstrip(b"\0"))
    if path is not None:
        path.write_text("1")


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
observer = Observer()
observer.schedule(Triggers(), directory)
observer.start()
sniffer = AsyncSniffer(opened_socket=link, prn=on_frame, store=False)
sniffer.start()
os.write(int(notification_fd), b"\n")
signal.sigwait({signal.SIGTERM})
