"""Open the directory of registers or of a socket so that no untrusted user can redirect its path to another directory.

This module opens each component of the path in turn and resolves symlinks itself (path_resolution(7)). Each directory
and symlink must belong to root, to the user of this process or to the configured owner. Everything below a directory
that the configured owner owns must also belong to that owner. No other user may be able to rename a component.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from pathlib import Path

import attrs

from inco_trio.linux.files import TARGETS_MAX, fuse_user, mount_id
from inco_trio.linux.process import overflow_uid
from inco_trio.linux.users import is_private_group, user_name

__all__ = ["Trust", "UnfitFileError", "open_trusted"]

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITERS = stat.S_IWGRP | stat.S_IWOTH
SYMLINKS_MAX = 40
"""Maximum number of symlinks to follow in a path, the same as in the kernel."""
STANDARD = frozenset({"/", "/dev", "/dev/shm", "/home", "/run", "/run/user", "/tmp", "/var", "/var/tmp"})  # noqa: S108
"""Directories that belong to root on every system (hier(7), file-hierarchy(7))."""
ACL = "system.posix_acl_access"


class UnfitFileError(OSError):
    """A file or directory exists but cannot be used, for example as a register or an IRQ directory."""

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))
        self.remedy = remedy


@attrs.frozen(slots=False, repr=False)
class Trust:
    """The users who may change IRQ directories, besides root and the user of this process."""

    owner: int | None = None
    group: int | None = None
    """The group whose members may change the files in an IRQ directory, but not the directories above it."""
    user: int = attrs.Factory(os.geteuid)
    """The proxy's user ID (default: the effective user ID of this process)."""

    @property
    def delegated(self) -> bool:
        """Whether another user is trusted. This user could mount a FUSE filesystem over a directory or a register."""
        return self.group is not None or self.owner not in (None, 0, self.user)

    def shares(self, found: os.stat_result) -> bool:
        """Return whether a user other than root and this process's user may change the file names in a directory."""
        return found.st_uid not in (0, self.user) or bool(found.st_mode & stat.S_IWGRP)


def open_trusted(
    path: Path, trust: Trust, *, make: bool = False, ancestor: bool = False, entries: bool = True
) -> tuple[int, os.stat_result]:
    """Return a descriptor (O_PATH) of the directory at `path`, and its status. With `make`, create it if it is missing.

    With `ancestor`, the path leads to an ancestor of an IRQ directory, so other users may write to a sticky directory.
    Without `entries`, any user may own the directory and change its entries, but not replace the directory.
    Raises OSError, or UnfitFileError if an untrusted user could replace the directory or change its files.
    """
    walk = _Walk(path, trust, entries=entries)
    try:
        walk.run(make=make, ancestor=ancestor)
    except OSError as error:
        os.close(walk.fd)
        error.filename = str(path)
        raise
    return walk.fd, walk.found


class _Walk:
    """The resolution of one path. `fd` is the descriptor of the last directory that has been opened."""

    def __init__(self, path: Path, trust: Trust, *, entries: bool) -> None:
        self._path = path
        self._trust = trust
        self._entries = entries
        self._names = deque(Path(os.path.abspath("."), path).parts[1:] if not path.is_absolute() else path.parts[1:])  # noqa: PTH100
        self._symlinks = self._in_targets = 0
        self._below: int | None = None
        """The configured owner once a directory or symlink of this owner has been passed; None before."""
        self._place = "/"
        self.fd = os.open("/", _DIRECTORY)
        self.found = os.fstat(self.fd)
        self._mounts: set[int] = set()
        """The IDs of the root directory's mount and of the mounts that `_check_fuse` has checked."""

    def run(self, *, make: bool, ancestor: bool) -> None:
        self._check_owner(self.found)
        with contextlib.suppress(FileNotFoundError):
            self._mounts.add(mount_id(self.fd))
        while self._names:
            self._check_writers(final=False)
            name = self._names.popleft()
            try:
                fd = os.open(name, _DIRECTORY, dir_fd=self.fd)
            except NotADirectoryError:
                self._follow_symlink(name)
                continue
            except FileNotFoundError:
                if not make:
                    raise
                fd = self._make(name)
            os.close(self.fd)
            self.fd = fd
            self._place = os.path.join(self._place, name)  # noqa: PTH118 - faster, and called for each component
            self._check_fuse()  # Call this before fstat(2), which waits for the process that serves the files.
            # In a sticky directory, the owner of this directory may rename it.
            any_owner = not self._entries and not self._names and not self.found.st_mode & _WRITERS
            self.found = os.fstat(fd)
            if not any_owner:
                self._check_owner(self.found)
        if self._entries:
            self._check_writers(final=not ancestor)

    def _follow_symlink(self, name: str) -> None:
        fd = os.open(name, _ANYTHING, dir_fd=self.fd)
        try:
            # Call this before fstat(2), which can block on a FUSE filesystem. ENOENT means that `fd` is not a symlink.
            target = os.readlink("", dir_fd=fd)
            found = os.fstat(fd)
        except FileNotFoundError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        finally:
            os.close(fd)
        parts = Path(target).parts
        self._symlinks += 1
        self._in_targets += len(parts)
        if self._symlinks > SYMLINKS_MAX or self._in_targets > TARGETS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        before = self._place
        self._place = os.path.join(before, name)  # noqa: PTH118
        self._check_owner(found)
        self._place = before
        if target.startswith("/"):
            root = os.open("/", _DIRECTORY)
            os.close(self.fd)
            self._place, self.fd, self.found = "/", root, os.fstat(root)
            self._check_owner(self.found)
            parts = parts[1:]
        self._names.extendleft(reversed(parts))

    def _make(self, name: str) -> int:
        """Create a directory that untrusted users cannot change."""
        place = Path(self._place, name)
        if self._below is not None:
            what = f"{place} is missing below a directory that {user_name(self._below)} owns"
            raise self._untrusted(what, f"let that user create {self._path}")
        trust = self._trust
        shared = not self._names and (trust.owner, trust.group) != (None, None)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=self.fd)
            if shared:
                # Names are safe before chown(2), because only root and this user can rename the new directory. After
                # that, the owner may rename it if the directory above is sticky.
                fd = os.open(name, _DIRECTORY & ~os.O_PATH, dir_fd=self.fd)
                try:
                    owner, group = (-1 if number is None else number for number in (trust.owner, trust.group))
                    os.chown(name, owner, group, dir_fd=self.fd, follow_symlinks=False)
                    if trust.group is not None:
                        os.fchmod(fd, 0o2775)
                finally:
                    os.close(fd)
        return os.open(name, _DIRECTORY, dir_fd=self.fd)

    def _check_owner(self, found: os.stat_result) -> None:
        uid = found.st_uid
        if uid == overflow_uid():
            if self._place in STANDARD and not _maps_all_users():
                return
            what = f"{self._place} belongs to uid {uid}, which stands for all unmapped users"
            raise self._untrusted(what, "use a directory that belongs to root or to a dedicated system user")
        if self._below is not None and uid != self._below:
            owner = user_name(self._below)
            what = f"{self._place} belongs to {user_name(uid)}, but {owner} owns an earlier part of the path"
            raise self._untrusted(what, f"use a path in which {owner} owns every directory below this one")
        if uid == self._trust.owner and uid not in (0, self._trust.user):
            self._below = uid
        elif uid not in (0, self._trust.user):
            what = f"{self._place} belongs to {user_name(uid)}"
            other = f"trust this user with --irq-owner {uid}" if self._entries else "use a directory below /run"
            raise self._untrusted(what, f"run the proxy as this user, or {other}")

    def _check_fuse(self) -> None:
        """Check that no user serves this directory through FUSE.

        The files could have any owner and could block this process.
        """
        try:
            number = mount_id(self.fd)
        except FileNotFoundError:
            return  # /proc is not mounted.
        if number in self._mounts:
            return
        self._mounts.add(number)
        user = fuse_user(self.fd)
        if user not in (None, 0, self._trust.user):
            what = f"{self._place} is a FUSE filesystem of {user_name(user)}, which can block the proxy"
            raise self._untrusted(what, "use a directory on another filesystem")

    def _check_writers(self, *, final: bool) -> None:
        """Check that other users can neither rename entries of the directory nor, in an IRQ directory, create them."""
        mode = self.found.st_mode
        if not mode & _WRITERS or (not final and mode & stat.S_ISVTX):
            return
        if not mode & stat.S_IWOTH:
            if self._has_acl():
                what = f"the ACL of {self._place} lets other users write to it"
                raise self._untrusted(what, f"setfacl -b {self._place}, or use a directory below /run")
            allowed = final and self.found.st_gid == self._trust.group
            # Search the users last, because that can block.
            if allowed or is_private_group(self.found.st_gid, self.found.st_uid):
                return
        what = f"other users may write to {self._place} (mode {stat.S_IMODE(mode):04o})"
        raise self._untrusted(what, f"chmod go-w {self._place}, or use a directory below /run")

    def _has_acl(self) -> bool:
        """Return whether the directory has an ACL. Its group bits are then the mask for all entries (acl(5))."""
        try:
            os.getxattr(f"/proc/self/fd/{self.fd}", ACL)
        except OSError:
            return False
        return True

    def _untrusted(self, what: str, remedy: str) -> UnfitFileError:
        return UnfitFileError(self._path, f"not trusted: {what}", remedy)


def _maps_all_users() -> bool:
    """Return whether this is the initial user namespace or one that maps all users (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", "rb") as lines:  # noqa: PTH123
            return [line.split() for line in lines] == [[b"0", b"0", b"4294967295"]]
    except OSError:
        return True
