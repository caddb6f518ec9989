"""Checks of the machine: what the kernel allows to whom, before any link or register."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from inco_trio.doctor.processes import Process, Processes, lines_of, read
from inco_trio.doctor.result import Result, fail, ok, warn
from inco_trio.linux.process import CAP_NET_ADMIN, CAP_NET_RAW

__all__ = ["capability", "inotify_limits", "proc", "receive_buffer", "unix_queue"]


QUEUED_EVENTS = 16384
"""The kernel's own default of fs.inotify.max_queued_events."""
INSTANCES = 2
"""inotify instances that a proxy takes: for the triggers, and for the names of a `unix:` link's sockets."""
WATCHES = 64
"""More watches than the usual table needs: one for each trigger, and for each directory and those above it."""
PLENTY = 0.9
"""The used part of a limit from which on it is reported."""
DATAGRAMS = 10
"""The kernel's own default of net.unix.max_dgram_qlen."""
FIRST_USER_NAMESPACE = ["0", "0", "4294967295"]
"""Its uid_map, see user_namespaces(7)."""

_NO_PROC = "is not mounted: processes, limits and filesystems cannot be looked at"


def proc(processes: Processes) -> Iterator[Result]:
    """Check that /proc is readable; no result if it is."""
    if not processes.mounted:
        yield warn("proc", "/proc", _NO_PROC, "mount -t proc proc /proc")


def capability(link: str, root: Path = Path("/")) -> Iterator[Result]:
    """Whether this process may open a packet socket."""
    status = dict(line.partition(":")[::2] for line in lines_of(root / "proc/self/status"))
    if "CapEff" not in status:
        return
    uid, gid = int(status["Uid"].split()[1]), int(status["Gid"].split()[1])
    if int(status["CapEff"], 16) >> CAP_NET_RAW & 1:
        yield ok("capability", link, f"CAP_NET_RAW is effective for this user (uid {uid})")
    elif uid == 0:
        text = "CAP_NET_RAW is not effective, although this is root: give the container NET_RAW (--cap-add)"
        yield fail("capability", link, text)
    else:
        # Not setcap: of a program that Python interprets, the file that counts is Python's.
        fix = (
            f"setpriv --reuid {uid} --regid {gid} --init-groups --inh-caps +net_raw --ambient-caps +net_raw "
            f"inco-trio run {link}"
        )
        yield fail("capability", link, f"CAP_NET_RAW is not effective for this user (uid {uid})", fix)


def receive_buffer(proxy: Process | None, wanted: int, root: Path = Path("/")) -> Iterator[Result]:
    """Whether a packet socket gets the receive buffer of `wanted` bytes.

    `proxy` is the one that runs; without one, it is this process that would be it.
    """
    who = f"process {proxy.pid}" if proxy else "this user"
    place = root / "proc" / (str(proxy.pid) if proxy else "self")
    status = dict(line.partition(":")[::2] for line in lines_of(place / "status"))
    if "CapEff" not in status:
        return
    # SO_RCVBUFFORCE takes the capability of the first user namespace (socket(7)).
    first = (read(place / "uid_map") or "").split() == FIRST_USER_NAMESPACE
    if first and int(status["CapEff"], 16) >> CAP_NET_ADMIN & 1:
        yield ok("receive-buffer", "net.core.rmem_max", f"{who} has CAP_NET_ADMIN, and may exceed it")
        return
    granted = _sysctl("net.core.rmem_max", root)
    if granted is None:
        yield warn("receive-buffer", "net.core.rmem_max", "cannot be read here; the proxy's log says what is granted")
    elif int(granted) >= wanted:
        yield ok("receive-buffer", "net.core.rmem_max", f"{granted} bytes hold a burst of 20,000 frames")
    else:
        yield warn(
            "receive-buffer",
            "net.core.rmem_max",
            f"{granted} bytes are less than the {wanted} that {who} asks for without CAP_NET_ADMIN: frames of a long "
            "burst are dropped (the proxy takes a greater one when it is started again)",
            f"sysctl -w net.core.rmem_max={wanted}",
        )


def inotify_limits(processes: Processes, proxy: Process | None, root: Path = Path("/")) -> Iterator[Result]:
    """The limits of inotify(7), and what the user of the proxy, or this one, has taken of them."""
    uid = os.geteuid() if proxy is None else proxy.uid
    own = [process for process in processes.all if process.uid == uid]
    # Those of the proxy that runs are among them.
    needed = (0, 0) if proxy else (INSTANCES, WATCHES)
    taken = (sum(process.instances for process in own), sum(len(process.watches) for process in own))
    for what, count, need in zip(("instances", "watches"), taken, needed, strict=True):
        # A user namespace has a limit of its own (namespaces(7), /proc/sys/user).
        settings = (f"fs.inotify.max_user_{what}", f"user.max_inotify_{what}")
        limits = [(int(text), name) for name in settings if (text := _sysctl(name, root)) is not None]
        if not limits:
            continue
        limit, setting = min(limits)
        # One that two processes share, as a proxy and its holder, is counted twice: /proc does not tell it from two.
        found = f"uid {uid} has taken at most {count} of {limit}"
        fix = f"sysctl -w {setting}={max(2 * limit, 2 * (count + need))}"
        if count + need > limit:
            yield fail("inotify-limits", setting, f"{found}; a proxy needs {need}", fix)
        elif count + need > PLENTY * limit:
            yield warn("inotify-limits", setting, found, fix)
        else:
            yield ok("inotify-limits", setting, found)
    setting = "fs.inotify.max_queued_events"
    text = _sysctl(setting, root)
    if text is not None:
        found = f"{text} events wait in order while a link is down, two for each close"
        if int(text) < QUEUED_EVENTS:
            fix = f"sysctl -w {setting}={QUEUED_EVENTS}"
            found += f"; beyond, they merge to one a signal (the kernel's default is {QUEUED_EVENTS})"
            yield warn("inotify-limits", setting, found, fix)
        else:
            yield ok("inotify-limits", setting, found)


def unix_queue(root: Path = Path("/")) -> Iterator[Result]:
    """How many datagrams wait in a Unix socket, before its sender has to."""
    setting = "net.unix.max_dgram_qlen"
    text = _sysctl(setting, root)
    if text is None:
        return
    found = f"{text} frames wait in a socket before their sender has to wait"
    if int(text) < DATAGRAMS:
        found += f"; the kernel's default is {DATAGRAMS} (a socket has what was set when it was made)"
        yield warn("unix-queue", setting, found, f"sysctl -w {setting}={DATAGRAMS}")
    else:
        yield ok("unix-queue", setting, found)


def _sysctl(name: str, root: Path) -> str | None:
    return read(root / "proc/sys" / name.replace(".", "/"))
