"""Tests of the sandbox: forbidden operations fail, and all operations that a running proxy needs succeed."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inco_trio.config import Config
from inco_trio.linux import files, landlock, seccomp
from inco_trio.linux.bpf import AND, JUMP_IF_EQUAL, JUMP_IF_GREATER, LOAD_WORD, RETURN
from inco_trio.service import sandbox
from inco_trio.service.sandbox import enter_sandbox
from inco_trio.signals import builtin_signals
from netns.hang import HANG
from tests.faults.supervised import wait_path
from tests.support_control import Board, no_descriptors
from tests.support_proxy import write_udrv
from tests.test_privileges import status_of

ENTER = """
import ctypes, os, socket, sys
from pathlib import Path
from inco_trio.config import Config
from inco_trio.linux.seccomp import machine, numbers
from inco_trio.service.privileges import drop_capabilities
from inco_trio.service.sandbox import enter_sandbox
from inco_trio.signals import builtin_signals

home = Path(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
drop_capabilities({1, 3})
config = Config(f"unix:{home}/socket/a,peer={home}/b", builtin_signals(home / "irq/board"))
enter_sandbox([config], control=home / "run/s", grows=False, has_fd_holder=False, log=sys.argv[2] == "log")

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def thread(function):
    import threading
    failed = []
    def run():
        try:
            function()
        except OSError as error:
            failed.append(error)
    started = threading.Thread(target=run)
    started.start()
    started.join()
    for error in failed:
        raise error

def operation():
    %s

try:
    operation()
except OSError as error:
    print(error.errno)
else:
    print("works")
"""
"""A program that enters the sandbox and then tries an operation."""

FORBIDDEN_BY_LANDLOCK = {
    "write elsewhere": 'open(home / "elsewhere", "w")',
    "write an existing file elsewhere": 'open(home / "here/file", "r+")',
    "remove elsewhere": '(home / "here/file").unlink()',
    "rename elsewhere": '(home / "here/file").rename(home / "here/other")',
    "move out": '(home / "irq/board/x").rename(home / "here/x")',
    "make a directory elsewhere": '(home / "here/new").mkdir()',
    "make a socket elsewhere": 'socket.socket(socket.AF_UNIX).bind(str(home / "here/s"))',
    "write elsewhere in a thread": 'thread(lambda: open(home / "elsewhere", "w"))',
    "write through a symlink": 'open(home / "irq/board/link", "r+")',
    "write to a device": 'open("/dev/full", "w")',
}

FORBIDDEN_BY_SECCOMP = {
    "truncate elsewhere": 'os.truncate(home / "here/file", 0)',
    "execute": 'os.execv("/bin/true", ["true"])',
    "execute in a thread": 'thread(lambda: os.execv("/bin/true", ["true"]))',
    "execute a descriptor": 'os.execve(os.open("/bin/true", os.O_RDONLY), ["true"], {})',
    "spawn": 'os.posix_spawn("/bin/true", ["true"], {})',
    "trace": 'call("ptrace", 16, os.getppid(), 0, 0)',
    "read another process's memory": 'call("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0)',
    "use IPv4": "socket.socket(socket.AF_INET)",
    "use IPv6": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "use packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "use Bluetooth": "socket.socket(31)",
    "make namespaces": 'call("unshare", 0x10000000)',
    "enter a namespace": 'call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0)',
    "clone into a namespace": 'call("syscall", numbers(machine())["clone"], 0x10000000 | 17, 0, 0, 0, 0)',
    "mount": 'call("mount", b"none", os.fsencode(home), b"tmpfs", 0, None)',
    "change the user": "os.setuid(1)",
    "use io_uring": 'call("syscall", 425, 1, 0)',
    "change the root": "os.chroot(home)",
    "change an owner": 'os.chown(home / "irq/board/x", 1, 1)',
    "make a symlink": 'os.symlink("/etc/passwd", home / "irq/board/y")',
    "signal another process": "os.kill(os.getppid(), 0)",
    "change the priority": "os.setpriority(os.PRIO_PROCESS, 0, 5)",
}

ALLOWED = {
    "write a register": 'open(home / "irq/board/x", "w").close()',
    "recreate an IRQ directory": '(home / "irq/board/x").unlink(); (home / "irq/board/link").unlink(); '
    '(home / "irq/board").rmdir(); (home / "irq/board").mkdir(); os.mknod(home / "irq/board/z")',
    "rename a register": '(home / "irq/board/x").rename(home / "irq/board/y")',
    "bind the link": 'socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind(str(home / "socket/a"))',
    "remove the control socket": '(home / "run/s").unlink()',
    "read elsewhere": 'assert (home / "here/file").read_text() == "content"',
    "write to /dev/null": 'open("/dev/null", "w").close()',
    "use rtnetlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "start a thread": 'thread(lambda: open(home / "irq/board/x", "w").close())',
    "import a module": "import json, sqlite3",
    "lock memory": 'os.memfd_create("x")',
}


def tried(home: Path, operation: str, mode: str = "on") -> str:
    """Run an operation in the sandbox. Return its error number, or "works"."""
    for directory in ("irq/board", "socket", "run", "here"):
        (home / directory).mkdir(parents=True)
    (home / "irq/board/x").touch()
    (home / "run/s").touch()
    (home / "here/file").write_text("content")
    (home / "irq/board/link").symlink_to(home / "here/file")
    command = [sys.executable, "-c", ENTER % operation, str(home), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _without_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure coverage in subprocesses: the sandbox prevents them from writing the data when they exit."""
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", FORBIDDEN_BY_LANDLOCK)
def test_an_operation_is_forbidden_with_landlock(name: str, tmp_path: Path) -> None:
    assert landlock.abi() >= 1
    assert tried(tmp_path, FORBIDDEN_BY_LANDLOCK[name]) in {str(errno.EACCES), str(errno.EXDEV)}


@pytest.mark.parametrize("name", FORBIDDEN_BY_SECCOMP)
def test_an_operation_is_forbidden_by_seccomp(name: str, tmp_path: Path) -> None:
    assert tried(tmp_path, FORBIDDEN_BY_SECCOMP[name]) == str(errno.EPERM)


@pytest.mark.parametrize("name", ALLOWED)
def test_an_operation_is_allowed(name: str, tmp_path: Path) -> None:
    assert tried(tmp_path, ALLOWED[name]) == "works"


@pytest.mark.parametrize("name", ["write elsewhere", "use IPv4", "signal another process"])
def test_the_log_mode_forbids_nothing(name: str, tmp_path: Path) -> None:
    assert tried(tmp_path, (FORBIDDEN_BY_LANDLOCK | FORBIDDEN_BY_SECCOMP)[name], "log") == "works"


def test_a_proxy_in_the_sandbox_with_landlock_does_its_work(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        proxy = board.running("--sandbox", "on")
        assert status_of(proxy.pid)["Seccomp"] == "2"
        assert "sandbox: writing is limited to" in proxy.log
        client = board.client()
        client.ask({"request": "monitor"})
        for turn in range(2):
            board.trigger()
            assert peer.recv(100)
            board.inbound(peer)
            client.until(event="notification", direction="inbound")
            proxy.process.send_signal(signal.SIGHUP)
            proxy.wait_log("reloaded")
            # The proxy can recreate the files in a new directory, because the Landlock rule applies to the parent.
            board.irq.rename(tmp_path / f"former{turn}")
            board.irq.mkdir()
            wait_path(board.irq / "message_6_trig")
        assert board.status()["tasks"]
        proxy.process.terminate()
        assert proxy.wait() == 0
        assert not board.path.exists()
        assert "Traceback" not in proxy.log


def test_a_reload_with_a_directory_outside_is_refused_with_landlock(tmp_path: Path) -> None:
    with ExitStack() as stack:
        inside, outside = tmp_path / "board", tmp_path / "other/irq"
        inside.mkdir()
        outside.mkdir(parents=True)
        board = Board(inside, stack)
        write_udrv(inside / "u.json", board.irq)
        proxy = board.running("--sandbox", "on", "--config", str(inside / "u.json"))
        write_udrv(inside / "u.json", outside)
        proxy.process.send_signal(signal.SIGHUP)
        line = proxy.wait_log("reload refused")
        assert str(outside) in line
        assert "Permission denied" in line
        assert "Traceback" not in proxy.log


class Machine:
    """A classic BPF interpreter that runs a filter on one system call."""

    def __init__(self, code: bytes) -> None:
        self.code = [struct.unpack_from("=HBBI", code, place) for place in range(0, len(code), 8)]

    def run(self, number: int, arch: int, argument: int = 0, byteorder: str = "little", second: int = 0) -> int:
        order = "<" if byteorder == "little" else ">"
        data = struct.pack(f"{order}IIQQQ", number, arch, 0, argument, second)
        accumulator = place = 0
        while True:
            operation, true, false, operand = self.code[place]
            place += 1
            if operation == LOAD_WORD:
                (accumulator,) = struct.unpack_from(f"{order}I", data, operand)
            elif operation == AND:
                accumulator &= operand
            elif operation == RETURN:
                return int(operand)
            else:
                is_true = {JUMP_IF_EQUAL: accumulator == operand, JUMP_IF_GREATER: accumulator > operand}[operation]
                place += true if is_true else false


ALLOW, EPERM, ENOSYS, LOG = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x7FFC0000
FAMILIES = [socket.AF_UNIX, socket.AF_NETLINK]


@pytest.mark.parametrize("name", seccomp.MACHINES)
def test_the_filter_of_each_machine(name: str) -> None:
    arch, calls = seccomp.MACHINES[name], seccomp.numbers(name)
    byteorder = "big" if name == "s390x" else "little"
    filtered = Machine(seccomp.filter_code(name, families=FAMILIES, byteorder=byteorder))

    def run(call: str, argument: int = 0, second: int = 0) -> int:
        return filtered.run(calls[call], arch, argument, byteorder, second)

    for call in calls.keys() - seccomp.SPECIAL:
        assert run(call) == ALLOW, call
    for call in seccomp.SPECIAL & calls.keys() - {"clone", "clone3", "socket"}:
        assert run(call) == EPERM, call
    assert run("clone3") == ENOSYS
    assert [run("socket", family) for family in (*FAMILIES, socket.AF_INET, socket.AF_PACKET)] == [ALLOW] * 2 + [
        EPERM
    ] * 2
    for flags, expected in ((0, ALLOW), (0x3D0F00, ALLOW), (0x10000000, EPERM), (0x40000000, EPERM), (0x20000, EPERM)):
        assert (run("clone", 0, flags) if name == "s390x" else run("clone", flags)) == expected
    assert filtered.run(9999, arch, byteorder=byteorder) == ENOSYS
    assert filtered.run(calls["read"], 0x1234, byteorder=byteorder) == EPERM
    # No system call appears twice in the table, and a number that is not in the table is refused.
    assert len(set(calls.values())) == len(calls)
    free = next(number for number in range(seccomp.NEWEST) if number not in calls.values())
    assert filtered.run(free, arch, byteorder=byteorder) == EPERM
    logging = Machine(seccomp.filter_code(name, families=FAMILIES, log=True, byteorder=byteorder))
    assert logging.run(free, arch, byteorder=byteorder) == LOG
    assert logging.run(9999, arch, byteorder=byteorder) == LOG
    more = Machine(seccomp.filter_code(name, families=FAMILIES, also={"execve", "setns"}, byteorder=byteorder))
    assert more.run(calls["execve"], arch, byteorder=byteorder) == ALLOW
    assert more.run(calls["kill"], arch, byteorder=byteorder) == EPERM


@pytest.mark.parametrize(
    ("reported", "pointer", "expected"),
    [
        ("x86_64", 8, "x86_64"), ("aarch64", 8, "aarch64"), ("s390x", 8, "s390x"), ("armv7l", 4, "armv7l"),
        ("aarch64", 4, "armv7l"), ("armv8l", 4, "armv7l"), ("x86_64", 4, None), ("riscv64", 8, None), ("mips", 4, None),
    ],
)  # fmt: skip
def test_the_machine_is_recognized(
    reported: str, pointer: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6.1", "v", reported)))
    monkeypatch.setattr(struct, "calcsize", lambda _: pointer)
    assert seccomp.machine() == expected


@pytest.mark.parametrize(
    ("version", "rights", "size"),
    [
        (1, 0x1FF3, 8),
        (2, 0x3FF3, 8),
        (3, 0x7FF3, 8),
        (4, 0x7FF3, 16),
        (5, 0x7FF3, 16),
        (6, 0x7FF3, 24),
        (9, 0x7FF3, 24),
    ],
)
def test_the_rules_fit_the_version_of_the_kernel(
    version: int, rights: int, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[Any, ...]] = []

    class Libc:
        def syscall(self, number: int, *arguments: Any) -> int:
            made.append((number, *arguments))
            return os.open("/dev/null", os.O_RDONLY) if number == 444 else 0

    monkeypatch.setattr(landlock, "abi", lambda: version)
    monkeypatch.setattr(landlock, "libc", Libc())
    landlock.restrict_files([tmp_path, Path("/dev/null")], [Path("/bin/sh")])
    create, *rules, restrict = made
    assert struct.unpack("=QQQ", create[1])[0] == rights
    assert create[2].value == size
    allowed = [struct.unpack("=Qi", rule[3])[0] for rule in rules]
    assert allowed[0] == (0x43B2 & rights)
    assert allowed[1] == (0x4002 & rights)
    assert allowed[2] == landlock.EXECUTE
    assert restrict[0] == 446


def test_a_fuse_filesystem_of_another_user_is_not_writable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Libc:
        def syscall(self, number: int, *_: object) -> int:
            return os.open("/dev/null", os.O_RDONLY) if number == 444 else 0

    monkeypatch.setattr(landlock, "abi", lambda: 1)
    monkeypatch.setattr(landlock, "libc", Libc())
    monkeypatch.setattr(seccomp, "install", lambda _: None)
    device = tmp_path.stat().st_dev
    monkeypatch.setattr(files, "fuse_user", lambda fd: 12345 if os.fstat(fd).st_dev == device else None)
    config, control = Config("rpmsg4000", builtin_signals(tmp_path / "irq")), Path("/dev/shm/control")  # noqa: S108
    with caplog.at_level("INFO"):
        enter_sandbox([config], control=control, grows=False, has_fd_holder=False, log=False)
    text = "the sandbox does not permit writing there, because it is a FUSE filesystem of another user"
    assert caplog.messages == [
        f"{tmp_path}: {text} (unmount it and restart)",
        "sandbox: writing is limited to /dev/shm (restart after adding a directory elsewhere)",
    ]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("landlock", "sandbox: cannot restrict writing (Landlock: Function not implemented): continuing without it"),
        ("seccomp", "sandbox: cannot filter system calls (seccomp: Function not implemented): continuing without it"),
        (
            "machine",
            "sandbox: cannot filter system calls (unknown processor architecture): continuing without the filter",
        ),
    ],
)
def test_a_kernel_without_a_part_of_the_sandbox_is_one_warning(
    broken: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def accept(*_: object) -> dict[Path, OSError]:
        return {}

    monkeypatch.setattr(landlock, "restrict_files", refuse if broken == "landlock" else accept)
    monkeypatch.setattr(seccomp, "install", refuse if broken == "seccomp" else accept)
    monkeypatch.setattr(seccomp, "machine", lambda: None if broken == "machine" else "x86_64")
    config = Config("rpmsg4000", builtin_signals(tmp_path))
    enter_sandbox([config], control=None, grows=False, has_fd_holder=True, log=False)
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    ("configs", "grows", "has_fd_holder", "families", "also"),
    [
        ([], False, False, 2, set()),
        ([], True, False, 3, set()),
        (["rpmsg4000"], False, True, 3, {"execve", "fork", "kill", "vfork"}),
        (["netns"], False, False, 3, {"setns"}),
    ],
)
def test_the_filter_depends_on_the_features(
    configs: list[str],
    grows: bool,
    has_fd_holder: bool,
    families: int,
    also: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, set[str]]] = []

    def code(_: str, *, families: list[int], also: set[str], log: bool) -> bytes:
        made.append((len(families), also))
        return b""

    ignore: Callable[..., dict[Path, OSError]] = lambda *_: {}  # noqa: E731 - a stand-in
    monkeypatch.setattr(landlock, "restrict_files", ignore)
    monkeypatch.setattr(seccomp, "install", ignore)
    monkeypatch.setattr(seccomp, "filter_code", code)
    several = [
        Config(link, builtin_signals(tmp_path), netns=Path("/n") if link == "netns" else None) for link in configs
    ]
    enter_sandbox(several, control=None, grows=grows, has_fd_holder=has_fd_holder, log=False)
    assert made == [(families, also)]


def test_the_writable_places_are_parents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert sandbox._existing(tmp_path / "a/irq") == tmp_path / "a"
    assert sandbox._existing(tmp_path / "b/c/irq") == tmp_path
    assert sandbox._existing(Path("/proc")) == Path("/proc")
    assert sandbox._existing(Path("/missing")) == Path("/")


def test_a_writable_place_above_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "x" * 256):
        assert sandbox._existing(tmp_path / name / "irq/state") == tmp_path
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        sandbox._existing(tmp_path / "irq")


def test_a_path_that_cannot_be_opened_does_not_disable_the_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The application replaces the directory with a symlink while the sandbox starts."""
    (tmp_path / "a").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    ruled: list[int] = []
    rulesets = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]

    class Libc:
        def syscall(self, number: int, *arguments: Any) -> int:
            if number == 445:
                ruled.append(os.fstat(struct.unpack("=Qi", arguments[2])[1]).st_ino)
            return rulesets.pop() if number == 444 else 0

    monkeypatch.setattr(landlock, "abi", lambda: 1)
    monkeypatch.setattr(landlock, "libc", Libc())
    monkeypatch.setattr(seccomp, "install", lambda _: None)
    monkeypatch.setattr(sandbox, "_existing", lambda path: path)
    configs = [Config("rpmsg4000", builtin_signals(tmp_path / name)) for name in ("a", "loop")]
    with caplog.at_level("INFO"):
        enter_sandbox(configs, control=None, grows=False, has_fd_holder=False, log=False)
    text = "the sandbox does not permit writing there, because it cannot be opened: Too many levels of symbolic links"
    assert caplog.messages == [
        f"{tmp_path}/loop: {text} (correct the path and restart)",
        f"sandbox: writing is limited to {tmp_path}/a (restart after adding a directory elsewhere)",
    ]
    assert ruled == [(tmp_path / "a").stat().st_ino, Path("/dev/null").stat().st_ino]
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        landlock.restrict_files([tmp_path], [])


@pytest.mark.s6
def test_the_programs_of_s6_can_run_with_landlock(tmp_path: Path) -> None:
    programs = list(sandbox._programs())
    assert {path.name for path in programs} >= set(sandbox.FD_STORE_PROGRAMS)
    script = f"""
import subprocess
from pathlib import Path
from inco_trio.linux.capabilities import no_new_privileges
from inco_trio.linux.landlock import restrict_files
no_new_privileges()
restrict_files([Path('/dev/null')], map(Path, {list(map(str, programs))!r}))
done = subprocess.run(["s6-fdholder-store"], stdin=subprocess.DEVNULL, capture_output=True)
assert b"usage" in done.stderr, done.stderr
try:
    subprocess.run(["true"])
except PermissionError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
