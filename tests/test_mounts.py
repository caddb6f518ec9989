"""Tests of the mount watcher."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from inco_trio.linux.mounts import Mounts
from netns.hang import HANG

pytestmark = pytest.mark.netns  # Mounting needs root.


@pytest.fixture
def change(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Return a function that mounts a tmpfs over an empty directory."""
    mounted = 0

    def mount() -> None:
        nonlocal mounted
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
        mounted += 1

    yield mount
    for _ in range(mounted):
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    made = Mounts()
    yield made
    made.close()


class Follower:
    """A callback that counts its calls and lets a test wait for the next call."""

    def __init__(self) -> None:
        self.calls = 0
        self._called = trio.Event()

    def __call__(self) -> int:
        self.calls += 1
        self._called.set()
        return 1

    async def wait_called(self) -> None:
        with trio.fail_after(HANG):
            await self._called.wait()
        self._called = trio.Event()


def test_each_change_is_reported_once(mounts: Mounts, change: Callable[[], None]) -> None:
    async def main() -> None:
        follower = Follower()
        mounts.followers.add(follower)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mounts.run)
            for number in range(1, 6):
                await trio.testing.wait_all_tasks_blocked()
                change()
                await follower.wait_called()
                assert follower.calls == number
            await trio.testing.wait_all_tasks_blocked()
            assert follower.calls == 5
            await mounts.stop()

    trio.run(main)


def test_a_change_before_the_wait_begins_is_not_lost(mounts: Mounts, change: Callable[[], None]) -> None:
    async def main() -> None:
        follower = Follower()
        mounts.followers.add(follower)
        change()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mounts.run)
            await follower.wait_called()
            # The task pauses after each call, so its next wait begins only after this change.
            change()
            await follower.wait_called()
            assert follower.calls == 2
            await mounts.stop()

    trio.run(main)


def test_without_proc_no_change_is_reported(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    def missing(path: str, flags: int) -> int:
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", missing)
        mounts = Mounts()

    async def main() -> None:
        follower = Follower()
        mounts.followers.add(follower)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mounts.run)
            change()
            await trio.testing.wait_all_tasks_blocked()
            assert not follower.calls
            await mounts.stop()

    trio.run(main)
    mounts.close()


def test_a_refused_descriptor_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(path)

    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(PermissionError):
            Mounts()
    assert len(list(descriptors.iterdir())) == before


def test_a_lack_of_descriptors_does_not_end_the_watcher() -> None:
    """Under this limit, poll(2) would fail with EINVAL, but epoll_wait(2) works."""
    mounts = Mounts()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        mounts._end_if_missed(trio.CancelScope())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        mounts.close()
