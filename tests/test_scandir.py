"""Tests of the systemd unit, and of the scan directory under a real s6-svscan with a small stand-in for inco-trio."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from inco_trio.errors import InvalidArgumentError, PermissionDeniedError
from inco_trio.service.descriptions import (
    Service,
    boards_service,
    bridge_service,
    exporter_service,
    find_program,
    gateway_service,
    link_service,
)
from inco_trio.service.scandir import write_scandir
from inco_trio.service.systemd import systemd_unit
from inco_trio.simulation.world import Cores, Namespace, Peer
from netns.fixtures import Consumer
from netns.hang import HANG

STANDIN = """
import os, signal, socket, sys
from inco_trio.persist.fdstore import fd_store_from_environment
from inco_trio.notify import check_notification_fd, notify_ready

run, interface, _, config, _, _, notification_fd, _, holder_socket, *log_format = sys.argv[1:]
check_notification_fd(int(notification_fd))
holder = fd_store_from_environment(holder_socket, interface)
home = os.path.dirname(config)
if "link" in holder.inherited:
    link = socket.socket(fileno=holder.inherited["link"])
    starts = holder.inherited["inflight"]
else:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    link.bind(f"{home}/{interface}")
    starts = os.memfd_create("inflight")
    holder.store("inflight", starts)
    holder.store("link", link.fileno())
os.write(starts, b"+")
report = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
report.connect(f"{home}/report")
notify_ready(int(notification_fd))
print(f"hello from {interface}", flush=True)
report.send(f"{interface} started {os.fstat(starts).st_size}".encode())
while True:
    message = link.recv(100)
    if message.startswith(b"exit "):
        sys.exit(int(message[5:]))
    report.send(interface.encode() + b" got " + message)
    if message == b"hang":
        signal.pause()
"""
"""A stand-in for inco-trio that stores a link and a start counter in the fd store, and reports what it does."""

STANDIN_IN_SH = """
home=${4%/*}
if [ -n "$S6_FD_0" ]; then
  read -r waiting <&"$S6_FD_0"
  echo "user read $waiting" >"$home/said"
else
  exec 5<>"$home/fifo"
  s6-fdholder-store "$9" "inco-trio/$2/link.1" <&5
  echo "user $(id -un) $(sed -n '/^CapEff/s/.*\\t//p' /proc/self/status)" >"$home/said"
fi
echo >&"$7" && exec sleep 1000
"""
"""A shell script to use instead of STANDIN if a user cannot run this Python interpreter.

It stores one FIFO, and writes its reports to another.
"""


def another_user() -> str | None:
    """Return a user for the services, or None if not running as root or if the user namespace has only one user."""
    users = int(Path("/proc/self/uid_map").read_text().split()[2])
    return "nobody" if os.geteuid() == 0 and users > pwd.getpwnam("nobody").pw_uid else None


class Tree:
    """A scan directory, its s6-svscan, and the reports of its services."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.scandir = home / "scan dir"
        self.config = home / "udrv.json"
        self.config.write_text("{}")
        self._log = home / "svscan.log"
        self._report = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._report.settimeout(HANG)
        self._report.bind(str(home / "report"))

    def write(self, interface: str, *, user: str | None = None, program: Sequence[str] = ()) -> list[str]:
        return write_scandir(
            self.scandir,
            service=link_service(interface, self.config),
            user=user,
            program=program or [sys.executable, "-c", STANDIN],
        )

    def start(self, namespace: Namespace | None = None, prefix: Sequence[str] = ()) -> None:
        def start() -> subprocess.Popen[bytes]:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    [*prefix, "s6-svscan", str(self.scandir)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

        self._process = namespace.run(start) if namespace else start()

    @contextmanager
    def becoming_ready(self, interface: str) -> Iterator[None]:
        """At the end of the block, wait until a service is ready. s6-svscan can discover it during the block."""
        event = f"{self.service(interface)}/event"
        subprocess.run(["s6-mkfifodir", event], check=True)
        # s6-ftrig-listen1 runs `echo` once it is listening.
        with subprocess.Popen(
            ["s6-ftrig-listen1", "-t", "20000", event, "U", "echo"], stdout=subprocess.PIPE
        ) as listener:
            assert listener.stdout is not None
            assert listener.stdout.read(1) == b"\n"
            yield
            if listener.wait(HANG) != 0:
                pytest.fail(f"{interface} does not become ready; {self.said()}")

    def stop(self) -> None:
        """Stop all services and wait until the loggers have written everything."""
        subprocess.run(["s6-svscanctl", "-t", str(self.scandir)], check=True)
        assert self._process.wait(HANG) == 0

    def close(self) -> None:
        self._report.close()
        if self._process.poll() is None:
            # SIGTERM has the same effect as s6-svscanctl -t, which might fail at this point.
            self._process.terminate()
            self._process.wait(HANG)

    def next_report(self) -> str:
        """Return the next report of a service."""
        try:
            return self._report.recv(100).decode()
        except TimeoutError:
            pytest.fail(f"no report within {HANG:g} s; {self.said()}")

    def send(self, interface: str, message: str) -> None:
        """Send a datagram to the link of a service, even if the service is down."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), str(self.home / interface))

    def service(self, interface: str) -> str:
        return str(self.scandir / f"inco-trio-{interface}")

    def svc(self, options: str, interface: str) -> None:
        subprocess.run(["s6-svc", "-T", "20000", *options.split(), self.service(interface)], check=True)

    def state(self, interface: str) -> dict[str, str]:
        names = ["up", "wantedup", "exitcode"]
        done = subprocess.run(
            ["s6-svstat", "-o", ",".join(names), self.service(interface)], check=True, capture_output=True, text=True
        )
        return dict(zip(names, done.stdout.split(), strict=True))

    def wait_down(self, interface: str) -> None:
        """Wait until the service is down and its finish script has ended."""
        subprocess.run(["s6-svwait", "-D", "-t", "20000", self.service(interface)], check=True)

    def held(self) -> list[str]:
        socket_path = str(self.scandir / "inco-trio-fdholder/s")
        done = subprocess.run(["s6-fdholder-list", socket_path], check=True, capture_output=True, text=True)
        return sorted(done.stdout.split())

    def log(self, interface: str) -> str:
        return (Path(self.service(interface)) / "log/main/current").read_text()

    def said(self) -> str:
        logs = [self._log, *self.scandir.glob("*/log/main/current")]
        return "".join(f"{path}:\n{path.read_text()}" for path in logs)


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a directory with a short path that every user can enter."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        yield Path(home)


@pytest.fixture
def tree(home: Path) -> Iterator[Tree]:
    tree = Tree(home)
    yield tree
    tree.close()


@pytest.mark.s6
class TestUnderS6:
    def test_datagrams_that_arrive_while_the_service_is_down_are_read_later(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.svc("-wD -d", "core0")
        for number in range(3):
            tree.send("core0", str(number))
        tree.svc("-wU -u", "core0")
        assert [tree.next_report() for _ in range(4)] == [
            "core0 started 2",
            *(f"core0 got {number}" for number in range(3)),
        ]
        assert tree.held() == ["inco-trio/core0/inflight.1", "inco-trio/core0/link.1"]

    def test_datagrams_that_wait_when_the_service_is_killed_are_read_later(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.send("core0", "hang")
        assert tree.next_report() == "core0 got hang"
        tree.send("core0", "waiting")
        tree.svc("-k", "core0")
        assert [tree.next_report(), tree.next_report()] == ["core0 started 2", "core0 got waiting"]

    @pytest.mark.parametrize("code", [2, 77, 78])
    def test_a_permanent_failure_is_not_retried(self, code: int, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.send("core0", f"exit {code}")
        tree.wait_down("core0")
        assert tree.state("core0") == {"up": "false", "wantedup": "false", "exitcode": str(code)}
        # Do not use -wU: s6-supervise might still report the earlier failure, which -wU would mistake for a new
        # failure.
        tree.svc("-u", "core0")
        assert tree.next_report() == "core0 started 2"
        tree.stop()
        assert re.search(
            rf"inco-trio-core0 stays down: [^\n]* \(exit code {code}\)\. Fix it, then run: "
            rf"s6-svc -u '{tree.service('core0')}'\n",
            tree.log("core0"),
        )

    def test_a_temporary_failure_is_retried(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.send("core0", "exit 71")
        assert tree.next_report() == "core0 started 2"

    def test_the_log_names_the_exit_code_or_the_signal_that_ended_the_process(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.send("core0", "exit 71")
        assert tree.next_report() == "core0 started 2"
        tree.svc("-k", "core0")
        assert tree.next_report() == "core0 started 3"
        tree.stop()
        ends = re.findall("inco-trio-core0: (.*)", tree.log("core0"))
        assert ends == ["ended with exit code 71", "killed by signal 9 (SIGKILL)", "killed by signal 15 (SIGTERM)"]

    def test_log_lines_have_a_timestamp(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.stop()
        assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+  hello from core0$", tree.log("core0"), re.MULTILINE)

    def test_two_interfaces_share_the_fd_store(self, tree: Tree) -> None:
        tree.write("core0")
        tree.write("core0.16")
        tree.start()
        assert {tree.next_report(), tree.next_report()} == {"core0 started 1", "core0.16 started 1"}
        tree.svc("-wD -d", "core0")
        tree.send("core0", "a")
        tree.send("core0.16", "b")
        assert tree.next_report() == "core0.16 got b"
        tree.svc("-wU -u", "core0")
        assert [tree.next_report(), tree.next_report()] == ["core0 started 2", "core0 got a"]
        services = ("core0", "core0.16")
        assert set(tree.held()) == {f"inco-trio/{i}/{name}.1" for i in services for name in ("inflight", "link")}

    def test_an_interface_can_be_added_to_a_running_tree(self, tree: Tree) -> None:
        tree.write("core0")
        tree.start()
        assert tree.next_report() == "core0 started 1"
        tree.write("other")
        subprocess.run(["s6-svscanctl", "-a", str(tree.scandir)], check=True)
        assert tree.next_report() == "other started 1"

    def test_another_user_keeps_two_capabilities_and_stored_descriptors(self, tree: Tree) -> None:
        user = another_user()
        fifos = [tree.home / "fifo", tree.home / "said"]
        for fifo in fifos:
            os.mkfifo(fifo)
            fifo.chmod(0o666)
        said = os.open(fifos[1], os.O_RDWR)
        tree.write("core0", user=user, program=["/bin/sh", "-c", STANDIN_IN_SH, "sh"])
        tree.start()

        def heard() -> str:
            if not select.select([said], [], [], HANG)[0]:
                pytest.fail(f"the service reports nothing; {tree.said()}")
            return os.read(said, 100).decode()

        first = heard()
        if user:
            assert first == "user nobody 0000000000003000\n"
        tree.svc("-wD -d", "core0")
        # This open succeeds only because the fd store holds the reading end of the FIFO.
        fd = os.open(fifos[0], os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"what came meanwhile\n")
        os.close(fd)
        tree.svc("-wU -u", "core0")
        assert heard() == "user read what came meanwhile\n"
        os.close(said)


@pytest.mark.s6
@pytest.mark.netns
def test_a_real_proxy_delivers_notifications_that_arrive_while_it_is_down(
    tree: Tree, cores: Cores, core1: Peer, watch: Callable[[Path], Consumer]
) -> None:
    irq = tree.home / "irq"
    tree.config.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": str(irq)}}}))
    tree.write(cores.link, program=[sys.executable, "-m", "inco_trio"])
    with tree.becoming_ready(cores.link):
        tree.start(cores.core0)
    state = watch(irq / "message_4_state")
    tree.svc("-wD -d", cores.link)
    for _ in range(3):
        core1.send(b"ihub_reset_irq")
        (irq / "message_6_trig").write_text("1")
    tree.svc("-wU -u", cores.link)
    state.wait(3)
    assert [core1.receive()[14:] for _ in range(3)] == [b"redun_notify_irq"] * 3
    assert tree.held() == [f"inco-trio/{cores.link}/{name}.1" for name in ("inflight", "inotify", "link")]


UNCOVERED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from netns.unprivileged import uncover
uncover([Path(path).resolve() for path in (sys.argv[1], sys.prefix, sys.base_prefix)])
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""A program that lets every user read the Python installation and the project, and then runs a given command."""
APPLICATION = 12
"""The user ID of an application."""


@pytest.mark.s6
@pytest.mark.netns
def test_a_service_can_use_a_directory_of_the_application(
    tree: Tree, cores: Cores, core1: Peer, watch: Callable[[Path], Consumer]
) -> None:
    """The service's user has write permission through its group. `--irq-owner` names the application and this group."""
    irq = tree.home / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    user, group = ("daemon", "daemon") if another_user() else ("root", str(os.getegid()))
    owner = str(APPLICATION if another_user() else os.getuid())
    for path in (irq, irq / "message_6_trig"):
        os.chown(path, int(owner), grp.getgrnam(group).gr_gid if another_user() else -1)
    irq.chmod(0o2775)
    tree.config.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": str(irq)}}}))
    command = [sys.executable, "-m", "inco_trio", "service", "s6", str(tree.scandir), cores.link]
    command += ["--config", str(tree.config), "--user", user, "--irq-owner", f"{owner}:{group}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tree.becoming_ready(cores.link):
        tree.start(cores.core0, [sys.executable, "-c", UNCOVERED, str(Path(__file__).parents[1])])
    state = watch(irq / "message_4_state")
    core1.send(b"ihub_reset_irq")
    state.wait(1)
    (irq / "message_6_trig").write_text("1")
    assert core1.receive()[14:] == b"redun_notify_irq"
    assert (irq / "message_4_state").stat().st_uid == (pwd.getpwnam(user).pw_uid)


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the inode, mode and content of every file."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def changes(scandir: Path, *, interface: str = "core0", config: str = __file__, user: str | None = None) -> list[str]:
    lines = write_scandir(scandir, service=link_service(interface, Path(config)), user=user, program=["/opt/inco-trio"])
    return [line.replace(f"{scandir}/", "") for line in lines]


class TestFiles:
    def test_a_second_run_changes_nothing(self, tmp_path: Path) -> None:
        assert set(changes(tmp_path)) >= {
            "created inco-trio-core0/run",
            "created inco-trio-core0/log/run",
            "created inco-trio-fdholder/run",
        }
        before = snapshot(tmp_path)
        assert changes(tmp_path) == []
        assert snapshot(tmp_path) == before

    def test_a_new_configuration_changes_only_run(self, tmp_path: Path) -> None:
        changes(tmp_path)
        before = snapshot(tmp_path)
        assert changes(tmp_path, config="/proc/version") == ["changed inco-trio-core0/run"]
        after = snapshot(tmp_path)
        assert {name for name in after if after[name] != before[name]} == {"inco-trio-core0/run"}

    def test_a_wrong_mode_and_an_edited_file_are_restored(self, tmp_path: Path) -> None:
        changes(tmp_path)
        (tmp_path / "inco-trio-core0/run").chmod(0o600)
        (tmp_path / "inco-trio-core0/finish").write_text("")
        assert changes(tmp_path) == ["changed inco-trio-core0/finish", "changed inco-trio-core0/run"]
        assert os.access(tmp_path / "inco-trio-core0/run", os.X_OK)

    def test_the_umask_does_not_lock_users_out(self, tmp_path: Path) -> None:
        umask = os.umask(0o077)
        changes(tmp_path / "new/scan")
        os.umask(umask)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]}
        assert modes == {0o755, 0o644}

    def test_no_symlink_gets_the_mode_of_a_new_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If another user may write to the parent of the scan directory, that user can replace what was created."""
        victim = tmp_path / "victim"
        victim.mkdir(mode=0o700)
        mkdir = os.mkdir

        def replaced_afterwards(name: str, *, dir_fd: int) -> None:
            mkdir(name, dir_fd=dir_fd)
            (tmp_path / name).rename(tmp_path / "moved")
            (tmp_path / name).symlink_to(victim)

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", replaced_afterwards)
            with pytest.raises(InvalidArgumentError):
                changes(tmp_path / "scan")
        assert stat.S_IMODE(victim.stat().st_mode) == 0o700
        (tmp_path / "scan").unlink()
        monkeypatch.delattr(Path, "chmod")  # The modes of files are set by their descriptors.
        changes(tmp_path / "scan")

    @pytest.mark.netns  # Changing owners needs root.
    @pytest.mark.parametrize(
        "link",
        [".", "inco-trio-core0", "inco-trio-core0/log", "inco-trio-fdholder", "inco-trio-fdholder/data/rules/uid"],
    )
    def test_no_symlink_of_another_user_leads_elsewhere(self, tmp_path: Path, link: str) -> None:
        victim, stranger = tmp_path / "victim", 12345
        (victim / "precious").mkdir(parents=True)
        tmp_path.chmod(0o755)
        place = tmp_path / "scan" / link
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(victim)
        os.lchown(place, stranger, stranger)
        with pytest.raises(PermissionDeniedError, match=rf" {place} is a symlink that another user owns$"):
            changes(tmp_path / "scan")
        assert [str(path.relative_to(victim)) for path in victim.rglob("*")] == ["precious"]
        os.lchown(place, os.geteuid(), os.getegid())
        changes(tmp_path / "scan")  # The user's own symlinks are followed.
        assert len([*victim.rglob("*")]) > 1

    def test_no_symlink_stays_in_place_of_a_file(self, tmp_path: Path) -> None:
        """Otherwise, the owner of its target could change what the service runs."""
        changes(tmp_path)
        run = tmp_path / "inco-trio-core0/run"
        run.rename(tmp_path / "target")
        run.symlink_to(tmp_path / "target")
        changes(tmp_path)
        assert not run.is_symlink()

    def test_a_user_without_a_service_loses_its_rights(self, tmp_path: Path) -> None:
        rules = tmp_path / "inco-trio-fdholder/data/rules/uid"
        owner = {"0", str(os.geteuid())}
        one, two = [account for account in pwd.getpwall() if str(account.pw_uid) not in owner][:2]
        changes(tmp_path, interface="a.1", user=one.pw_name)
        changes(tmp_path, interface="b", user=one.pw_name)
        assert (rules / str(one.pw_uid) / "env/S6_FDHOLDER_STORE_REGEX").read_text() == "^inco-trio/(a\\.1|b)/\n"
        changes(tmp_path, interface="a.1", user=two.pw_name)
        assert {path.name for path in rules.iterdir()} == owner | {str(one.pw_uid), str(two.pw_uid)}
        assert f"removed inco-trio-fdholder/data/rules/uid/{two.pw_uid}" in changes(tmp_path, interface="a.1")
        shutil.rmtree(tmp_path / "inco-trio-b")
        assert changes(tmp_path, interface="a.1") == [f"removed inco-trio-fdholder/data/rules/uid/{one.pw_uid}"]
        assert {path.name for path in rules.iterdir()} == owner

    def test_files_not_written_by_us_are_left_alone(self, tmp_path: Path) -> None:
        for name in ("inco-trio-core0/down", "sshd/run"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        changes(tmp_path)
        assert (tmp_path / "inco-trio-core0/down").exists()
        assert (tmp_path / "sshd/run").exists()

    @pytest.mark.parametrize("path", ["/x/a b", "/x/it's", "/x/$(exit)`exit`", "/x/a\nb", "/x/\udcff"])
    def test_a_path_reaches_the_program_unchanged(self, path: str, tmp_path: Path) -> None:
        write_scandir(tmp_path, service=link_service("core0", Path(path)), user=None, program=[path, "x y"])
        command = (tmp_path / "inco-trio-core0/run").read_bytes().partition(b"/s \\\n")[2]
        done = subprocess.run(["/bin/sh"], input=b"printf '%s\\0' " + command, capture_output=True, check=True)
        assert os.fsdecode(done.stdout).split("\0")[:6] == [path, "x y", "run", "core0", "--config", path]

    def test_a_missing_configuration_is_a_warning(self, tmp_path: Path) -> None:
        changes(tmp_path, config="/nonexistent/udrv.json")
        assert changes(tmp_path, config="/nonexistent/udrv.json") == [
            "warning: /nonexistent/udrv.json: cannot be read: No such file or directory"
        ]

    @pytest.mark.parametrize(
        "interface", ["", ".", "..", "a/b", "a b", "a:1", "a\n", "\udcff", "sixteen-letters-", "fdholder", "-a"]
    )
    def test_an_invalid_interface_is_refused(self, interface: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^link {re.escape(repr(interface))}: [^\n]+$"):
            changes(tmp_path, interface=interface)
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_user_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^--user nobodyelse: no such user \(create it with [^\n]*\)$"):
            changes(tmp_path, user="nobodyelse")

    def test_a_directory_that_cannot_be_created_is_one_error_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InvalidArgumentError, match=rf"^cannot write {tmp_path}/file: Not a directory$"):
            changes(tmp_path / "file")

    def test_missing_permission_is_one_error_line(self) -> None:
        # sysfs refuses new directories even to root.
        with pytest.raises(PermissionDeniedError, match=r"^cannot write /sys/scan: [^\n]*$"):
            changes(Path("/sys/scan"))


def test_the_program_ignores_the_python_paths_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('imported from a path of the user')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*find_program(), "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_installed_only_for_the_user_still_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != -I ]\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert find_program() == [str(python), "-P", "-m", "inco_trio"]


def directives(service: Service) -> list[str]:
    """Return the names of a unit's directives as systemd reads them: systemd's read_line() also ends a line at \\r."""
    unit = systemd_unit(service=service, user=None, program=["inco-trio"]).replace("\\\n", " ")
    lines = [line.strip() for line in re.split("[\n\r\0]", unit)]
    return [line.partition("=")[0] for line in lines if line and not line.startswith(("#", ";"))]


@pytest.mark.parametrize("text", ["\nExecStartPre=/x", "\rExecStartPre=/x", "\\"])
def test_no_path_adds_or_hides_directives(text: str, tmp_path: Path) -> None:
    config = tmp_path / "udrv.json"
    services = [
        [
            boards_service(Path(f"/etc/boards{end}"), "boards-1"),
            link_service(f"unix:/a,peer=/b{end}", config),
            link_service("unix:/a,peer=/b", Path(f"{config}{end}")),
            bridge_service("mqtt://h/wire", f"unix:/a,peer=/b{end}", "core0", None),
        ]
        for end in ("", text)
    ]
    for plain, odd in zip(*services, strict=True):
        assert directives(odd) == directives(plain)


def test_each_unit_has_its_own_runtime_directory() -> None:
    found = set()
    for service in (
        link_service("rpmsg4000", Path("/dev/null")),
        link_service("unix:/run/a b/core0,peer=/c", Path("/dev/null")),
        boards_service(Path("/etc/boards"), "boards-1"),
    ):
        unit = systemd_unit(service=service, user="daemon", program=["inco-trio"])
        (directory,) = re.findall(r"^RuntimeDirectory=(inco-trio/[A-Za-z0-9_.@-]+)$", unit, re.MULTILINE)
        assert f" --control %t/{directory}/control.sock\n" in unit
        found.add(directory)
    assert len(found) == 3


SERVICES = {
    "proxy of an interface": link_service("rpmsg4000", Path("/dev/null")),
    "proxy of a socket": link_service("unix:/run/a,peer=/run/b", Path("/dev/null")),
    "boards": boards_service(Path("/etc/boards"), "boards-1"),
    "gateway": gateway_service("mqtt://h/lab/host1", None),
    "bridge": bridge_service("mqtt://h/wire", "unix:/run/a,peer=/run/b", "core0", None),
    "exporter": exporter_service("127.0.0.1:9478"),
}


@pytest.mark.tools
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_rates_the_exposure_of_each_unit_as_low(name: str, tmp_path: Path) -> None:
    unit = tmp_path / "x.service"
    unit.write_text(systemd_unit(service=SERVICES[name], user="inco-trio", program=["/usr/bin/true"]))
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    rated = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", rated)
    assert found is not None
    assert float(found[1]) <= 1.5, rated
    page = (Path(__file__).parents[1] / "docs/supervision.md").read_text().replace("\\|", "|")
    for line in rated.splitlines():
        if line.startswith("✗"):
            assert f"`{line.split()[1]}`" in page, f"docs/supervision.md does not explain: {line}"
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    # Versions of systemd before 254 do not support FileDescriptorStorePreserve=.
    unexpected = [line for line in verified.stderr.splitlines() if "FileDescriptorStorePreserve" not in line]
    assert not [line for line in unexpected if str(unit) in line]


@pytest.mark.parametrize(
    ("service", "tmp", "home"),
    [
        (SERVICES["proxy of a socket"], "yes", "yes"),
        (link_service("unix:/tmp/a,peer=/run/b", Path("/dev/null")), "no", "yes"),
        (link_service("unix:/run/a,peer=/home/u/b", Path("/dev/null")), "yes", "no"),
        (link_service("a", Path("/var/tmp/u.json")), "no", "yes"),  # noqa: S108 - not a file
        (bridge_service("mqtt://h/w", "unix:/run/a,peer=/run/user/7/b", "core0", None), "yes", "no"),
        (gateway_service("mqtt://h/lab", Path("/tmp/g.json")), "no", "yes"),  # noqa: S108 - not a file
    ],
)
def test_a_unit_sees_the_directories_that_its_service_uses(service: Service, tmp: str, home: str) -> None:
    unit = systemd_unit(service=service, user="inco-trio", program=["/usr/bin/true"]).splitlines()
    assert {f"PrivateTmp={tmp}", f"ProtectHome={home}"} <= set(unit)


def test_a_program_in_a_home_directory_is_readable() -> None:
    unit = systemd_unit(service=SERVICES["exporter"], user="inco-trio", program=["/home/u/bin/inco-trio"])
    assert "ProtectHome=read-only" in unit.splitlines()


def test_the_python_of_a_virtual_environment_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/home/u/python")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    unit = systemd_unit(
        service=SERVICES["exporter"], user="inco-trio", program=[sys.executable, "-I", "-m", "inco_trio"]
    )
    assert {"ProtectHome=read-only", "PrivateTmp=no"} <= set(unit.splitlines())


def test_a_unit_sees_the_directories_of_the_configured_registers(tmp_path: Path) -> None:
    (tmp_path / "b1.json").write_text(json.dumps({"link": "unix:/run/a,peer=/run/b", "irq_dir": "/home/irq"}))
    unit = systemd_unit(service=boards_service(tmp_path, "boards-1"), user="inco-trio", program=["/usr/bin/true"])
    assert {"PrivateTmp=no", "ProtectHome=no"} <= set(unit.splitlines())


def test_a_unit_waits_for_its_link_and_reports_a_refused_reload() -> None:
    unit = systemd_unit(service=link_service("a", Path("/u.json")), user="inco-trio", program=["/usr/bin/inco-trio"])
    assert " --wait-link " in unit
    assert "\nTimeoutStartSec=infinity\n" in unit
    assert "\nExecReload=/usr/bin/inco-trio reload --control %t/inco-trio/a/control.sock\n" in unit
    boards = systemd_unit(service=SERVICES["boards"], user="inco-trio", program=["/usr/bin/inco-trio"])
    assert "\nExecReload=/usr/bin/inco-trio reload --control %t/inco-trio/" in boards
    client = systemd_unit(service=SERVICES["exporter"], user="inco-trio", program=["/usr/bin/inco-trio"])
    assert "\nExecReload=kill -HUP $MAINPID\n" in client
    assert "TimeoutStartSec" not in boards


def test_a_unit_of_root_names_no_account() -> None:
    for user in (None, "root"):
        unit = systemd_unit(service=SERVICES["boards"], user=user, program=["/usr/bin/inco-trio"])
        assert "\nUser=root\n" in unit
        assert "useradd" not in unit
    unit = systemd_unit(service=SERVICES["boards"], user="inco-trio", program=["/usr/bin/inco-trio"])
    assert "\nUser=inco-trio\n" in unit
    assert "\n#   useradd --system --user-group --no-create-home --shell /usr/sbin/nologin inco-trio\n" in unit


def test_a_unit_names_the_owner_of_the_directories() -> None:
    options = ["--config", "/u.json", "--user", "root"]
    for words in (["systemd", "rpmsg4000"], ["systemd", "unix:/run/a,peer=/run/b"]):
        command = [sys.executable, "-m", "inco_trio", "service", *words, *options, "--irq-owner", "12:13"]
        unit = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert re.search("^ExecStart=.* --irq-owner 12:13 ", unit, re.MULTILINE)


def test_memory_is_locked_only_on_request(tmp_path: Path) -> None:
    service, program = SERVICES["proxy of a socket"], ["/usr/bin/inco-trio"]
    assert "MEMLOCK" not in systemd_unit(service=service, user=None, program=program)
    unit = systemd_unit(service=service, user=None, program=program, options=["--lock-memory"])
    assert "\nLimitMEMLOCK=infinity\n" in unit
    assert " --lock-memory " in unit
    for options, lines in ((), 0), (("--lock-memory",), 1):
        write_scandir(tmp_path / "scan", service=service, user=None, program=program, options=options)
        (run,) = (tmp_path / "scan").glob("inco-trio-*a*/run")
        assert run.read_text().count("\nulimit -l unlimited\n") == lines


class TestSystemdUnit:
    def test_the_command_is_quoted_for_systemd(self) -> None:
        unit = systemd_unit(
            service=link_service("rpmsg%1", Path('/etc/a b/100%/$HOME/"x"\\')),
            user=None,
            program=["/usr/bin/inco-trio"],
        )
        command = (
            '/usr/bin/inco-trio run rpmsg%%1 --config "/etc/a b/100%%/$$HOME/\\"x\\"\\\\" --wait-link --log-format text'
        )
        assert re.search(rf"^ExecStart={re.escape(command)} --control %t/[^ ]+$", unit, re.MULTILINE)
        assert "interrupts on rpmsg%%1\n" in unit

    def test_the_unit_runs_as_the_user_with_one_capability(self) -> None:
        unit = systemd_unit(
            service=link_service("a", Path("/dev/null")), user="nobody", program=["inco-trio"]
        ).splitlines()
        both = "CAP_NET_RAW CAP_NET_ADMIN"
        assert {"User=nobody", f"AmbientCapabilities={both}", f"CapabilityBoundingSet={both}"} <= set(unit)

    def test_a_socket_needs_no_capability_and_boards_may_have_namespaces(self, tmp_path: Path) -> None:
        (tmp_path / "b1.json").write_text(json.dumps({"link": "a", "netns": "b1", "irq_dir": "/run/irq"}))
        for service, said in (
            (boards_service(tmp_path, "boards-1"), "RestrictNamespaces=net"),
            (link_service("unix:/a,peer=/b", Path("/dev/null")), "RestrictAddressFamilies=AF_UNIX"),
            (boards_service(Path("/etc/boards"), "boards-1"), "RestrictNamespaces=yes"),
        ):
            unit = systemd_unit(service=service, user="nobody", program=["inco-trio"]).splitlines()
            assert said in unit
            assert ("CapabilityBoundingSet=CAP_NET_RAW CAP_NET_ADMIN" in unit) == (service.label == "boards-1")

    def test_invalid_input_is_refused(self) -> None:
        with pytest.raises(InvalidArgumentError):
            systemd_unit(service=link_service("a b", Path("/dev/null")), user=None, program=["inco-trio"])
