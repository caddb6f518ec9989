"""The check of the free space for registers, which names what fills the filesystem."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from inco_trio import real_clock
from inco_trio.doctor.result import Result, fail, warn
from inco_trio.linux.processes import lines_of

__all__ = ["mount_point", "mount_points", "searching_once", "space"]

ENTRIES_MAX = 20_000
"""Maximum number of directory entries that the search reads."""
PATIENCE = 1.0
"""Maximum time in seconds that the search takes. A single slow system call can exceed it."""
_NAMED = 3
"""Maximum number of files or directories that a result names."""

_Found = tuple[dict[Path, int], dict[Path, int]]
"""The sizes of files, and the numbers of entries of directories."""
_known: ContextVar[dict[Path, _Found] | None] = ContextVar("inco_trio.searched", default=None)
"""What was found in each filesystem, by its mount point, or None outside `searching_once`."""


def mount_points() -> set[Path]:
    """Return the mount points of this mount namespace without symlinks, or an empty set if they are unknown."""
    # The kernel writes a space as \040 (proc_pid_mountinfo(5)). The mount point is the fifth field.
    fields = (line.split(" ") for line in lines_of(Path("/proc/self/mountinfo")) if line)
    return {Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field[4])) for field in fields}


def mount_point(path: Path) -> Path:
    """Return the mount point of the filesystem that contains `path`."""
    around = [point for point in mount_points() if path.resolve().is_relative_to(point)]
    return max(around, key=lambda point: len(point.parts), default=path)


def space(path: Path, registers: Collection[str] = (), problems: Collection[str] = ()) -> Iterator[Result]:
    """Check that the filesystem of an IRQ directory has free space and inodes for state files.

    `registers` contains the names of the registers in the directory, and `problems` what a proxy reports about them.
    """
    try:
        free = os.statvfs(path)
    except OSError:
        return  # The path was removed.
    has_failed, over_quota = (
        any(os.strerror(code) in problem for problem in problems) for code in (errno.ENOSPC, errno.EDQUOT)
    )
    # A total of 0 means that the filesystem has no limit.
    no_space, no_inodes = free.f_blocks and not free.f_bavail, free.f_files and not free.f_favail
    if not (no_space or no_inodes or has_failed or over_quota):
        return
    mount = mount_point(path)
    files, entries = _searched(path, mount)
    for name in registers:
        files.pop(path.resolve() / name, None)
    quoted, cannot = shlex.quote(str(mount)), "cannot" if has_failed else "may be unable to"
    result = fail if has_failed or over_quota else warn
    if no_inodes:
        text = f"the filesystem {mount} has no free inodes, so the proxy {cannot} create files"
        text += f"{_most('the directories with the most entries', entries)}: remove or move what is not needed"
        yield result("space", path, text, f"find {quoted} -xdev | sed 's|/[^/]*$||' | sort | uniq -c | sort -n | tail")
        if not (no_space or over_quota):
            return
    text = f"the filesystem {mount} has no free space, so the proxy {cannot} write"
    remedy = "remove or move what is not needed"
    if over_quota:
        text = f"a disk quota of the filesystem {mount} is used up, so the proxy cannot write"
        remedy += ", or raise the quota"
    elif not no_space:
        text = f"a write to the filesystem {mount} failed, although it has free space now"
        remedy = "the proxy retries; if this result remains, examine the quotas"
    elif 2 * sum(files.values()) < (free.f_blocks - free.f_bfree) * free.f_frsize:
        remedy += "; `ls -l /proc/[0-9]*/fd | grep deleted` lists deleted files that are still open and occupy space"
    kib = {file: f"{size // 1024:,} KiB" for file, size in files.items()}
    text += f"{_most('the largest files found', files, kib)}: {remedy}"
    yield result("space", path, text, f"du -axk {quoted} | sort -n | tail")


def _most(what: str, numbers: Mapping[Path, int], texts: Mapping[Path, object] | None = None) -> str:
    """Return a text with the paths that have the largest numbers, or "" if there are none."""
    largest = sorted(filter(numbers.get, numbers), key=lambda path: -numbers[path])[:_NAMED]
    return f"; {what}: " + ", ".join(f"{path} ({(texts or numbers)[path]})" for path in largest) if largest else ""


@contextlib.contextmanager
def searching_once() -> Iterator[None]:
    """Search each filesystem only once while the block runs: a machine can have many IRQ directories in one."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _searched(path: Path, mount: Path) -> _Found:
    """Return copies of the results of `_search`, or of an earlier search in the same filesystem."""
    known = _known.get()
    found = _search(path, mount) if known is None or mount not in known else known[mount]
    if known is not None:
        known[mount] = found
    return dict(found[0]), dict(found[1])


def _search(path: Path, mount: Path) -> _Found:
    """Return the size in bytes of files, and the number of entries of directories, in the filesystem at `mount`.

    Search `path` first. The search ends after ENTRIES_MAX entries or PATIENCE.
    """
    files, entries = dict[Path, int](), dict[Path, int]()
    others, deadline, total = mount_points(), real_clock.monotonic() + PATIENCE, 0
    queue = deque(dict.fromkeys((path.resolve(), mount)))
    while queue:
        directory = queue.popleft()
        with contextlib.suppress(OSError), os.scandir(directory) as found:
            for entry in found:
                if total == ENTRIES_MAX or real_clock.monotonic() > deadline:
                    return files, entries
                total += 1
                entries[directory] = entries.get(directory, 0) + 1
                here = Path(entry.path)
                # Do not call stat(2) on a mount point: another filesystem may not answer.
                if here in others:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(OSError):  # The file was removed.
                        files[here] = entry.stat(follow_symlinks=False).st_blocks * 512
                elif here != path.resolve():
                    queue.append(here)
    return files, entries
