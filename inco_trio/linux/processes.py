"""The sockets and inotify watches of all processes, read once from proc(5).

The argument `root` is the directory that contains /proc and /sys. Tests pass a directory with their own files.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import attrs

__all__ = [
    "ENVIRONMENT_MAX",
    "PAUSE",
    "PER_PAUSE",
    "SEARCH_SECONDS",
    "SILENT_MAX",
    "Process",
    "Processes",
    "Search",
    "answered",
    "described",
    "interfaces_of",
    "is_beside",
    "is_proxy_command",
    "is_same_mount_namespace",
    "is_same_system",
    "is_stopped",
    "lines_of",
    "listening_sockets",
    "look",
    "named",
    "packet_sockets",
    "processes_in",
    "read",
    "status_of",
    "unix_sockets",
    "wait_of",
    "working_directory",
]

SEARCH_SECONDS = 10.0
"""Maximum processor time in seconds for a search of the descriptors of all processes.

Any user can open millions of descriptors. A limit of wall-clock time would end searches early on a busy machine.
"""
PER_PAUSE = 64
"""Number of descriptors between two pauses. Without pauses, a search would delay the other threads."""
PAUSE = 0.001
"""Length of such a pause in seconds."""
SILENT_MAX = 4
"""Maximum number of processes that do not answer. After that, a search ends."""
_LOOK = 0.1
"""Pause in seconds between two looks at a thread that reads files of another process."""
_LOOKS = 25
"""The thread hangs if this number of looks in a row find it in the same wait."""
_Result = TypeVar("_Result")
_SOCKET = re.compile(r"socket:\[([0-9]+)\]")
_INOTIFY = re.compile(r"(anon_inode:)?\[?inotify\]?")
_WATCH = re.compile(r"^inotify wd:[0-9a-f]+ ino:([0-9a-f]+) sdev:([0-9a-f]+) ", re.MULTILINE)
_UNIX_SOCKET = re.compile(r"[0-9a-f]+: [0-9A-F]+ [0-9A-F]+ ([0-9A-F]+) [0-9A-F]+ [0-9A-F]+ +([0-9]+) (.*)")
"""A row of /proc/net/unix: number, references, protocol, flags, type, state, inode, and path."""
_S6_STYLE = {"s6-supervise": "s6-svc -d", "runsv": "sv down", "supervise": "svc -d"}
"""The command that stops a service, for each supervisor's process name. Its argument is the service's directory."""
_SUPERVISORS = {"s6-svc": "s6", "sv": "runit", "svc": "daemontools", "systemctl": "systemd"}
"""The supervisor to which each of these commands belongs."""
_LISTENS = 0x10000
"""__SO_ACCEPTCON, the flag of a listening socket in /proc/net/unix (the kernel's include/uapi/linux/net.h)."""
_PROGRAMS = ("inco-trio", "inco_trio", "inco_proxy")
WORDS = 100
"""Maximum number of characters of a command line in `described`."""
_COMMAND = 4096
"""Maximum number of characters of a command line that `described` reads."""
ENVIRONMENT_MAX = 1 << 20
"""Maximum number of characters that are read of the environment of a process.

Any user can make it arbitrarily long (PR_SET_MM_MAP of prctl(2)).
"""
_COMMAND_MAX = 1 << 14
"""Maximum number of characters that are read of a command line. `look` keeps those that `wanted` accepts."""
NS_GET_USERNS = 0xB701
"""The ioctl that opens the user namespace to which a namespace belongs (ioctl_ns(2))."""
_MINOR_BITS = 20
"""Number of bits that the minor number occupies in the device numbers in fdinfo (include/linux/kdev_t.h)."""


def read(path: Path, limit: int = -1) -> str | None:
    """Return the text of a file in /proc or /sys without the last line break, or None if it cannot be read.

    Read at most `limit` characters, if it is not negative.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            return file.read(limit).rstrip("\n")
    except OSError:
        return None


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file in /proc, or one empty line if the file cannot be read."""
    # Do not use splitlines(): a process or file name may contain other line separators.
    return (read(path) or "").split("\n")


def status_of(process: Path) -> dict[str, str]:
    """Return the fields of the file `status` in a process's /proc directory, or {} if it cannot be read."""
    return dict(line.partition(":")[::2] for line in lines_of(process / "status"))


def wait_of(thread: Path) -> str:
    """Return the number of the current wait of a process or thread, counted from its start, or "" if it is runnable.

    `thread` is its directory in /proc.
    """
    status = status_of(thread)
    is_runnable = status.get("State", "").strip().startswith("R")
    return "" if is_runnable else status.get("voluntary_ctxt_switches", "unknown")


def answered(process: Path, call: Callable[[], _Result], default: _Result) -> _Result:
    """Return the result of `call`, which reads files of `process`, a directory in /proc, or `default` if it hangs.

    Any user can let a process wait in execve(2), for example with a FUSE filesystem that does not answer when execve(2)
    closes a file. Some files of this process, in new kernels most of them, then make their readers wait, too. Only
    SIGKILL ends this wait. Therefore a thread calls `call`. If it hangs, it ends later, or with this process.
    Processes of root and of this user are trusted.
    """
    if not _is_of_another_user(process):
        return call()
    results, errors = list[_Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - the caller receives it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # A limit of threads is reached.
        return default
    looks, before = 0, ""
    while looks < _LOOKS:
        thread.join(_LOOK)
        if not thread.is_alive():
            if errors:
                raise errors[0]
            return results[0]
        now = wait_of(Path(f"/proc/self/task/{thread.native_id}"))
        looks, before = looks + 1 if now and now == before else 0, now
    return default


def is_stopped(pid: int, root: Path = Path("/")) -> bool:
    """Return whether a signal or a debugger has stopped a process."""
    return status_of(root / f"proc/{pid}").get("State", "").strip().lower().startswith("t")


def working_directory(pid: int, root: Path = Path("/")) -> Path | None:
    """Return the working directory of a process, or None if it has ended, hangs, or this user may not see it."""
    place = root / f"proc/{pid}"
    try:
        return answered(place, (place / "cwd").readlink, None)
    except OSError:
        return None


@attrs.frozen
class Process:
    """A process with its sockets and inotify watches."""

    pid: int
    name: str
    uid: int
    """The effective user ID."""
    command: tuple[str, ...]
    started: float
    """The start time in seconds since 1970."""
    sockets: frozenset[int]
    """Inode numbers of the open sockets."""
    instances: int
    """The number of inotify descriptors."""
    watches: tuple[tuple[int, int], ...]
    """Device and inode of each watched file."""
    hidden: bool = False
    """Whether this user is not permitted to inspect the descriptors, or the search ended before it reached them.

    `sockets` and `watches` are then empty.
    """
    supervised: str = ""
    """The supervisor's command that stops the process, or an empty string if no supervisor restarts it."""
    groups: frozenset[int] = frozenset()
    """The effective group ID and the supplementary group IDs."""
    capabilities: int = 0
    """The effective capabilities as a bit mask."""
    is_wrapper: bool = False
    """Whether the process runs a proxy as its child, like `sudo` and `timeout`. Their command lines contain its own."""

    @property
    def is_proxy(self) -> bool:
        """Whether the command of the process runs a proxy of inco-trio or its predecessor."""
        return is_proxy_command(self.command) and not self.is_wrapper

    @property
    def serves_boards(self) -> bool:
        """Whether the command of the process serves all boards in a directory."""
        return any(word.partition("=")[0] == "--boards" for word in self.command)

    @property
    def stop(self) -> str | None:
        """The command that stops the process permanently. After kill(1), a supervisor would restart the process.

        It is None if the directory of the process's service is unknown.
        """
        words = shlex.split(self.supervised)
        if words and words[0] != "systemctl" and not words[-1].startswith("/"):
            return None
        # A stopped process handles only SIGKILL.
        return self.supervised or f"kill {'-KILL ' if is_stopped(self.pid) else ''}{self.pid}"

    @property
    def supervision(self) -> str:
        """The service of the process as text, such as `in s6 service /run/service/x`, or `without a supervisor`."""
        return _supervision(self.supervised) or "without a supervisor"

    @property
    def is_holder(self) -> bool:
        """Whether the process is an fd store, which keeps descriptors of other processes."""
        return self.name == "systemd" or self.name.startswith("s6-fdholder")


def described(pid: int, root: Path = Path("/")) -> str:
    """Return the user, the supervisor or parent, and the command line of a proxy.

    Return "" if the process has ended. Its number may then belong to another program.
    """
    place = root / f"proc/{pid}"
    status, command = status_of(place), read(place / "cmdline", _COMMAND)
    words = (command or "").rstrip("\0").split("\0")
    if not is_proxy_command(words) or "Uid" not in status:
        return ""
    parent = status["PPid"].strip()
    name = read(place.parent / parent / "comm")
    started_by = "without a visible parent" if name is None else f"parent {name} ({parent})"
    started_by = _supervision(_supervisor(place, parent)) or started_by
    # Leave out the interpreter and its options.
    first = next((number for number, word in enumerate(words) if word.rpartition("/")[2] in _PROGRAMS), 0)
    text = " ".join(words[first:])
    return f"uid {status['Uid'].split()[1]}, {started_by}, {text if len(text) <= WORDS else text[:WORDS] + '...'}"


def _supervision(supervised: str) -> str:
    """Return the service that the supervisor's command `supervised` stops, as text, or "" if there is none."""
    words = shlex.split(supervised)
    return f"in {_SUPERVISORS[words[0]]} service {words[-1]}" if words else ""


def is_proxy_command(command: Sequence[str]) -> bool:
    """Return whether a command line runs a proxy of inco-trio or its predecessor."""
    words = [os.path.basename(word) for word in command]  # noqa: PTH119 - a word need not be a path
    return "inco_proxy" in words[:2] or ("run" in words and not {"inco-trio", "inco_trio"}.isdisjoint(words))


def named(processes: Sequence[Process]) -> str:
    """Return the PIDs and names of processes as text."""
    return ", ".join(f"{process.pid} ({process.name})" for process in processes)


@attrs.frozen
class Processes:
    """All processes that could be inspected."""

    all: tuple[Process, ...]
    unseen: bool
    """Whether there are processes whose descriptors root can inspect, but this user cannot."""
    mounted: bool
    """Whether /proc is mounted."""
    is_cut: bool = False
    """Whether the search ended after SEARCH_SECONDS or SILENT_MAX, and has not looked at all descriptors."""
    silent: tuple[int, ...] = ()
    """The PIDs of processes that do not answer. `all` does not contain them."""

    def with_socket(self, inode: int) -> list[Process]:
        """Return the processes that have the socket `inode` open."""
        return [process for process in self.all if inode in process.sockets]

    def watching(self, device: int, inode: int) -> list[Process]:
        """Return the processes that watch a file or directory, except fd stores."""
        return [process for process in self.all if (device, inode) in process.watches and not process.is_holder]


class Search:
    """A search of the descriptors of all processes. It ends after SEARCH_SECONDS, and hardly delays other threads.

    It also ends if SILENT_MAX processes do not answer.
    """

    def __init__(self) -> None:
        self._left = SEARCH_SECONDS
        self._looked = 0
        self.is_over = False
        self.silent: list[int] = []
        """The PIDs of processes that do not answer."""

    def inspect(self, process: Path, call: Callable[[], list[_Result]]) -> list[_Result]:
        """Return the result of `call`, which reads files of a process, or [] if the process does not answer."""
        found = answered(process, call, None)
        if found is not None:
            return found
        self.silent.append(int(process.name))
        self.is_over |= len(self.silent) >= SILENT_MAX
        return []

    def descriptors(self, process: Path) -> Iterator[tuple[str, str]]:
        """Yield the number and the target of each descriptor. Raises OSError, or TimeoutError after SEARCH_SECONDS."""
        began = time.thread_time()  # Each process has another thread.
        try:
            with os.scandir(process / "fd") as entries:
                for entry in entries:
                    self._pause(began)
                    try:
                        target = os.readlink(entry.path)  # noqa: PTH115 - faster
                    except FileNotFoundError:
                        continue  # The process has just closed the descriptor.
                    yield entry.name, target
        finally:
            self._left -= time.thread_time() - began

    def _pause(self, began: float) -> None:
        self._looked += 1
        if self._looked % PER_PAUSE == 0:
            time.sleep(PAUSE)
            self.is_over |= time.thread_time() - began > self._left
        if self.is_over:
            raise TimeoutError


def processes_in(proc: Path) -> list[Path]:
    """Return the directories of the processes in /proc: first those of root and of this user, then the others.

    Each group is sorted by PID. A search may end before it has looked at all processes. Raises OSError.
    """
    numbers = sorted(int(name) for name in os.listdir(proc) if name.isdecimal())  # noqa: PTH208 - faster
    return sorted((proc / str(number) for number in numbers), key=_is_of_another_user)


def _is_of_another_user(process: Path) -> bool:
    try:
        return process.stat().st_uid not in (0, os.geteuid())
    except OSError:
        return True  # The process has ended.


def look(
    root: Path = Path("/"), booted: float | None = None, wanted: Callable[[Sequence[str]], bool] = lambda _: True
) -> Processes:
    """Return the processes below `root`/proc whose command line `wanted` accepts, unless they exit during the scan.

    `booted` is the boot time in seconds since 1970 (default: the boot time of this machine).
    """
    since = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) if booted is None else booted
    proc = root / "proc"
    try:
        places = processes_in(proc)
    except OSError:
        places = []
    unseen, parents, search = False, set[int](), Search()

    def inspect(place: Path) -> list[Process]:
        nonlocal unseen
        command = tuple((read(place / "cmdline", _COMMAND_MAX) or "").rstrip("\0").split("\0"))
        if not wanted(command):
            return []
        status = status_of(place)
        times = (read(place / "stat") or "").rpartition(")")[2].split()
        if "Uid" not in status or len(times) < 20:
            return []
        if is_proxy_command(command):
            parents.add(int(status["PPid"]))
        hidden = False
        try:
            sockets, instances, watches = _descriptors(place, search)
        except (PermissionError, TimeoutError) as error:
            sockets, instances, watches, hidden = frozenset(), 0, (), True
            if isinstance(error, PermissionError):
                unseen = os.geteuid() != 0  # Some processes cannot be inspected even by root.
        except OSError:
            return []
        return [
            Process(
                pid=int(place.name),
                name=(read(place / "comm") or ""),
                uid=int(status["Uid"].split()[1]),
                command=command,
                # Field 22 of proc_pid_stat(5). `times` starts with field 3.
                started=since + int(times[19]) / os.sysconf("SC_CLK_TCK"),
                sockets=sockets,
                instances=instances,
                watches=watches,
                hidden=hidden,
                supervised=_supervisor(place, status["PPid"].strip()) if is_proxy_command(command) else "",
                capabilities=int(status.get("CapEff", "0"), 16),
                groups=frozenset(map(int, status["Gid"].split()[1:2] + status.get("Groups", "").split())),
            )
        ]

    found = list[Process]()
    for place in places:
        found += search.inspect(place, functools.partial(inspect, place))
        if len(search.silent) >= SILENT_MAX:
            break
    # Each proxy has an inotify instance, even if it has started another one. A wrapper, such as uv, can have sockets.
    marked = (attrs.evolve(each, is_wrapper=each.pid in parents and each.instances == 0) for each in found)
    ordered = tuple(sorted(marked, key=lambda each: each.pid))
    return Processes(ordered, unseen, bool(places), search.is_over, tuple(search.silent))


def _supervisor(place: Path, parent: str) -> str:
    """Return the supervisor's command that stops a process, or an empty string if the process has no supervisor."""
    above = place.parent / parent
    name = read(above / "comm") or ""
    # Any user can give a process the name of a supervisor, and the directory of a service as its working directory.
    is_trusted = status_of(above).get("Uid", "-1 -1").split()[1] in ("0", str(os.geteuid()))
    if is_trusted and (stop := _S6_STYLE.get(name)):
        # The service directory is the working directory of the supervisor and of the process that it starts. This user
        # may be unable to see the former. The supervisor's last argument is only the name of the service.
        service = (read(above / "cmdline", _COMMAND_MAX) or "").rstrip("\0").rpartition("\0")[2]
        seen = [working_directory(int(pid), place.parent.parent) for pid in (parent, place.name)]
        if seen[0] is not None:
            service = str(seen[0])
        elif seen[1] is not None and seen[1].name == service:
            service = str(seen[1])
        return f"{stop} {shlex.quote(service)}"
    # See cgroups(7). The line of the unified hierarchy, or of systemd's own hierarchy, ends with the unit's name.
    groups = [line for line in lines_of(place / "cgroup") if line.startswith("0::") or ":name=systemd:" in line]
    units = [unit for group in groups if (unit := group.rpartition("/")[2]).endswith(".service")]
    if name != "systemd" or not units:
        return ""
    manager = "systemctl" if parent == "1" else "systemctl --user"
    return f"{manager} stop {shlex.quote(units[0])}"


def _descriptors(place: Path, search: Search) -> tuple[frozenset[int], int, tuple[tuple[int, int], ...]]:
    """Return the sockets, the number of inotify descriptors, and the watched files of a process. Raises OSError."""
    sockets: set[int] = set()
    instances = 0
    watches: list[tuple[int, int]] = []
    for fd, target in search.descriptors(place):
        if match := _SOCKET.fullmatch(target):
            sockets.add(int(match[1]))
        elif _INOTIFY.fullmatch(target):
            instances += 1
            watches += _watches(read(place / "fdinfo" / fd) or "")
    return frozenset(sockets), instances, tuple(watches)


def _watches(fdinfo: str) -> Iterator[tuple[int, int]]:
    for inode, device in _WATCH.findall(fdinfo):
        number = int(device, 16)
        yield os.makedev(number >> _MINOR_BITS, number & (1 << _MINOR_BITS) - 1), int(inode, 16)


def packet_sockets(index: int, ethertype: int, root: Path = Path("/")) -> list[int]:
    """Return the inodes of the packet sockets for an interface and an EtherType in this network namespace."""
    # Use thread-self, because other threads may be in other network namespaces. Columns: sk, references, type,
    # protocol, interface, running, memory, user, inode.
    rows = (line.split() for line in lines_of(root / "proc/thread-self/net/packet")[1:])
    return [int(row[8]) for row in rows if len(row) == 9 and int(row[3], 16) == ethertype and int(row[4]) == index]


def is_beside(process: Process, inodes: Collection[int], root: Path = Path("/")) -> bool:
    """Return whether one of these packet or Unix sockets is in the network namespace of a process.

    Every user may read this, also for a process whose descriptors are hidden.
    """
    place = root / f"proc/{process.pid}/net"
    rows = (line.split() for line in lines_of(place / "packet")[1:])
    packet = {int(row[8]) for row in rows if len(row) == 9}
    return not packet.union(inode for _, inode, _ in _unix_sockets(place / "unix")).isdisjoint(inodes)


def interfaces_of(process: Process, root: Path = Path("/")) -> list[str]:
    """Return the names of the interfaces that the packet sockets of a process are bound to.

    Call this in the network namespace of the process.
    """
    rows = (line.split() for line in lines_of(root / f"proc/{process.pid}/net/packet")[1:])
    indexes = dict.fromkeys(int(row[4]) for row in rows if len(row) == 9 and int(row[8]) in process.sockets)
    names = dict(socket.if_nameindex())
    return [names[index] for index in indexes if index in names]


def listening_sockets(process: Process, root: Path = Path("/")) -> list[Path]:
    """Return the paths of the Unix sockets on which a process listens, as paths that this process can open."""
    paths = [
        path
        for flags, inode, path in _unix_sockets(root / f"proc/{process.pid}/net/unix")
        if flags & _LISTENS and inode in process.sockets and path.startswith("/")
    ]
    above = Path("/") if is_same_mount_namespace(process, root) else root / f"proc/{process.pid}/root"
    return [above / path.lstrip("/") for path in paths]


def is_same_mount_namespace(process: Process, root: Path = Path("/")) -> bool:
    """Return whether a process sees the same files as this one. If that is unknown, return True."""
    try:
        place, own = root / f"proc/{process.pid}", root / "proc/self/ns/mnt"
        return answered(place, lambda: (place / "ns/mnt").samefile(own), default=True)
    except OSError:
        return True


def is_same_system(process: Process, root: Path = Path("/")) -> bool:
    """Return whether a process sees the programs of this system, not those of a container or of another user.

    The mount namespace must belong to the user namespace of this process. Another user can create a user namespace and,
    in it, mount any program over another one.
    """
    place = root / f"proc/{process.pid}"
    return answered(place, lambda: _is_same_system(place, root), default=False)


def _is_same_system(place: Path, root: Path) -> bool:
    try:
        fd = os.open(place / "ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = fcntl.ioctl(fd, NS_GET_USERNS)
        finally:
            os.close(fd)
        try:
            is_ours = os.path.samestat(os.fstat(owner), (root / "proc/self/ns/user").stat())
        finally:
            os.close(owner)
        return is_ours and (place / "root").samefile(root)
    except OSError:
        return False


def unix_sockets(path: str, root: Path = Path("/")) -> list[int]:
    """Return the inodes of the sockets in this network namespace that are bound to `path`."""
    return [inode for _, inode, bound in _unix_sockets(root / "proc/thread-self/net/unix") if bound == path]


def _unix_sockets(table: Path) -> Iterator[tuple[int, int, str]]:
    """Yield the flags, the inode and the path of each Unix socket that is bound to a path."""
    # The path may contain spaces and, as the kernel does not escape them, line breaks: ignore the rest of such a path.
    for line in lines_of(table):
        if row := _UNIX_SOCKET.fullmatch(line):
            yield int(row[1], 16), int(row[2]), row[3]
