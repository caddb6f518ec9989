"""The holders: s6's against the real s6-fdholder-daemon, systemd's against a socket that plays systemd's part."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inco_trio.errors import InvalidArgumentError, ResourceError
from inco_trio.persist.fdstore import NoFdStore, S6FdStore, SystemdFdStore, fd_store_from_environment
from inco_trio.service.descriptions import link_service
from inco_trio.service.s6 import write_scandir
from netns.hang import HANG

PREFIX = "inco-trio/a/"

PROBE = """
import json, os, sys
from inco_trio.persist.fdstore import fd_store_from_environment

holder = fd_store_from_environment(sys.argv[1] or None, "a")
links = []
for fd in os.listdir("/proc/self/fd"):
    try:
        links.append(os.readlink("/proc/self/fd/" + fd))
    except FileNotFoundError:  # that of listdir itself
        pass
print(json.dumps({
    "class": type(holder).__name__,
    "held": {name: os.pread(fd, 100, 0).decode() for name, fd in holder.inherited.items()},
    "inheritable": [name for name, fd in holder.inherited.items() if os.get_inheritable(fd)],
    "open": [link for link in links if "memfd" in link],
    "environment": [name for name in os.environ if name.startswith(("S6_FD", "LISTEN_"))],
}))
"""
"""A successor: says as JSON what it has inherited, and what is left over."""


def memfd(content: str) -> int:
    fd = os.memfd_create(content)
    os.write(fd, content.encode())
    return fd


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    """Three descriptors with a content to know them by."""
    made = {name: memfd(name) for name in ("one", "two", "foreign")}
    yield made
    for fd in made.values():
        os.close(fd)


@pytest.fixture(autouse=True)
def no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "S6_FD#"):
        monkeypatch.delenv(name, raising=False)


class Daemon:
    """The s6-fdholder-daemon of a generated scan directory, without its supervisor."""

    def __init__(self, home: Path) -> None:
        home.chmod(0o755)
        # Without root, and in a user namespace that knows but one user, there is no other to become.
        users = int(Path("/proc/self/uid_map").read_text().split()[2])
        self.user = "nobody" if os.geteuid() == 0 and users > pwd.getpwnam("nobody").pw_uid else None
        write_scandir(home / "scan", service=link_service("a", Path("/dev/null")), user=self.user, program=["true"])
        self._service = home / "scan/inco-trio-fdholder"
        self.socket = str(self._service / "s")

    def start(self) -> None:
        self._process = subprocess.Popen(["./run"], cwd=self._service, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        with self._process.stdout as ready:
            assert ready.read() == b"\n"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(HANG)

    def identifiers(self) -> list[str]:
        done = subprocess.run(["s6-fdholder-list", self.socket], check=True, capture_output=True, text=True)
        return sorted(done.stdout.split())

    def put(self, identifier: str, fd: int) -> None:
        subprocess.run(["s6-fdholder-store", self.socket, identifier], stdin=fd, check=True)

    def successor(self) -> dict[str, Any]:
        command = ["s6-fdholder-getdump", self.socket, sys.executable, "-c", PROBE, self.socket]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        said: dict[str, Any] = json.loads(done.stdout)
        return said


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as home:
        daemon = Daemon(Path(home))
        daemon.start()
        yield daemon
        daemon.stop()


@pytest.fixture
def holder(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> S6FdStore:
    """A holder at the very first start."""
    monkeypatch.setenv("S6_FD#", "0")
    return S6FdStore(daemon.socket, PREFIX)


@pytest.mark.s6
class TestS6:
    def test_the_first_start_inherits_nothing(self, daemon: Daemon) -> None:
        assert daemon.successor() == {
            "class": "S6FdStore",
            "held": {},
            "inheritable": [],
            "open": [],
            "environment": [],
        }

    def test_the_successor_has_what_was_stored_and_nothing_else(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        holder.store("inotify", fds["two"])
        daemon.put("inco-trio/aa/link.7", fds["foreign"])
        daemon.put("inco-trio/a/unnumbered", fds["foreign"])
        said = daemon.successor()
        assert said["held"] == {"link": "one", "inotify": "two"}
        assert said["inheritable"] == said["environment"] == []
        assert sorted(said["open"]) == ["/memfd:one (deleted)", "/memfd:two (deleted)"]

    def test_the_newer_replaces_the_older(self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]) -> None:
        holder.store("link", fds["one"])
        holder.store("link", fds["two"])
        assert daemon.identifiers() == ["inco-trio/a/link.2"]
        assert daemon.successor()["held"] == {"link": "two"}

    def test_after_a_crash_within_a_replacement_the_newer_counts(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        for _ in range(9):
            holder.store("link", fds["one"])
        daemon.put("inco-trio/a/link.10", fds["two"])
        said = daemon.successor()
        assert (said["held"], said["open"]) == ({"link": "two"}, ["/memfd:two (deleted)"])
        assert daemon.identifiers() == ["inco-trio/a/link.10"]

    def test_removed_is_gone(self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]) -> None:
        holder.store("link", fds["one"])
        holder.remove("link")
        holder.remove("link")
        assert daemon.identifiers() == []

    def test_a_restarted_daemon_takes_descriptors_again(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        daemon.stop()
        daemon.start()
        holder.store("link", fds["two"])
        assert daemon.successor()["held"] == {"link": "two"}

    def test_a_second_process_with_the_same_names_is_noticed(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        daemon.put("inco-trio/a/link.1", fds["foreign"])
        with pytest.raises(ResourceError, match=r"cannot store inco-trio/a/link\.1 in .*busy .*no other process"):
            holder.store("link", fds["one"])
        assert daemon.successor()["held"] == {"link": "foreign"}

    def test_what_the_rules_deny_is_one_line(
        self, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, fds: dict[str, int]
    ) -> None:
        monkeypatch.setenv("S6_FD#", "0")
        with pytest.raises(ResourceError, match=r"^cannot store other/link\.1 .*not permitted .its rules[^\n]*$"):
            S6FdStore(daemon.socket, "other/").store("link", fds["one"])

    def test_a_daemon_that_is_not_there_is_one_line(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        daemon.stop()
        with pytest.raises(ResourceError, match=r"^cannot store .*refused .is s6-fdholder-daemon running there\?\)$"):
            holder.store("link", fds["two"])
        with pytest.raises(ResourceError, match=r"^cannot delete [^\n]*$"):
            holder.remove("link")
        daemon.start()

    def test_the_user_of_a_service_stores_its_own_and_no_more(self, daemon: Daemon) -> None:
        account = pwd.getpwnam(daemon.user) if daemon.user else None
        code = f"""
import os
from inco_trio.errors import ResourceError
from inco_trio.persist.fdstore import S6FdStore

if {account is not None}:
    os.setgroups([])
    os.setgid({account and account.pw_gid})
    os.setuid({account and account.pw_uid})
for prefix in ("inco-trio/a/", "inco-trio/aa/"):
    os.environ["S6_FD#"] = "0"
    holder = S6FdStore("s", prefix)
    try:
        holder.store("link", 0)
        holder.store("link", 0)
        print(prefix, "kept")
    except ResourceError:
        print(prefix, "refused")
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(daemon.socket).parent,
            check=True,
            capture_output=True,
            text=True,
        )
        # Whoever owns the scan directory may also store for its other services.
        assert done.stdout == f"inco-trio/a/ kept\ninco-trio/aa/ {'refused' if account else 'kept'}\n"
        assert "inco-trio/a/link.2" in daemon.identifiers()


def test_without_s6_installed_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fds: dict[str, int]
) -> None:
    monkeypatch.setenv("S6_FD#", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=r"^cannot run s6-fdholder-store: [^\n]*is s6 installed"):
        S6FdStore("s", PREFIX).store("link", fds["one"])


def test_s6_without_its_dump_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^--fd-holder /run/s: [^\n]*s6-fdholder-getdump /run/s inco-trio run"
    ):
        fd_store_from_environment("/run/s", "a")


@pytest.mark.parametrize("identifier", ["inco-trio/a/link.1", "inco-trio/b/link.1"])
def test_a_descriptor_that_was_closed_on_the_way_is_refused(identifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"S6_FD#": "1", "S6_FD_0": "1000000", "S6_FDID_0": identifier}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=r"^descriptor 1000000: in the environment [^\n]*$"):
        fd_store_from_environment("/run/s", "a")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which systemd listens to its services."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(HANG)
        manager.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        yield manager


def received(manager: socket.socket) -> tuple[list[str], list[str]]:
    """The lines of the next datagram, and the contents of the descriptors in it."""
    data, fds, _, _ = socket.recv_fds(manager, 1000, 10)
    contents = [os.pread(fd, 100, 0).decode() for fd in fds]
    for fd in fds:
        os.close(fd)
    return data.decode().split("\n"), contents


class TestSystemd:
    def test_the_new_is_stored_before_the_old_is_dropped(self, systemd: socket.socket, fds: dict[str, int]) -> None:
        holder = SystemdFdStore()
        holder.store("link", fds["one"])
        holder.store("link", fds["two"])
        holder.remove("link")
        assert [received(systemd) for _ in range(4)] == [
            (["FDSTORE=1", "FDNAME=link.1", "FDPOLL=0"], ["one"]),
            (["FDSTORE=1", "FDNAME=link.2", "FDPOLL=0"], ["two"]),
            (["FDSTOREREMOVE=1", "FDNAME=link.1"], []),
            (["FDSTOREREMOVE=1", "FDNAME=link.2"], []),
        ]

    def test_the_successor_takes_over_its_own(self, systemd: socket.socket, tmp_path: Path) -> None:
        files = []
        for content in ("old", "new", "socket unit", "nameless"):
            files.append(tmp_path / content)
            files[-1].write_text(content)
        script = 'export LISTEN_PID=$$; exec "$@" 3<old 4<new 5<"socket unit" 6<nameless'
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", sys.executable, "-c", PROBE, ""],
            env={**os.environ, "LISTEN_FDS": "4", "LISTEN_FDNAMES": "link.9:link.10:http"},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout) == {
            "class": "SystemdFdStore",
            "held": {"link": "new"},
            "inheritable": [],
            "open": [],
            "environment": [],
        }
        assert received(systemd) == (["FDSTOREREMOVE=1", "FDNAME=link.9"], [])

    def test_a_store_that_cannot_be_reached_is_one_line(self, systemd: socket.socket, fds: dict[str, int]) -> None:
        holder = SystemdFdStore()
        systemd.close()
        with pytest.raises(ResourceError, match=r"^cannot reach systemd's fd store at [^\n]*refused$"):
            holder.store("link", fds["one"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, NoFdStore),
        ({"NOTIFY_SOCKET": "/n"}, NoFdStore),
        ({"NOTIFY_SOCKET": "/n", "FDSTORE": "0"}, NoFdStore),
        ({"NOTIFY_SOCKET": "/n", "FDSTORE": "8"}, SystemdFdStore),
        ({"NOTIFY_SOCKET": "/n", "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"}, SystemdFdStore),
        ({"NOTIFY_SOCKET": "/n", "LISTEN_PID": "1", "LISTEN_FDS": "1"}, NoFdStore),
        ({"FDSTORE": "8"}, NoFdStore),
    ],
)
def test_the_environment_chooses_the_holder(
    environment: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    holder = fd_store_from_environment(None, "a")
    assert type(holder) is expected
    assert holder.inherited == {}


def test_no_holder_keeps_nothing(fds: dict[str, int]) -> None:
    holder = NoFdStore()
    holder.store("link", fds["one"])
    holder.remove("link")
    assert NoFdStore().inherited == {}
