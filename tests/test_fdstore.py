"""Tests of the fd stores: s6 with the real s6-fdholder-daemon, systemd with a socket that simulates systemd."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inco_trio.errors import InvalidArgumentError, ResourceError
from inco_trio.persist.fdstore import (
    IN_TRANSIT,
    NoFdStore,
    S6FdStore,
    SystemdFdStore,
    fd_store_from_environment,
    inherited_fd,
)
from inco_trio.service.descriptions import link_service
from inco_trio.service.scandir import write_scandir
from netns.fixtures import Proxy
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
"""A successor program that prints its inherited descriptors, open memfds and environment variables as JSON."""


def memfd(content: str) -> int:
    fd = os.memfd_create(content)
    os.write(fd, content.encode())
    return fd


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    """Yield three memfds that can be recognized by their content."""
    made = {name: memfd(name) for name in ("one", "two", "foreign")}
    yield made
    for fd in made.values():
        os.close(fd)


@pytest.fixture(autouse=True)
def no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "S6_FD#"):
        monkeypatch.delenv(name, raising=False)


class Daemon:
    """The s6-fdholder-daemon of a generated scan directory, running without a supervisor."""

    def __init__(self, home: Path) -> None:
        home.chmod(0o755)
        # An ordinary user, or root in a user namespace with a single uid, cannot switch to another user.
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
    """Return an fd store that no proxy has used before."""
    monkeypatch.setenv("S6_FD#", "0")
    return S6FdStore(daemon.socket, PREFIX)


@pytest.mark.s6
class TestS6:
    def test_the_first_start_inherits_no_descriptor(self, daemon: Daemon) -> None:
        assert daemon.successor() == {
            "class": "S6FdStore",
            "held": {},
            "inheritable": [],
            "open": [],
            "environment": [],
        }

    def test_the_successor_inherits_only_the_stored_descriptors(
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

    def test_a_newer_descriptor_replaces_the_older_one(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        holder.store("link", fds["two"])
        assert daemon.identifiers() == ["inco-trio/a/link.2"]
        assert daemon.successor()["held"] == {"link": "two"}

    def test_after_a_crash_while_replacing_the_newer_descriptor_counts(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        for _ in range(9):
            holder.store("link", fds["one"])
        daemon.put("inco-trio/a/link.10", fds["two"])
        said = daemon.successor()
        assert (said["held"], said["open"]) == ({"link": "two"}, ["/memfd:two (deleted)"])
        assert daemon.identifiers() == ["inco-trio/a/link.10"]

    def test_a_removed_descriptor_is_not_inherited(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        holder.remove("link")
        holder.remove("link")
        assert daemon.identifiers() == []

    def test_a_restarted_daemon_accepts_descriptors(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        holder.store("link", fds["one"])
        daemon.stop()
        daemon.start()
        holder.store("link", fds["two"])
        assert daemon.successor()["held"] == {"link": "two"}

    def test_a_second_process_with_the_same_names_is_detected(
        self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]
    ) -> None:
        daemon.put("inco-trio/a/link.1", fds["foreign"])
        with pytest.raises(ResourceError, match=r"cannot store inco-trio/a/link\.1 in .*busy .*no other process"):
            holder.store("link", fds["one"])
        assert daemon.successor()["held"] == {"link": "foreign"}

    def test_a_denied_request_is_one_error_line(
        self, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, fds: dict[str, int]
    ) -> None:
        monkeypatch.setenv("S6_FD#", "0")
        with pytest.raises(ResourceError, match=r"^cannot store other/link\.1 .*permitted .the daemon's rules[^\n]*$"):
            S6FdStore(daemon.socket, "other/").store("link", fds["one"])

    def test_a_missing_daemon_is_one_error_line(self, daemon: Daemon, holder: S6FdStore, fds: dict[str, int]) -> None:
        holder.store("link", fds["one"])
        daemon.stop()
        with pytest.raises(
            ResourceError, match=r"^cannot store .*refused .is s6-fdholder-daemon running on this socket\?\)$"
        ):
            holder.store("link", fds["two"])
        with pytest.raises(ResourceError, match=r"^cannot delete [^\n]*$"):
            holder.remove("link")
        daemon.start()

    def test_a_service_user_may_only_store_its_own_descriptors(self, daemon: Daemon) -> None:
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
        # A service's user may store descriptors only for that service. The scan directory's owner may store them for
        # all services.
        assert done.stdout == f"inco-trio/a/ kept\ninco-trio/aa/ {'refused' if account else 'kept'}\n"
        assert "inco-trio/a/link.2" in daemon.identifiers()


def test_missing_s6_programs_are_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fds: dict[str, int]
) -> None:
    monkeypatch.setenv("S6_FD#", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=r"^cannot run s6-fdholder-store: [^\n]*is s6 installed"):
        S6FdStore("s", PREFIX).store("link", fds["one"])


def test_s6_without_getdump_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^--fd-holder /run/s: [^\n]*s6-fdholder-getdump /run/s inco-trio run"
    ):
        fd_store_from_environment("/run/s", "a")


@pytest.mark.parametrize("identifier", ["inco-trio/a/link.1", "inco-trio/b/link.1"])
def test_a_descriptor_that_was_closed_in_transit_is_an_error(identifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"S6_FD#": "1", "S6_FD_0": "1000000", "S6_FDID_0": identifier}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=r"^descriptor 1000000: listed in the environment [^\n]*$"):
        fd_store_from_environment("/run/s", "a")


@pytest.mark.parametrize("value", ["abc", "-1", "", "1 ", "0x1", "\u0661", "1" * 30, "99999999999"])
@pytest.mark.parametrize("name", ["S6_FD#", "S6_FD_0"])
def test_an_invalid_number_of_s6_is_one_error_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, text in (
        {"S6_FD#": "1", "S6_FDID_0": "inco-trio/a/link.1", "S6_FD_0": "1000000"} | {name: value}
    ).items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(InvalidArgumentError) as caught:
        fd_store_from_environment("/run/s", "a")
    supervisor = "(let the supervisor start inco-trio directly)"
    assert str(caught.value) == f"${name}: {value!r} is not a descriptor number or count {supervisor}"


@pytest.mark.parametrize("missing", ["S6_FDID_0", "S6_FD_0"])
def test_a_missing_variable_of_s6_is_one_error_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"S6_FD#": "1", "S6_FD_0": "1000000", "S6_FDID_0": "inco-trio/a/link.1"}.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=r"^(\$S6_FD_0|descriptor 1000000): [^\n]*$"):
        fd_store_from_environment("/run/s", "a")


@pytest.mark.parametrize("value", ["zz", "-1", "", "3.5", "9" * 5000])
def test_an_invalid_number_of_systemd_is_one_error_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"NOTIFY_SOCKET": "/n", "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": value}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(
        InvalidArgumentError, match=r"^\$LISTEN_FDS: [^\n]* is not a descriptor number or count [^\n]*$"
    ):
        fd_store_from_environment(None, "a")


@pytest.mark.parametrize(
    "names", ["", ":::::", "link", "link.", "link.9" * 100, ".1", "a.b.c\udcff.1", f"link.{'9' * 5000}"]
)
def test_more_descriptors_than_are_open_is_one_error_line(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "NOTIFY_SOCKET": "/n",
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "2147483647",
        "LISTEN_FDNAMES": names,
    }
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    # Number the passed descriptors from a number that is certainly not in use.
    monkeypatch.setattr("inco_trio.persist.fdstore._LISTEN_FDS_START", 1000000)
    with pytest.raises(InvalidArgumentError, match=r"^descriptor 1000000: listed in the environment [^\n]*$"):
        fd_store_from_environment(None, "a")


@pytest.mark.parametrize("pid", ["zz", "-1", "", "1", "9" * 30])
def test_the_descriptors_of_another_process_are_ignored(pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"NOTIFY_SOCKET": "/n", "LISTEN_PID": pid, "LISTEN_FDS": "zz", "FDSTORE": "1"}.items():
        monkeypatch.setenv(name, text)
    assert fd_store_from_environment(None, "a").inherited == {}


@pytest.mark.parametrize("second", ["5", "0", "2"])
def test_a_descriptor_that_cannot_be_stored_is_one_error_line(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries with the same descriptor, or a standard stream, would make the proxy close a descriptor in use."""
    fd = memfd("one")
    variables = {"S6_FD#": "2", "S6_FD_0": str(fd), "S6_FDID_0": "inco-trio/a/link.1"}
    variables |= {"S6_FD_1": str(fd) if second == "5" else second, "S6_FDID_1": "inco-trio/a/inotify.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=r"^descriptor [0-9]+: listed in the environment twice[^\n]*$"):
        fd_store_from_environment("/run/s", "a")
    os.close(fd)


@pytest.mark.parametrize("fdstore", ["8", "0"])
@pytest.mark.parametrize("names", ["link.1", "http:inflight.2", "bundle.1"])
def test_stored_descriptors_of_another_process_are_not_replaced(
    names: str, fdstore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check, the proxy would store new descriptors under the same names and never read the old queues."""
    variables = {
        "NOTIFY_SOCKET": "/n",
        "LISTEN_PID": "1",
        "LISTEN_FDS": "2",
        "FDSTORE": fdstore,
        "LISTEN_FDNAMES": names,
    }
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(InvalidArgumentError, match=rf"^\$LISTEN_PID: '1' is not this process, {os.getpid()}, [^\n]*$"):
        fd_store_from_environment(None, "a")


def test_more_names_than_descriptors_is_one_error_line(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "link.1:inotify.1"}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("NOTIFY_SOCKET", "/n")
    with pytest.raises(InvalidArgumentError, match=r"^\$LISTEN_FDNAMES: 2 names for 1 descriptor[^\n]*$"):
        fd_store_from_environment(None, "a")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Yield a socket that simulates systemd's notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(HANG)
        manager.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        yield manager


def received(manager: socket.socket) -> tuple[list[str], list[str]]:
    """Return the lines of the next datagram and the contents of its descriptors."""
    data, fds, _, _ = socket.recv_fds(manager, 1000, 10)
    contents = [os.pread(fd, 100, 0).decode() for fd in fds]
    for fd in fds:
        os.close(fd)
    return data.decode().split("\n"), contents


class TestSystemd:
    def test_the_new_descriptor_is_stored_before_the_old_is_removed(
        self, systemd: socket.socket, fds: dict[str, int]
    ) -> None:
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

    def test_the_successor_inherits_its_own_descriptors(self, systemd: socket.socket, tmp_path: Path) -> None:
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

    def test_of_two_descriptors_of_one_name_the_newer_is_used(self, systemd: socket.socket, tmp_path: Path) -> None:
        """systemd can store two descriptors under one name.

        It lists the newer one first. Removing the name would remove both.
        """
        for content in ("newer", "older", "other"):
            (tmp_path / content).write_text(content)
        script = 'export LISTEN_PID=$$; exec "$@" 3<newer 4<older 5<other'
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", sys.executable, "-c", PROBE, ""],
            env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "link.1:link.1:inotify.1"},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout)["held"] == {"link": "newer", "inotify": "other"}
        assert done.stderr == "fd store: several descriptors are stored as link.1: using the newest one\n"
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            systemd.recv(1000)

    def test_an_unreachable_fd_store_is_one_error_line(self, systemd: socket.socket, fds: dict[str, int]) -> None:
        holder = SystemdFdStore()
        systemd.close()
        with pytest.raises(ResourceError, match=r"^cannot reach systemd's fd store at [^\n]*refused$"):
            holder.store("link", fds["one"])


LIMITED = """
import os, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64 if sys.argv[1] == "hard" else hard))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""A program that limits the descriptors (also the hard limit if the first argument is `hard`) and runs a command."""


def limited(limit: str) -> list[str]:
    """Return a prefix that limits the descriptors of a program, and removes the capability to exceed the limit."""
    return ["setpriv", "--bounding-set=-all", sys.executable, "-c", LIMITED, limit]


class TestDescriptorsInTransit:
    """The processes of one user have more descriptors in transit in Unix sockets than the proxy's limit allows."""

    @pytest.fixture(autouse=True)
    def in_transit(self) -> Iterator[None]:
        ends = socket.socketpair()
        for _ in range(2):
            socket.send_fds(ends[0], [b"x"], [0] * 50)
        yield
        for end in ends:
            end.close()

    @pytest.fixture
    def start(self, systemd: socket.socket, tmp_path: Path) -> Iterator[Callable[[str], Proxy]]:
        """Yield a function that starts a proxy with a limited number of descriptors under a simulated systemd."""
        environment = {"NOTIFY_SOCKET": systemd.getsockname(), "FDSTORE": "8"}
        arguments: list[str | Path] = [f"unix:{tmp_path}/a,peer={tmp_path}/b", "--irq-dir", tmp_path / "irq"]
        with ExitStack() as stack:

            def start(limit: str) -> Proxy:
                proxy = Proxy(None, arguments, environment, tmp_path / "log", limited(limit))
                stack.callback(proxy.close)
                return proxy

            yield start

    def test_a_low_soft_limit_is_raised(self, systemd: socket.socket, start: Callable[[str], Proxy]) -> None:
        proxy = start("soft")
        proxy.wait_ready()
        stored = [systemd.recv(1000).split(b"\n")[1] for _ in range(3)]
        assert stored == [b"FDNAME=inflight.1", b"FDNAME=inotify.1", b"FDNAME=link.1"]
        assert proxy.stop() == 0

    def test_a_low_hard_limit_is_one_error_line(self, start: Callable[[str], Proxy]) -> None:
        proxy = start("hard")
        assert proxy.process.wait(HANG) == os.EX_OSERR
        assert proxy.log.endswith(f"error: cannot store a descriptor in systemd's fd store: {IN_TRANSIT}\n")
        assert proxy.log.count("\n") == 1

    @pytest.mark.s6
    def test_the_error_of_s6_is_explained(self, daemon: Daemon) -> None:
        code = f"""
import os
from inco_trio.errors import ResourceError
from inco_trio.persist.fdstore import S6FdStore

os.environ["S6_FD#"] = "0"
try:
    S6FdStore({daemon.socket!r}, {PREFIX!r}).store("link", 0)
except ResourceError as error:
    print(error)
"""
        command = [*limited("hard"), sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"cannot store {PREFIX}link.1 in {daemon.socket}: {IN_TRANSIT}\n", "")

    def test_the_error_of_a_bundle_is_explained(self) -> None:
        code = """
from inco_trio.errors import ResourceError
from inco_trio.persist.bundle import Bundle
from tests.support_proxy import Cupboard

bundle = Bundle(Cupboard())
try:
    bundle.store("b1/link", 0)
except ResourceError as error:
    print(error)
"""
        command = [*limited("hard"), sys.executable, "-c", code]
        project = Path(__file__).parents[1]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=project)
        assert (done.stdout, done.stderr) == (f"cannot store descriptors: {IN_TRANSIT}\n", "")


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
def test_the_environment_selects_the_fd_store(
    environment: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    holder = fd_store_from_environment(None, "a")
    assert type(holder) is expected
    assert holder.inherited == {}


def test_without_an_fd_store_nothing_is_stored(fds: dict[str, int]) -> None:
    holder = NoFdStore()
    holder.store("link", fds["one"])
    holder.remove("link")
    assert NoFdStore().inherited == {}


@pytest.mark.parametrize("name", ["link", "bundle", "b1/link", "inotify"])
def test_a_descriptor_of_the_wrong_kind_is_closed(name: str) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    fds = {name: os.open("/dev/null", os.O_RDWR)}
    assert inherited_fd(fds, name) is None
    assert (fds, sorted(Path("/proc/self/fd").iterdir())) == ({}, before)
