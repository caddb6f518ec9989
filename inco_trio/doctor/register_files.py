"""Checks of the registers: permissions, file types, and whether inotify reports writes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pwd
import shlex
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from inco_trio.doctor.result import Result, fail, ok, permit, warn
from inco_trio.doctor.space import mount_point, mount_points, space
from inco_trio.linux.capabilities import CAP_DAC_OVERRIDE
from inco_trio.linux.files import kind_of_file
from inco_trio.linux.processes import Process
from inco_trio.linux.users import user_name
from inco_trio.registers.diagnose import filesystem, open_registers, unreported_type
from inco_trio.service.descriptions import USER, reading
from inco_trio.signals import Direction, Signal
from inco_trio.trust import ACL, Trust, UnfitFileError, open_trusted

__all__ = ["denied", "directory", "held_open", "kinds", "removal", "reported", "trusted", "unreadable", "watched"]

OTHER_INODES = frozenset({"overlay", "btrfs"})
"""Filesystems on which stat(2) reports a different device number than the watches in /proc."""


def directory(
    path: Path, *, access: bool = True, registers: Collection[str] = (), problems: Collection[str] = ()
) -> Iterator[Result]:
    """Check that an IRQ directory exists, and its free space (see `space`).

    With `access`, check that this user may use it.
    """
    quoted, uid = shlex.quote(str(path)), os.geteuid()
    try:
        status = path.stat()
    except FileNotFoundError:
        text = "does not exist: a proxy creates it when it starts, and 60 s after a removal"
        yield warn("directory", path, text, _creation(quoted))
        return
    except OSError as error:
        yield fail("directory", path, f"cannot be inspected: {error.strerror}")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield fail("directory", path, "not a directory: use another path, or remove it", f"rm {quoted}")
    elif _is_read_only(path):
        text = "is on a read-only filesystem: no state file can be written"
        yield fail("directory", path, text, f"mount -o remount,rw {shlex.quote(str(mount_point(path)))}")
    elif not access or os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        yield ok("directory", path, f"uid {uid} may read and write it" if access else "is a directory")
        yield from space(path, registers, problems)
    else:
        yield fail("directory", path, f"uid {uid} may not read and write it", permit(path, "u+rwx"))


def _creation(quoted: str) -> str:
    """Return the command that creates a directory.

    If root runs the doctor and the user of the services exists, the command makes this user the owner.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(USER)
            return f"install -d -o {USER} -g {USER} {quoted}"
    return f"mkdir -p {quoted}"


def _is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False  # The path was removed.


def removal(path: Path, mode: int) -> str:
    """Return the command that frees a path. It moves a directory that is not empty. `mode` is from lstat(2)."""
    quoted = shlex.quote(str(path))
    # A mount point is never a symlink, but its parent can be one.
    if path.parent.resolve() / path.name in mount_points():
        return f"umount {quoted}"
    if not stat.S_ISDIR(mode):
        return f"rm {quoted}"
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        if not any(entries):
            return f"rmdir {quoted}"
    names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
    return f"mv {quoted} {shlex.quote(str(next(name for name in names if not os.path.lexists(name))))}"


def trusted(path: Path, trust: Trust) -> Iterator[Result]:
    """Check that no untrusted user can redirect the path of an IRQ directory or write to the directory."""
    try:
        fd, _ = open_trusted(path, trust)
    except UnfitFileError as error:
        # Do not advise chown(1) for a directory above: it may belong to other programs.
        is_own = (error.strerror or "").startswith(f"not trusted: {path} belongs to ")
        fix = f"chown {trust.user} {shlex.quote(str(path))}" if is_own else None
        remedy = f"{error.remedy}, or make {user_name(trust.user)} the owner" if is_own else error.remedy
        yield warn("trusted", path, f"{error.strerror}; {remedy}", fix)
    except OSError:
        pass  # `directory` reports this error.
    else:
        os.close(fd)
        yield ok("trusted", path, "only trusted users can change its path and its files")


def kinds(signals: Iterable[Signal], *, access: bool = True) -> Iterator[Result]:
    """Check that one directory's registers are regular files. With `access`, check that this user may use them.

    Yield a single result if all of them are.
    """
    signals = tuple(signals)
    faults = [fault for signal in signals for fault in _register(signal, access=access)]
    yield from faults
    if not faults:
        names = ", ".join(dict.fromkeys(signal.register for signal in signals))
        yield ok("registers", signals[0].directory, f"{names}: regular files, or not created yet")


def _register(signal: Signal, *, access: bool) -> Iterator[Result]:
    path, uid = signal.path, os.geteuid()
    try:
        status = path.lstat()
    except OSError:
        return  # Not an error here: the proxy creates a missing file, and `directory` reports other errors.
    if not stat.S_ISREG(status.st_mode):
        text = f"{kind_of_file(status.st_mode)}, not a regular file: the proxy refuses it"
        yield fail("registers", path, text, removal(path, status.st_mode))
        return
    use, verb = (os.R_OK, "read") if signal.direction is Direction.OUTBOUND else (os.W_OK, "write")
    # `directory` reports a read-only filesystem.
    if access and not os.access(path, use, effective_ids=True) and not _is_read_only(path):
        yield fail("registers", path, f"uid {uid} may not {verb} it", permit(path, f"u+{verb[0]}"))


def denied(signals: Iterable[Signal], proxy: Process) -> Iterator[Result]:
    """Check the owner and mode of registers that a proxy of another user was not permitted to use.

    Name the first part of the path that denies the access. The check ignores ACLs, so it must not examine registers
    that the proxy can use.
    """
    found: dict[Path, Result] = {}
    for signal in signals:
        use, verb = (stat.S_IRUSR, "read") if signal.direction is Direction.OUTBOUND else (stat.S_IWUSR, "write")
        needed = [(signal.directory, stat.S_IXUSR, "use", "u+rwx"), (signal.path, use, verb, f"u+{verb[0]}")]
        if not os.path.lexists(signal.path):
            needed = [(signal.directory, stat.S_IWUSR | stat.S_IXUSR, "create files in", "u+rwx")]
        if denial := _denial(signal.directory, needed, proxy):
            path, text, mode = denial
            text += "" if mode else ": let this user search it, or use another IRQ directory"
            found.setdefault(path, fail("registers", path, text, _permission(path, mode, proxy)))
    yield from found.values()


def _permission(path: Path, mode: str, proxy: Process) -> str | None:
    """Return the command that gives a proxy the permission `mode`. Return None for a directory above the registers."""
    # Do not advise chown(1) for a directory above: it may belong to other programs, as /root does.
    if not mode:
        return None
    # The application that owns a trigger must still be able to write it.
    if mode == "u+r" and path.lstat().st_uid not in (0, proxy.uid):
        return f"chmod a+r {shlex.quote(str(path))}"
    return permit(path, mode, proxy.uid)


def unreadable(path: Path, proxy: Process) -> tuple[str, str | None] | None:
    """Return why a proxy may not read a file, as far as owners and modes show, and the command that permits it.

    Return None if the proxy may read it, or if an ACL can grant the access.
    """
    path = Path(os.path.realpath(path))
    if any(_has_acl(each) for each in (path, *path.parents)):
        return None
    denial = _denial(
        path.parent, [(path.parent, stat.S_IXUSR, "search", ""), (path, stat.S_IRUSR, "read", "u+r")], proxy
    )
    if denial is None:
        return None
    text = f"{denial[1].removesuffix(' it')} {denial[0]}"
    if denial[0] != path or not proxy.groups:
        return f"{text}: change its owner or mode", None
    gid = min(proxy.groups)
    with contextlib.suppress(KeyError):
        # The process need not have the group of its user in the user database.
        if (own := pwd.getpwuid(proxy.uid).pw_gid) in proxy.groups:
            gid = own
    return text, reading(path, proxy.uid, gid)


def _has_acl(path: Path) -> bool:
    try:
        os.getxattr(path, ACL)
    except OSError:
        return False
    return True


_Needed = tuple[Path, int, str, str]
"""A path, the permission bits of its owner that a proxy needs, a verb, and the mode that chmod(1) would set."""


def _denial(directory: Path, needed: Sequence[_Needed], proxy: Process) -> tuple[Path, str, str] | None:
    """Return the first part of a path that denies a proxy the access, with a text and the missing mode, or None.

    Check the directories above `directory`, then the paths in `needed`.
    """
    if proxy.capabilities >> CAP_DAC_OVERRIDE & 1:
        return None
    # Search the directories of symlinks before those to which they lead.
    above = [*reversed(directory.parents), *reversed(Path(os.path.realpath(directory)).parents)]
    search: list[_Needed] = [(path, stat.S_IXUSR, "search", "") for path in dict.fromkeys(above)]
    for path, bits, verb, mode in (*search, *needed):
        try:
            status = path.stat(follow_symlinks=mode not in ("u+r", "u+w"))
        except OSError:
            return None  # `directory` reports this error.
        shift = 0 if status.st_uid == proxy.uid else 3 if status.st_gid in proxy.groups else 6
        if status.st_mode << shift & bits != bits:
            return path, f"process {proxy.pid} of {user_name(proxy.uid)} may not {verb} it", mode
    return None


def reported(path: Path, root: Path = Path("/")) -> Iterator[Result]:
    """Check that inotify reports writes in an IRQ directory.

    The check writes nothing, because other processes would see the file or notification. The filesystem type shows
    whether writes by other hosts cause events. Opening the directory shows whether inotify works.
    """
    existing, kind = filesystem(path, root)
    if reason := unreported_type(kind):
        text = f"is on a filesystem of type {kind}: {reason}; use a local filesystem, such as tmpfs"
        yield (fail if kind in ("proc", "sysfs") else warn)("filesystem", existing, text)
        return
    on = f"is on a filesystem of type {kind}" if kind else "is on a filesystem of unknown type"
    try:
        seen = _opening_is_reported(existing)
    except OSError as error:
        yield fail("filesystem", existing, f"{on}; cannot watch it: {_reason(error)}")
        return
    if seen:
        yield ok("filesystem", existing, f"{on}; inotify reports its events")
    else:
        yield fail("filesystem", existing, f"{on}; inotify does not report its events; use tmpfs")


def _reason(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        # inotify_init(2) fails with EMFILE if either limit is reached.
        return "raise fs.inotify.max_user_instances or ulimit -n"
    return str(error.strerror)


def _opening_is_reported(path: Path) -> bool:
    """Return whether inotify reports the opening of a directory. Raises OSError."""
    from inco_trio.linux.inotify import IN_OPEN, Inotify, parse_events

    with contextlib.closing(Inotify()) as inotify:
        inotify.watch(str(path), IN_OPEN)
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        buffer = memoryview(bytearray(4096))
        return any(event.mask & IN_OPEN for event in parse_events(buffer[: inotify.read_into(buffer)]))


def held_open(signals: Iterable[Signal], proxies: Iterable[Process]) -> Iterator[Result]:
    """Check that no other process holds a register open, which would hide notifications."""
    ours = {process.pid for process in proxies}
    for signal, pid, text in open_registers(signals):
        if pid not in ours:
            yield warn("open", signal.path, text)


def watched(signals: Iterable[Signal], proxy: Process, *, fit: bool = True) -> Iterator[Result]:
    """Check that a running proxy watches the trigger files.

    `fit` is whether the proxy can use the directory. Otherwise, reloading does not help.
    """
    triggers = {}
    for signal in signals:
        if signal.direction is Direction.OUTBOUND:
            with contextlib.suppress(OSError):  # The trigger file does not exist yet; the proxy creates it.
                status = signal.path.lstat()
                if stat.S_ISREG(status.st_mode):  # `kinds` reports other files.
                    triggers[signal] = (status.st_dev, status.st_ino)
    if not triggers or filesystem(next(iter(triggers)).path)[1] in OTHER_INODES:
        return
    missed = [signal for signal, place in triggers.items() if place not in proxy.watches]
    for signal in missed:
        text = f"process {proxy.pid} does not watch it, so the proxy misses notifications"
        if denials := list(denied([signal], proxy)):
            yield from denials
        elif fit:
            yield fail("watched", signal.path, text, f"kill -HUP {proxy.pid}")
        else:
            yield fail("watched", signal.path, f"{text}: fix the problem of its directory first")
    if not missed:
        names = ", ".join(str(signal.path) for signal in triggers)
        yield ok("watched", names, f"process {proxy.pid} watches them")
