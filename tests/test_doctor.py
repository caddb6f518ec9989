"""Tests of `inco-trio doctor`: the result of each check, the output and the exit codes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import pwd
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import attrs
import pytest

from inco_trio.board_files import Boards
from inco_trio.cli import main
from inco_trio.cli.doctor import EXITS
from inco_trio.config import Config
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor import links, machine, proxies, register_files, space
from inco_trio.doctor.answers import Answer, Answers
from inco_trio.doctor.examination import examine, expected_trust, trust_of
from inco_trio.doctor.result import Level, Result, fail, hidden, permit, refused, warn
from inco_trio.doctor.survey import survey
from inco_trio.errors import ConfigError, PermissionDeniedError
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.linux import processes as linux_processes
from inco_trio.linux.capabilities import CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
from inco_trio.linux.processes import (
    PAUSE,
    PER_PAUSE,
    SEARCH_SECONDS,
    SILENT_MAX,
    Process,
    Processes,
    answered,
    described,
    is_beside,
    listening_sockets,
    look,
    packet_sockets,
    unix_sockets,
)
from inco_trio.linux.rtnetlink import Interface
from inco_trio.linux.users import user_name
from inco_trio.proxy.others import OF_LINK, OF_TRIGGERS, REMEDY
from inco_trio.proxy_status import RivalStatus, SignalStatus, Status, TaskStatus
from inco_trio.registers.diagnose import UNREPORTED
from inco_trio.service import rivals
from inco_trio.service.descriptions import reading
from inco_trio.service.rivals import Users, _rival, superfluous, users_of_interface, users_of_socket
from inco_trio.signals import Direction, Signal, builtin_signals
from inco_trio.stats import Stats
from inco_trio.trust import Trust
from netns.hang import HANG
from tests.support_acl import add_acl
from tests.support_capabilities import without_capability
from tests.support_doctor import BOOTED, FIRST, Tree, process
from tests.support_proxy import write_udrv

NET_ADMIN, NET_RAW = 1 << 12, 1 << 13
MAC = bytes.fromhex("020000000001")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "root")


def only(results: Iterable[Result]) -> tuple[str, str, str | None]:
    """Return the level, the text and the fix of the only result."""
    (result,) = results
    return result.level.name.lower(), f"{result.subject}: {result.found}", result.fix


def everyone(*found: Process, unseen: bool = False) -> Processes:
    return Processes(found, unseen, mounted=True)


def test_processes_are_read_with_sockets_and_watches(tree: Tree) -> None:
    tree.process(
        3,
        "/usr/bin/python3 -m inco_trio run l0",
        name="python3",
        uid=5,
        seconds=8,
        fds={0: "/dev/null", 3: "socket:[77]", 4: "socket:[78]"},
        watches={5: "inotify wd:2 ino:2a sdev:fe00001 mask:2 ignored_mask:0 fhandle-bytes:8 f_handle:1\n", 6: ""},
    )
    tree.process(20, name="s6-fdholderd", fds={9: "socket:[77]"})
    processes = look(tree.root, BOOTED)
    assert processes.mounted
    assert not processes.unseen
    proxy, holder = processes.all
    assert (proxy.pid, holder.pid) == (3, 20)
    assert (proxy.name, proxy.uid, proxy.started) == ("python3", 5, BOOTED + 8)
    assert (proxy.sockets, proxy.instances) == (frozenset({77, 78}), 2)
    assert proxy.watches == ((os.makedev(254, 1), 42),)
    assert (proxy.is_proxy, proxy.is_holder) == (True, False)
    assert (holder.is_proxy, holder.is_holder) == (False, True)
    assert processes.with_socket(77) == [proxy, holder]
    assert processes.watching(os.makedev(254, 1), 42) == [proxy]
    assert processes.watching(os.makedev(254, 1), 43) == []


def test_processes_that_end_meanwhile_are_skipped(tree: Tree) -> None:
    tree.process(3)
    (tree.root / "proc/3/fd").rmdir()
    tree.put("proc/4/comm", "nothing else is left")
    tree.process(5)
    assert [found.pid for found in look(tree.root, BOOTED).all] == [5]


def test_a_command_line_of_any_length_needs_little_memory(tree: Tree) -> None:
    tree.process(3, "/usr/bin/python3 -m inco_trio run l0")
    tree.process(4)
    os.truncate(tree.root / "proc/3/cmdline", 1 << 25)
    os.truncate(tree.root / "proc/4/cmdline", 1 << 25)
    tracemalloc.start()
    processes = look(tree.root, BOOTED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert [each.is_proxy for each in processes.all] == [True, False]
    assert processes.all[0].command[-1] == "l0"


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Simulate the processor time of searches: each pause takes a second. Return the pauses."""
    pauses = list[float]()
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "thread_time", lambda: len(pauses) * 1.0)
    return pauses


def test_a_search_pauses_and_ends(tree: Tree, simulated: list[float]) -> None:
    number = int(SEARCH_SECONDS) * PER_PAUSE
    tree.process(3, fds=dict.fromkeys(range(number), "/dev/null"))
    tree.process(4, fds={3: "socket:[77]"})
    processes = look(tree.root, BOOTED)
    assert ([each.hidden for each in processes.all], processes.is_cut) == ([False, False], False)
    assert simulated == [PAUSE] * int(SEARCH_SECONDS)
    tree.process(5, fds=dict.fromkeys(range(number), "/dev/null"))
    tree.process(6, fds={3: "socket:[77]"})
    processes = look(tree.root, BOOTED)
    assert [each.hidden for each in processes.all] == [False, False, True, True]
    (result,) = machine.proc(processes)
    assert "may have missed proxies" in result.found
    assert len(simulated) == 2 * int(SEARCH_SECONDS) + 1


def test_a_search_begins_with_trusted_users(tree: Tree, simulated: list[float]) -> None:
    tree.process(3, fds=dict.fromkeys(range(2 * int(SEARCH_SECONDS) * PER_PAUSE), "/dev/null"))
    tree.process(20, fds={3: "socket:[77]"})
    os.chown(tree.root / "proc/3", 12345, 12345)
    processes = look(tree.root, BOOTED)
    assert [(each.pid, each.hidden) for each in processes.all] == [(3, True), (20, False)]
    assert [each.pid for each in processes.with_socket(77)] == [20]
    assert (processes.unseen, len(simulated)) == (False, SEARCH_SECONDS + 1)


def let_wait(tree: Tree, pid: int, file: str) -> None:
    """Let everybody wait who opens a file of a process, as the kernel does while the process waits in execve(2)."""
    path = tree.root / f"proc/{pid}/{file}"
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_processes_that_do_not_answer_are_left_out(tree: Tree) -> None:
    for pid in (3, 4, 5):
        tree.process(pid)
        os.chown(tree.root / f"proc/{pid}", 12345, 12345)
    let_wait(tree, 4, "stat")
    processes = look(tree.root, BOOTED)
    assert [each.pid for each in processes.all] == [3, 5]
    assert (processes.silent, processes.is_cut) == ((4,), False)
    (result,) = machine.proc(processes)
    assert (result.level, result.subject) == (Level.WARN, "/proc/4")
    assert "does not answer" in result.found


def test_a_search_ends_if_many_processes_do_not_answer(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_processes, "_LOOKS", 1)
    for pid in range(3, 5 + SILENT_MAX):
        tree.process(pid)
        os.chown(tree.root / f"proc/{pid}", 12345, 12345)
        let_wait(tree, pid, "cmdline")
    processes = look(tree.root, BOOTED)
    assert processes.all == ()
    assert (processes.silent, processes.is_cut) == (tuple(range(3, 3 + SILENT_MAX)), True)
    assert f"after {SILENT_MAX} processes that do not answer" in list(machine.proc(processes))[-1].found


def test_errors_of_an_answer_are_raised(tree: Tree) -> None:
    tree.process(3)
    os.chown(tree.root / "proc/3", 12345, 12345)
    with pytest.raises(FileNotFoundError):
        answered(tree.root / "proc/3", Path("/missing").stat, None)


def test_nothing_answers_if_no_thread_can_start(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError

    monkeypatch.setattr(threading.Thread, "start", refuse)
    tree.process(3)
    os.chown(tree.root / "proc/3", 12345, 12345)
    assert answered(tree.root / "proc/3", lambda: 1, None) is None


@pytest.mark.parametrize("user", [0, 1000])
def test_uninspectable_processes_are_noted_for_ordinary_users(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    tree.process(3, fds={3: "socket:[77]"})
    (tree.root / "proc/3/fd").chmod(0)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with without_capability(CAP_DAC_OVERRIDE), without_capability(CAP_DAC_READ_SEARCH):
        processes = look(tree.root, BOOTED)
    (found,) = processes.all
    assert (found.pid, found.sockets, found.instances, found.watches) == (3, frozenset(), 0, ())
    # Only an ordinary user is advised to run the command as root.
    assert processes.unseen is (user != 0)


def test_missing_proc_is_a_warning(tmp_path: Path) -> None:
    processes = look(tmp_path)
    assert (processes.all, processes.mounted) == ((), False)
    assert only(machine.proc(processes)) == (
        "warn",
        "/proc: not mounted: cannot inspect processes, limits and filesystems",
        "mount -t proc proc /proc",
    )
    # Without /proc, the doctor skips the checks that need it.
    for found in (
        machine.capability("l0", tmp_path),
        machine.receive_buffer(None, 5, root=tmp_path),
        machine.inotify_limits(processes, None, tmp_path),
        machine.unix_queue(tmp_path),
    ):
        assert list(found) == []
    assert packet_sockets(2, 0x8800, tmp_path) == []
    assert unix_sockets("/a", tmp_path) == []


@pytest.mark.parametrize(
    ("command", "proxy"),
    [
        ("/usr/bin/python3 /usr/bin/inco-trio run l0", True),
        ("python3 -m inco_trio run l0", True),
        ("inco_proxy l0", True),
        ("python3 /usr/bin/inco_proxy l0", True),
        ("python3 /usr/bin/inco-trio doctor l0", False),
        ("vim inco_trio/cli/run.py", False),
        ("grep -r inco_trio inco_proxy", False),
        ("", False),
    ],
)
def test_a_proxy_is_recognized_by_its_command_line(command: str, proxy: bool) -> None:
    assert process(1, command).is_proxy is proxy


def test_a_program_that_runs_a_proxy_as_its_child_is_no_proxy(tree: Tree) -> None:
    run = "inco-trio run l0"
    tree.process(2, f"sudo timeout 9 {run}", fds={3: "socket:[6]"})
    tree.process(3, f"timeout 9 {run}", parent=2)
    tree.process(4, f"python3 /usr/bin/{run}", parent=3, fds={3: "socket:[7]"})
    tree.process(5, f"python3 /usr/bin/{run}", watches={3: ""})  # This one started another proxy.
    tree.process(6, f"python3 /usr/bin/{run}", parent=5)
    tree.process(7, f"python3 /usr/bin/{run}")
    assert [each.pid for each in look(tree.root, BOOTED).all if each.is_proxy] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("name", "holder"),
    [
        ("s6-fdholderd", True),
        ("s6-fdholder-dae", True),
        ("systemd", True),
        ("systemd-network", False),
        ("python3", False),
    ],
)
def test_an_fd_store_is_recognized_by_its_name(name: str, holder: bool) -> None:
    assert process(1, name=name).is_holder is holder


@pytest.mark.parametrize(
    ("uid", "capabilities", "level", "text", "fix"),
    [
        (0, NET_RAW, "ok", "this user (uid 0) has CAP_NET_RAW", None),
        (5, NET_RAW | NET_ADMIN, "ok", "this user (uid 5) has CAP_NET_RAW", None),
        (0, NET_ADMIN, "fail", "root does not have CAP_NET_RAW: start the container with --cap-add NET_RAW", None),
        (
            5,
            0,
            "fail",
            "this user (uid 5) does not have CAP_NET_RAW",
            "setpriv --reuid 5 --regid 7 --init-groups --inh-caps +net_raw --ambient-caps +net_raw inco-trio run l0",
        ),
    ],
)
def test_missing_cap_net_raw_is_a_fault(
    tree: Tree, uid: int, capabilities: int, level: str, text: str, fix: str | None
) -> None:
    tree.status("self", uid, capabilities)
    found = only(machine.capability("l0", tree.root))
    assert (found[0], found[2]) == (level, fix)
    assert found[1].startswith(f"l0: {text}")


@pytest.mark.parametrize(
    ("capabilities", "uid_map", "limit", "level", "fix"),
    [
        (NET_ADMIN, FIRST, "100", "ok", None),
        # CAP_NET_ADMIN in a user namespace does not lift the limit net.core.rmem_max.
        (NET_ADMIN, "0 1000 1", "100", "warn", "sysctl -w net.core.rmem_max=101"),
        (NET_RAW, FIRST, "100", "warn", "sysctl -w net.core.rmem_max=101"),
        (NET_RAW, FIRST, "101", "ok", None),
        (NET_RAW, FIRST, None, "warn", None),
    ],
)
@pytest.mark.parametrize("running", [False, True])
def test_small_receive_buffer_limit_is_a_warning(
    tree: Tree, capabilities: int, uid_map: str, limit: str | None, level: str, fix: str | None, running: bool
) -> None:
    tree.status("3" if running else "self", 0, capabilities)
    tree.put("proc/3/uid_map" if running else "proc/self/uid_map", uid_map)
    if limit is not None:
        tree.put("proc/sys/net/core/rmem_max", f"{limit}\n")
    found = only(machine.receive_buffer(process(3) if running else None, 101, root=tree.root))
    assert (found[0], found[2]) == (level, fix)
    assert found[1].startswith("net.core.rmem_max: ")


@pytest.mark.parametrize(("granted", "level"), [(101, "ok"), (100, "warn")])
def test_a_proxy_that_dropped_cap_net_admin_keeps_its_receive_buffer(tree: Tree, granted: int, level: str) -> None:
    tree.status("3", 0, NET_RAW)
    tree.put("proc/3/uid_map", FIRST)
    tree.put("proc/sys/net/core/rmem_max", "100\n")
    assert only(machine.receive_buffer(process(3), 101, granted, tree.root))[0] == level


def limits(tree: Tree, instances: int, watches: int, queued: int = 16384) -> None:
    tree.put("proc/sys/fs/inotify/max_user_instances", f"{instances}\n")
    tree.put("proc/sys/fs/inotify/max_user_watches", f"{watches}\n")
    tree.put("proc/sys/fs/inotify/max_queued_events", f"{queued}\n")


def test_inotify_limits_are_compared_with_their_use(tree: Tree) -> None:
    uid = os.geteuid()
    processes = everyone(
        process(3, uid=uid, instances=7, watches=((1, 1),) * 30),
        process(4, uid=uid, instances=1, watches=((1, 1),) * 6),
        process(5, uid=uid + 1, instances=100, watches=((1, 1),) * 1000),
    )

    def found(proxy: Process | None = None) -> list[tuple[str, str, str | None]]:
        results = machine.inotify_limits(processes, proxy, tree.root)
        return [(result.level.name, f"{result.subject}: {result.found}", result.fix) for result in results]

    assert found() == []
    limits(tree, 128, 1000)
    assert found() == [
        ("OK", f"fs.inotify.max_user_instances: uid {uid} uses at most 8 of 128", None),
        ("OK", f"fs.inotify.max_user_watches: uid {uid} uses at most 36 of 1000", None),
        (
            "OK",
            "fs.inotify.max_queued_events: 16384 events can be queued while a link is down, two for each close",
            None,
        ),
    ]
    # A new proxy needs 2 inotify instances and 64 watches.
    limits(tree, 10, 99, 100)
    assert [(level, fix) for level, _, fix in found()] == [
        ("WARN", "sysctl -w fs.inotify.max_user_instances=20"),
        ("FAIL", "sysctl -w fs.inotify.max_user_watches=200"),
        ("WARN", "sysctl -w fs.inotify.max_queued_events=16384"),
    ]
    # A running proxy already has its instances and watches. The doctor checks the usage of the proxy's user.
    assert [level for level, _, _ in found(processes.all[0])] == ["OK", "OK", "WARN"]
    assert [level for level, _, _ in found(processes.all[2])] == ["FAIL", "FAIL", "WARN"]
    # The limit of the user namespace applies if it is lower.
    tree.put("proc/sys/user/max_inotify_instances", "2147483647")
    tree.put("proc/sys/user/max_inotify_watches", "50")
    assert [fix for _, _, fix in found()][:2] == [
        "sysctl -w fs.inotify.max_user_instances=20",
        "sysctl -w user.max_inotify_watches=200",
    ]


@pytest.mark.parametrize(("length", "level"), [("10", "ok"), ("512", "ok"), ("9", "warn")])
def test_short_unix_queue_is_a_warning(tree: Tree, length: str, level: str) -> None:
    tree.put("proc/sys/net/unix/max_dgram_qlen", length)
    found = only(machine.unix_queue(tree.root))
    assert found[0] == level
    assert found[1].startswith(f"net.unix.max_dgram_qlen: {length} frames fit in the queue")
    assert found[2] == (None if level == "ok" else "sysctl -w net.unix.max_dgram_qlen=10")


def interface(
    name: str = "l0",
    *,
    up: bool = True,
    running: bool = True,
    master: int = 0,
    port_of: str = "",
    mtu: int = 1500,
    kind: str = "",
    carrier: bool = False,
    operstate: int = 0,
) -> Interface:
    return Interface(4, name, up, running, master, port_of, mtu, MAC, kind, carrier=carrier, operstate=operstate)


BRIDGE = interface("br0")
STATE_UP = "ip link set dev l0 state up mode default"


@pytest.mark.parametrize(
    ("found", "master", "said"),
    [
        (interface(), None, []),
        (interface(up=False, running=False), None, [("the interface is down", "ip link set dev l0 up")]),
        (interface(running=False), None, [("the interface is up without a carrier: bring the peer up", None)]),
        (
            interface(running=False, carrier=True, operstate=5),
            None,
            [
                (
                    "the interface is up and has a carrier, but is not RUNNING: its operational state is DORMANT (",
                    STATE_UP,
                )
            ],
        ),
        (
            interface(running=False, carrier=True, operstate=9),
            None,
            [
                (
                    "the interface is up and has a carrier, but is not RUNNING: its operational state is 9 (",
                    STATE_UP,
                )
            ],
        ),
        (
            interface(mtu=63),
            None,
            [("MTU 63: too small (signal names", "ip link set dev l0 mtu 1500")],
        ),
        (interface(mtu=64), None, []),
        (interface(master=5, port_of="vrf"), interface("red"), []),
        (interface(master=5, port_of="bond"), interface("b0"), [("is a port of the bond b0, wh", "inco-trio run b0")]),
        (
            interface(master=5, port_of="openvswitch"),
            interface("ovs-system"),
            [("is a port of the openvswitch ovs-system, which takes its frames", "inco-trio run ovs-system")],
        ),
        (interface(master=5), interface("m"), [("is a port of the master device m, which", "inco-trio run m")]),
        (interface(master=5, port_of="bridge"), BRIDGE, [("is a port of the bridge br0, which", "inco-trio run br0")]),
        (interface(master=5, port_of="bridge"), None, [("is a port of the bridge in another network names", None)]),
        (interface("a;b", up=False), None, [("the interface is down", "ip link set dev 'a;b' up")]),
    ],
)
def test_interface_state_mtu_and_master_are_checked(
    found: Interface, master: Interface | None, said: list[tuple[str, str | None]]
) -> None:
    results = list(links.state(found, master))
    assert [result.check for result in results] == ["state", "mtu", "master"]
    faults = [result for result in results if result.level is not Level.OK]
    assert all(result.level is Level.FAIL for result in faults)
    assert [result.fix for result in faults] == [fix for _, fix in said]
    assert all(result.found.startswith(text) for result, (text, _) in zip(faults, said, strict=True))


def test_a_name_that_is_too_short_for_a_vlan_is_a_warning() -> None:
    signals = [
        Signal("a", Direction.OUTBOUND, Path("/irq"), "a"),
        Signal("ab", Direction.OUTBOUND, Path("/irq"), "ab"),
        Signal("b", Direction.INBOUND, Path("/irq"), "b"),
    ]
    assert list(links.short_names(interface(kind="veth"), signals)) == []
    level, text, _ = only(links.short_names(interface(kind="vlan"), signals))
    assert level == "warn"
    assert text.startswith("l0: a: the kernel may drop frames with a name of one character on a VLAN")


ALL_CPUS = "echo 1 | tee /sys/class/net/l0/queues/rx-*/rps_cpus"


@pytest.mark.parametrize(
    ("cpus", "masks", "hardware", "level", "text", "fix"),
    [
        ("0", ["f"], False, "ok", "this machine has one CPU", None),
        ("0-3", ["2"], False, "ok", "one CPU handles its frames", None),
        ("0-3", ["00000000,00000002", "00000000,00000002"], True, "ok", "one CPU handles its frames", None),
        ("0,2", ["0"], True, "ok", "one receive queue without steering", None),
        # The kernel selects a CPU by a hash, which is the same for all frames of one EtherType.
        ("0-1", ["3"], True, "ok", "one CPU handles its frames", None),
        ("0-3", ["f", "f"], False, "ok", "one CPU handles its frames", None),
        ("0-3", ["3", "f"], True, "warn", "rps_cpus is 3, f: several CPUs", ALL_CPUS),
        ("0-63", ["1", "1,00000000"], True, "warn", "rps_cpus is 1, 1,00000000: several CPUs", ALL_CPUS),
        ("0-1", ["0", "0"], True, "warn", "2 receive queues: several CPUs", ALL_CPUS),
        ("0-1", ["0", "1"], True, "warn", "2 receive queues: several CPUs", ALL_CPUS),
        ("0-1", ["0"], False, "warn", "rps_cpus is 0: the sending CPU handles", ALL_CPUS),
        # A kernel without RPS (receive packet steering) has no file rps_cpus.
        ("0-1", [None, None], True, "warn", "2 receive queues", "ethtool -L l0 combined 1"),
        ("0-1", [None], True, "ok", "one receive queue", None),
        ("0-1", [None], False, "warn", "rps_cpus is 0", None),
    ],
)
def test_several_cpus_or_queues_are_a_warning(
    tree: Tree, cpus: str, masks: list[str | None], hardware: bool, level: str, text: str, fix: str | None
) -> None:
    place = "sys/class/net/l0"
    tree.put("sys/devices/system/cpu/online", f"{cpus}\n")
    tree.put(f"{place}/ifindex", "4\n")
    tree.put(f"{place}/address", f"{MAC.hex(':')}\n")
    for number, mask in enumerate(masks):
        tree.put(f"{place}/queues/rx-{number}/{'rps_cpus' if mask is not None else 'other'}", f"{mask}\n")
    if hardware:
        tree.put(f"{place}/device/vendor", "")
    found = only(links.order(interface(), tree.root))
    assert (found[0], found[2]) == (level, fix)
    assert found[1].startswith(f"l0: {text}")


def test_the_interface_below_a_vlan_is_checked(tree: Tree) -> None:
    tree.put("sys/devices/system/cpu/online", "0-1\n")
    for name in ("rpmsg4000", "eth_rpmsg"):
        tree.put(f"sys/class/net/{name}/ifindex", "4\n")
        tree.put(f"sys/class/net/{name}/address", f"{MAC.hex(':')}\n")
        tree.put(f"sys/class/net/{name}/queues/rx-0/rps_cpus", "1\n" if name == "rpmsg4000" else "0\n")
    (tree.root / "sys/class/net/rpmsg4000/lower_eth_rpmsg").symlink_to("../eth_rpmsg")
    own, below = links.order(interface("rpmsg4000"), tree.root)
    assert (own.level, own.subject) == (Level.OK, "rpmsg4000")
    assert (below.level, below.subject) == (Level.WARN, "eth_rpmsg")
    assert "the sending CPU handles the frames of rpmsg4000" in below.found
    assert below.fix == "echo 1 | tee /sys/class/net/eth_rpmsg/queues/rx-*/rps_cpus"


@pytest.mark.parametrize(("index", "address"), [("5", MAC.hex(":")), ("4", "02:00:00:00:00:02"), (None, None)])
def test_sys_of_another_network_namespace_is_a_warning(tree: Tree, index: str | None, address: str | None) -> None:
    if index is not None:
        tree.put("sys/class/net/l0/ifindex", index)
        tree.put("sys/class/net/l0/address", str(address))
    assert only(links.order(interface(), tree.root)) == (
        "warn",
        "l0: cannot inspect the receive queues: /sys belongs to another network namespace",
        "mount -t sysfs sysfs /sys",
    )


def test_interfaces_that_cannot_be_read_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(links, "Rtnetlink", refuse)
    found, results = links.interface("l0")
    assert found is None
    assert only(results) == ("warn", "l0: cannot list interfaces (rtnetlink): Too many open files", None)


def unix(home: Path) -> UnixAddress:
    address = parse_address(f"unix:{home}/a,peer={home}/b")
    assert isinstance(address, UnixAddress)
    return address


def datagram(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    return sock


def run_fix(found: tuple[str, str, str | None]) -> None:
    """Run the fix that a result contains."""
    assert found[2] is not None
    subprocess.run(["sh", "-c", found[2]], check=True, timeout=HANG)


def test_the_socket_path_is_checked(tmp_path: Path) -> None:
    home = tmp_path / "of links"
    address, path = unix(home), home / "a"
    found = only(links.socket_path(address))
    assert found == (
        "fail",
        f"{home}: does not exist: the proxy creates its socket in this directory",
        f"mkdir -p '{home}'",
    )
    run_fix(found)
    free = ("ok", f"{home}: the proxy can create its socket in this directory", None)
    assert only(links.socket_path(address)) == free
    with datagram(path):
        assert only(links.socket_path(address)) == ("ok", f"{path}: a process has bound this socket", None)
    ended = f"{path}: the process that bound this socket has ended: the next proxy replaces the socket"
    assert only(links.socket_path(address)) == ("ok", ended, None)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(str(path))
        found = only(links.socket_path(address))
        text = f"{path}: a socket of another type is bound to this path: use another path"
        assert found == ("fail", text, None)
    path.unlink()
    for make, kind in ((Path.mkdir, "a directory"), (Path.touch, "a file"), (os.mkfifo, "a FIFO")):
        make(path)
        found = only(links.socket_path(address))
        assert found[:2] == ("fail", f"{path}: {kind}, not a socket: the proxy cannot bind its socket")
        run_fix(found)
        assert only(links.socket_path(address)) == free
    (tmp_path / "file").touch()
    assert only(links.socket_path(unix(tmp_path / "file"))) == (
        "fail",
        f"{tmp_path}/file/a: cannot be inspected: Not a directory",
        None,
    )


def test_the_peer_path_is_checked(tmp_path: Path) -> None:
    address, path = unix(tmp_path), tmp_path / "b"
    missing = "fail", f"{path}: no process has bound this socket (No such file or directory): start core 1", None
    assert only(links.peer(address)) == missing
    with datagram(path) as sock:
        assert only(links.peer(address)) == ("ok", f"{path}: core 1 has bound this socket", None)
        # A connected socket accepts frames from one sender only, but still counts as bound.
        sock.connect(str(path))
        assert only(links.peer(address)) == ("ok", f"{path}: core 1 has bound this socket", None)
    assert "no process has bound this socket (Connection refused)" in only(links.peer(address))[1]
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(str(path))
        text = f"{path}: does not receive frames: Protocol wrong type for socket"
        assert only(links.peer(address)) == ("fail", text, None)


def test_the_registers_directory_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The services' user might exist on the machine that runs this test.
    monkeypatch.setattr(register_files, "USER", "no-such-user-of-a-service")
    path = tmp_path / "an irq"
    found = only(register_files.directory(path))
    assert found == (
        "warn",
        f"{path}: does not exist: a proxy creates it when it starts, and 60 s after a removal",
        f"mkdir -p '{path}'",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.geteuid", lambda: 0)
        patch.setattr(register_files, "USER", "inco-trio")
        patch.setattr("pwd.getpwnam", lambda _: None)
        assert only(register_files.directory(path))[2] == f"install -d -o inco-trio -g inco-trio '{path}'"
    run_fix(found)
    fine = "ok", f"{path}: uid {os.geteuid()} may read and write it", None
    assert only(register_files.directory(path)) == fine
    path.rmdir()
    path.touch()
    found = only(register_files.directory(path))
    assert found == ("fail", f"{path}: not a directory: use another path, or remove it", f"rm '{path}'")
    assert only(register_files.directory(path / "a"))[1] == f"{path}/a: cannot be inspected: Not a directory"


def test_missing_permissions_are_faults_with_a_fix(tmp_path: Path) -> None:
    home = tmp_path / "irq"
    home.mkdir()
    trigger, state, ours, core1 = (home / name for name in ("message_6_trig", "message_5_state", "a", "b"))
    trigger.touch()
    state.touch()
    address, signals, uid = unix(home), builtin_signals(home), os.geteuid()
    with datagram(ours), datagram(core1), without_capability(CAP_DAC_OVERRIDE), without_capability(CAP_DAC_READ_SEARCH):
        for path in (trigger, state, ours, core1):
            path.chmod(0)
        found = list(register_files.kinds(signals))
        assert [str(result) for result in found] == [
            f"{state}: uid {uid} may not write it: run: chmod u+w {state}",
            f"{trigger}: uid {uid} may not read it: run: chmod u+r {trigger}",
        ]
        for result in found:
            run_fix(("", "", result.fix))
        assert only(register_files.kinds(signals))[0] == "ok"
        text = f"{ours}: cannot connect to this socket: Permission denied"
        assert only(links.socket_path(address)) == ("fail", text, None)
        refused = only(links.peer(address))
        assert refused[:2] == ("fail", f"{core1}: uid {uid} may not send to this socket")
        run_fix(refused)
        assert only(links.peer(address))[0] == "ok"
        ours.unlink()
        home.chmod(0o500)
        checks: list[tuple[Callable[[], Iterable[Result]], str]] = [
            (lambda: links.socket_path(address), "may not create a socket in this directory"),
            (lambda: register_files.directory(home), "may not read and write it"),
        ]
        for check, text in checks:
            refused = only(check())
            assert refused == ("fail", f"{home}: uid {uid} {text}", f"chmod u+rwx {home}")
            run_fix(refused)
            assert only(check())[0] == "ok"
            home.chmod(0o500)
        home.chmod(0o700)


def test_the_fix_is_chmod_for_the_owner_and_chown_otherwise(tmp_path: Path) -> None:
    assert permit(tmp_path, "u+r") == f"chmod u+r {tmp_path}"
    assert permit(tmp_path / "gone", "u+r") == f"chown {os.geteuid()} {tmp_path}/gone"


def test_registers_must_be_regular_files(tmp_path: Path) -> None:
    signals = builtin_signals(tmp_path)
    names = "message_4_state, message_5_state, message_6_trig"
    fine = "ok", f"{tmp_path}: {names}: regular files, or not created yet", None
    assert only(register_files.kinds(signals)) == fine
    path = tmp_path / "message_6_trig"
    path.touch()
    assert only(register_files.kinds(signals)) == fine
    path.unlink()
    for make, kind in (
        (lambda path: path.symlink_to("message_4_state"), "a symlink"),
        (Path.mkdir, "a directory"),
        (os.mkfifo, "a FIFO"),
        (lambda path: datagram(path).close(), "a socket"),
    ):
        make(path)
        found = only(register_files.kinds(signals))
        assert found[:2] == ("fail", f"{path}: {kind}, not a regular file: the proxy refuses it")
        run_fix(found)
        assert only(register_files.kinds(signals)) == fine


def test_a_mount_point_is_unmounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").symlink_to("/")
    assert register_files.removal(tmp_path / "root/proc", stat.S_IFDIR) == f"umount {tmp_path}/root/proc"
    # A symlink to a mount point is not one.
    (tmp_path / "link").symlink_to("/proc")
    assert register_files.removal(tmp_path / "link", stat.S_IFLNK) == f"rm {tmp_path}/link"
    (tmp_path / "file").touch()
    monkeypatch.setattr(space, "lines_of", lambda _: [""])  # /proc/self/mountinfo cannot be read.
    assert register_files.removal(tmp_path / "file", stat.S_IFIFO) == f"rm {tmp_path}/file"


MOUNTS = "29 28 {major}:{minor} / /x rw,relatime - {kind} x rw\n"


@pytest.mark.parametrize(
    ("kind", "level", "text"),
    [
        ("tmpfs", "ok", "is on a filesystem of type tmpfs; inotify reports its events"),
        (
            "proc",
            "fail",
            f"is on a filesystem of type proc: {UNREPORTED['proc']}; use a local filesystem, such as tmpfs",
        ),
        ("9p", "warn", f"is on a filesystem of type 9p: {UNREPORTED['9p']}; use a local filesystem, such as tmpfs"),
        (
            "nfs4",
            "warn",
            f"is on a filesystem of type nfs4: {UNREPORTED['nfs4']}; use a local filesystem, such as tmpfs",
        ),
        (None, "ok", "is on a filesystem of unknown type; inotify reports its events"),
    ],
)
def test_filesystems_without_inotify_events_are_reported(
    tree: Tree, tmp_path: Path, kind: str | None, level: str, text: str
) -> None:
    if kind is not None:
        device = tmp_path.stat().st_dev
        tree.put("proc/self/mountinfo", MOUNTS.format(major=os.major(device), minor=os.minor(device), kind=kind))
    before = list(tmp_path.iterdir())
    assert only(register_files.reported(tmp_path / "later", tree.root)) == (level, f"{tmp_path}: {text}", None)
    assert list(tmp_path.iterdir()) == before


def test_a_filesystem_on_which_inotify_fails_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_files, "_opening_is_reported", lambda _: False)
    level, text, fix = only(register_files.reported(tmp_path))
    assert (level, fix) == ("fail", None)
    assert text.endswith("; inotify does not report its events; use tmpfs")


def test_a_directory_that_cannot_be_watched_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    level, text, _ = only(register_files.reported(tmp_path / "file"))
    assert level == "fail"
    assert text.endswith("; cannot watch it: Not a directory")


def test_a_register_that_is_held_open_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "message_6_trig"
    program = f"import sys; held = open({str(path)!r}, 'w'); print(flush=True); sys.stdin.read()"
    signals = builtin_signals(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        level, text, _ = only(register_files.held_open(signals, []))
        assert level == "warn"
        assert text.startswith(f"{path}: process {holder.pid} (python")
        assert list(register_files.held_open(signals, [process(holder.pid)])) == []


def place(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def test_an_unwatched_trigger_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_files, "filesystem", lambda path: (path, "tmpfs"))
    signals, path = builtin_signals(tmp_path), tmp_path / "message_6_trig"
    assert list(register_files.watched(signals, process(3))) == []
    path.touch()
    assert only(register_files.watched(signals, process(3))) == (
        "fail",
        f"{path}: process 3 does not watch it, so the proxy misses notifications",
        "kill -HUP 3",
    )
    # A reload does not help if the proxy may not use the directory or the file.
    text = f"{path}: process 3 does not watch it, so the proxy misses notifications"
    unfit = f"{text}: fix the problem of its directory first"
    assert only(register_files.watched(signals, process(3), fit=False)) == ("fail", unfit, None)
    path.chmod(0o200)
    assert only(register_files.watched(signals, process(3, uid=os.geteuid()))) == (
        "fail",
        f"{path}: process 3 of {user_name(os.geteuid())} may not read it",
        f"chmod u+r {path}",
    )
    path.unlink()
    path.mkdir()
    assert list(register_files.watched(signals, process(3))) == []
    path.rmdir()
    path.touch()
    proxy = process(3, watches=(place(path),))
    assert only(register_files.watched(signals, proxy)) == (
        "ok",
        f"{path}: process 3 watches them",
        None,
    )
    monkeypatch.setattr(register_files, "filesystem", lambda path: (path, "overlay"))
    assert list(register_files.watched(signals, process(3))) == []


ALONE = "without a supervisor"
NONE = frozenset[int]()
PROXY = process(30, "inco-trio run l0", name="inco-trio", sockets=(77,), started=5)
SECOND = process(20, "inco-trio run l0", name="inco-trio", sockets=(78,), started=6)
LISTENER = process(40, "python3 listen.py", name="python3", sockets=(79,))
HOLDER = process(2, name="s6-fdholderd", sockets=(77,))

PACKETS = """\
sk               RefCnt Type Proto  Iface R Rmem   User   Inode
0000000000000000 3      3    8800   4     1 0      0      77
0000000000000000 3      3    8800   5     1 0      0      78
0000000000000000 3      3    0003   4     1 0      0      79
0000000000000000 3      3    0003   4     1 0      0      80
"""

SOCKETS = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00000000 0002 01 77 /x/a
0000000000000000: 00000002 00000000 00000000 0002 01 78 /x/a b
0000000000000000: 00000003 00000000 00000000 0001 03    79
0000000000000000: 00000002 00000000 00010000 0001 01    81 /x/s
0000000000000000: 00000002 00000000 00010000 0001 01    82 /x/odd
a b c not d e a number /x/a
0000000000000000: 00000002 00000000 00010000 0001 01    83 /x/\u2028s
"""


def test_processes_with_sockets_of_a_link_are_found(tree: Tree) -> None:
    tree.put("proc/thread-self/net/packet", PACKETS)
    tree.put("proc/thread-self/net/unix", SOCKETS)
    assert packet_sockets(4, 0x8800, tree.root) == [77]
    assert unix_sockets("/x/a", tree.root) == [77]
    assert unix_sockets("/x/a b", tree.root) == [78]
    tree.put("proc/50/net/unix", SOCKETS)
    listening = process(50, "inco-trio run l0", sockets=(77, 81, 83))
    tree.put("proc/51/net/packet", PACKETS)
    hidden_ones = [attrs.evolve(PROXY, pid=number, hidden=True) for number in (50, 51, 52)]
    assert [is_beside(each, {77, 99}, tree.root) for each in hidden_ones] == [True, True, False]
    assert [is_beside(each, {80, 82}, tree.root) for each in hidden_ones] == [True, True, False]
    assert not any(is_beside(each, {99}, tree.root) for each in hidden_ones)
    assert listening_sockets(listening, tree.root) == [Path("/x/s"), Path("/x/\u2028s")]
    processes = everyone(PROXY, HOLDER)
    assert users_of_interface(4, processes, tree.root) == Users((PROXY,), (), (HOLDER,), NONE)
    assert users_of_interface(5, processes, tree.root) == Users((), (), (), frozenset({78}))
    # The doctor ignores packet sockets that receive every EtherType, unless inco_proxy owns them.
    former = process(50, "./inco_proxy l0", name="inco_proxy", sockets=(80,), started=7)
    processes = everyone(PROXY, LISTENER, former)
    assert users_of_interface(4, processes, tree.root) == Users((PROXY, former), (), (), NONE)
    address = parse_address("unix:/x/a,peer=/x/b")
    assert isinstance(address, UnixAddress)
    assert users_of_socket(address, everyone(PROXY, HOLDER), tree.root) == Users((PROXY,), (), (HOLDER,), NONE)


@pytest.mark.parametrize(
    ("users", "level", "text", "fix"),
    [
        (Users((PROXY,), (), (HOLDER,), NONE), "ok", f"only process 30 (inco-trio) {ALONE} serves the link", None),
        (Users((), (LISTENER,), (), NONE), "ok", "only process 40 (python3) serves the link", None),
        (Users((), (), (), NONE), "warn", "no proxy serves this link", "inco-trio run l0"),
        (
            Users((), (), (HOLDER,), NONE),
            "warn",
            "no proxy serves this link; 2 (s6-fdholderd) keeps notifications for a service of this link",
            "inco-trio run l0",
        ),
        (
            Users((PROXY, SECOND), (LISTENER,), (), NONE),
            "fail",
            f"2 proxies: 30 (inco-trio) {ALONE}, 20 (inco-trio) {ALONE}: each receives each frame",
            "kill 30",
        ),
        (
            Users((PROXY,), (LISTENER,), (), NONE),
            "warn",
            "several processes use it: 30 (inco-trio), 40 (python3): if two are proxies, each receives each frame",
            None,
        ),
        (
            Users((), (), (), frozenset({79})),
            "warn",
            "which process has a socket of l0",
            None,
        ),
    ],
)
def test_each_link_needs_exactly_one_proxy(users: Users, level: str, text: str, fix: str | None) -> None:
    subject = "" if users.unseen else "l0"
    assert only(proxies.users_of_link("l0", users)) == (level, f"{subject}: {text}", fix)


@pytest.mark.parametrize(
    ("users", "unseen", "level", "text", "fix"),
    [
        (Users((PROXY,), (), (HOLDER,), NONE), True, "ok", "process 2 (s6-fdholderd) keeps its socket while", None),
        (
            Users((PROXY,), (), (), NONE),
            True,
            "warn",
            "whether an fd store keeps the socket of l0 while the proxy restarts",
            None,
        ),
        (
            Users((), (LISTENER,), (), NONE),
            False,
            "warn",
            "no fd store keeps its socket: notifications that arrive while the proxy restarts are lost",
            "inco-trio service s6 /run/service l0 --config udrv.json",
        ),
        (
            Users((process(3, "inco-trio run l0 --config u.json --irq-owner app"),), (), (), NONE),
            False,
            "warn",
            "no fd store keeps its socket",
            "inco-trio service s6 /run/service l0 --config u.json --irq-owner app",
        ),
        (
            Users((process(3, "inco-trio run --boards=b"),), (), (), NONE),
            False,
            "warn",
            "no fd store keeps its socket",
            "inco-trio service s6 /run/service --boards b",
        ),
        (
            Users((process(3, "inco-trio run l0 --fd-holder s"),), (), (), NONE),
            False,
            "fail",
            "process 3 was started with --fd-holder, but no fd store has its socket: see the proxy's log",
            None,
        ),
    ],
)
def test_a_missing_fd_store_is_reported(users: Users, unseen: bool, level: str, text: str, fix: str | None) -> None:
    found = only(proxies.descriptors("l0", users, everyone(unseen=unseen)))
    assert (found[0], found[2]) == (level, fix)
    assert found[1].partition(": ")[2].startswith(text)


def test_the_stored_sockets_of_several_boards_are_known_from_the_status() -> None:
    boards, single = (process(3, f"inco-trio run {words} --fd-holder s") for words in ("--boards b", "l0"))
    for proxy, store, level in ((boards, "s6-fdholder", "ok"), (boards, None, "fail"), (single, "s6-fdholder", "fail")):
        status = attrs.evolve(status_of("l0", ()), descriptors=store)
        found = only(proxies.descriptors("l0", Users((proxy,), (), (), NONE), everyone(proxy), status))
        assert found[0] == level
        if level == "ok":
            assert found[1] == "l0: s6-fdholder keeps its socket while the proxy restarts"


def test_the_proxy_of_a_missing_interface_is_examined() -> None:
    proxy = process(os.getpid(), "inco-trio run gone0", uid=7)
    status = attrs.evolve(status_of("gone0", (), owner=3), counters=Stats(link_downs=1))
    answers = Answers({proxy.pid: Answer("gone0", (BoardStatus("gone0", status=status),))})
    found = list(examine("gone0", (), everyone(proxy), answers, serving=proxy))
    assert next(each for each in found if each.check == "interface").found.startswith("no such interface (available: ")
    assert [each.found for each in found if each.check == "counters"] == [
        "link_downs is 1 (over): the link went down: `inco-trio history` shows when"
    ]
    _, (result,) = links.interface("gone0", Path("/run/netns/b1"))
    assert result.found.startswith("no such interface in the network namespace /run/netns/b1 (available: ")


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (errno.EDQUOT, "a disk quota of the filesystem {} is used up, so the proxy cannot write"),
        (errno.ENOSPC, "a write to the filesystem {} failed, although it has free space now"),
    ],
)
def test_a_failed_write_for_lack_of_space_is_a_fault(tmp_path: Path, reason: int, text: str) -> None:
    irq, proxy = tmp_path / "irq", process(os.getpid(), "inco-trio run gone0", uid=os.geteuid())
    irq.mkdir()
    signals = builtin_signals(irq)
    status = status_of("gone0", signals)
    problem = f"cannot write: {os.strerror(reason)}; notifications are kept and retried"
    status = attrs.evolve(status, signals=(attrs.evolve(status.signals[0], problem=problem), *status.signals[1:]))
    answers = Answers({proxy.pid: Answer("gone0", (BoardStatus("gone0", status=status),))})
    found = list(examine("gone0", signals, everyone(proxy), answers, serving=proxy))
    (result,) = [each for each in found if each.check == "space"]
    assert (result.level, result.subject) == (Level.FAIL, str(irq))
    mount = next(each for each in (irq, *irq.parents) if each.is_mount())
    assert result.found.startswith(text.format(mount))
    assert result.fix == f"du -axk {mount} | sort -n | tail"
    checks = [each.check for each in found]
    assert checks.index("space") < checks.index("signal")


def test_the_search_for_large_files_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("inco_trio.doctor.space.ENTRIES_MAX", 2)
    for name in ("irq/1", "irq/2", "more/3"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    files, entries = space._search(tmp_path / "irq", tmp_path)
    assert set(files) == {tmp_path / "irq/1", tmp_path / "irq/2"}
    assert entries == {tmp_path / "irq": 2}


def test_a_full_filesystem_is_searched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("b1", "b2"):
        (tmp_path / f"irq/{name}").mkdir(parents=True)
        board = {"link": f"unix:{tmp_path}/{name}.0,peer={tmp_path}/{name}.1", "irq_dir": str(tmp_path / "irq" / name)}
        (tmp_path / "boards").mkdir(exist_ok=True)
        (tmp_path / f"boards/{name}.json").write_text(json.dumps(board))
    searches, search = list[Path](), space._search

    def counted(path: Path, mount: Path) -> space._Found:
        searches.append(path)
        return search(path, mount)

    monkeypatch.setattr(space, "_search", counted)
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    # Another run searches again.
    for runs in (1, 2):
        main(["doctor", "--boards", str(tmp_path / "boards")])
        assert searches == [tmp_path / "irq/b1"] * runs
    for name in ("b1", "b2"):
        (result,) = space.space(tmp_path / "irq" / name)
        assert result.subject == str(tmp_path / "irq" / name)
    assert searches[2:] == [tmp_path / "irq/b1", tmp_path / "irq/b2"]


def test_a_removed_service_is_named_if_no_proxy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.doctor.survey.silent_services", lambda: ["rpmsg4000"])
    monkeypatch.setattr("inco_trio.doctor.survey.find_services", lambda _: [])
    result = next(each for each in survey(everyone(), Answers()) if each.check == "proxy")
    assert result.found == (
        "no proxy is running, and no supervisor is known to run the service of rpmsg4000 any more: "
        "start it or its supervisor, or write it again with `inco-trio service`"
    )


def test_each_counter_of_a_state_says_whether_the_state_is_over() -> None:
    counted = Stats(write_failures=2, send_failures=3, link_downs=4, rivals=1, restarts=5, unknown=6, dropped=7)

    def found(**more: Any) -> list[str]:
        status = attrs.evolve(status_of("l0", ()), counters=counted, **more)
        results = proxies.counters(BoardStatus("l0", status=status))
        return [each.found.partition(":")[0] for each in results if each.check == "counters"]

    names = [name for name, count in counted.as_dict().items() if count]
    events = {"unknown", "dropped"}
    numbers = {name: f"{name} is {getattr(counted, name)}" for name in names}
    over = {name: text if name in events else f"{text} (over)" for name, text in numbers.items()}
    assert found() == [*over.values()]
    inbound = SignalStatus("s", Direction.INBOUND, "/irq/s", 1, None, 2, 1, None)
    busy = (inbound, attrs.evolve(inbound, direction=Direction.OUTBOUND))
    failing = attrs.evolve(inbound, problem="cannot write: No space left on device")
    task = TaskStatus("receive", 1, "Network is down; restarting the task", None)
    sending = TaskStatus("send", 0, "cannot send: Network is down; notifications are kept", None)
    states: dict[str, dict[str, Any]] = {
        "write_failures": {"signals": (failing,)},
        "link_downs": {"running": False},
        "rivals": {"rivals": (RivalStatus(3, 1.0, ("l0",)),)},
        "restarts": {"tasks": (task,)},
    }
    assert states.keys() == {*names} - events - {"send_failures"}
    # A busy proxy has pending notifications although the cause of the failures is over.
    assert found(signals=busy) == [*over.values()]
    assert f"{numbers['send_failures']} (continues)" in found(tasks=(sending,))
    for name, more in states.items():
        assert found(**more) == [*{**over, name: f"{numbers[name]} (continues)"}.values()]


def test_the_user_of_the_services_is_trusted_while_no_proxy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    service = pwd.getpwnam("daemon").pw_uid
    for name, uid, trust in (
        ("daemon", 0, Trust(3, 4, service)),
        ("daemon", 5, Trust(3, 4)),
        ("no such user", 0, Trust(3, 4)),
    ):
        monkeypatch.setattr("inco_trio.doctor.examination.USER", name)
        monkeypatch.setattr("os.geteuid", lambda uid=uid: uid)
        assert expected_trust(3, 4) == trust


def test_the_rights_of_the_doctor_do_not_matter_to_a_proxy_of_another_user(tmp_path: Path) -> None:
    irq, link, uid = tmp_path / "irq", f"unix:{tmp_path}/a,peer={tmp_path}/b", os.geteuid()
    irq.mkdir()
    (irq / "message_4_state").touch(0o400)
    irq.chmod(0o500)
    with without_capability(CAP_DAC_OVERRIDE), without_capability(CAP_DAC_READ_SEARCH):
        for user, levels in ((uid, ["fail", "fail"]), (uid + 1, ["ok", "ok"])):
            proxy = process(os.getpid(), f"inco-trio run {link}", uid=user)
            found = examine(link, builtin_signals(irq), everyone(proxy), Answers(), serving=proxy)
            assert [each.level.name.lower() for each in found if each.check in ("directory", "registers")] == levels
    irq.chmod(0o700)


@pytest.fixture
def searchable() -> Iterator[Path]:
    """Return a directory that all users may search, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        Path(home).chmod(0o755)
        yield Path(home)


def test_registers_that_the_user_of_a_proxy_may_not_use_are_named(searchable: Path) -> None:
    irq, link, uid = searchable / "irq", f"unix:{searchable}/a,peer={searchable}/b", os.geteuid() + 1
    irq.mkdir()
    signals = builtin_signals(irq)
    state, trigger = (next(each for each in signals if each.direction is way) for way in Direction)
    proxy = process(3, f"inco-trio run {link}", uid=uid)

    def denied(*modes: int, user: int = uid, groups: Set[int] = frozenset()) -> list[tuple[str, str | None]]:
        for path, mode in zip((irq, state.path, trigger.path), modes, strict=False):
            path.touch()
            path.chmod(mode)
        found = list(register_files.denied((state, trigger), attrs.evolve(proxy, uid=user, groups=frozenset(groups))))
        irq.chmod(0o700)
        return [(f"{each.subject}: {each.found.partition(' may ')[2]}", each.fix) for each in found]

    assert [*register_files.denied(builtin_signals(irq / "missing"), proxy)] == []
    assert denied(0o755) == [(f"{irq}: not create files in it", f"chown {uid} {irq}")]
    assert denied(0o755, 0o644, 0o600) == [
        (f"{state.path}: not write it", f"chown {uid} {state.path}"),
        (f"{trigger.path}: not read it", f"chown {uid} {trigger.path}"),
    ]
    assert denied(0o700, 0o646, 0o604) == [(f"{irq}: not use it", f"chown {uid} {irq}")]
    assert denied(0o755, 0o646, 0o604) == []
    # The application that owns a trigger must still be able to write it.
    os.chown(trigger.path, 12345, -1)
    assert denied(0o755, 0o646, 0o600) == [(f"{trigger.path}: not read it", f"chmod a+r {trigger.path}")]
    os.chown(trigger.path, os.geteuid(), -1)
    overriding = attrs.evolve(proxy, capabilities=1 << CAP_DAC_OVERRIDE)
    trigger.path.chmod(0o600)
    assert list(register_files.denied([trigger], overriding)) == []
    gid = searchable.stat().st_gid
    assert denied(0o750, 0o660, 0o640, groups={gid}) == []
    searchable.chmod(0o710)
    above = f"{searchable}: not search it: let this user search it, or use another IRQ directory"
    assert denied(0o755, 0o600, 0o600) == [(above, None)]
    assert denied(0o755, 0o646, 0o600, groups={gid}) == [
        (f"{state.path}: not write it", f"chown {uid} {state.path}"),
        (f"{trigger.path}: not read it", f"chown {uid} {trigger.path}"),
    ]
    searchable.chmod(0o755)
    own = os.geteuid()
    assert denied(0o755, 0o444, 0o600, user=own) == [(f"{state.path}: not write it", f"chmod u+w {state.path}")]
    irq.chmod(0o755)
    for problem, fixes in (("cannot write: Permission denied; retried", [f"chown {uid} {state.path}"]), (None, [])):
        state.path.chmod(0o644)
        status = status_of(link, signals)
        table = (each if each.signal != state.name else attrs.evolve(each, problem=problem) for each in status.signals)
        status = attrs.evolve(status, signals=tuple(table))
        for owner in (None, own):
            answers = Answers({3: Answer("x", (BoardStatus("x", status=attrs.evolve(status, owner=owner)),))})
            found = examine(link, signals, everyone(proxy), answers, serving=proxy)
            named = [each.fix for each in found if each.check == "registers" and each.level is Level.FAIL]
            assert named == ([] if owner is not None else fixes)


def test_no_reload_is_advised_for_a_file_that_the_proxy_may_not_read(searchable: Path) -> None:
    config, proxy = searchable / "u.json", process(3, "inco-trio run l0", uid=os.geteuid() + 12345)
    proxy = attrs.evolve(proxy, groups=frozenset({os.getegid()}))
    write_udrv(config, searchable / "irq")
    share = f"chgrp {os.getegid()} {config} && chmod g+r {config}"
    link = searchable / "link.json"
    link.symlink_to(config)
    status, boards = status_of("l0", ()), Boards({"u": Config("l0", ())}, {}, {})
    signals = builtin_signals(searchable / "irq")
    for mode, above, fix, text in (
        (0o644, 0o755, "kill -HUP 3", ""),
        (0o600, 0o755, f"{share} && kill -HUP 3", f" may not read {config}"),
        (0o644, 0o700, None, f" may not search {searchable}: change its owner or mode"),
    ):
        config.chmod(mode)
        searchable.chmod(above)
        (changed,) = proxies.configuration(link, signals, proxy, status)
        (board,) = proxies.board_files(searchable, boards, [], proxy)
        for result in (changed, board):
            assert result.fix == fix
            assert result.found.endswith(text)
    searchable.chmod(0o755)
    config.chmod(0o600)
    subprocess.run(["sh", "-ec", share], check=True)
    assert register_files.unreadable(config, proxy) is None


def test_a_file_is_shared_without_more_rights_for_its_group(tmp_path: Path) -> None:
    path, uid = tmp_path / "a b", os.geteuid() + 1
    acl, share = f"setfacl -m u:{uid}:r '{path}'", f"chgrp 5 '{path}' && chmod g+r '{path}'"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        status = path.stat()
        for mode, gid, command in (
            (0o600, 0, share),
            (0o640, 0, share),
            (0o600, 5, share),
            (0o660, 0, acl),  # The user could write to the file.
            (0o620, 0, acl),
            (0o640, 12345, acl),  # The group 12345 would lose the file.
        ):
            found = os.stat_result([stat.S_IFREG | mode, *status[1:5], gid, *status[6:]])
            patch.setattr(Path, "stat", lambda _, found=found: found)
            assert reading(path, uid, 5) == command
    tmp_path.chmod(0o770)
    gid = tmp_path.stat().st_gid
    assert reading(tmp_path, uid, gid + 1) == f"setfacl -m u:{uid}:rx {tmp_path}"


def test_a_file_is_shared_with_a_group_of_the_process(searchable: Path) -> None:
    config, nobody = searchable / "u.json", pwd.getpwnam("nobody")
    config.touch(0o600)
    proxy = process(3, "inco-trio run l0", uid=nobody.pw_uid)
    for groups in ({12345, 12346}, {12345, nobody.pw_gid}):
        gid = nobody.pw_gid if nobody.pw_gid in groups else 12345
        found = register_files.unreadable(config, attrs.evolve(proxy, groups=frozenset(groups)))
        assert found is not None
        # The group of the file is that of the tests' user.
        share = f"chgrp {gid} {config} && chmod g+r {config}"
        assert found[1] == (share if config.stat().st_gid == 0 else f"setfacl -m u:{nobody.pw_uid}:r {config}")


def test_no_command_is_advised_for_a_removed_file(tmp_path: Path) -> None:
    assert reading(tmp_path / "gone", os.geteuid() + 1, 5) is None


@pytest.mark.parametrize("place", ["u.json", ""])
def test_a_reload_is_advised_for_a_file_with_an_acl(place: str, searchable: Path) -> None:
    config, proxy = searchable / "u.json", process(3, "inco-trio run l0", uid=os.geteuid() + 1)
    write_udrv(config, searchable / "irq")
    config.chmod(0o644)
    (searchable / place).chmod(0o750)
    assert register_files.unreadable(config, proxy) is not None
    add_acl(searchable / place, proxy.uid)
    (searchable / place).chmod(0o750)  # Now, the group bits are the mask of the ACL.
    assert register_files.unreadable(config, proxy) is None


def test_pending_notifications_are_described_by_direction() -> None:
    status = status_of("l0", IN_RUN)
    status = attrs.evolve(status, signals=tuple(attrs.evolve(each, pending=1) for each in status.signals))
    texts = {each.found.partition(": ")[2] for each in proxies.counters(BoardStatus("l0", status=status))}
    assert texts == {"not delivered yet (1 pending)", "not sent yet (1 pending)"}


def test_a_stopped_process_is_a_fault_with_a_fix() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        proxy = process(child.pid, "inco-trio run l0")
        everywhere = survey(everyone(proxy), Answers()), proxies.users_of_link("l0", Users((proxy,), (), (), NONE))
        result, same = (each for results in everywhere for each in results if each.check == "control")
        assert result == same
        assert (result.level, result.fix) == (Level.FAIL, f"kill -CONT {child.pid}")
        assert result.found.startswith("the process is stopped by a signal or a debugger")
        run_fix(("", "", result.fix))
        child.communicate(b"\n", timeout=HANG)


@pytest.mark.parametrize(
    ("supervised", "command", "fix"),
    [
        ("s6-svc -d '/run/a b'", "inco-trio run l0", "s6-svc -r '/run/a b'"),
        ("systemctl --user stop a.service", "inco-trio run l0", "systemctl --user restart a.service"),
        ("s6-svc -d /run/a", "inco-trio run l0 --control none", None),
        ("s6-svc -d a", "inco-trio run l0", None),
        ("sv down /run/a", "inco-trio run l0", None),
        ("", "inco-trio run l0", None),
    ],
)
def test_a_service_without_a_control_socket_is_restarted(supervised: str, command: str, fix: str | None) -> None:
    proxy = attrs.evolve(process(2**22 + 1, command, instances=1), supervised=supervised)
    (result,) = (each for each in survey(everyone(proxy), Answers()) if each.check == "control")
    assert (result.level, result.fix) == (Level.WARN, fix)


def test_a_service_that_waits_for_its_fd_store_is_not_restarted() -> None:
    command = "s6-fdholder-getdump ../s inco-trio run l0"
    for name, text in (("python3", ""), ("s6-fdholder-get", ": it waits for the fd store")):
        waiting = attrs.evolve(process(2**22 + 1, command, name=name), supervised="s6-svc -d /run/a")
        (result,) = (each for each in survey(everyone(waiting), Answers()) if each.check == "control")
        assert (result.level, result.fix) == (Level.WARN, None)
        assert result.found == f"the process has not finished its start{text}"


def test_an_invalid_link_in_a_command_line_does_not_end_the_command(tmp_path: Path) -> None:
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    proxy = process(2**22 + 1, f"sh -c : inco-trio run unix:bad {link}")
    subjects = [each.subject for each in survey(everyone(proxy), Answers())]
    assert f"process {proxy.pid} (program)" in subjects
    assert "unix:bad" not in subjects
    assert link in subjects


OTHER_UID = os.geteuid() + 1
"""A user ID that is neither root nor that of the tests."""


@pytest.mark.parametrize(
    ("parent", "cgroup", "stop"),
    [
        ({"name": "s6-supervise", "cwd": "/run/service/inco-trio l0"}, "0::/", "s6-svc -d '/run/service/inco-trio l0'"),
        # An ordinary user may see the working directory of the proxy, but not that of its supervisor.
        (
            {"name": "s6-supervise", "command": "s6-supervise inco-trio-l0", "child": "/run/service/inco-trio-l0"},
            "0::/",
            "s6-svc -d /run/service/inco-trio-l0",
        ),
        ({"name": "s6-supervise", "command": "s6-supervise inco-trio-l0", "child": "/root"}, "0::/", None),
        ({"name": "s6-supervise", "command": "s6-supervise inco-trio-l0"}, "0::/", None),
        # Another user can give a process this name and this working directory.
        ({"name": "s6-supervise", "cwd": "/run/service/x", "pid": 7, "uid": OTHER_UID}, "0::/", "kill 30"),
        ({"name": "s6-supervise", "cwd": "/home/x", "pid": 7, "uid": os.geteuid()}, "0::/", "s6-svc -d /home/x"),
        ({"name": "runsv", "cwd": "/etc/service/irq"}, "0::/", "sv down /etc/service/irq"),
        ({"name": "supervise", "cwd": "/service/irq"}, "0::/", "svc -d /service/irq"),
        ({"name": "systemd"}, "0::/system.slice/inco-trio-l0.service", "systemctl stop inco-trio-l0.service"),
        (
            {"name": "systemd"},
            "12:cpu:/\n1:name=systemd:/system.slice/inco@a.service",
            "systemctl stop inco@a.service",
        ),
        (
            {"name": "systemd", "pid": 7},
            "0::/user.slice/user-5.slice/user@5.service/app.slice/inco.service",
            "systemctl --user stop inco.service",
        ),
        # Login shells and cron also run in systemd units, but systemd does not restart their children.
        ({"name": "systemd"}, "0::/user.slice/user-5.slice/session-1.scope", "kill 30"),
        ({"name": "cron", "pid": 7}, "0::/system.slice/cron.service", "kill 30"),
        ({"name": "bash", "pid": 7}, "0::/", "kill 30"),
    ],
)
def test_the_command_of_the_supervisor_stops_a_process(
    tree: Tree, parent: dict[str, Any], cgroup: str, stop: str | None
) -> None:
    above = parent.get("pid", 1)
    tree.process(above, parent.get("command", "init"), name=parent["name"], uid=parent.get("uid", 0))
    if "cwd" in parent:
        (tree.root / f"proc/{above}/cwd").symlink_to(parent["cwd"])
    tree.process(30, "inco_proxy l0", parent=above)
    if "child" in parent:
        (tree.root / "proc/30/cwd").symlink_to(parent["child"])
    tree.put("proc/30/cgroup", f"{cgroup}\n")
    (found,) = [each for each in look(tree.root, BOOTED).all if each.pid == 30]
    assert found.stop == stop


def test_the_proxy_without_supervisor_is_superfluous_otherwise_the_oldest() -> None:
    young, old = process(4, "inco_proxy l0", started=4), process(3, "inco_proxy l0", started=3)
    assert superfluous([young, old]) == old
    watched = attrs.evolve(old, supervised="s6-svc -d /run/service/a")
    assert superfluous([young, watched]) == young
    # This user cannot see whether a proxy of another user has the usual control socket.
    assert superfluous([attrs.evolve(old, hidden=True), young]) == young
    assert superfluous([attrs.evolve(young, supervised="systemctl stop b"), watched]).stop == "s6-svc -d /run/service/a"
    boards = process(2, "inco-trio run --boards=/b", started=2)
    assert superfluous([boards, watched]) == boards
    # Other boards would lose their proxy.
    assert superfluous([boards, young]) == young
    assert superfluous([attrs.evolve(boards, supervised="s6-svc -d /run/service/b"), watched]) == watched
    assert watched.supervision == "in s6 service /run/service/a"
    assert (
        attrs.evolve(young, supervised="systemctl --user stop b.service").supervision == "in systemd service b.service"
    )


def test_a_proxy_that_does_not_answer_is_not_known_to_serve_the_link() -> None:
    """It may serve an interface of the same name in another network namespace."""
    path, other = "/run/inco-trio/l0.sock", "/run/inco-trio/l1.sock"
    silent, stale, unseen = fail("control", path, "silent"), warn("control", path, "stale"), hidden("a status")
    assert Answers(problems=(silent, stale, warn("control", other, "stale"), unseen)).problems_of("l0") == [
        stale,
        unseen,
    ]


def test_the_log_names_no_command_for_a_service_whose_directory_is_unknown() -> None:
    for supervised, remedy in (("s6-svc -d inco-trio-l0", REMEDY), ("s6-svc -d /s/l0", "run: s6-svc -d /s/l0")):
        (rival,) = _rival(0, "l0", [attrs.evolve(PROXY, supervised=supervised)], OF_LINK)
        assert str(rival) == f"l0: process 30 (inco-trio) {OF_LINK}: {remedy}"


def test_only_some_of_many_rivals_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user can start any number of processes that look like proxies."""
    calls: list[None] = []

    def counted(proxies: Iterable[Process]) -> Process:
        calls.append(None)
        return superfluous(proxies)

    monkeypatch.setattr("inco_trio.service.rivals.superfluous", counted)
    many = [attrs.evolve(PROXY, pid=10_000_000 + number) for number in range(100)]
    assert len([*_rival(0, "l0", many, OF_TRIGGERS)]) == 16
    assert len(calls) == 1


def test_only_a_proxy_is_described(tmp_path: Path) -> None:
    """A process ID can belong to another program when the proxy has ended."""
    tree = Tree(tmp_path)
    tree.process(7, "inco-trio run l0")
    tree.process(8, "sleep 9")
    assert described(7, tmp_path) == "uid 0, without a visible parent, inco-trio run l0"
    assert (described(8, tmp_path), described(9, tmp_path)) == ("", "")


def test_the_fd_store_of_a_stopped_service_does_not_keep_the_socket_of_another_proxy() -> None:
    other = attrs.evolve(HOLDER, sockets=frozenset({78}))
    for holder, keepers in ((HOLDER, (HOLDER,)), (other, ())):
        users = Users((PROXY,), (), (holder,), NONE)
        assert users.keepers == keepers
        for has_service in (False, True):
            found = only(proxies.descriptors("l0", users, everyone(), has_service=has_service))
            assert found[0] == ("ok" if keepers else "warn")
            # A second service of the link would not help.
            assert (found[2] is None) == (bool(keepers) or has_service)
    assert Users((), (), (HOLDER,), NONE).keepers == ()


def test_a_link_whose_service_does_not_serve_it_is_a_problem() -> None:
    for start, text in (
        (None, "no proxy serves this link: see the log of its service"),
        ("x", "no proxy serves this link"),
    ):
        found = only(proxies.users_of_link("l0", Users((), (), (), NONE), start, has_service=True))
        assert found == ("fail", f"l0: {text}", start)


def test_an_unknown_receive_buffer_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.doctor.examination.users_of_interface", lambda *_: Users((PROXY,), (), (), NONE))
    asked: list[int | None] = []

    def receive_buffer(_proxy: Process, _wanted: int, granted: int | None) -> list[Result]:
        asked.append(granted)
        return []

    monkeypatch.setattr(machine, "receive_buffer", receive_buffer)
    status = attrs.evolve(status_of("lo", ()), receive_buffer=7)
    for answers in (Answers(), Answers({PROXY.pid: Answer("lo", (BoardStatus("lo", status=status),))})):
        for _ in examine("lo", (), everyone(PROXY), answers):
            pass
    assert asked == [7]


def test_the_fd_store_check_needs_exactly_one_proxy() -> None:
    for users in (
        Users((), (), (HOLDER,), NONE),
        Users((PROXY, SECOND), (), (), NONE),
        Users((), (), (), frozenset({79})),
    ):
        assert users.proxy is None
        assert list(proxies.descriptors("l0", users, everyone())) == []


def test_two_proxies_on_one_directory_are_a_fault(tmp_path: Path) -> None:
    signals = builtin_signals(tmp_path)
    path = tmp_path / "message_6_trig"
    both = [process(n, f"inco-trio run l{n}", started=n, watches=((1, 1),)) for n in (3, 4)]
    assert list(proxies.users_of_directory(tmp_path, signals, everyone(*both))) == []
    path.touch()
    assert list(proxies.users_of_directory(tmp_path, signals, everyone(*both))) == []
    three, four, other = (
        process(n, command, started=n, watches=(place(path),))
        for n, command in ((3, "inco-trio run l0"), (4, "inco_proxy l1"), (5, "tail -f x"))
    )
    # The doctor ignores its own process and the fd store, which holds the proxy's watches.
    aside = (
        process(6, name="s6-fdholderd", watches=(place(path),)),
        process(os.getpid(), watches=(place(path),)),
    )
    assert only(proxies.users_of_directory(tmp_path, signals, everyone(four, three, *aside))) == (
        "fail",
        f"{tmp_path}: 2 proxies: 3 (program) {ALONE}, 4 (program) {ALONE}: each sends each notification",
        "kill 3",
    )
    assert only(proxies.users_of_directory(tmp_path, signals, everyone(three, other)))[0] == "warn"
    assert only(proxies.users_of_directory(tmp_path, signals, everyone(three, *aside)))[0] == "ok"


@pytest.mark.parametrize(
    ("mode", "who", "counts"),
    [
        (0o755, {"uid": 0}, True),
        (0o755, {"uid": 12345}, True),
        (0o755, {"uid": 12346}, False),
        (0o755, {"uid": 12346, "groups": {12347}}, False),
        (0o775, {"uid": 12346, "groups": {12347}}, True),
        (0o775, {"uid": 12346, "groups": {12348}}, False),
        (0o777, {"uid": 12346}, True),
        (0o755, {"uid": 12346, "capabilities": 1 << CAP_DAC_OVERRIDE}, True),
        (0o755, {"uid": 12346, "capabilities": ~(1 << CAP_DAC_OVERRIDE)}, False),
    ],
)
def test_a_user_who_may_not_write_a_directory_has_no_proxy_there(
    tmp_path: Path, mode: int, who: dict[str, Any], counts: bool
) -> None:
    path = tmp_path / "message_6_trig"
    path.touch()
    os.chown(tmp_path, 12345, 12347)
    tmp_path.chmod(mode)
    signals = builtin_signals(tmp_path)
    real = process(3, "inco-trio run l0", watches=(place(path),))
    other = attrs.evolve(process(os.getppid(), "inco-trio run --boards x", watches=(place(path),)), **who)
    found = only(proxies.users_of_directory(tmp_path, signals, everyone(real, other)))
    assert found[0] == ("fail" if counts else "ok")


def test_a_capability_in_another_user_namespace_is_no_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "message_6_trig"
    path.touch()
    other = attrs.evolve(process(7, "inco-trio run l0", watches=(place(path),)), uid=12346, capabilities=-1)
    maps = {Path("/proc/7/uid_map"): "0 12346 1", Path("/proc/self/uid_map"): FIRST}
    monkeypatch.setattr(rivals, "read", maps.get)
    assert list(proxies.users_of_directory(tmp_path, builtin_signals(tmp_path), everyone(other))) == []


def status_of(link: str, signals: Iterable[Signal], **more: Any) -> Status:
    """Return the status that a proxy with this link and these signals reports."""
    table = tuple(SignalStatus(s.name, s.direction, str(s.path), 0, None, 0, 0, None) for s in signals)
    return Status(link, 1.0, 1.0, True, "", None, Stats(), table, (), **more)


IN_RUN, ELSEWHERE = builtin_signals(Path("/run/irq")), builtin_signals(Path("/run/other"))
IN_TWO = (*IN_RUN[:2], ELSEWHERE[2])


@pytest.mark.parametrize(
    ("wanted", "more", "changed"),
    [
        (IN_RUN, {}, ""),
        (IN_RUN[::-1], {"netns": "/run/netns/b2", "owner": 12}, ""),
        (IN_TWO, {}, "redun_notify_irq"),
        (IN_RUN[:2], {}, "redun_notify_irq"),
        (ELSEWHERE, {}, "ihub_hwwd_irq, ihub_reset_irq, redun_notify_irq"),
        (Config("l0", IN_RUN), {}, ""),
        (Config("l1", IN_TWO), {}, "link, redun_notify_irq"),
        (Config("l0", IN_RUN, netns=Path("/run/netns/b2")), {"netns": "/run/netns/b2"}, ""),
        (Config("l0", IN_RUN, netns=Path("/run/netns/b2")), {}, "netns"),
        (Config("l0", IN_RUN, owner=12, group=13), {"owner": 12, "group": 13}, ""),
        (Config("l0", IN_RUN, owner=12, group=13), {"owner": 12}, "irq_owner"),
    ],
)
def test_a_proxy_must_use_the_current_content_of_its_file(
    wanted: Config | Sequence[Signal], more: dict[str, Any], changed: str
) -> None:
    # Times do not matter: a file can be newer than the proxy, and the clock might have been changed.
    found = only(proxies.configuration(Path("/b.json"), wanted, PROXY, status_of("l0", IN_RUN, **more)))
    if changed:
        text = f"/b.json: process 30 does not use the current version, which differs in {changed}"
        assert found == ("warn", text, "kill -HUP 30")
    else:
        assert found == ("ok", "/b.json: process 30 uses the current version", None)


def test_a_proxy_must_serve_the_boards_in_its_directory() -> None:
    boards = Boards({"a": Config("l0", ()), "b": Config("l1", ())}, {"c": ConfigError("invalid")}, {})
    # The proxy keeps a board whose file has become invalid.
    assert list(proxies.board_files(Path("/boards"), boards, ["a", "b", "c"], PROXY)) == []
    assert [str(result) for result in proxies.board_files(Path("/boards"), boards, ["b", "d"], PROXY)] == [
        "/boards/a.json: process 30 has not read this file: it does not serve the board: run: kill -HUP 30",
        "/boards/d.json: was removed, but process 30 still serves the board: run: kill -HUP 30",
    ]


def test_an_unreadable_configuration_is_reported_as_hidden() -> None:
    denied = PermissionDeniedError("/u.json", "cannot be read: Permission denied")
    assert refused(Path("/u.json"), denied) == [hidden("the configuration /u.json")]
    assert [str(each) for each in refused(Path("/u.json"), ConfigError("/u.json", ["a: b", "c: d"]))] == [
        "/u.json: a: b",
        "/u.json: c: d",
    ]
    assert [each.found for each in refused(Path("/u.json"), ConfigError("/u\n.json", ["a: /x\ny", "b"]))] == [
        "a: /x\ny",
        "b",
    ]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UDRV_JSON_PATH", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def run(*words: object, **more: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "inco_trio", "doctor", *map(str, words)]
    options: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, **more}
    return subprocess.run(command, check=False, timeout=HANG, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Return a list of results, which the doctor reports instead of examining the machine."""
    results: list[Result] = []
    monkeypatch.setattr("inco_trio.doctor.survey.survey", lambda *_, **__: iter(results))
    monkeypatch.setattr("inco_trio.doctor.examination.examine", lambda *_, **__: iter(()))
    return results


OK = Result(Level.OK, "mtu", "l0", "MTU 1500")
WARN = Result(Level.WARN, "order", "l0", "two queues", "ethtool")
DOWN = Result(Level.FAIL, "state", "l1", "down")
FAIL = Result(Level.FAIL, "state", "a\nb\x1b", "down")


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        ([], 0, "no problems, 0 checks ok\n"),
        ([OK], 0, "ok   l0: MTU 1500\nno problems, 1 check ok\n"),
        (
            [OK, WARN, OK],
            3,
            "warn l0: two queues: run: ethtool\nok   l0: MTU 1500\nno problems, 1 warning, 1 check ok\n",
        ),
        (
            [OK, WARN, FAIL, DOWN],
            1,
            """\
fail a\\nb\\x1b: down
fail l1: down
warn l0: two queues: run: ethtool
ok   l0: MTU 1500
2 problems, 1 warning, 1 check ok
""",
        ),
        (
            [FAIL, WARN],
            1,
            "fail a\\nb\\x1b: down\nwarn l0: two queues: run: ethtool\n1 problem, 1 warning, 0 checks ok\n",
        ),
    ],
)
def test_each_result_is_a_line_and_the_worst_sets_the_exit_code(
    quiet: list[Result], capsys: pytest.CaptureFixture[str], results: list[Result], code: int, said: str
) -> None:
    quiet += results
    assert main(["doctor"]) == code
    assert capsys.readouterr() == (said, "")
    *lines, _summary = said.splitlines()
    assert main(["doctor", "--quiet"]) == code
    assert capsys.readouterr().out.splitlines() == [line for line in lines if not line.startswith("ok")]
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    levels = [entry["level"] for entry in found["results"]]
    assert levels == [line.split()[0] for line in lines]
    assert (found["problems"], found["warnings"], found["ok"]) == tuple(map(levels.count, ("fail", "warn", "ok")))
    assert all(set(entry) == {"level", "check", "subject", "found", "fix"} for entry in found["results"])


def test_what_this_user_may_not_see_is_one_line(
    quiet: list[Result], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet += [hidden("which process has a socket of l0"), OK, hidden("the status of the proxy at /run/a.sock")]
    monkeypatch.setattr(shutil, "which", lambda _: "/opt/my env/bin/inco-trio")
    assert main(["doctor", "--quiet"]) == 3
    seen = "which process has a socket of l0; the status of the proxy at /run/a.sock"
    again = "run: sudo '/opt/my env/bin/inco-trio' doctor"
    assert capsys.readouterr().out == f"warn uid {os.geteuid()}: may not see {seen}: {again}\n"


def test_each_level_has_its_own_exit_code() -> None:
    assert sorted(EXITS.values()) == [0, 1, 3]


def test_invalid_arguments_are_one_error_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, said in (
        (["--irq-dir", "a", "--config", "b"], "--irq-dir and --config are mutually exclusive"),
        (
            ["--boards", "a", "--config", "b"],
            "--boards and --config are mutually exclusive: the file of each board names its link",
        ),
        (["l0", "--boards", "a"], "--boards and LINK are mutually exclusive"),
        (["a/b"], "link 'a/b': expected unix:LOCAL,peer=REMOTE or an interface name"),
        (["unix:/a"], "link 'unix:/a': peer=REMOTE is missing"),
        (["--irq-dir", ""], "--irq-dir: the path is empty"),
        (["--config", ""], "--config: the path is empty"),
    ):
        assert main(["doctor", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"inco-trio: error: {said}")
        assert err.count("\n") == 1


def test_a_refused_configuration_does_not_stop_other_checks(tmp_path: Path) -> None:
    udrv = tmp_path / "u.json"
    done = run("--config", udrv)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"fail %b: cannot be read: No such file or directory\n" % bytes(udrv) in done.stdout
    assert b" fs.inotify.max_user_instances: " in done.stdout
    udrv.write_text('{"file": {}, "misc": {"inco_proxy": {"signals": {"a b": {}}}}}')
    lines = run(env={**os.environ, "UDRV_JSON_PATH": str(udrv)}).stdout.decode().splitlines()
    refused = [line for line in lines if line.startswith(f"fail {udrv}: ")]
    assert len(refused) > 1
    udrv.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": str(tmp_path / "irq")}}}))
    done = run("--config", udrv)
    assert b"ok   %b: valid, 3 signals\n" % bytes(udrv) in done.stdout
    assert b"warn %b/irq: does not exist" % bytes(tmp_path) in done.stdout


def test_all_boards_of_a_directory_are_checked(tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    done = run("--boards", boards)
    assert done.returncode == 1
    assert b"cannot read the board directory: No such file or directory\n" in done.stdout
    boards.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        link = f"unix:{tmp_path}/{name}.0,peer={tmp_path}/{name}.1"
        (boards / f"{name}.json").write_text(json.dumps({"link": link, "irq_dir": f"{tmp_path / name}"}))
    (boards / "three.json").write_text("{}")
    done = run("--boards", boards, "--json")
    found = json.loads(done.stdout)["results"]
    assert done.returncode == 1
    assert {entry["subject"] for entry in found if entry["check"] == "directory"} == {
        f"{tmp_path}/one",
        f"{tmp_path}/two",
    }
    assert {entry["subject"] for entry in found if entry["check"] == "peer"} == {
        f"{tmp_path}/one.1",
        f"{tmp_path}/two.1",
    }
    assert {(entry["subject"], entry["level"]) for entry in found if entry["check"] == "configuration"} == {
        (f"{boards}/one.json", "ok"),
        (f"{boards}/two.json", "ok"),
        (f"{boards}/three.json", "fail"),
    }
    # The doctor reports a result that is the same for all boards only once.
    assert [entry["subject"] for entry in found].count("net.unix.max_dgram_qlen") == 1


def shown(tmp_path: Path, **environment: str) -> bytes:
    """Return the output of the doctor on a terminal with 20 columns, including colours."""
    ours, theirs = pty.openpty()
    # struct winsize for TIOCSWINSZ: rows and columns first.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    done = run(f"unix:{tmp_path}/a,peer={tmp_path}/b", stdout=theirs, stderr=theirs, capture_output=False,
               env={**os.environ, **environment})  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:
        pass  # EIO: the other side of the pty is closed.
    os.close(ours)
    assert done.returncode == 1
    return said


def test_lines_are_not_wrapped_and_colours_can_be_disabled(tmp_path: Path) -> None:
    line = b"%b/b: no process has bound this socket" % bytes(tmp_path)
    coloured = shown(tmp_path)
    assert b"\033[31mfail\033[m " + line in coloured
    assert b"\033[32mok  \033[m " in coloured
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        plain = shown(tmp_path, **{name: value})
        assert b"fail " + line in plain
        assert b"\033" not in plain


def test_a_closed_standard_output_is_ignored_and_a_full_one_an_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("--irq-dir", tmp_path, stdout=write, stderr=subprocess.PIPE, capture_output=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        for words in ([], ["--json"]):
            done = run(*words, stdout=full, stderr=subprocess.PIPE, capture_output=False)
            said = b"inco-trio: error: standard output: No space left on device\n"
            assert (done.returncode, done.stderr) == (71, said)


def test_the_doctor_changes_no_file(tmp_path: Path) -> None:
    irq = tmp_path / "irq"
    irq.mkdir()
    for name in ("message_4_state", "message_6_trig"):
        (irq / name).write_text("0")
    before = {path: path.stat() for path in (tmp_path, irq, *irq.iterdir())}
    run(f"unix:{tmp_path}/a,peer={tmp_path}/b", "--irq-dir", irq)
    after = {path: path.stat() for path in (tmp_path, irq, *irq.iterdir())}
    assert {path: (s.st_mtime_ns, s.st_ino) for path, s in after.items()} == {
        path: (s.st_mtime_ns, s.st_ino) for path, s in before.items()
    }


@pytest.mark.parametrize(
    ("option", "trust"),
    [
        ("", Trust(user=7)),
        ("--irq-owner 12:13", Trust(12, 13, 7)),
        ("--irq-owner=:13", Trust(None, 13, 7)),
        ("--irq-owner no-such-user", Trust(user=7)),  # The user was removed after the proxy had started.
    ],
)
def test_whom_a_proxy_trusts_is_read_from_its_status_or_command_line(option: str, trust: Trust) -> None:
    proxy = process(1, f"inco-trio run l0 {option}", uid=7)
    assert trust_of(proxy, None) == trust
    assert trust_of(proxy, status_of("l0", (), owner=3, group=4)) == Trust(3, 4, 7)
