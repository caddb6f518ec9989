"""Checks of VLAN links: tags, link changes, masters such as bridges, and the queues of slow links."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.frame import BROADCAST, ETHERTYPE
from inco_trio.simulation.guest import tap_netdev
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores
from netns.fixtures import Proxy, StartProxy
from tests.core1 import SCENARIOS, Scenario
from tests.core1 import Board as GuestBoard
from tests.kernels.checks.conftest import Applications, Board, add_vlan, ip, run
from tests.support_proxy import INBOUND, OUTBOUND, mac_of, trigger, write_udrv

FIRST, SECOND, THIRD = INBOUND


def tagged(core: Namespace, *tags: int, protocol: int = 0x8100, to: bytes = BROADCAST) -> bytes:
    """Return a frame from core 1 with these VLAN tags in its header, to be sent on the parent interface."""
    header = to + mac_of(core, "eth_rpmsg")
    for tag in tags:
        header += protocol.to_bytes(2, "big") + tag.to_bytes(2, "big")
        protocol = 0x8100
    return header + ETHERTYPE.to_bytes(2, "big") + FIRST.encode()


def send_on_parent(core: Namespace, *frames: bytes) -> None:
    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as parent:
            parent.bind(("eth_rpmsg", 0))
            for frame in frames:
                parent.send(frame)

    core.run(inside)


def test_notifications_pass_in_order(board: Board) -> None:
    board.exchange(900)


@pytest.mark.parametrize("state", ["on", "off"])
def test_notifications_pass_with_vlan_offload(board: Board, parents: Cores, state: str) -> None:
    for core in (parents.core0, parents.core1):
        run(core, f"ethtool -K eth_rpmsg rxvlan {state} txvlan {state}")
    board.exchange()


def test_notifications_pass_without_reorder_hdr(board: Board, cores: Cores) -> None:
    ip(cores.core0, "link set rpmsg4000 type vlan reorder_hdr off")
    board.exchange()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario_with_a_guest_behind_the_vlan_a_bridge_and_a_tap(scenario: Scenario, tmp_path: Path) -> None:
    with two_cores("eth_rpmsg", chain=True) as chain:
        assert chain.switch is not None
        # The bridge removes the tag of VLAN 4000 from the guest's frames. The tap replaces the veth to core 1.
        ip(
            chain.switch,
            "link del tap_rpmsg",
            "tuntap add tap_rpmsg mode tap",
            "link set br_rpmsg type bridge vlan_filtering 1",
            "link set tap_rpmsg master br_rpmsg",
            "link set tap_rpmsg up",
        )
        run(chain.switch, "bridge vlan add dev eth_rpmsg vid 4000")
        run(chain.switch, "bridge vlan add dev tap_rpmsg vid 4000 pvid untagged")
        add_vlan(chain.core0)
        netdev = tap_netdev("tap_rpmsg")
        with GuestBoard(tmp_path, "rpmsg4000", netdev, core0=chain.core0, core1=chain.switch) as board:
            scenario(board)


def test_frames_of_other_vlans_and_tags_are_not_delivered(board: Board, parents: Cores) -> None:
    core = parents.core1
    other = bytes.fromhex("020000000042")
    frames = (
        tagged(core, 4001),
        tagged(core, 0),
        tagged(core, 4000, 7),
        tagged(core, 4000, protocol=0x88A8),
        tagged(core),
        tagged(core, 4000, to=other),
    )
    ip(parents.core0, "link set eth_rpmsg promisc on")
    send_on_parent(core, *frames)
    board.only(SECOND)
    send_on_parent(core, tagged(core, 4000))
    board.applications.wait_for(lambda: board.applications.seen == [FIRST])


def test_a_proxy_on_the_parent_does_not_deliver_frames_of_the_vlan(
    cores: Cores, parents: Cores, udrv: Path, irq_dir: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        running = Proxy(parents.core0, ["eth_rpmsg", "--config", udrv], {}, tmp_path / "log")
        stack.callback(running.close)
        running.wait_ready()
        on_vlan, on_parent = stack.enter_context(cores.peer()), stack.enter_context(parents.peer())
        applications = stack.enter_context(Applications(irq_dir, list(INBOUND)))
        for _ in range(5):
            on_vlan.send(FIRST.encode())
        Board(on_parent, irq_dir, applications).only(SECOND)


def test_a_name_of_one_character_is_warned_about_on_a_vlan(
    cores: Cores, proxy: StartProxy, irq_dir: Path, tmp_path: Path
) -> None:
    udrv = write_udrv(tmp_path / "short.json", irq_dir, INBOUND, {"x": "x_trig"})
    proxy("--config", udrv).wait_log("a name of one character")


class Change:
    """A link change that a board must survive: `away` makes the link unusable, and `back` restores it."""

    def __init__(self, away: Callable[[Cores], None], back: Callable[[Cores, Peer], None]) -> None:
        self.away = away
        self.back = back


def on_core0(*commands: str) -> Callable[..., None]:
    return lambda cores, *_: ip(cores.core0, *commands)


def recreate_parent(cores: Cores, core1: Peer) -> None:
    Cores(cores.core0, cores.core1, "eth_rpmsg").make_link()
    add_vlan(cores.core1)
    # Core 1 must be listening before the proxy can send: an interface does not keep frames for later listeners.
    core1.rebind()
    add_vlan(cores.core0)


CHANGES = {
    "VLAN deleted": Change(on_core0("link del rpmsg4000"), lambda cores, _: add_vlan(cores.core0)),
    "VLAN down": Change(on_core0("link set rpmsg4000 down"), on_core0("link set rpmsg4000 up")),
    "parent down": Change(
        on_core0("link set eth_rpmsg down"), on_core0("link set eth_rpmsg up", "link set rpmsg4000 up")
    ),
    "parent deleted": Change(on_core0("link del eth_rpmsg"), recreate_parent),
    "renamed": Change(
        on_core0("link set rpmsg4000 down", "link set rpmsg4000 name other"),
        on_core0("link set other name rpmsg4000", "link set rpmsg4000 up"),
    ),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_triggers_written_while_the_link_is_away_are_sent_later(board: Board, cores: Cores, change: Change) -> None:
    change.away(cores)
    trigger(board.directory / OUTBOUND["redun_notify_irq"])
    change.back(cores, board.core1)
    board.recovers(cores)


def test_a_link_that_visits_another_namespace_is_used_again(board: Board, cores: Cores) -> None:
    with Namespace() as other:
        ip(cores.core0, f"link set rpmsg4000 netns /proc/{os.getpid()}/fd/{other.fd}")
        trigger(board.directory / OUTBOUND["redun_notify_irq"])
        ip(other, f"link set rpmsg4000 netns /proc/{os.getpid()}/fd/{cores.core0.fd}")
        board.recovers(cores)


def test_a_changed_address_and_mtu_disturb_nothing(board: Board, cores: Cores) -> None:
    ip(cores.core0, "link set rpmsg4000 mtu 1000", "link set rpmsg4000 address 02:00:00:00:00:99")
    board.exchange()


MASTERS = ("bridge", "bond", "team")


@pytest.mark.parametrize("kind", MASTERS)
def test_a_master_that_takes_the_frames_is_named(cores: Cores, proxy: StartProxy, udrv: Path, kind: str) -> None:
    running = proxy("--config", udrv)
    ip(cores.core0, f"link add master0 type {kind}", "link set rpmsg4000 down")
    ip(cores.core0, "link set rpmsg4000 master master0", "link set master0 up", "link set rpmsg4000 up")
    running.wait_log("master0")


@pytest.mark.parametrize("mode", ["private", "vepa", "bridge", "passthru"])
def test_a_macvlan_beside_the_link_disturbs_nothing(board: Board, cores: Cores, mode: str) -> None:
    ip(cores.core0, f"link add link rpmsg4000 name macvlan0 type macvlan mode {mode}", "link set macvlan0 up")
    board.exchange()


@pytest.mark.parametrize("options", ["delay 20ms 10ms", "duplicate 10%", "slot 5ms 10ms"])
def test_a_slow_link_loses_nothing(board: Board, cores: Cores, options: str) -> None:
    for core in (cores.core0, cores.core1):
        run(core, f"tc qdisc add dev rpmsg4000 root netem limit 10000 {options}")
    sent = Counter(dict.fromkeys(INBOUND, 30))
    for name in list(INBOUND) * 30:
        board.core1.send(name.encode())
    board.applications.wait_for(lambda: not sent - Counter(board.applications.seen))
    for name in list(OUTBOUND) * 30:
        trigger(board.directory / OUTBOUND[name])
    left = Counter(dict.fromkeys(OUTBOUND, 30))
    while left:
        left -= Counter([board.next_frame()])


@pytest.mark.parametrize("options", ["loss 20%", "corrupt 50%"])
def test_a_bad_link_does_not_stop_the_proxy(board: Board, cores: Cores, options: str) -> None:
    run(cores.core1, f"tc qdisc add dev rpmsg4000 root netem limit 10000 {options}")
    for name in list(INBOUND) * 100:
        board.core1.send(name.encode())
    run(cores.core1, "tc qdisc del dev rpmsg4000 root")
    board.core1.send(FIRST.encode())
    board.applications.wait_for(lambda: FIRST in board.applications.seen[-1:])
    board.outbound()


def test_a_queue_of_one_frame_loses_nothing(board: Board, cores: Cores) -> None:
    run(cores.core0, "tc qdisc add dev rpmsg4000 root netem limit 1 delay 1ms")
    board.outbound(510)
