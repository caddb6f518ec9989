"""The privileges of a running daemon: its capabilities, its locked memory and its limit on open descriptors."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Collection

from inco_trio.config import Config
from inco_trio.errors import ResourceError
from inco_trio.links.address import InterfaceAddress
from inco_trio.linux import capabilities as cap
from inco_trio.linux.process import lock_memory

__all__ = [
    "OF_NAMESPACES",
    "OF_OWNERS",
    "drop_capabilities",
    "keep_in_memory",
    "needed_capabilities",
    "raise_descriptor_limit",
]

logger = logging.getLogger(__name__)

_FILES = frozenset({cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER})
"""Capabilities of a proxy that writes to other users' directories."""

OF_NAMESPACES = frozenset({cap.CAP_SYS_ADMIN, cap.CAP_NET_ADMIN, cap.CAP_SYS_PTRACE})
"""Capabilities for boards in other network namespaces. CAP_SYS_PTRACE is needed for /proc/PID/ns/net."""
OF_OWNERS = frozenset({cap.CAP_CHOWN, cap.CAP_FSETID})
"""Capabilities for giving new IRQ directories to another owner. CAP_FSETID keeps their set-group-ID bit."""


def needed_capabilities(configs: Collection[Config], *, grows: bool, locked: bool) -> frozenset[int]:
    """Return the capabilities that proxies may need while they run. With `grows`, a reload may add boards;
    with `locked`, the memory is locked.

    CAP_NET_RAW opens a packet socket for an interface. CAP_NET_ADMIN sets the receive buffer of boards that a reload
    adds. CAP_SYS_ADMIN enters a network namespace. CAP_SYS_PTRACE reads the namespace of another process, such as
    /proc/PID/ns/net. CAP_CHOWN gives new IRQ directories to their owner. CAP_IPC_LOCK locks memory beyond the limit.
    """
    needed = set(_FILES)
    if grows:
        needed |= {cap.CAP_NET_RAW, cap.CAP_NET_ADMIN}
    if any(isinstance(config.address, InterfaceAddress) for config in configs):
        needed.add(cap.CAP_NET_RAW)
    if any(config.netns is not None for config in configs):
        needed |= OF_NAMESPACES - {cap.CAP_SYS_PTRACE}
    if any(config.netns is not None and config.netns.is_relative_to("/proc") for config in configs):
        needed |= OF_NAMESPACES
    if any((config.owner, config.group) != (None, None) for config in configs):
        needed |= OF_OWNERS
    if locked and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        needed.add(cap.CAP_IPC_LOCK)
    return frozenset(needed)


def drop_capabilities(needed: Collection[int]) -> None:
    """Keep only the `needed` capabilities, and forbid new privileges. If the kernel refuses, log this and continue."""
    try:
        cap.no_new_privileges()
        cap.keep_capabilities(needed)
    except OSError as error:
        logger.warning("cannot drop capabilities (%s): the process keeps them", error.strerror)


def keep_in_memory() -> None:
    """Lock the memory of the process. Raises ResourceError.

    A finite limit is an error, because the kernel could otherwise refuse memory later, while notifications arrive.
    """
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) != unlimited and cap.CAP_IPC_LOCK not in cap.held_capabilities():
        remedy = "set `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit"
        raise ResourceError("--lock-memory", f"cannot lock memory (RLIMIT_MEMLOCK is finite): {remedy}")
    try:
        lock_memory()
    except OSError as error:
        remedy = "start without --lock-memory"
        raise ResourceError("--lock-memory", f"cannot lock memory ({error.strerror}): {remedy}") from error


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open descriptors to the hard limit.

    Each board uses four or five descriptors. The limit also applies to the total number of descriptors that a user's
    processes have in transit in Unix sockets (unix(7), ETOOMANYREFS). With many boards, the stored descriptors are in
    transit.

    If the kernel refuses the change, the soft limit stays the same. In a container, the hard limit may exceed
    fs.nr_open (setrlimit(2)).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
