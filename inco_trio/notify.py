"""Readiness reports: a newline on a descriptor for s6, and datagrams to `$NOTIFY_SOCKET` for systemd.

See https://skarnet.org/software/s6/notifywhenup.html and sd_notify(3).
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Sequence

from inco_trio import real_clock
from inco_trio.errors import InvalidArgumentError

__all__ = [
    "check_notification_fd",
    "notify_ready",
    "notify_reloaded",
    "notify_reloading",
    "notify_stopping",
    "sd_notify",
]

logger = logging.getLogger(__name__)

TIMEOUT = 2.0
"""Timeout in seconds for a report to systemd. The report blocks the whole process."""


def check_notification_fd(fd: int) -> None:
    """Check `fd` and make it close-on-exec. Call this before opening other descriptors. Raises InvalidArgumentError."""
    if fd <= 2:
        raise InvalidArgumentError(f"--notification-fd {fd}: 0, 1 and 2 are the standard streams (3 is customary)")
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        os.set_inheritable(fd, False)
    except (OSError, OverflowError):
        raise InvalidArgumentError(
            f"--notification-fd {fd}: not open (s6 opens the descriptor that the service's notification-fd names)"
        ) from None
    if mode == os.O_RDONLY:
        raise InvalidArgumentError(f"--notification-fd {fd}: open for reading only")


def notify_ready(notification_fd: int | None) -> None:
    """Report readiness to s6 on `notification_fd`, which is then closed, and to systemd."""
    if notification_fd is not None:
        try:
            os.write(notification_fd, b"\n")
        except OSError as error:
            logger.warning("cannot report readiness on descriptor %d: %s", notification_fd, error.strerror)
        finally:
            os.close(notification_fd)
    _tell_systemd("READY=1")


def notify_reloading() -> None:
    """Report to systemd that a reload has begun. A unit with Type=notify-reload waits for `notify_reloaded`."""
    _tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={real_clock.monotonic_ns() // 1000}")


def notify_reloaded(problem: str | None) -> None:
    """Report to systemd that a reload has ended and, if it was refused, why. `systemctl status` shows the reason."""
    status = "" if problem is None else f"reload refused, keeping the old configuration: {problem}"
    _tell_systemd(f"READY=1\nSTATUS={status}")


def notify_stopping() -> None:
    """Report to systemd that the service is stopping. s6 has no equivalent."""
    _tell_systemd("STOPPING=1")


def sd_notify(state: str, fds: Sequence[int] = ()) -> None:
    """Send `state` (lines of NAME=value) and descriptors to `$NOTIFY_SOCKET`, if it is set. Raises OSError."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)  # sendmsg(2) blocks if the queue is full because systemd does not read it.
        sock.connect(address)
        socket.send_fds(sock, [state.encode(errors="replace")], fds)


def _tell_systemd(state: str) -> None:
    # Only log errors: the service must not fail because of a stale $NOTIFY_SOCKET.
    try:
        sd_notify(state)
    except OSError as error:
        what = state.partition("\n")[0]
        logger.warning("cannot report %s to $NOTIFY_SOCKET (%r): %s", what, os.environ["NOTIFY_SOCKET"], error)
