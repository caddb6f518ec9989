"""What a running daemon may do: its memory limit, its capabilities and its sandbox."""

from __future__ import annotations

import contextlib
import resource

from inco_trio.errors import ResourceError
from inco_trio.linux.process import lock_memory

__all__ = ["keep_in_memory"]


def keep_in_memory() -> None:
    """Lock the memory of the process. Raises ResourceError.

    With a finite limit, the kernel would refuse memory later, while notifications flow.
    """
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) != unlimited:
        remedy = "set `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit"
        raise ResourceError("--lock-memory", f"cannot lock memory (its size is limited): {remedy}")
    try:
        lock_memory()
    except OSError as error:
        remedy = "start without --lock-memory"
        raise ResourceError("--lock-memory", f"cannot lock memory ({error.strerror}): {remedy}") from error
