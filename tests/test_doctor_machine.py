"""Tests of `inco-trio doctor` on the real kernel: the printed command must fix the fault that the test has caused."""

from __future__ import annotations

import json
import os
import pwd
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from inco_trio.doctor import machine
from inco_trio.links.packet import RECEIVE_BUFFER
from inco_trio.linux.processes import is_same_system, look, working_directory
from inco_trio.linux.rtnetlink import RTMGRP_LINK, Rtnetlink
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.faults.supervised import Service, main_process, wait_path, write_scandir
from tests.support_doctor import DOCTOR, FIRST, Tree
from tests.support_proxy import write_udrv
from tests.test_privileges import restrictions

pytestmark = pytest.mark.netns

Found = dict[str, Any]

DRIVER = """
import json, subprocess, sys
from tests.support_doctor import DOCTOR
setup, check, subject, *words = sys.argv[1:]
found = []
subprocess.run(["sh", "-ec", setup], check=True)
while len(found) < 5:
    done = subprocess.run([*DOCTOR, *words, "--json"], stdout=subprocess.PIPE)
    results = json.loads(done.stdout)["results"]
    (result,) = [result for result in results if (result["check"], result["subject"]) == (check, subject)]
    found.append(result)
    if result["level"] == "ok" or result["fix"] is None or result["check"] == "space":
        break
    subprocess.run(["sh", "-ec", result["fix"]], check=True, stdout=subprocess.DEVNULL)
print(json.dumps(found))
"""
"""A program that runs a set-up command, then the doctor and its fix until the result is ok. It prints all results."""


def driven(
    core: Namespace, setup: str, check: str, subject: object, *words: object, around: Sequence[str] = ()
) -> list[Found]:
    """Run DRIVER in `core` with the command prefix `around`; return the results of one check in order."""
    command = [*around, sys.executable, "-c", DRIVER, setup, check, str(subject), *map(str, words)]
    done = core.run(lambda: subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE))
    found: list[Found] = json.loads(done.stdout)
    return found


def doctor(core: Namespace, *words: object, around: Sequence[str] = ()) -> list[Found]:
    """Run the doctor and return all results."""
    command = [*around, *DOCTOR, *map(str, words), "--json"]
    done = core.run(lambda: subprocess.run(command, check=False, timeout=HANG, stdout=subprocess.PIPE))
    found: list[Found] = json.loads(done.stdout)["results"]
    worst = {result["level"] for result in found}
    assert done.returncode == (1 if "fail" in worst else 3 if "warn" in worst else 0)
    return found


def of(found: list[Found], check: str, subject: str | None = None) -> Found:
    """Return the only result of a check, or the only one with this subject."""
    (result,) = [each for each in found if each["check"] == check and subject in (None, each["subject"])]
    return result


def fix(core: Namespace, result: Found) -> None:
    """Run the fix that the doctor printed."""
    command = ["sh", "-ec", result["fix"]]
    core.run(lambda: subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.DEVNULL))


def levels(found: list[Found]) -> list[str]:
    return [result["level"] for result in found]


ROOT = os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == FIRST.split()
"""Whether this process is root in the initial user namespace."""
IN_MOUNTS = ["unshare", "--mount"]


def test_missing_proc_is_a_warning_until_it_is_mounted(cores: Cores) -> None:
    around = ["unshare", "--mount", "--pid", "--fork"]
    setup = "mount -t tmpfs inco-trio-test /proc"
    # Run the doctor before and after /proc is mounted.
    command = [*around, "sh", "-ec", setup + '; "$@" || mount -t proc proc /proc; "$@"', "sh"]
    command += [*DOCTOR, cores.link]
    done = cores.core0.run(lambda: subprocess.run(command, check=False, timeout=HANG, capture_output=True))
    lines = done.stdout.decode().splitlines()
    end = next(number for number, line in enumerate(lines) if line.endswith(" ok"))
    assert done.stderr == b""
    (first,) = [line for line in lines[:end] if line.startswith("warn /proc: not mounted: ")]
    assert first.endswith(": run: mount -t proc proc /proc")
    # Without /proc, the doctor still runs the checks that do not need it.
    assert f"ok   {cores.link}: the interface is up and has a carrier" in lines[:end]
    assert not any(line.startswith("warn /proc") for line in lines[end:])
    assert any("fs.inotify.max_user_instances" in line for line in lines[end:])


def test_the_fix_gives_an_ordinary_user_the_capability(cores: Cores, nobody: list[str]) -> None:
    result = of(doctor(cores.core0, cores.link, around=nobody), "capability")
    assert result["level"] == "fail"
    assert result["fix"].endswith(f" inco-trio run {cores.link}")
    if not ROOT:
        return  # setpriv cannot switch to another user here.
    # The ordinary user might be unable to run this Python, so a script prints the capabilities that it received.
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        program = Path(home, "inco-trio")
        program.write_text("#!/bin/sh\ncat /proc/self/status\n")
        program.chmod(0o755)
        path = f"{home}:{os.environ['PATH']}"
        given = subprocess.run(
            ["sh", "-ec", result["fix"]], check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
        ).stdout
        tree = Tree(Path(home))
        tree.put("proc/self/status", given)
        (after,) = machine.capability(cores.link, tree.root)
    assert after.level.name == "OK"
    assert after.found == f"this user (uid {pwd.getpwnam('daemon').pw_uid}) has CAP_NET_RAW"


def test_the_receive_buffer_limit_is_checked(cores: Cores, nobody: list[str]) -> None:
    path = Path("/proc/sys/net/core/rmem_max")
    limit = cores.core0.run(lambda: int(path.read_text()) if path.exists() else None)
    result = of(doctor(cores.core0, cores.link, around=nobody), "receive-buffer")
    # Do not change this machine-wide limit. Linux 6.1 shows it only in the initial network namespace.
    if limit is None:
        assert (result["level"], result["fix"]) == ("warn", None)
        assert result["found"].startswith("cannot be read in this network namespace")
    elif limit < RECEIVE_BUFFER:
        assert (result["level"], result["fix"]) == ("warn", f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER}")
    else:
        assert result["level"] == "ok"


@pytest.mark.parametrize("what", ["instances", "watches"])
def test_the_fix_raises_the_inotify_limits(cores: Cores, what: str) -> None:
    found = driven(
        cores.core0,
        f"sysctl -qw user.max_inotify_{what}=1",
        "inotify-limits",
        f"user.max_inotify_{what}",
        around=["unshare", "--user", "--map-root-user"],
    )
    assert levels(found) == ["fail", "ok"]
    assert " of 1; a proxy needs " in found[0]["found"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("instances", "cannot watch it: raise fs.inotify.max_user_instances or ulimit -n"),
        (
            "watches",
            "cannot watch it: the limit of inotify watches is reached: raise fs.inotify.max_user_watches",
        ),
    ],
)
def test_reached_inotify_limits_are_a_fault_of_the_directory(
    cores: Cores, tmp_path: Path, setting: str, reason: str
) -> None:
    (result,) = driven(
        cores.core0,
        f"sysctl -qw user.max_inotify_{setting}=0",
        "filesystem",
        tmp_path,
        *("--irq-dir", tmp_path),
        around=["unshare", "--user", "--map-root-user"],
    )
    assert result["level"] == "fail"
    assert result["found"].endswith(f"; {reason}")


def test_the_fix_lengthens_the_queue_of_unix_sockets(cores: Cores, tmp_path: Path) -> None:
    setting, link = "net.unix.max_dgram_qlen", f"unix:{tmp_path}/a,peer={tmp_path}/b"
    found = driven(cores.core0, f"sysctl -qw {setting}=3", "unix-queue", setting, link)
    assert levels(found) == ["warn", "ok"]


def wait_running(cores: Cores) -> None:
    """Wait until core 0's interface is up and has a carrier, which the kernel reports asynchronously."""

    def wait() -> None:
        rtnetlink = Rtnetlink()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as changes:
            changes.bind((0, RTMGRP_LINK))
            while not ((found := rtnetlink.interface(cores.link)) and found.running):
                assert select.select([changes], [], [], HANG)[0], "the link did not come up"
                changes.recv(65536)
        rtnetlink.close()

    cores.core0.run(wait)


def test_a_working_interface_is_ok(cores: Cores) -> None:
    found = doctor(cores.core0, cores.link)
    for check, text in (
        ("capability", f"this user (uid {os.geteuid()}) has CAP_NET_RAW"),
        ("state", "the interface is up and has a carrier"),
        ("mtu", "MTU 1500 is large enough"),
        ("master", "no bridge, bond or other master device takes its frames"),
    ):
        result = of(found, check)
        assert (result["level"], result["subject"]) == ("ok", cores.link)
        assert result["found"].startswith(text)


def test_the_fix_brings_the_interface_up(cores: Cores) -> None:
    cores.link_down()
    result = of(doctor(cores.core0, cores.link), "state")
    assert (result["level"], result["found"]) == ("fail", "the interface is down")
    fix(cores.core0, result)
    wait_running(cores)
    assert of(doctor(cores.core0, cores.link), "state")["level"] == "ok"


def test_an_interface_without_carrier_is_a_fault(cores: Cores) -> None:
    command = ["ip", "link", "set", "dev", cores.link, "down"]
    cores.core1.run(lambda: subprocess.run(command, check=True))
    result = of(doctor(cores.core0, cores.link), "state")
    assert (result["level"], result["fix"]) == ("fail", None)
    assert result["found"].startswith("the interface is up without a carrier: bring the peer up")


def test_a_dormant_interface_is_a_fault_and_the_fix_brings_it_up(cores: Cores) -> None:
    cores.link_down()
    commands = (["ip", "link", "set", "dev", cores.link, *words] for words in (["mode", "dormant"], ["up"]))
    cores.core0.run(lambda: [subprocess.run(command, check=True) for command in commands])
    result = of(doctor(cores.core0, cores.link), "state")
    assert result["level"] == "fail"
    assert result["found"].startswith("the interface is up and has a carrier, but is not RUNNING")
    assert "operational state is DORMANT (expected UP)" in result["found"]
    fix(cores.core0, result)
    wait_running(cores)
    assert of(doctor(cores.core0, cores.link), "state")["level"] == "ok"


def test_a_missing_interface_is_a_fault(cores: Cores) -> None:
    cores.delete_link()
    result = of(doctor(cores.core0, cores.link), "interface")
    assert result["level"] == "fail"
    assert result["found"].startswith("no such interface (available: lo")


def test_a_bridge_port_is_a_fault(cores: Cores) -> None:
    setup = f"ip link add br0 type bridge; ip link set dev br0 up; ip link set dev {cores.link} master br0"
    cores.core0.run(lambda: subprocess.run(["sh", "-ec", setup], check=True))
    result = of(doctor(cores.core0, cores.link), "master")
    assert (result["level"], result["fix"]) == ("fail", "inco-trio run br0")
    assert of(doctor(cores.core0, "br0"), "master")["level"] == "ok"


def test_the_fix_pins_receive_queues_to_one_cpu(cores: Cores) -> None:
    sysfs = "mount -t sysfs sysfs /sys"
    if not ROOT:
        # The kernel refuses writes to rps_cpus from a user namespace.
        around = [*IN_MOUNTS, "sh", "-c", f'{sysfs} && exec "$@"', "sh"]
        assert of(doctor(cores.core0, cores.link, around=around), "order")["level"] == "warn"
        return
    # The first fix mounts /sys; the second pins the queues to a CPU.
    found = driven(cores.core0, "true", "order", cores.link, cores.link, around=IN_MOUNTS)
    assert levels(found) == ["warn", "warn", "ok"]
    assert found[0]["fix"] == sysfs
    assert found[1]["found"].startswith("rps_cpus is 0: ")
    every = f"{sysfs}; echo 3 > /sys/class/net/{cores.link}/queues/rx-0/rps_cpus"
    assert levels(driven(cores.core0, every, "order", cores.link, cores.link, around=IN_MOUNTS)) == ["ok"]


def test_a_missing_network_namespace_is_a_fault(cores: Cores, tmp_path: Path) -> None:
    board = {"link": "l0", "irq_dir": str(tmp_path / "irq"), "netns": str(tmp_path / "none")}
    (tmp_path / "b1.json").write_text(json.dumps(board))
    result = of(doctor(cores.core0, "--boards", tmp_path), "netns")
    assert result["level"] == "fail"
    assert result["found"].startswith(f"there is no network namespace {tmp_path}/none (create it")


def test_a_board_in_another_network_namespace_is_checked(cores: Cores, tmp_path: Path) -> None:
    place = f"/proc/{os.getpid()}/fd/{cores.core0.fd}"
    board = {"link": cores.link, "irq_dir": str(tmp_path / "irq"), "netns": place}
    (tmp_path / "b1.json").write_text(json.dumps(board))
    assert of(doctor(cores.core1, "--boards", tmp_path), "state")["level"] == "ok"
    cores.link_down()
    assert of(doctor(cores.core1, "--boards", tmp_path), "state")["found"] == "the interface is down"


def test_boards_with_the_same_interface_name_are_distinguished(cores: Cores, tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    for name, core in (("b1", cores.core0), ("b2", cores.core1)):
        place = f"/proc/{os.getpid()}/fd/{core.fd}"
        board = {"link": cores.link, "irq_dir": str(tmp_path / name), "netns": place}
        (boards / f"{name}.json").write_text(json.dumps(board))
    proxy = Proxy(None, ("--boards", boards, "--control", tmp_path / "c.sock"), {}, tmp_path / "log")
    try:
        assert proxy.wait_ready()
        found = doctor(cores.core0, "--boards", boards)
        reload = {each["subject"]: each["level"] for each in found if each["check"] == "reload"}
        assert reload == {f"{boards}/b1.json": "ok", f"{boards}/b2.json": "ok"}
        assert [each["subject"] for each in found if each["check"] == "counters"] == ["b1", "b2"]
        # Without --boards, the doctor examines the link in its own namespace.
        for name, core in (("b1", cores.core0), ("b2", cores.core1)):
            assert of(doctor(core, cores.link), "counters")["subject"] == name
    finally:
        proxy.close()


def test_the_fix_gives_missing_permissions(cores: Cores, irq_dir: Path, nobody: list[str]) -> None:
    irq_dir.mkdir()
    around = [*nobody[:2], str(irq_dir), *nobody[2:]]
    for name, mode in (("message_6_trig", 0o200), ("message_4_state", 0o400), ("", 0o500)):
        path = irq_dir / name
        path.touch()
        path.chmod(mode)
        check = "registers" if name else "directory"
        before = of(doctor(cores.core0, "--irq-dir", irq_dir, around=around), check)
        assert (before["level"], before["subject"]) == ("fail", str(path))
        fix(cores.core0, before)
        path.chmod(path.stat().st_mode | 0o700)
        assert of(doctor(cores.core0, "--irq-dir", irq_dir, around=around), check)["level"] == "ok"


def test_the_fix_makes_a_read_only_directory_writable(cores: Cores, tmp_path: Path) -> None:
    irq = tmp_path / "an\u2028\x1c irq"
    irq.mkdir()
    setup = f"""
        mount -t tmpfs none '{irq}'; mkdir '{irq}/x'; touch '{irq}/x/message_4_state'; mount -o remount,ro '{irq}'
    """
    found = driven(cores.core0, setup, "directory", irq / "x", "--irq-dir", irq / "x", around=IN_MOUNTS)
    assert levels(found) == ["fail", "ok"]
    assert found[0]["found"] == "is on a read-only filesystem: no state file can be written"
    assert found[0]["fix"] == f"mount -o remount,rw '{irq}'"


@pytest.mark.parametrize(
    ("size", "fill", "what", "text"),
    [
        (
            "size=24k",
            """
                mkdir x sub; mount -t tmpfs none sub; head -c 5M /dev/zero > sub/y
                echo > message_4_state; echo > small; head -c 1M /dev/zero > 'x/the trace' || true
            """,
            "space",
            "write; the largest files found: {0}/x/the trace (16 KiB), {0}/small (4 KiB)",
        ),
        (
            "nr_inodes=5",
            "mkdir x; touch x/1 x/2 x/3",
            "inodes",
            "create files; the directories with the most entries: {0}/x (3), {0} (1)",
        ),
    ],
    ids=["space", "inodes"],
)
def test_a_full_filesystem_is_a_warning(
    cores: Cores, irq_dir: Path, size: str, fill: str, what: str, text: str
) -> None:
    irq = irq_dir / "an irq"
    irq.mkdir(parents=True)
    setup = f"mount -t tmpfs -o {size} none '{irq}'; cd '{irq}'; {fill}"
    (found,) = driven(cores.core0, setup, "space", irq, "--irq-dir", irq, around=IN_MOUNTS)
    assert found["level"] == "warn"
    expected = f"the filesystem {irq} has no free {what}, so the proxy may be unable to {text.format(irq)}"
    assert found["found"] == f"{expected}: remove or move what is not needed"


@pytest.fixture
def cores() -> Iterator[Cores]:
    """Create two cores with a link that no other test uses.

    Doctor attributes a service to a link of the same name if it cannot read which link the service uses.
    """
    with two_cores(f"rpmsg{os.getpid()}") as made:
        yield made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a filesystem with room for a few files."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "inco-trio-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_filesystem_that_prevents_writes_is_a_fault(
    cores: Cores, core1: Peer, proxy: StartProxy, small: Path
) -> None:
    running = proxy("--irq-dir", small / "irq")
    trace = small / "trace.bin"
    with pytest.raises(OSError, match="No space left"):
        trace.write_bytes(bytes(1 << 20))
    core1.send(b"ihub_hwwd_irq")
    running.wait_log("No space left on device")
    found = doctor(cores.core0, cores.link)
    # The checks of the whole machine may find what other tests do at the same time.
    problems = [each for each in found if each["level"] == "fail" and each["check"] in ("space", "signal")]
    assert [each["check"] for each in problems] == ["space", "signal"]
    text = f"the filesystem {small} has no free space, so the proxy cannot write; the largest files found: {trace} ("
    assert problems[0]["found"].startswith(text)
    said = subprocess.check_output(["sh", "-ec", problems[0]["fix"]], text=True)
    assert str(trace) in said
    trace.unlink()
    running.wait_log("works again")
    assert all(each["check"] != "space" for each in doctor(cores.core0, cores.link))


def test_registers_on_proc_are_a_fault(cores: Cores) -> None:
    result = of(doctor(cores.core0, "--irq-dir", "/proc/irq/x"), "filesystem")
    assert (result["level"], result["fix"]) == ("fail", None)
    assert "is on a filesystem of type proc: inotify reports no events on it" in result["found"]


def test_an_interface_needs_exactly_one_proxy(cores: Cores, proxy: StartProxy, tmp_path: Path) -> None:
    result = of(doctor(cores.core0, cores.link, "--irq-dir", tmp_path / "one"), "proxy")
    assert (result["level"], result["fix"]) == ("warn", f"inco-trio run {cores.link} --irq-dir {tmp_path}/one")
    one = proxy("--irq-dir", tmp_path / "one")
    found = doctor(cores.core0, cores.link)
    result = of(found, "proxy", cores.link)
    assert result["level"] == "ok"
    assert result["found"].startswith(f"only process {one.pid} (python")
    assert of(found, "descriptors")["level"] == "warn"
    # The second proxy does not have the usual control socket.
    two = proxy("--irq-dir", tmp_path / "two")
    result = of(doctor(cores.core0, cores.link), "proxy", cores.link)
    assert (result["level"], result["fix"]) == ("fail", f"kill {two.pid}")
    fix(cores.core0, result)
    assert two.wait() == 0
    assert of(doctor(cores.core0, cores.link), "proxy", cores.link)["level"] == "ok"


def test_a_proxy_of_another_user_needs_root_to_inspect(
    cores: Cores, proxy: StartProxy, irq_dir: Path, nobody: list[str]
) -> None:
    running = proxy("--irq-dir", irq_dir)
    if os.geteuid() == 0:
        result = of(doctor(cores.core0, cores.link, around=nobody), "permission")
        assert result["level"] == "warn"
        assert re.fullmatch(f"sudo /.*inco-trio doctor {cores.link}", result["fix"])
        assert f"which process has a socket of {cores.link}" in result["found"]
    found = doctor(cores.core0, cores.link)
    assert of(found, "proxy", cores.link)["found"].startswith(f"only process {running.pid} ")


def test_the_fix_ends_the_second_proxy_of_a_directory(
    cores: Cores, proxy: StartProxy, irq_dir: Path, tmp_path: Path
) -> None:
    one = proxy("--irq-dir", irq_dir)
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    two = Proxy(cores.core0, [link, "--irq-dir", str(irq_dir)], {}, tmp_path / "two.log")
    try:
        two.wait_ready()
        found = [result for result in doctor(cores.core0, link, "--irq-dir", irq_dir) if result["check"] == "proxy"]
        assert [(result["subject"], result["level"]) for result in found] == [(str(irq_dir), "fail"), (link, "ok")]
        assert found[0]["found"].startswith("2 proxies: ")
        assert found[0]["fix"] == f"kill {one.pid}"
        fix(cores.core0, found[0])
        assert one.wait() == 0
        result = of(doctor(cores.core0, "--irq-dir", irq_dir), "proxy")
        assert result["level"] == "ok"
        assert result["found"].startswith(f"only process {two.pid} ")
    finally:
        two.close()


def test_the_fix_reloads_a_changed_configuration(cores: Cores, proxy: StartProxy, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "one")
    running = proxy("--config", udrv)
    # The file seems to be newer than the proxy, as it would after the clock was set back.
    os.utime(udrv, (1 << 32, 1 << 32))
    found = doctor(cores.core0, cores.link, "--config", udrv)
    assert of(found, "reload")["level"] == "ok"
    assert of(found, "watched")["level"] == "ok"
    write_udrv(udrv, tmp_path / "two")
    os.utime(udrv, (1, 1))
    (tmp_path / "two").mkdir()
    for name in ("message_0_trig", "message_1_trig", "message_6_trig"):
        (tmp_path / "two" / name).touch()
    found = doctor(cores.core0, cores.link, "--config", udrv)
    reload = of(found, "reload")
    assert reload["level"] == "warn"
    missed = [result for result in found if result["check"] == "watched"]
    assert levels(missed) == ["fail"] * 3
    assert {result["fix"] for result in [reload, *missed]} == {f"kill -HUP {running.pid}"}
    fix(cores.core0, reload)
    running.wait_log("reloaded: 6 signals")
    found = doctor(cores.core0, cores.link, "--config", udrv)
    assert of(found, "watched")["level"] == "ok"
    assert of(found, "reload")["level"] == "ok"


@pytest.mark.s6
def test_the_fd_store_of_s6_is_found(cores: Cores, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    write_scandir(tmp_path / "scan", cores.link, udrv)
    with Service(cores.core0, tmp_path / "scan", cores.link) as service:
        service.wait("U")
        found = doctor(cores.core0, cores.link, "--config", udrv)
        result = of(found, "descriptors")
        assert result["level"] == "ok"
        assert "(s6-fdholder" in result["found"]
        for result in found:
            if result["check"] == "proxy":
                assert result["level"] == "ok"
                assert result["found"].startswith(f"only process {main_process(service.directory)} ")
        # While the proxy is down, only the fd store holds the socket of the link.
        service.control("-d")
        service.wait("D")
        found = doctor(cores.core0, cores.link, "--config", udrv)
        result = of(found, "proxy")
        assert result["level"] == "fail"
        assert result["found"].startswith("no proxy serves this link; ")
        assert "(s6-fdholder" in result["found"]
        result = of(found, "service")
        assert (result["subject"], result["fix"]) == (str(service.directory), f"s6-svc -u {service.directory}")
        # The doctor recommends stopping the unsupervised proxy, because s6 would restart the other proxy.
        service.control("-u")
        service.wait("U")
        stray = Proxy(cores.core0, [cores.link, "--irq-dir", str(tmp_path / "two")], {}, tmp_path / "stray.log")
        try:
            stray.wait_ready()
            result = of(doctor(cores.core0, cores.link), "proxy", cores.link)
            assert (result["level"], result["fix"]) == ("fail", f"kill {stray.pid}")
            assert f"in s6 service {service.directory}" in result["found"]
            assert f"{stray.pid} (python) without a supervisor" in result["found"]
        finally:
            stray.close()
        # The fix for a supervised proxy stops its service, so that s6 does not restart it.
        (own,) = [each for each in look().all if each.pid == main_process(service.directory)]
        assert own.stop == f"s6-svc -d {service.directory}"
        subprocess.run(["sh", "-ec", own.stop], check=True, timeout=HANG)
        service.wait("D")


@pytest.mark.s6
def test_the_fixes_replace_a_proxy_without_a_supervisor_by_the_service(cores: Cores, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    write_scandir(tmp_path / "scan", cores.link, udrv)
    with Service(cores.core0, tmp_path / "scan", cores.link) as service:
        service.wait("U")
        service.control("-d")
        service.wait("D")
        stray = Proxy(cores.core0, [cores.link, "--config", str(udrv)], {}, tmp_path / "stray.log")
        try:
            stray.wait_ready()
            found = doctor(cores.core0, cores.link)
            result = of(found, "service")
            assert (result["level"], result["fix"]) == ("warn", f"kill {stray.pid}")
            assert f"then run `s6-svc -u {service.directory}`; the service delivers again what" in result["found"]
            assert f"process {stray.pid} (python) without a supervisor serves its link" in result["found"]
            result = of(found, "proxy", cores.link)
            assert f"only process {stray.pid} (python) without a supervisor serves" in result["found"]
            # The fd store keeps only the socket of the service.
            result = of(found, "descriptors")
            assert (result["level"], result["fix"]) == ("warn", None)
            subprocess.run(["sh", "-ec", f"kill {stray.pid}"], check=True)
            stray.process.wait(HANG)
        finally:
            stray.close()
        result = of(doctor(cores.core0, cores.link), "service")
        assert (result["level"], result["fix"]) == ("fail", f"s6-svc -u {service.directory}")
        service.control("-u")
        service.wait("U")
        found = doctor(cores.core0, cores.link)
        assert [each["check"] for each in found if each["check"] == "service"] == []
        assert of(found, "descriptors")["level"] == "ok"


@pytest.mark.s6
def test_the_fixes_remove_a_second_service_of_a_link(cores: Cores, tmp_path: Path) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    with ExitStack() as stack:
        both = []
        for name in ("one", "two"):
            write_scandir(tmp_path / name, cores.link, udrv)
            both.append(stack.enter_context(Service(cores.core0, tmp_path / name, cores.link)))
            both[-1].wait("U")
            # Wait until the search for other proxies has ended. Otherwise, the first proxy could report itself to the
            # second one.
            restrictions(main_process(both[-1].directory))
        one, two = both
        # The proxy with the usual control socket stays.
        result = of(doctor(cores.core0, cores.link), "proxy", cores.link)
        assert (result["level"], result["fix"]) == ("fail", f"s6-svc -d {two.directory}")
        assert "after this command, `inco-trio doctor` prints how to remove the stopped service" in result["found"]
        # The log of the second proxy names the same command.
        assert f"run: s6-svc -d {two.directory}" in two.wait_log("also serves this link")
        two.control("-d")
        two.wait("D")
        result = of(doctor(cores.core0, cores.link), "service")
        fix = f"rm -r {two.directory} && s6-svscanctl -an {two.scandir}"
        assert (result["level"], result["fix"]) == ("warn", fix)
        assert f"in s6 service {one.directory} serves its link" in result["found"]
        (supervisor,) = (
            each.pid
            for each in look().all
            if each.name == "s6-supervise" and working_directory(each.pid) == two.directory
        )
        ended = os.pidfd_open(supervisor)
        subprocess.run(["sh", "-ec", fix], check=True, timeout=HANG)
        assert select.select([ended], [], [], HANG)[0] == [ended]
        os.close(ended)
        found = doctor(cores.core0, cores.link)
        assert [each["check"] for each in found if each["check"] == "service"] == []
        assert of(found, "proxy", cores.link)["level"] == "ok"


@pytest.mark.s6
@pytest.mark.parametrize("stop", ["service", "stray"])
def test_a_stopped_proxy_continues_once_the_second_one_has_ended(cores: Cores, tmp_path: Path, stop: str) -> None:
    udrv = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    write_scandir(tmp_path / "scan", cores.link, udrv)
    with Service(cores.core0, tmp_path / "scan", cores.link) as service:
        service.wait("U")
        own = main_process(service.directory)
        stray = Proxy(cores.core0, [cores.link, "--config", str(udrv)], {}, tmp_path / "stray.log")
        try:
            stray.wait_ready()
            # The service has received the report of the other proxy, or it has found this proxy itself.
            assert f"process {stray.pid} " in service.wait_log("also watches its triggers")
            chosen = own if stop == "service" else stray.pid
            wait_stopped(chosen)
            found = doctor(cores.core0, cores.link)
            fixes = list(dict.fromkeys(each["fix"] for each in found if each["check"] in ("proxy", "control")))
            # A stopped process handles only SIGKILL, and need not continue before.
            expected = [f"kill {stray.pid}", f"kill -CONT {own}"]
            expected = expected if stop == "service" else [f"kill -KILL {stray.pid}"]
            assert [each for each in fixes if each is not None] == expected
            for command in expected:
                subprocess.run(["sh", "-ec", command], check=True)
                stray.process.wait(HANG)
            result = of(doctor(cores.core0, cores.link), "proxy", cores.link)
            assert (result["level"], main_process(service.directory)) == ("ok", own)
            service.wait_log(f"process {stray.pid} ended ")
        finally:
            os.kill(own, signal.SIGCONT)
            stray.close()


@pytest.mark.s6
def test_a_service_without_its_control_socket_is_restarted_after_the_second_proxy(cores: Cores, tmp_path: Path) -> None:
    udrv, control = write_udrv(tmp_path / "u.json", tmp_path / "irq"), tmp_path / "control"
    stray = Proxy(
        cores.core0, [cores.link, "--config", str(udrv), "--control", str(control)], {}, tmp_path / "stray.log"
    )
    with closing(stray):
        stray.wait_ready()
        write_scandir(tmp_path / "scan", cores.link, udrv)
        run = tmp_path / f"scan/inco-trio-{cores.link}/run"
        run.write_text(run.read_text().replace(" --notification-fd ", f" --control {control} --notification-fd "))
        with Service(cores.core0, tmp_path / "scan", cores.link) as service:
            service.wait("U")
            found = doctor(cores.core0, cores.link)
            fixes = [each["fix"] for each in found if each["check"] in ("proxy", "control") and each["fix"]]
            assert list(dict.fromkeys(fixes)) == [f"kill {stray.pid}", f"s6-svc -r {service.directory}"]
            subprocess.run(["sh", "-ec", fixes[0]], check=True)
            stray.process.wait(HANG)
            before = main_process(service.directory)
            subprocess.run(["sh", "-ec", fixes[-1]], check=True)
            wait_path(
                service.directory / "supervise/status", lambda: main_process(service.directory) not in (0, before)
            )
            service.wait("U")
            assert [each for each in doctor(cores.core0, cores.link) if each["check"] == "control"] == []


FORMS = """
import json, subprocess, sys
from tests.support_doctor import DOCTOR
link, file, wanted = sys.argv[1:]
shown = {}
for words in ((), (link,), ("--config", file)):
    done = subprocess.run([*DOCTOR, *words, "--json"], stdout=subprocess.PIPE)
    found = [each for each in json.loads(done.stdout)["results"] if each["level"] != "ok"]
    shown[" ".join(words)] = sorted(found, key=str)
first, *others = shown.values()
assert all(each == first for each in others), shown
(fix,) = {each["fix"] for each in first if each["fix"] and wanted in each["fix"]}
subprocess.run(["sh", "-ec", fix], check=True, stdout=subprocess.DEVNULL)
"""
"""A program that runs the doctor in each form, compares the results, and runs the command that contains a text."""


def test_with_a_link_the_files_of_other_boards_are_not_examined(cores: Cores, tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    for name in ("b1", "b2"):
        # An IRQ directory can be in the directory of the boards.
        board = {"link": unix_link(tmp_path, name), "irq_dir": str(boards / name)}
        (boards / f"{name}.json").write_text(json.dumps(board))
    with closing(Proxy(cores.core0, ["--boards", str(boards)], {}, tmp_path / "proxy.log")) as running:
        running.wait_ready()
        (boards / "b2.json").write_text("nonsense")
        changed = boards / "b1.json"
        changed.write_text(changed.read_text().replace("/b1.0", "/changed.0"))
        found = doctor(cores.core0, unix_link(tmp_path, "b1"))
        files = [each for each in found if each["check"] in ("reload", "configuration")]
        assert [(each["subject"], each["fix"]) for each in files] == [(str(changed), f"kill -HUP {running.pid}")]
        assert {each["subject"] for each in found if each["check"] == "counters"} == {"b1"}
        assert {each["subject"] for each in found if each["check"] == "directory"} == {str(boards / "b1")}


def logged(text: str) -> str:
    """Return a command that waits for a text in the log. Before that, the doctor finds less."""
    return f"until grep -q '{text}' {{log}}; do :; done"


REPLACED = "until mkdir {irq}/message_4_state 2>&1; do rm -f {irq}/message_4_state; done"
"""A command that replaces a register by a directory. The proxy may create the file again meanwhile."""


FAULTS = [
    (REPLACED, "rmdir {irq}/message_4_state"),
    ("sed -i s/ihub_hwwd_irq/other_irq/ {udrv}", "kill -HUP "),
    (
        (
            "pid=$(pgrep -f -- '[r]un_child.*run {link}'); kill -STOP $pid; trap \"kill -CONT $pid\" EXIT; "
            "until grep -q '^State:.T' /proc/$pid/status; do :; done"
        ),
        "kill -CONT ",
    ),
    (f"ip link set dev {{link}} down; {logged('the link went down')}", "ip link set dev {link} up"),
]
MORE_FAULTS = [
    (f"{REPLACED}; touch {{irq}}/message_4_state/x", "mv {irq}/message_4_state {irq}/message_4_state.old1"),
    (f"{REPLACED}; mount -t tmpfs x {{irq}}/message_4_state", "umount {irq}/message_4_state"),
    (
        "until mkfifo {irq}/message_6_trig 2>&1; do rm -f {irq}/message_6_trig; done; "
        + logged("cannot watch: not a regular file"),
        "rm {irq}/message_6_trig",
    ),
    (f"chown 12345 {{irq}}; {logged('not trusted')}", "chown 0 {irq}"),
]


@pytest.mark.parametrize(
    ("setup", "wanted"), [*FAULTS, *(pytest.param(*fault, marks=pytest.mark.thorough) for fault in MORE_FAULTS)]
)
def test_each_form_of_the_command_prints_the_same(cores: Cores, tmp_path: Path, setup: str, wanted: str) -> None:
    tmp_path.chmod(0o755)
    names = {"irq": tmp_path / "irq", "udrv": write_udrv(tmp_path / "u.json", tmp_path / "irq"), "link": cores.link}
    names["log"] = tmp_path / "0.log"
    forms = [sys.executable, "-c", FORMS, cores.link, names["udrv"], wanted.format_map(names)]
    setup = f"{setup.format_map(names)}; {shlex.join(map(str, forms))}"
    survey(cores.core0, tmp_path, (cores.link, "--config", names["udrv"]), setup=setup)


@pytest.mark.parametrize(
    ("change", "check", "fix"),
    [
        ("install -d -o 12345 -g 12345 {irq}.new; mv {irq} {irq}.old; mv {irq}.new {irq}", "trusted", "chown 0 {irq}"),
        ("install -m 600 -o 12345 /dev/null {irq}.new; mv {irq}.new {trigger}", "registers", "chmod a+r {trigger}"),
    ],
)
def test_the_fix_gives_a_proxy_its_files_back(
    cores: Cores, tmp_path: Path, irq_dir: Path, change: str, check: str, fix: str
) -> None:
    """A reload would not help.

    `mv` replaces the directory or the file at once. The proxy must not open it before its owner changes.
    """
    names = {"irq": str(irq_dir), "trigger": f"{irq_dir}/message_6_trig"}
    lost = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}"]
    running = Proxy(cores.core0, [cores.link, "--irq-dir", str(irq_dir)], {}, tmp_path / "proxy.log", prefix)
    with closing(running):
        running.wait_ready()
        subprocess.run(["sh", "-ec", change.format_map(names)], check=True)
        running.wait_log("not trusted" if check == "trusted" else "cannot watch: Permission denied")
        words = [cores.link, "--irq-dir", irq_dir]
        found = [each for each in doctor(cores.core0, *words) if each["fix"] is not None]
        chosen = [each["fix"] for each in found if each["check"] == check]
        assert chosen == [fix.format_map(names)]
        assert [each["fix"] for each in found if "-HUP" in each["fix"]] == []
        subprocess.run(["sh", "-ec", chosen[0]], check=True)
        running.wait_log("works again")
        wait_path(Path(names["trigger"]))  # The proxy watches a trigger before it becomes visible.
        found = [each for each in doctor(cores.core0, *words) if each["check"] in ("trusted", "registers", "watched")]
        assert [each for each in found if each["level"] != "ok"] == []


SURVEYED = """
import json, subprocess, sys
from contextlib import ExitStack, closing
from pathlib import Path
from inco_trio.service.launch import Launched
from netns.hang import HANG
from tests.support_doctor import DOCTOR
home, proxies, setup = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "inco-trio-test", "/run/inco-trio"], check=True)
with ExitStack() as stack:
    for number, words in enumerate(proxies):
        running = Launched("run", *words, log=home / f"{number}.log")
        stack.callback(running.close)
        assert running.wait_ready(HANG), running.log
    subprocess.run(["sh", "-ec", setup], check=True, stdout=subprocess.DEVNULL)
    sys.exit(subprocess.run([*DOCTOR, "--json"]).returncode)
"""
"""A program that starts proxies, runs a set-up command and then the doctor without arguments."""


def survey(core: Namespace, home: Path, *proxies: Sequence[object], setup: str = "") -> tuple[int, list[Found]]:
    """Run SURVEYED in a PID namespace, in which no other proxies exist. Return the exit code and the results."""
    given = json.dumps([list(map(str, words)) for words in proxies])
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", sys.executable, "-c", SURVEYED]
    command += [str(home), given, setup]
    done = core.run(lambda: subprocess.run(command, check=False, timeout=HANG, stdout=subprocess.PIPE))
    return done.returncode, json.loads(done.stdout)["results"]


def unix_link(home: Path, name: str) -> str:
    return f"unix:{home}/{name}.0,peer={home}/{name}.1"


def test_without_arguments_a_missing_proxy_is_a_problem(cores: Cores, tmp_path: Path) -> None:
    code, found = survey(cores.core0, tmp_path)
    assert (code, found[0]["level"], found[0]["check"]) == (1, "fail", "proxy")
    assert found[0]["found"].startswith("no proxy is running: start one with `inco-trio run LINK --config FILE`")


def test_without_arguments_all_proxies_and_boards_are_examined(cores: Cores, tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    link, one, two = cores.link, unix_link(tmp_path, "one"), unix_link(tmp_path, "two")
    for name in ("b1", "b2"):
        board = {"link": unix_link(tmp_path, name), "irq_dir": str(tmp_path / name)}
        (boards / f"{name}.json").write_text(json.dumps(board))
    _, found = survey(
        cores.core0,
        tmp_path,
        (link, "--irq-dir", tmp_path / "irq"),
        (one, "--irq-dir", tmp_path / "one"),
        # The second proxy of the directory has no control socket.
        (two, "--irq-dir", tmp_path / "one", "--control", "none"),
        # This control socket is not in one of the usual directories.
        ("--boards", boards, "--control", tmp_path / "c.sock"),
    )
    served = {each["subject"] for each in found if each["check"] == "proxy" and each["level"] == "ok"}
    places = {unix_link(tmp_path, name) for name in ("b1", "b2", "one", "two")}
    assert served == {link, *places, *(f"{tmp_path}/{name}" for name in ("irq", "b1", "b2"))}
    (double,) = [each for each in found if each["check"] == "proxy" and each["level"] == "fail"]
    assert double["subject"] == f"{tmp_path}/one"
    assert double["found"].startswith("2 proxies: ")
    # The command of this result ends the process that does not answer, so no other result names it.
    assert re.fullmatch("kill [0-9]+", double["fix"])
    assert [each for each in found if each["check"] == "control"] == []
    assert {each["subject"] for each in found if each["check"] == "counters"} == {link, f"{tmp_path}/one.0", "b1", "b2"}
    # The doctor finds the boards' files through the proxy's command line.
    assert {each["subject"] for each in found if each["check"] == "reload"} == {
        f"{boards}/b1.json",
        f"{boards}/b2.json",
    }
    assert [level for level, _ in groupby(levels(found))] == ["fail", "warn", "ok"]


def killing(directory: Path) -> str:
    """Return a command that kills the proxy of a directory."""
    program = "import os; from inco_trio.linux.processes import look; "
    program += f"[os.kill(each.pid, 9) for each in look().all if each.is_proxy and '{directory}' in each.command]"
    return f'{sys.executable} -c "{program}"'


def test_without_arguments_a_killed_proxy_is_a_warning(cores: Cores, tmp_path: Path) -> None:
    proxies = [(unix_link(tmp_path, name), "--irq-dir", tmp_path / name) for name in ("one", "two")]
    _, found = survey(cores.core0, tmp_path, *proxies, setup=killing(tmp_path / "two"))
    killed = of(found, "control")
    assert (killed["level"], killed["fix"]) == ("warn", None)
    assert killed["found"].startswith("the proxy of this socket was killed or has crashed, and no other proxy has")


@pytest.mark.parametrize("control", ["none", "second"])
def test_the_socket_of_a_killed_second_proxy_is_removed(cores: Cores, tmp_path: Path, control: str) -> None:
    """The other proxy may not answer, for example because it has no control socket."""
    second = ("--control", "none" if control == "none" else tmp_path / control)
    proxies = [(cores.link, "--irq-dir", tmp_path / "one"), (cores.link, "--irq-dir", tmp_path / "two", *second)]
    _, found = survey(cores.core0, tmp_path, *proxies, setup=killing(tmp_path / "one"))
    path = f"/run/inco-trio/{cores.link}.sock"
    (stale,) = (each for each in found if each["subject"] == path)
    assert (stale["level"], stale["fix"]) == ("warn", f"rm {path}")
    assert re.fullmatch("the proxy of this socket was .*, but process [0-9]+ serves its link", stale["found"])


def test_without_arguments_each_changed_configuration_is_found(cores: Cores, tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    for name in ("b1", "b2", "b3"):
        board = {"link": unix_link(tmp_path, name), "irq_dir": str(tmp_path / name)}
        (boards / f"{name}.json").write_text(json.dumps(board))
    udrv, same = (write_udrv(tmp_path / f"{name}.json", tmp_path / name) for name in ("u", "same"))
    setup = f"""
        sed -i s,/b1,/elsewhere, {boards}/b1.json
        echo nonsense > {boards}/b2.json
        mv {boards}/b3.json {boards}/b4.json
        echo nonsense > {udrv}
        touch -d 2100-01-01 {same}
    """
    _, found = survey(
        cores.core0,
        tmp_path,
        ("--boards", boards),
        (unix_link(tmp_path, "one"), "--config", udrv),
        (unix_link(tmp_path, "two"), "--config", same),
        setup=setup,
    )
    reload = {each["subject"]: each["level"] for each in found if each["check"] == "reload"}
    assert reload == {
        **dict.fromkeys((f"{boards}/{name}.json" for name in ("b1", "b3", "b4")), "warn"),
        str(same): "ok",
    }
    wrong = {each["subject"]: each["level"] for each in found if each["check"] == "configuration"}
    assert wrong == {f"{boards}/b2.json": "fail", str(udrv): "fail"}


def test_no_program_of_a_container_is_suggested(cores: Cores, tmp_path: Path) -> None:
    """nsenter(1) would run another user's program as root, because that user can mount the program over `inco-trio`."""
    ways = {"service": "--mount", "container": "--mount --user --map-root-user"}
    program = "import pathlib, signal, sys; pathlib.Path(sys.argv[-1]).touch(); signal.pause()"
    setup = ""
    for name, options in ways.items():
        words = f"inco-trio run {unix_link(tmp_path, name)} {tmp_path}/ready.{name}"
        setup += f"unshare {options} {sys.executable} -c '{program}' {words} &\n"
    setup += f"until [ -e {tmp_path}/ready.service -a -e {tmp_path}/ready.container ]; do :; done"
    _, found = survey(cores.core0, tmp_path, setup=setup)
    fixes = {each["subject"]: each["fix"] for each in found if each["check"] == "registers" and each["level"] == "warn"}
    suggested = {name: str(fixes[unix_link(tmp_path, name)]).partition(" --target")[0] for name in ways}
    assert suggested == {"service": "nsenter", "container": "None"}


def test_a_container_is_known_by_its_root_directory(tmp_path: Path) -> None:
    """Even a container that runs as root without a user namespace contains different programs."""
    (process,) = [each for each in look().all if each.pid == os.getpid()]
    root = tmp_path / "root"
    place = root / f"proc/{process.pid}"
    for namespaces in (place / "ns", root / "proc/self/ns"):
        namespaces.mkdir(parents=True)
        for name in ("mnt", "user"):
            (namespaces / name).symlink_to(f"/proc/self/ns/{name}")
    assert not is_same_system(process, root)
    (place / "root").symlink_to(root)
    assert is_same_system(process, root)
    (place / "root").unlink()
    (place / "root").symlink_to(tmp_path)
    assert not is_same_system(process, root)


def test_the_counters_and_problems_of_a_proxy_are_reported(cores: Cores, tmp_path: Path) -> None:
    link, irq = unix_link(tmp_path, "l"), tmp_path / "irq"
    send = f"{sys.executable} -m inco_trio send"
    as_core1 = f"unix:{tmp_path}/l.1,peer={tmp_path}/l.0 --as core1"
    setup = f"""
        until mkdir {irq}/message_4_state 2>&1; do rm -f {irq}/message_4_state; done  # The proxy may create it again.
        {send} unknown_irq {as_core1}
        {send} ihub_reset_irq {as_core1}
        until {sys.executable} -m inco_trio status --json | grep -q '"pending": 1'; do :; done
    """
    code, found = survey(cores.core0, tmp_path, (link, "--irq-dir", irq), setup=setup)
    assert code == 1
    pending = of(found, "signal")
    assert (pending["level"], pending["subject"]) == ("fail", f"{irq}/message_4_state")
    assert pending["found"].startswith("ihub_reset_irq: cannot write: not a regular file but a directory; ")
    assert pending["found"].endswith(" (1 pending)")
    counted = [each["found"] for each in found if each["check"] == "counters"]
    # The link goes down when core 1's process ends; whether the proxy notices this depends on timing.
    counted = [each for each in counted if not each.startswith("link_downs is ")]
    assert len(counted) == 2
    assert counted[0].startswith(
        "unknown is 1: core 1 sent a name that is not an inbound signal: compare `inco-trio monitor`"
    )
    assert re.match(r"write_failures is [1-9][0-9]* \(continues\): writing a state file failed", counted[1])


def test_a_second_proxy_warns_and_names_the_first(cores: Cores, proxy: StartProxy, tmp_path: Path) -> None:
    one = proxy("--irq-dir", tmp_path / "irq", "--sandbox", "on")
    restrictions(one.pid)  # Its search for other proxies has ended, so that it cannot report itself to the second one.
    two = proxy("--irq-dir", tmp_path / "irq")
    for subject, what in (
        (cores.link, "also serves this link, so both proxies receive each frame"),
        (tmp_path / "irq", "also watches its triggers, so both proxies send each notification"),
    ):
        line = json.loads(two.wait_log(what))
        assert line["level"] == "warning"
        assert re.fullmatch(rf"{subject}: process {one.pid} \(python.*\) {what}: run: kill {two.pid}", line["message"])


def test_a_proxy_beside_one_of_another_user_names_it_by_its_command_line(
    cores: Cores, proxy: StartProxy, nobody: list[str], tmp_path: Path
) -> None:
    one = proxy("--irq-dir", tmp_path / "irq")
    program = f"""
from inco_trio.links.address import InterfaceAddress
from inco_trio.service.rivals import rivals
print(*rivals([(InterfaceAddress({cores.link!r}), None, ())]), sep="\\n")
"""
    command = [*nobody, sys.executable, "-c", program]

    def found(namespace: Namespace) -> list[str]:
        done = namespace.run(
            lambda: subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
        )
        return done.stdout.splitlines()

    (line,) = found(cores.core0)
    assert re.match(rf"{cores.link}: process {one.pid} \(python", line)
    # In the namespace of core 1, the link has the same name, and a socket of a process that this user cannot inspect.
    with cores.peer():
        assert [*filter(None, found(cores.core1))] == []


def test_a_proxy_of_another_user_does_not_serve_a_socket_of_this_user(nobody: list[str]) -> None:
    """The link of the other user's proxy has the same path, in a network namespace that this user cannot inspect."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)  # Other users cannot enter pytest's directories.
        link = f"unix:{home}/core1,peer={home}/core0"
        other = [sys.executable, "-c", "print(flush=True); input()", "inco-trio", "run", link]
        program = f"""
import socket
from inco_trio.links.address import parse_address
from inco_trio.service.rivals import serving
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
    own.bind("{home}/core1")
    print(serving(parse_address({link!r})))
"""
        with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            command = [*nobody, sys.executable, "-c", program]
            done = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
            process.communicate("\n")
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("named", ["12:13", ":13"])
def test_the_owner_that_a_proxy_trusts_is_trusted(cores: Cores, proxy: StartProxy, irq_dir: Path, named: str) -> None:
    irq_dir.parent.chmod(0o755)
    proxy("--irq-dir", irq_dir, "--irq-owner", named)
    assert irq_dir.stat().st_gid == 13
    assert of(doctor(cores.core0, cores.link, "--irq-dir", irq_dir), "trusted")["level"] == "ok"


def test_the_owner_in_the_file_of_a_board_is_trusted(cores: Cores, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    irq, boards = tmp_path / "irq", tmp_path / "boards"
    boards.mkdir()
    irq.mkdir()
    os.chown(irq, 12, 12)
    board = {"link": unix_link(tmp_path, "b"), "irq_dir": str(irq)}
    for owner, level in (({}, "warn"), ({"irq_owner": "12"}, "ok")):
        (boards / "b.json").write_text(json.dumps(board | owner))
        assert of(doctor(cores.core0, "--boards", boards), "trusted")["level"] == level
    # A running proxy reports the owner.
    _, found = survey(cores.core0, tmp_path, ("--boards", boards))
    assert of(found, "trusted")["level"] == "ok"
