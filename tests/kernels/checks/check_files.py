"""Checks on the filesystems that contain the IRQ directory on real boards and in simulations."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.simulation.world import Peer
from netns.fixtures import Proxy, StartProxy
from tests.faults.supervised import wait_path
from tests.kernels.checks.conftest import Applications, Board
from tests.support_proxy import INBOUND, OUTBOUND, trigger, write_udrv


def shell(command: str) -> None:
    """Run shell commands. If a command fails, the check fails with the command's error output."""
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


IMAGE = "truncate -s 16M image && mkfs.ext4 -q image && mkdir -p mounted && mount -o {options} image mounted"
FIRST = next(iter(INBOUND))
MOUNTS = {
    "tmpfs": "mkdir mounted && mount -t tmpfs tmpfs mounted",
    "ext4": IMAGE.format(options="data=ordered"),
    "ext4 data=journal": IMAGE.format(options="data=journal"),
    "ext4 sync": IMAGE.format(options="sync"),
    "overlayfs": (
        "mkdir mounted disk && mount -t tmpfs tmpfs disk && mkdir -p disk/lower/irq disk/upper disk/work"
        " && mount -t overlay overlay -o lowerdir=disk/lower,upperdir=disk/upper,workdir=disk/work mounted"
    ),
}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that runs mount commands in `tmp_path` and returns the path of `mounted/irq`."""
    with ExitStack() as stack:

        def make(commands: str) -> Path:
            for name in ("mounted", "disk"):
                stack.callback(shell, f"umount -l {tmp_path / name} 2>/dev/null || true")
            shell(f"cd {tmp_path} && {commands}")
            return tmp_path / "mounted/irq"

        yield make


StartBoard = Callable[[Path], tuple[Board, Proxy]]


@pytest.fixture
def start_in(proxy: StartProxy, core1: Peer, tmp_path: Path) -> Iterator[StartBoard]:
    """Return a function that starts a board with a given IRQ directory."""
    with ExitStack() as stack:

        def start(directory: Path) -> tuple[Board, Proxy]:
            running = proxy("--config", write_udrv(tmp_path / "udrv.json", directory))
            applications = stack.enter_context(Applications(directory, list(INBOUND)))
            return Board(core1, directory, applications), running

        yield start


@pytest.mark.parametrize("kind", list(MOUNTS))
def test_notifications_pass_on(kind: str, mount: Callable[[str], Path], start_in: StartBoard) -> None:
    board, _ = start_in(mount(MOUNTS[kind]))
    board.exchange()


def test_files_that_overlayfs_copies_up_are_delivered(mount: Callable[[str], Path], start_in: StartBoard) -> None:
    lower = "touch disk/lower/irq/message_4_state disk/lower/irq/message_6_trig"
    directory = mount(MOUNTS["overlayfs"].replace(" && mount -t overlay", f" && {lower} && mount -t overlay"))
    board, _ = start_in(directory)
    board.exchange()


def test_a_read_only_file_system_keeps_notifications_pending(
    mount: Callable[[str], Path], start_in: StartBoard, tmp_path: Path
) -> None:
    board, running = start_in(mount(MOUNTS["tmpfs"]))
    shell(f"mount -o remount,ro {tmp_path}/mounted")
    board.core1.send(b"ihub_reset_irq")
    running.wait_log("Read-only file system")
    shell(f"mount -o remount,rw {tmp_path}/mounted")
    board.applications.wait_for(lambda: board.applications.seen == ["ihub_reset_irq"])
    board.exchange()


def test_a_full_file_system_keeps_notifications_pending(
    mount: Callable[[str], Path], start_in: StartBoard, tmp_path: Path
) -> None:
    board, running = start_in(mount("mkdir mounted && mount -t tmpfs -o size=64k tmpfs mounted"))
    shell(f"dd if=/dev/zero of={tmp_path}/mounted/filler bs=4k 2>/dev/null || true")
    board.core1.send(b"ihub_reset_irq")
    running.wait_log("No space left")
    (tmp_path / "mounted/filler").unlink()
    board.applications.wait_for(lambda: board.applications.seen[-1:] == ["ihub_reset_irq"])


def test_a_lazily_unmounted_directory_is_recreated(
    mount: Callable[[str], Path], start_in: StartBoard, tmp_path: Path
) -> None:
    board, running = start_in(mount(MOUNTS["tmpfs"]))
    shell(f"umount -l {tmp_path}/mounted")
    running.wait_log("works again")
    board.core1.send(FIRST.encode())
    with Applications(board.directory, list(INBOUND)) as applications:
        # Notifications that wait for the directory arrive in the order of their signals, so let none wait.
        applications.wait_for(lambda: FIRST in applications.seen)
        Board(board.core1, board.directory, applications).exchange()


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_over_the_directory_is_noticed(kind: str, start_in: StartBoard, irq_dir: Path, tmp_path: Path) -> None:
    board, _ = start_in(irq_dir)
    (tmp_path / "other").mkdir()
    source = "-t tmpfs -o mode=755 tmpfs" if kind == "tmpfs" else f"--bind {tmp_path}/other"
    shell(f"mount {source} {irq_dir}")
    try:
        # The proxy must notice the mount even without an inbound notification.
        wait_path(irq_dir / OUTBOUND["redun_notify_irq"])
        trigger(irq_dir / OUTBOUND["redun_notify_irq"])
        assert board.next_frame() == "redun_notify_irq"
    finally:
        shell(f"umount -l {irq_dir}")


def test_a_directory_on_fuse_is_warned_about(mount: Callable[[str], Path], start_in: StartBoard) -> None:
    _, running = start_in(mount("mkdir mounted disk && bindfs --no-allow-other disk mounted && mkdir mounted/irq"))
    running.wait_log("filesystem of type fuse")


def test_notifications_pass_on_nfs_of_the_same_machine(
    mount: Callable[[str], Path], start_in: StartBoard, tmp_path: Path
) -> None:
    start = (
        "mkdir mounted disk && mount -t tmpfs tmpfs disk && mkdir disk/irq && chmod 755 disk disk/irq"
        " && exportfs -o rw,no_root_squash,insecure,fsid=1 127.0.0.1:$PWD/disk"
        " && systemctl start nfs-server && mount -t nfs -o vers=4.2 127.0.0.1:$PWD/disk mounted"
    )
    board, running = start_in(mount(start))
    running.wait_log("nfs")
    board.exchange()
