"""Tests of registers that have become a device, a FIFO, a hard link or a mount: the proxy writes nothing to them."""

from __future__ import annotations

import itertools
import logging
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from inco_trio.errors import ConfigError, ResourceError
from inco_trio.linux import inotify as ino
from inco_trio.linux.capabilities import CAP_DAC_OVERRIDE
from inco_trio.linux.inotify import Event
from inco_trio.registers.directory import SEARCHED_MAX, Directory, temporary_name
from inco_trio.signals import Direction, Signal
from tests.support_capabilities import without_capability
from tests.support_registers import Clock, World

IN, OUT = Direction.INBOUND, Direction.OUTBOUND

Replace = Callable[[Path, ExitStack], Callable[[], bool]]
"""A function that replaces the file at a path. The returned function checks that the replacement is untouched."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    made.install(monkeypatch)
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """Mount a filesystem at `place` while the block runs. `arguments` are passed to mount(8)."""
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def hard_link(path: Path, _stack: ExitStack) -> Callable[[], bool]:
    victim = path.parent.parent / "victim"
    victim.write_text("untouched")
    before = victim.stat()
    path.unlink(missing_ok=True)
    path.hardlink_to(victim)
    return lambda: victim.read_text() == "untouched" and victim.stat().st_mtime_ns == before.st_mtime_ns


def fifo_with_reader(path: Path, stack: ExitStack) -> Callable[[], bool]:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stack.callback(os.close, reader)
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    return lambda: poller.poll(0) == []  # Even a writer that only opens and closes the FIFO causes POLLHUP.


def bind_mount(path: Path, stack: ExitStack) -> Callable[[], bool]:
    home = path.parent.parent / "other filesystem"
    home.mkdir()
    stack.enter_context(mounted(home, "-t", "tmpfs", "inco-trio-test"))
    (home / "victim").write_text("untouched")
    path.touch()
    stack.enter_context(mounted(path, "--bind", str(home / "victim")))
    return lambda: path.read_text() == "untouched"


odd = pytest.mark.parametrize(
    ("why", "replace"),
    [
        ("has 2 names (hard links)", hard_link),
        ("not a regular file but a FIFO", fifo_with_reader),
        pytest.param("not on the same filesystem as its directory", bind_mount, marks=pytest.mark.netns),
    ],
    ids=["hard link", "FIFO", "mount"],
)


@pytest.fixture
def world(tmp_path: Path, clock: Clock) -> Iterator[World]:
    irq = tmp_path / "irq"
    made = World(clock, [Signal("ihub_reset_irq", IN, irq, "state"), Signal("redun_notify_irq", OUT, irq, "trig")])
    yield made
    made.ending.close()


def registers(world: World) -> tuple[Signal, Signal]:
    state, trigger = world.table
    return state, trigger


def put_a_new_file(path: Path, stack: ExitStack) -> None:
    stack.close()
    path.unlink()
    path.touch()


@odd
def test_a_state_file_that_another_user_replaced_is_not_written(
    world: World, stack: ExitStack, why: str, replace: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    state, _ = registers(world)
    world.open()
    untouched = replace(state.path, stack)
    caplog.set_level(logging.INFO)
    world.write(state)
    world.write(state, state)
    for _ in range(5):
        world.later()
    assert untouched()
    assert world.pending == {state.name: 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"{state.path}: cannot write: {why}; notifications are kept and retried"
    ]
    assert why in str(world.registers.problem(state))

    put_a_new_file(state.path, stack)
    world.later()
    assert (world.pending, world.stats.delivered) == ({}, 3)
    assert state.path.read_text() == "1"
    assert world.registers.problem(state) is None


@odd
def test_a_state_file_replaced_after_a_write_is_not_written(
    world: World, stack: ExitStack, why: str, replace: Replace
) -> None:
    state, _ = registers(world)
    world.open()
    world.write(state)
    untouched = replace(state.path, stack)
    world.triggered()
    if replace is bind_mount:
        world.registers.mounts_changed()  # Mounting a filesystem causes no event.
    world.write(state)
    assert untouched()
    assert world.pending == {state.name: 1}
    assert why in str(world.registers.problem(state))


def test_a_second_name_of_a_written_state_file_is_noticed(world: World) -> None:
    state, _ = registers(world)
    world.open()
    world.write(state)
    state.path.with_name("another name").hardlink_to(state.path)
    world.triggered()
    world.write(state)
    assert world.pending == {state.name: 1}


def test_lost_events_lead_to_a_new_check(world: World, stack: ExitStack) -> None:
    state, _ = registers(world)
    world.open()
    world.write(state)
    untouched = hard_link(state.path, stack)
    world.events()  # Discard the events, as the kernel does when its queue is full.
    world.registers.triggers.follow([Event(-1, ino.IN_Q_OVERFLOW, b"")])
    world.write(state)
    assert untouched()


def test_a_failed_write_names_the_cause_before_the_event_is_read(world: World) -> None:
    state, _ = registers(world)
    world.open()
    world.write(state)
    state.path.unlink()
    os.mkfifo(state.path)
    world.write(state)
    assert "not a regular file but a FIFO" in str(world.registers.problem(state))


@odd
def test_a_trigger_that_another_user_replaced_is_not_watched(
    world: World, stack: ExitStack, why: str, replace: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    _, trigger = registers(world)
    world.open()
    world.triggered()
    if replace is bind_mount:
        trigger.path.unlink()  # Mounting over an existing file causes no event.
        world.triggered()
    replace(trigger.path, stack)
    assert world.triggered() + world.restore() == []
    assert f"{trigger.path}: cannot watch: {why}; retrying" in caplog.text
    assert world.registers.problem(trigger) == "the file is missing or cannot be watched"

    put_a_new_file(trigger.path, stack)
    assert set(world.triggered() + world.later()) == {trigger.name}
    assert world.registers.problem(trigger) is None


@odd
@pytest.mark.parametrize("number", [0, 1], ids=["state", "trigger"])
def test_such_a_register_is_refused_at_start(
    world: World, stack: ExitStack, why: str, replace: Replace, number: int
) -> None:
    signal = registers(world)[number]
    signal.directory.mkdir()
    untouched = replace(signal.path, stack)
    with pytest.raises(ConfigError) as caught:
        world.open()
    assert str(caught.value).startswith(f"{signal.path}: {why} (")
    assert untouched()


def test_the_second_name_that_a_killed_proxy_left_is_removed(world: World) -> None:
    _, trigger = registers(world)
    trigger.directory.mkdir()
    left = trigger.directory / ".inco-trio.1"
    left.touch()
    trigger.path.hardlink_to(left)
    world.open()
    assert not left.exists()
    trigger.path.write_text("1")
    assert world.triggered() == [trigger.name]


def test_a_directory_with_the_name_of_the_temporary_file_is_named(world: World) -> None:
    _, trigger = registers(world)
    temporary = trigger.directory / temporary_name()
    temporary.mkdir(parents=True)
    with pytest.raises(ResourceError) as caught:
        world.open()
    assert str(caught.value) == f"{temporary}: Is a directory"
    temporary.rmdir()
    world.open()


def test_a_large_directory_is_not_searched_completely(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application could otherwise create millions of files, and block the process for seconds at each attempt."""
    state, _ = registers(world)
    world.open()
    state.path.with_name("another name").hardlink_to(state.path)
    for number in range(2 * SEARCHED_MAX):
        os.mknod(state.directory / str(number))
    read = itertools.count()
    scandir = os.scandir

    @contextmanager
    def counted(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(path) as entries:
            yield (entry for entry, _ in zip(entries, read, strict=False))

    monkeypatch.setattr(os, "scandir", counted)
    world.write(state)
    assert next(read) == SEARCHED_MAX
    assert world.pending == {state.name: 1}


@pytest.mark.netns
def test_an_overlay_of_two_filesystems_works(tmp_path: Path, clock: Clock, stack: ExitStack) -> None:
    # Files in the lower layer have a different device number from the directory.
    lower, scratch, irq = (tmp_path / name for name in ("lower", "scratch", "irq"))
    for path in (lower, scratch, irq):
        path.mkdir()
    (lower / "state").touch()
    (lower / "trig").touch()
    stack.enter_context(mounted(scratch, "-t", "tmpfs", "inco-trio-test"))
    for name in ("upper", "work"):
        (scratch / name).mkdir()
    options = f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work,xino=off"
    stack.enter_context(mounted(irq, "-t", "overlay", "-o", options, "inco-trio-test"))
    assert (irq / "state").stat().st_dev != irq.stat().st_dev
    state, trigger = Signal("ihub_reset_irq", IN, irq, "state"), Signal("redun_notify_irq", OUT, irq, "trig")
    world = World(clock, [state, trigger])
    stack.callback(world.ending.close)
    world.open()
    for _ in range(2):
        world.write(state)
    assert (world.pending, state.path.read_text()) == ({}, "1")


def test_a_file_replaced_between_check_and_open_is_not_written(
    world: World, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    state, _ = registers(world)
    world.open()
    directory = world.registers.directories.by_path[state.directory]
    directory.shared = True
    untouched: list[Callable[[], bool]] = []
    check = Directory.check

    def replaced_afterwards(self: Directory, register: str | bytes, opened: int | None = None) -> None:
        check(self, register, opened)
        if not untouched:
            untouched.append(hard_link(state.path, stack))

    monkeypatch.setattr(Directory, "check", replaced_afterwards)
    world.write(state)
    assert untouched[0]()
    assert world.pending == {state.name: 1}


def test_the_status_says_why_a_state_file_is_missing(world: World, clock: Clock) -> None:
    state, _ = registers(world)
    world.open()
    state.path.unlink()
    world.write(state)
    assert world.registers.problem(state) == "the file is missing"
    directory = state.path.parent
    directory.chmod(0o500)
    with without_capability(CAP_DAC_OVERRIDE):
        world.later()
        assert world.registers.problem(state) == "cannot create: Permission denied; retrying"
    directory.chmod(0o700)
    world.later()
    assert world.registers.problem(state) is None
    assert world.pending == {}
