"""Check the Debian package in a system that `packages/deb.py` has booted: install, upgrade, purge.

While traffic flows in both directions, dpkg upgrades the package: once with the proxy under systemd, once under s6.
Every notification must arrive.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path

from inco_trio.simulation.world import Cores, Namespace
from tests.faults.applications import Applications, Wire, write_config

LINK = "rpmsg4000"
UNIT = f"inco-trio@{LINK}.service"
CONFIG = Path(f"/etc/inco-trio/{LINK}.json")
DIRECTORY = Path("/run/irq")
SCANDIR = Path("/run/service")
INBOUND = [f"in_{number}" for number in range(8)]
OUTBOUND = [f"out_{number}" for number in range(8)]
PAUSE = 0.002
"""Seconds between two notifications in the same direction."""
AT_LEAST = 1000
"""Minimum number of notifications in each direction: half of them before the upgrade, half after it."""

STATE = ("/opt/check", "/proc", "/run", "/sys", "/tmp", "/var/cache", "/var/lib/dpkg", "/var/lib/systemd", "/var/log")  # noqa: S108
"""Directories that the check ignores, because the system stores its own state in them."""


def run(*command: str) -> str:
    """Print and run a command, and return its output. Raises CalledProcessError on failure."""
    print("+", *command)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def files() -> set[str]:
    """Return the paths of all files except those in `STATE` and backups of the user database."""
    found = set()
    for directory, directories, names in os.walk("/"):
        directories[:] = [name for name in directories if str(Path(directory, name)) not in STATE]
        found |= {str(Path(directory, name)) for name in (*directories, *names)}
    return {path for path in found if not (path.startswith("/etc/") and path.endswith("-"))} - {"/etc/.pwd.lock"}


def property_of(name: str) -> str:
    return run("systemctl", "show", "--value", "--property", name, UNIT)


class Sender(threading.Thread):
    """A thread that sends signals in turn and counts them, until `stop` is called."""

    def __init__(self, send: Callable[[str], None], names: list[str]) -> None:
        super().__init__()
        self._send = send
        self._names = names
        self._stopping = threading.Event()
        self.sent: Counter[str] = Counter()

    def run(self) -> None:
        for name in cycle(self._names):
            if self._stopping.is_set():
                return
            self._send(name)
            self.sent[name] += 1
            time.sleep(PAUSE)  # Limit the rate of the notifications.

    def wait_more(self, count: int) -> None:
        """Wait until `count` more notifications have been sent."""
        goal = self.sent.total() + count
        while self.sent.total() < goal:
            assert self.is_alive(), "the sender has failed"
            time.sleep(PAUSE)  # In this time, the sender sends about one notification.

    def stop(self) -> Counter[str]:
        self._stopping.set()
        self.join()
        return self.sent


@contextmanager
def board() -> Iterator[Cores]:
    """Create the link, the configuration and the IRQ directory."""
    with ExitStack() as stack:
        core0 = stack.enter_context(Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)))
        cores = Cores(core0, stack.enter_context(Namespace()), LINK)
        cores.make_link()
        DIRECTORY.mkdir()
        account = pwd.getpwnam("inco-trio")
        os.chown(DIRECTORY, account.pw_uid, account.pw_gid)
        write_config(CONFIG, DIRECTORY, INBOUND, OUTBOUND)
        yield cores


def count_during(cores: Cores, event: Callable[[], object]) -> None:
    """Send notifications in both directions while `event` runs. Fail unless all of them arrive."""
    with cores.peer() as core1, ExitStack() as stack:
        applications = Applications(DIRECTORY, INBOUND, OUTBOUND)
        stack.callback(applications.close)
        wire = Wire(core1)
        stack.callback(wire.close)
        inbound = Sender(lambda name: core1.send(name.encode()), INBOUND)
        outbound = Sender(applications.trigger, OUTBOUND)
        senders = (inbound, outbound)
        for sender in senders:
            sender.start()
            sender.wait_more(AT_LEAST // 2)
        event()
        for sender in senders:
            sender.wait_more(AT_LEAST // 2)
        sent_in, sent_out = (sender.stop() for sender in senders)
        closes, seen = applications.closes, wire.seen
        applications.wait(lambda: all(closes[name] >= sent_in[name] for name in INBOUND), "not all were delivered")
        wire.wait(lambda: all(seen[name] >= sent_out[name] for name in OUTBOUND), "not all were sent")
        print(f"inbound: {sent_in.total()} sent, {closes.total()} delivered")
        print(f"outbound: {sent_out.total()} triggered, {sum(seen[name] for name in OUTBOUND)} sent")


def upgrade_under_systemd(cores: Cores, new: str) -> None:
    run("systemctl", "enable", "--now", UNIT)
    assert property_of("User") == "inco-trio"
    before = property_of("MainPID")
    count_during(cores, lambda: run("dpkg", "--install", new))
    assert property_of("MainPID") != before, "the upgrade has not restarted the service"
    print(run("inco-trio", "status", LINK))


def upgrade_under_s6(cores: Cores, old: str, new: str) -> None:
    run("systemctl", "stop", UNIT)
    run("dpkg", "--install", old)
    run("inco-trio", "service", "s6", str(SCANDIR), LINK, "--config", str(CONFIG), "--user", "inco-trio")
    service = str(SCANDIR / f"inco-trio-{LINK}")
    with subprocess.Popen(["s6-svscan", str(SCANDIR)]) as svscan:
        # s6-svwait fails until s6-svscan has started the service.
        while subprocess.run(["s6-svwait", "-U", service], stderr=subprocess.DEVNULL, check=False).returncode:
            time.sleep(PAUSE)
            assert svscan.poll() is None, "s6-svscan has failed"

        def upgrade() -> None:
            run("dpkg", "--install", new)
            run("s6-svc", "-wR", "-r", service)

        count_during(cores, upgrade)
        run("s6-svscanctl", "-t", str(SCANDIR))


def main() -> None:
    old, new = sorted(map(str, Path("/opt/check").glob("*.deb")), key=len)
    before = files()
    run("dpkg", "--install", old)
    assert run("/usr/bin/inco-trio", "--version")
    assert "usage: inco_proxy" in run("/usr/bin/inco_proxy", "--help")
    print(run("inco-trio", "demo", "--count", "20"))
    assert sum(path.suffix == ".pyc" for path in Path("/usr/lib/inco-trio").rglob("*")), "postinst compiled nothing"
    with board() as cores:
        upgrade_under_systemd(cores, new)
        upgrade_under_s6(cores, old, new)
        run("systemctl", "start", UNIT)
        run("dpkg", "--remove", "inco-trio")
        assert property_of("ActiveState") == "inactive"
    run("dpkg", "--purge", "inco-trio")
    # The administrator's configuration remains, as do the user and its group.
    assert files() - before == {str(CONFIG.parent), str(CONFIG)}, sorted(files() ^ before)
    assert before <= files()
    assert not Path("/run/inco-trio").exists()
    assert pwd.getpwnam("inco-trio").pw_shell == "/usr/sbin/nologin"
    print("the package passes")


if __name__ == "__main__":
    main()
