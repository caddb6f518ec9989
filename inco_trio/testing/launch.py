"""The program of a test's proxy process: `inco-trio`, after what only the process itself can do.

`python -m inco_trio.testing.launch SETTINGS ARGUMENT...`; SETTINGS is JSON: `parent`, whose end ends this process,
`names` and `fds` of the descriptors that are kept for it (sd_listen_fds(3)), and `netns`, a descriptor or null.
"""

from __future__ import annotations

import json
import os
import sys

from inco_trio.linux.netns import set_network
from inco_trio.linux.process import end_with_parent

__all__ = ["main"]

_LISTEN_FDS_START = 3
_ABOVE = 64


def main() -> int:
    """Become the proxy; returns its exit code."""
    settings = json.loads(sys.argv.pop(1))
    if not end_with_parent(settings["parent"]):
        return 1
    if settings["netns"] is not None:
        set_network(settings["netns"])
    # Out of each other's way first.
    import fcntl

    fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in settings["fds"]]
    for number, fd in enumerate(fds, _LISTEN_FDS_START):
        os.dup2(fd, number)
        os.close(fd)
    for fd in settings["fds"]:
        if fd >= _LISTEN_FDS_START + len(fds):
            os.close(fd)
    os.environ |= {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": ":".join(settings["names"]),
    }
    from inco_trio.cli import main as inco_trio

    return inco_trio()


if __name__ == "__main__":
    sys.exit(main())
