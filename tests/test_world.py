"""Tests of the two simulated cores, which are network namespaces on the real kernel."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from inco_trio.errors import ResourceError
from inco_trio.frame import BROADCAST, decode, encode
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores
from netns.fixtures import Canary, Consumer, Tcpdump
from netns.hang import HANG
from tests.support_proxy import thread_count

pytestmark = pytest.mark.netns


@pytest.fixture(params=[False, True], ids=["veth", "chain"])
def either(request: pytest.FixtureRequest) -> Iterator[Cores]:
    with two_cores(chain=request.param) as made:
        yield made


def core0_peer(cores: Cores) -> Peer:
    return attrs.evolve(cores, core0=cores.core1, core1=cores.core0).peer()


def test_frames_pass_both_ways(either: Cores) -> None:
    with core0_peer(either) as core0, either.peer() as core1:
        core0.send(b"redun_notify_irq")
        assert core1.receive() == encode(b"redun_notify_irq", core0.mac)
        core1.send(b"ihub_hwwd_irq", pad=60)
        assert core0.receive() == encode(b"ihub_hwwd_irq", core1.mac) + bytes(33)
        core1.send_raw(BROADCAST + core1.mac + b"\x88\x00\x00garbage")
        assert decode(core0.receive()) is None


def test_frames_pass_at_once_after_the_link_is_recreated(either: Cores) -> None:
    with core0_peer(either) as core0, either.peer() as core1:
        for _ in range(5):
            either.delete_link()
            assert either.link not in (name for _, name in either.core0.run(socket.if_nameindex))
            either.make_link()
            core0.rebind()
            core1.rebind()
            core0.send(b"there")
            assert decode(core1.receive()) == b"there"
            core1.send(b"and_back")
            assert decode(core0.receive()) == b"and_back"


def test_frames_pass_at_once_after_the_link_was_down(either: Cores) -> None:
    with core0_peer(either) as core0, either.peer() as core1:
        either.link_down()
        with pytest.raises(OSError, match="Network is down"):
            core0.send(b"too_early")
        either.link_up()
        core0.send(b"there")
        assert decode(core1.receive()) == b"there"


def test_a_peer_that_receives_nothing_times_out(core1: Peer) -> None:
    with pytest.raises(TimeoutError, match="no frame on rpmsg4000"):
        core1.receive(timeout=0)


def test_the_link_sends_no_ipv6_frames(cores: Cores) -> None:
    for core in (cores.core0, cores.core1):
        addresses = core.run(Path("/proc/thread-self/net/if_inet6").read_text)
        assert cores.link not in addresses


def test_run_does_not_move_the_caller(cores: Cores) -> None:
    here = Path("/proc/thread-self/ns/net")
    before = here.stat().st_ino
    assert cores.core0.run(here.stat).st_ino == os.fstat(cores.core0.fd).st_ino != before
    assert here.stat().st_ino == before


def test_run_raises_the_error_of_the_function(cores: Cores) -> None:
    with pytest.raises(ZeroDivisionError):
        cores.core0.run(lambda: 1 // 0)


def test_a_refused_link_change_is_one_error_line(cores: Cores) -> None:
    with pytest.raises(ResourceError, match=r"^cannot change a link: File exists$"):
        cores.make_link()


@pytest.mark.parametrize("chain", [False, True])
def test_namespaces_end_with_their_descriptors(chain: bool, canary: Callable[[int], Canary]) -> None:
    with two_cores(chain=chain) as cores, cores.peer():
        watched = [canary(namespace.fd) for namespace in (cores.core0, cores.core1, cores.switch) if namespace]
    for one in watched:
        one.wait_gone()


def test_closed_cores_leave_no_descriptor_and_no_thread() -> None:
    before = set(Path("/proc/self/fd").iterdir()), thread_count()
    with two_cores() as cores, cores.peer():
        cores.delete_link()
        cores.make_link()
    assert (set(Path("/proc/self/fd").iterdir()), thread_count()) == before


def test_a_namespace_ends_with_a_killed_process(canary: Callable[[int], Canary]) -> None:
    script = "from inco_trio.simulation.world import Namespace; ns = Namespace(); print(ns.fd, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        inherited = os.open(f"/proc/{owner.pid}/fd/{int(owner.stdout.readline())}", os.O_RDONLY)
        watched = canary(inherited)
        os.close(inherited)
        owner.kill()
        watched.wait_gone()


def run_as_nobody(nobody: list[str], script: str) -> str:
    done = subprocess.run([*nobody, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.rstrip("\n")


def test_an_ordinary_user_gets_two_cores_in_a_user_namespace(nobody: list[str]) -> None:
    script = """
from inco_trio.simulation.world import Peer, may_make_namespaces, new_user_namespace, two_cores
assert not may_make_namespaces()
new_user_namespace()
assert may_make_namespaces()
with two_cores() as cores, cores.peer() as peer:
    print(len(peer.mac))
"""
    assert run_as_nobody(nobody, script) == "6"


def test_an_ordinary_user_is_refused_without_a_user_namespace(nobody: list[str]) -> None:
    script = """
from inco_trio.simulation.world import Namespace, NamespaceRefusedError
try:
    Namespace()
except NamespaceRefusedError as refused:
    print(refused)
"""
    said = run_as_nobody(nobody, script)
    assert said.startswith("cannot create a network namespace (Operation not permitted): run as root, or set")


def test_an_adopted_namespace_is_the_same(cores: Cores) -> None:
    with Namespace(os.dup(cores.core0.fd)) as same:
        assert same.run(socket.if_nameindex) == cores.core0.run(socket.if_nameindex)


def test_tcpdump_sees_the_exact_bytes(cores: Cores, tcpdump: Tcpdump) -> None:
    with core0_peer(cores) as core0:
        core0.send(b"a")
        core0.send(b"redun_notify_irq", pad=60)
        assert tcpdump.packet() == encode(b"a", core0.mac)
        assert tcpdump.packet() == encode(b"redun_notify_irq", core0.mac).ljust(60, b"\0")


def test_a_consumer_counts_every_close(tmp_path: Path, watch: Callable[[Path], Consumer]) -> None:
    path = tmp_path / "state"
    path.touch()
    consumer = watch(path)
    for _ in range(1000):
        path.write_text("1")
    consumer.wait(1000)
    with pytest.raises(AssertionError, match="1000 notifications instead of 1001"):
        consumer.wait(1001, timeout=0)


def test_a_peer_wakes_select(cores: Cores, core1: Peer) -> None:
    with core0_peer(cores) as core0:
        core0.send(b"x")
        assert select.select([core1], [], [], HANG)[0] == [core1]
