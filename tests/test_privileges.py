"""Tests of what a running daemon is allowed to do: its locked memory, its capabilities and its sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from inco_trio.config import Config
from inco_trio.doctor import proxies
from inco_trio.errors import ResourceError
from inco_trio.linux import capabilities as cap
from inco_trio.proxy.proxy import open_proxy
from inco_trio.proxy_status import Status
from inco_trio.service import privileges
from inco_trio.service.privileges import drop_capabilities, needed_capabilities
from inco_trio.signals import builtin_signals
from inco_trio.simulation.world import Cores, veth
from inco_trio.stats import Stats
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.faults.supervised import wait_path
from tests.support_control import COMMAND, Board
from tests.support_doctor import DOCTOR, process

LOCKED = "--lock-memory: cannot lock memory (RLIMIT_MEMLOCK is finite): set `ulimit -l unlimited`"


def status_of(pid: int, task: str = "") -> dict[str, str]:
    """Return the fields of /proc/PID/status, or of the status file of one thread."""
    lines = Path(f"/proc/{pid}/task/{task}/status" if task else f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_limit_of_locked_memory_is_one_error_line(tmp_path: Path) -> None:
    command = [*COMMAND, "run", f"unix:{tmp_path}/a,peer={tmp_path}/b", "--irq-dir", str(tmp_path), "--lock-memory"]
    script = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
os.execv(sys.argv[1], sys.argv[1:])
"""
    limited = ["setpriv", "--bounding-set=-all", sys.executable, "-c", script, *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        71, f"inco-trio: error: {LOCKED}, or LimitMEMLOCK=infinity in the unit\n"
    )  # fmt: skip


def test_used_memory_is_locked_and_unused_memory_is_not_allocated(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        proxy = board.running("--lock-memory")
        status = status_of(proxy.pid)
        locked, size = (int(status[name].split()[0]) for name in ("VmLck", "VmSize"))
        # The kernel counts whole mappings as locked, except special mappings such as the vdso.
        assert locked > size * 0.9
        # The in-flight buffer has a size of 20 MB, but only its used pages are in memory.
        assert int(status["RssShmem"].split()[0]) < 4096
        board.trigger()
        assert peer.recv(100)


def bits(*capabilities: int) -> int:
    return sum(1 << capability for capability in capabilities)


def restrictions(pid: int) -> tuple[str, ...]:
    """Wait until all threads of a process have the same capabilities and other restrictions, and return them."""
    deadline = time.monotonic() + HANG
    names = ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp")
    while True:
        found = set[tuple[str, ...]]()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The diagnosis thread has just ended.
            threads = [status_of(pid, task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
            found = {tuple(thread[name] for name in names) for thread in threads}
        if len(found) == 1:
            return found.pop()
        assert time.monotonic() < deadline, found
        time.sleep(0.01)  # Wait for the end of the diagnosis thread.


def effective(pid: int) -> int:
    """Wait until all threads of a process have the same capabilities, and return the effective ones."""
    return int(restrictions(pid)[0], 16)


OURS = int(status_of(os.getpid())["CapEff"], 16)


def test_a_proxy_of_a_socket_keeps_no_network_capability(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        proxy = board.running()
        kept = OURS & bits(cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER)
        assert effective(proxy.pid) == kept
        status = status_of(proxy.pid)
        assert [int(status[name], 16) for name in ("CapPrm", "CapInh", "CapAmb")] == [kept, 0, 0]
        assert status["NoNewPrivs"] == "1"
        if OURS:
            assert int(status["CapBnd"], 16) == 0
        assert board.status()["capabilities"] == cap.names_of({n for n in range(64) if kept >> n & 1})
        board.trigger()
        assert peer.recv(100)
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_log("reloaded")


@pytest.mark.netns
def test_a_proxy_of_an_interface_keeps_cap_net_raw(cores: Cores, tmp_path: Path) -> None:
    command = [cores.link, "--irq-dir", str(tmp_path / "irq"), "--control", str(tmp_path / "s")]
    proxy = Proxy(cores.core0, command, {}, tmp_path / "log")
    try:
        proxy.wait_ready()
        assert effective(proxy.pid) == OURS & bits(cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER, cap.CAP_NET_RAW)
    finally:
        proxy.close()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("mode", "level", "text"),
    [
        ("off", "ok", "has CAP_DAC_OVERRIDE CAP_FOWNER"),
        ("none", "warn", "has capabilities that it does not need: CAP_CHOWN "),
    ],
)
def test_the_doctor_reports_capabilities(mode: str, level: str, text: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        proxy = board.running("--sandbox", mode)
        doctor = [*DOCTOR, board.link, "--irq-dir", str(board.irq), "--json"]
        done = subprocess.run(doctor, capture_output=True, text=True, check=False)
        results = [each for each in json.loads(done.stdout)["results"] if each["check"] == "capabilities"]
        assert [(each["level"], each["subject"]) for each in results] == [(level, f"process {proxy.pid}")]
        assert results[0]["found"].startswith(text)
        assert "CAP_FOWNER" not in results[0]["found"] or mode == "off"


@pytest.mark.parametrize(
    ("command", "netns", "levels"),
    [
        ("inco-trio run a", None, ["warn"]),
        ("inco-trio run a", "/proc/7/ns/net", ["ok"]),
        ("inco-trio run --boards /b", None, ["ok"]),
        ("python program.py", None, []),
    ],
)
def test_the_doctor_knows_what_a_proxy_needs(command: str, netns: str | None, levels: list[str]) -> None:
    held = ("CAP_NET_RAW", "CAP_SYS_ADMIN")
    status = Status("a", 0, 0, True, "", None, Stats(), (), (), capabilities=held, netns=netns)
    found = proxies.capabilities(process(1, command), status)
    assert [result.level.name.lower() for result in found] == levels


def test_an_escape_keeps_all_capabilities(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        proxy = board.running("--sandbox", "none")
        assert effective(proxy.pid) == OURS
        assert status_of(proxy.pid)["NoNewPrivs"] == "0"


@pytest.mark.netns
def test_a_proxy_that_waits_for_its_link_has_already_dropped_capabilities(cores: Cores, tmp_path: Path) -> None:
    words = ["missing0", "--irq-dir", str(tmp_path / "irq"), "--control", "none", "--wait-link"]
    proxy = Proxy(cores.core0, words, {}, tmp_path / "log")
    try:
        proxy.wait_log("waiting for the link")
        kept = {cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER, cap.CAP_NET_RAW, cap.CAP_NET_ADMIN}
        assert effective(proxy.pid) == OURS & bits(*kept)
        status = status_of(proxy.pid)
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapBnd"], 16) == 0
        veth(cores.core0, "missing0", cores.core1, "missing0")
        proxy.wait_ready()
        assert effective(proxy.pid) == OURS & bits(*(kept - {cap.CAP_NET_ADMIN}))
    finally:
        proxy.close()


@pytest.mark.parametrize("port", ["9478", "80"])
def test_the_exporter_drops_all_capabilities(port: str, tmp_path: Path) -> None:
    script = "import sys; from inco_trio.cli import main; sys.exit(main(sys.argv[1:]))"
    program = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, "-c", script]
    with (tmp_path / "log").open("wb") as log:
        words = [*program, "exporter", "--listen", f"127.0.0.1:{port}"]
        exporter = subprocess.Popen(words, stderr=log)
    try:
        wait_path(tmp_path / "log", lambda: "ready" in (tmp_path / "log").read_text())
        status = status_of(exporter.pid)
        kept = OURS & bits(cap.CAP_NET_BIND_SERVICE) if port == "80" else 0
        assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [kept, kept, 0]
        assert status["NoNewPrivs"] == "1"
    finally:
        exporter.terminate()
        assert exporter.wait(HANG) == 0


@pytest.mark.parametrize(
    "words",
    [("mqtt", "{broker}/lab", "--control", "{control}"), ("mqtt-link", "{broker}/wire", "{link}", "--end", "core0")],
)
def test_the_clients_of_a_broker_drop_all_capabilities_before_they_connect(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        broker.settimeout(HANG)
        board = Board(tmp_path, stack)
        board.running()
        place = {
            "broker": f"mqtt://127.0.0.1:{broker.getsockname()[1]}",
            "control": board.path,
            "link": f"unix:{tmp_path}/core1,peer={tmp_path}/core0",
        }
        service = stack.enter_context(subprocess.Popen([*COMMAND, *(word.format(**place) for word in words)]))
        stack.callback(service.kill)
        broker.accept()[0].close()
        status = status_of(service.pid)
        assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0]
        assert status["NoNewPrivs"] == "1"


def config(tmp_path: Path, link: str, netns: str | None = None) -> Config:
    return Config(link, builtin_signals(tmp_path), netns=None if netns is None else Path(netns))


FILES = {cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER}


@pytest.mark.parametrize(
    ("links", "grows", "locked", "expected"),
    [
        ([("unix:/a,peer=/b", None)], False, False, set()),
        ([("rpmsg4000", None)], False, False, {cap.CAP_NET_RAW}),
        ([("unix:/a,peer=/b", None)], True, False, {cap.CAP_NET_RAW, cap.CAP_NET_ADMIN}),
        ([], True, False, {cap.CAP_NET_RAW, cap.CAP_NET_ADMIN}),
        ([("a", "/run/netns/b")], False, False, {cap.CAP_NET_RAW, cap.CAP_NET_ADMIN, cap.CAP_SYS_ADMIN}),
        (
            [("a", "/proc/7/ns/net")],
            False,
            False,
            {cap.CAP_NET_RAW, cap.CAP_NET_ADMIN, cap.CAP_SYS_ADMIN, cap.CAP_SYS_PTRACE},
        ),
        ([("unix:/a,peer=/b", None)], False, True, {cap.CAP_IPC_LOCK}),
    ],
)
def test_the_kept_capabilities_depend_on_the_features(
    links: list[tuple[str, str | None]],
    grows: bool,
    locked: bool,
    expected: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    configs = [config(tmp_path, *link) for link in links]
    assert needed_capabilities(configs, grows=grows, locked=locked) == FILES | expected
    if locked:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
        assert needed_capabilities(configs, grows=grows, locked=locked) == FILES


@pytest.mark.netns
def test_a_recreated_directory_is_given_to_its_owner(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    irq = tmp_path / "irq"
    command = [f"unix:{tmp_path}/a,peer={tmp_path}/b", "--irq-dir", str(irq), "--control", str(tmp_path / "s")]
    proxy = Proxy(None, [*command, "--irq-owner", "12:13"], {}, tmp_path / "log")
    try:
        proxy.wait_ready()
        files = (cap.CAP_DAC_OVERRIDE, cap.CAP_FOWNER, cap.CAP_CHOWN, cap.CAP_FSETID)
        assert effective(proxy.pid) == OURS & bits(*files)
        for _ in range(2):
            found = irq.stat()
            assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (12, 13, "0o42775")
            irq.rename(tmp_path / f"old{found.st_ino}")
            # A reload recreates a missing directory.
            proxy.wait_log("irq: missing: ")
            proxy.process.send_signal(signal.SIGHUP)
            proxy.wait_log("reloaded")
            (tmp_path / "log").write_text("")
    finally:
        proxy.close()


def test_a_proxy_with_an_owner_of_its_directories_keeps_cap_chown(tmp_path: Path) -> None:
    several = [Config("unix:/a,peer=/b", builtin_signals(tmp_path), owner=1)]
    assert needed_capabilities(several, grows=False, locked=False) == FILES | {cap.CAP_CHOWN, cap.CAP_FSETID}


def test_a_refusal_of_the_kernel_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(cap, "no_new_privileges", refuse)
    drop_capabilities(())
    assert caplog.messages == ["cannot drop capabilities (Operation not permitted): the process keeps them"]


def test_memory_that_cannot_be_locked_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(privileges, "lock_memory", refuse)
    monkeypatch.setattr(cap, "held_capabilities", lambda: frozenset({cap.CAP_IPC_LOCK}))
    with pytest.raises(ResourceError) as caught:
        privileges.keep_in_memory()
    reason = "cannot lock memory (Cannot allocate memory): start without --lock-memory"
    assert str(caught.value) == f"--lock-memory: {reason}"


def test_a_refused_limit_of_descriptors_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a hard limit above fs.nr_open, which Python reports as ValueError."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    privileges.raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_capabilities_have_names() -> None:
    assert cap.names_of({13, 12, 40, 41, 63}) == [
        "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE", "CAP_41", "CAP_63"
    ]  # fmt: skip
    assert len(cap.NAMES) == 41


def test_the_library_keeps_the_capabilities_of_its_program(tmp_path: Path) -> None:
    async def main() -> None:
        before = status_of(os.getpid())
        async with open_proxy(config(tmp_path, f"unix:{tmp_path}/a,peer={tmp_path}/b")):
            pass
        after = status_of(os.getpid())
        assert [before[name] for name in ("CapEff", "CapBnd", "NoNewPrivs")] == [
            after[name] for name in ("CapEff", "CapBnd", "NoNewPrivs")
        ]

    trio.run(main)
