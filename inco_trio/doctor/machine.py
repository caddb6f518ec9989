"""Checks of the machine: capabilities and kernel limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from inco_trio.doctor.result import Result, fail, ok, warn
from inco_trio.linux.capabilities import CAP_NET_ADMIN, CAP_NET_RAW
from inco_trio.linux.processes import SEARCH_SECONDS, SILENT_MAX, Process, Processes, read, status_of

__all__ = ["capability", "inotify_limits", "proc", "receive_buffer", "unix_queue"]

QUEUED_EVENTS = 16384
"""The kernel's default for fs.inotify.max_queued_events."""
INSTANCES = 2
"""Number of inotify instances that a proxy uses: one for the triggers, one for the sockets of a `unix:` link."""
WATCHES = 64
"""Number of inotify watches for a typical signal table: one per trigger, directory and parent directory."""
PLENTY = 0.9
"""Fraction of a limit above which the check warns."""
DATAGRAMS = 10
"""The kernel's default for net.unix.max_dgram_qlen."""
FIRST_USER_NAMESPACE = ["0", "0", "4294967295"]
"""The content of uid_map in the initial user namespace (user_namespaces(7))."""


def proc(processes: Processes) -> Iterator[Result]:
    """Yield a warning if /proc is not mounted, or could not be searched completely."""
    if not processes.mounted:
        text = "not mounted: cannot inspect processes, limits and filesystems"
        yield warn("proc", "/proc", text, "mount -t proc proc /proc")
    missed = "doctor may have missed proxies and programs that use registers"
    for pid in processes.silent:
        uid = status_of(Path(f"/proc/{pid}")).get("Uid", "unknown").split()[0]
        text = f"the process of uid {uid} does not answer, because it waits in the kernel, for example for a filesystem"
        yield warn("proc", f"/proc/{pid}", f"{text}: {missed}")
    if processes.is_cut:
        limit = f"{SEARCH_SECONDS:g} s of processor time"
        limit = f"{SILENT_MAX} processes that do not answer" if len(processes.silent) >= SILENT_MAX else limit
        yield warn("proc", "/proc", f"the search of all descriptors ended after {limit}: {missed}")


def capability(link: str, root: Path = Path("/")) -> Iterator[Result]:
    """Check that this process is permitted to open a packet socket."""
    status = status_of(root / "proc/self")
    if "CapEff" not in status:
        return
    uid, gid = int(status["Uid"].split()[1]), int(status["Gid"].split()[1])
    if int(status["CapEff"], 16) >> CAP_NET_RAW & 1:
        yield ok("capability", link, f"this user (uid {uid}) has CAP_NET_RAW")
    elif uid == 0:
        text = "root does not have CAP_NET_RAW: start the container with --cap-add NET_RAW"
        yield fail("capability", link, text)
    else:
        # Do not suggest setcap(8): it would give the capability to every program that this Python runs.
        fix = (
            f"setpriv --reuid {uid} --regid {gid} --init-groups --inh-caps +net_raw --ambient-caps +net_raw "
            f"inco-trio run {link}"
        )
        yield fail("capability", link, f"this user (uid {uid}) does not have CAP_NET_RAW", fix)


def receive_buffer(
    proxy: Process | None, wanted: int, granted: int | None = None, root: Path = Path("/")
) -> Iterator[Result]:
    """Check that packet sockets of `proxy` (default: of this process) get a receive buffer of `wanted` bytes.

    `granted` is the buffer size of the running proxy. A proxy keeps its buffer after it has dropped the capability
    CAP_NET_ADMIN.
    """
    who = f"process {proxy.pid}" if proxy else "this user"
    place = root / "proc" / (str(proxy.pid) if proxy else "self")
    status = status_of(place)
    if "CapEff" not in status:
        return
    check, setting = "receive-buffer", "net.core.rmem_max"
    if granted is not None and granted >= wanted:
        yield ok(check, setting, f"{who} already has a receive buffer of {granted} bytes")
        return
    # SO_RCVBUFFORCE needs CAP_NET_ADMIN in the initial user namespace (socket(7)).
    first = (read(place / "uid_map") or "").split() == FIRST_USER_NAMESPACE
    if first and int(status["CapEff"], 16) >> CAP_NET_ADMIN & 1:
        yield ok(check, setting, f"{who} has CAP_NET_ADMIN, and may exceed this limit")
        return
    limit = _sysctl(setting, root)
    if limit is None:
        yield warn(check, setting, "cannot be read in this network namespace: see the buffer size in the proxy's log")
    elif int(limit) >= wanted:
        yield ok(check, setting, f"{limit} bytes are enough for a burst of 20,000 frames")
    else:
        text = f"{limit} bytes: {who} without CAP_NET_ADMIN needs {wanted}, or the kernel drops frames of long bursts"
        yield warn(check, setting, f"{text} (restart the proxy after a change)", f"sysctl -w {setting}={wanted}")


def inotify_limits(processes: Processes, proxy: Process | None, root: Path = Path("/")) -> Iterator[Result]:
    """Check how close the user of the proxy (default: this user) is to the inotify limits."""
    uid = os.geteuid() if proxy is None else proxy.uid
    own = [process for process in processes.all if process.uid == uid]
    # `used` already includes the instances and watches of a running proxy.
    needed = (0, 0) if proxy else (INSTANCES, WATCHES)
    used = (sum(process.instances for process in own), sum(len(process.watches) for process in own))
    for what, count, need in zip(("instances", "watches"), used, needed, strict=True):
        # Each user namespace also has its own limit (/proc/sys/user, see namespaces(7)).
        settings = (f"fs.inotify.max_user_{what}", f"user.max_inotify_{what}")
        limits = [(int(text), name) for name in settings if (text := _sysctl(name, root)) is not None]
        if not limits:
            continue
        limit, setting = min(limits)
        # This is an upper bound: a descriptor shared with the fd store counts twice (/proc does not show sharing).
        found = f"uid {uid} uses at most {count} of {limit}"
        fix = f"sysctl -w {setting}={max(2 * limit, 2 * (count + need))}"
        if count + need > limit:
            yield fail("inotify-limits", setting, f"{found}; a proxy needs {need}", fix)
        elif count + need > PLENTY * limit:
            yield warn("inotify-limits", setting, found, fix)
        else:
            yield ok("inotify-limits", setting, found)
    found = "events can be queued while a link is down, two for each close"
    harm = "further events merge into one per signal"
    yield from _at_least(QUEUED_EVENTS, "inotify-limits", "fs.inotify.max_queued_events", found, harm, root)


def unix_queue(root: Path = Path("/")) -> Iterator[Result]:
    """Check how many datagrams a Unix socket queues before its sender has to wait."""
    found = "frames fit in the queue of a socket before the sender has to wait"
    harm = "a socket keeps the value that was set when it was created"
    yield from _at_least(DATAGRAMS, "unix-queue", "net.unix.max_dgram_qlen", found, harm, root)


def _at_least(default: int, check: str, setting: str, found: str, note: str, root: Path) -> Iterator[Result]:
    """Check that a setting is not less than the kernel's default."""
    text = _sysctl(setting, root)
    if text is None:
        return
    if int(text) < default:
        found = f"{text} {found}; {note} (kernel default: {default})"
        yield warn(check, setting, found, f"sysctl -w {setting}={default}")
    else:
        yield ok(check, setting, f"{text} {found}")


def _sysctl(name: str, root: Path) -> str | None:
    return read(root / "proc/sys" / name.replace(".", "/"))
