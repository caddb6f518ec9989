"""Tests of the registers with real directories, real files and the real inotify."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest

from inco_trio.errors import ConfigError, IncoError, PermissionDeniedError, ResourceError
from inco_trio.linux import inotify as ino
from inco_trio.linux.capabilities import CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
from inco_trio.linux.inotify import Event, Inotify, parse_events
from inco_trio.registers.directories import ABANDONED, Directories
from inco_trio.registers.directory import EMPTIED, PATIENCE, Directory
from inco_trio.registers.refusals import refusal
from inco_trio.registers.states import StateFile
from inco_trio.signals import Direction, Signal
from inco_trio.stats import Stats
from tests.support_capabilities import without_capability
from tests.support_registers import Clock, World, finish_steps

IN, OUT = Direction.INBOUND, Direction.OUTBOUND


StartWorld = Callable[..., World]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    made.install(monkeypatch)
    return made


@pytest.fixture
def start(clock: Clock) -> Iterator[StartWorld]:
    """Yield `start(signal, ...)`, which creates and opens the signals' registers. Opening must trigger nothing."""
    with ExitStack() as stack:

        def make(*table: Signal, opened: bool = True) -> World:
            world = World(clock, list(table))
            stack.callback(world.ending.close)
            if opened:
                assert world.open() == []
                assert world.triggered() + world.restore() == []
                assert not world.troubled
            return world

        yield make


@pytest.fixture
def irq(tmp_path: Path) -> Path:
    return tmp_path / "board" / "irq"


@pytest.fixture
def notify(irq: Path) -> Signal:
    return Signal("redun_notify_irq", OUT, irq, "message_6_trig")


@pytest.fixture
def uart(irq: Path) -> Signal:
    return Signal("uart_irq", OUT, irq, "message_1_trig")


@pytest.fixture
def reset(irq: Path) -> Signal:
    return Signal("ihub_reset_irq", IN, irq, "message_4_state")


@pytest.fixture
def hwwd(irq: Path) -> Signal:
    return Signal("ihub_hwwd_irq", IN, irq, "message_5_state")


def write(path: Path, text: str = "1") -> None:
    path.write_text(text)


def remake(path: Path, text: str = "1") -> None:
    """Replace a file atomically with rename(2)."""
    path.with_name("new").write_text(text)
    path.with_name("new").rename(path)


def test_missing_files_are_created_and_trigger_nothing(
    start: StartWorld, irq: Path, notify: Signal, uart: Signal, reset: Signal, hwwd: Signal
) -> None:
    world = start(notify, uart, reset, hwwd)
    names = ["message_1_trig", "message_4_state", "message_5_state", "message_6_trig"]
    assert sorted(path.name for path in irq.iterdir()) == names
    assert all(stat.S_ISREG(path.stat().st_mode) and path.stat().st_nlink == 1 for path in irq.iterdir())
    write(notify.path)
    write(uart.path)
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq", "uart_irq", "redun_notify_irq"]


def test_existing_files_are_kept(start: StartWorld, irq: Path, notify: Signal, reset: Signal) -> None:
    irq.mkdir(parents=True)
    write(notify.path, "before")
    write(reset.path, "7 before")
    inodes = [path.stat().st_ino for path in (notify.path, reset.path)]
    world = start(notify, reset)
    assert (notify.path.read_text(), reset.path.read_text()) == ("before", "7 before")
    assert [path.stat().st_ino for path in (notify.path, reset.path)] == inodes
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


@pytest.mark.parametrize("reload", [False, True])
def test_a_state_file_that_is_a_trigger_too_is_refused(
    start: StartWorld, notify: Signal, reset: Signal, hwwd: Signal, *, reload: bool
) -> None:
    world = start(hwwd, *([reset] if reload else []))
    reset.path.touch()
    notify.path.hardlink_to(reset.path)
    before = list(world.registers.table)
    with pytest.raises(ConfigError, match=r"_(trig|state): has 2 names \(hard links\) \("):
        world.reload([hwwd, reset, notify])
    assert list(world.registers.table) == before


def test_mode_follows_the_umask(start: StartWorld, notify: Signal, reset: Signal) -> None:
    before = os.umask(0o027)
    try:
        start(notify, reset)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (notify.path, reset.path)] == [0o640, 0o640]


def test_a_temporary_file_of_a_killed_process_is_reused(start: StartWorld, irq: Path, notify: Signal) -> None:
    # In a container, the proxy can have the same PID after each start.
    irq.mkdir(parents=True)
    (irq / f".inco-trio.{os.getpid()}").touch()
    world = start(notify)
    assert list(irq.iterdir()) == [notify.path]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def kind_file(path: Path) -> None:
    path.touch()


def kind_directory(path: Path) -> None:
    path.mkdir()


def kind_fifo(path: Path) -> None:
    os.mkfifo(path)


def kind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        # The path of a socket must be short (unix(7)), so bind through the directory's descriptor.
        directory = os.open(path.parent, os.O_PATH)
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)


def kind_symlink(path: Path) -> None:
    (path.parent / "elsewhere").touch()
    path.symlink_to("elsewhere")


KINDS = {
    "a directory": kind_directory,
    "a FIFO": kind_fifo,
    "a socket": kind_socket,
    "a symlink": kind_symlink,
}
kinds = pytest.mark.parametrize(("kind", "make"), KINDS.items(), ids=[kind.replace(" ", "-") for kind in KINDS])


@kinds
def test_a_trigger_that_is_not_a_regular_file_is_refused_at_start(
    start: StartWorld, irq: Path, notify: Signal, kind: str, make: Callable[[Path], None]
) -> None:
    irq.mkdir(parents=True)
    make(notify.path)
    with pytest.raises(ConfigError) as caught:
        start(notify, opened=False).open()
    assert str(caught.value) == (
        f"{notify.path}: not a regular file but {kind} (remove it, or configure another register)"
    )


@pytest.mark.parametrize("above", [False, True], ids=["itself", "above"])
def test_a_directory_that_cannot_be_created_is_refused_at_start(
    start: StartWorld, irq: Path, notify: Signal, above: bool
) -> None:
    irq.parent.mkdir()
    file = irq
    if above:
        irq.parent.rmdir()
        file = irq.parent
    file.touch()
    with pytest.raises(ConfigError, match="configure a directory that can be created and written") as caught:
        start(notify, opened=False).open()
    assert str(irq) in str(caught.value)


def test_proc_is_refused_at_start(start: StartWorld) -> None:
    with pytest.raises(ConfigError, match="filesystem of type proc"):
        start(Signal("x", OUT, Path("/proc/self"), "trig"), opened=False).open()


def test_a_missing_permission_is_named_in_the_error(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal
) -> None:
    irq.mkdir(parents=True)
    irq.chmod(0o555)
    with without_capability(CAP_DAC_OVERRIDE):
        for signal in (notify, reset):
            with pytest.raises(PermissionDeniedError) as caught:
                start(signal, opened=False).open()
            assert str(caught.value).startswith(f"{signal.path}: Permission denied: uid {os.geteuid()} must be able ")


def test_an_unreadable_directory_is_refused(start: StartWorld, irq: Path, notify: Signal) -> None:
    irq.mkdir(parents=True)
    irq.chmod(0o300)
    world = start(notify, opened=False)
    with (
        without_capability(CAP_DAC_OVERRIDE),
        without_capability(CAP_DAC_READ_SEARCH),
        pytest.raises(PermissionDeniedError, match=f"{irq}: Permission denied"),
    ):
        world.open()
    assert irq not in [path.resolve() for path in Path("/proc/self/fd").iterdir()]


def test_a_filesystem_without_hard_links_works(
    start: StartWorld, irq: Path, notify: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_names: str, **_how: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    # Simulate vfat, where link(2) fails with EPERM. A real vfat mount needs a block device.
    monkeypatch.setattr("os.link", refuse)
    world = start(notify)
    assert list(irq.iterdir()) == [notify.path]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_an_application_creates_the_trigger_first(
    start: StartWorld, irq: Path, notify: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(*names: str, **how: Any) -> None:
        monkeypatch.setattr("os.link", link)
        write(notify.path, "theirs")
        link(*names, **how)

    monkeypatch.setattr("os.link", late)
    world = start(notify)
    assert list(irq.iterdir()) == [notify.path]
    assert notify.path.read_text() == "theirs"
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EPERM, PermissionDeniedError, "CAP_DAC_OVERRIDE"),
        (errno.EROFS, ConfigError, "can be created and written"),
        (errno.EMFILE, ResourceError, "/irq: Too many open files"),
        (errno.ENOSPC, ResourceError, "/irq: No space left on device"),
    ],
)
def test_errors_at_start_have_the_right_type(number: int, kind: type[IncoError], text: str) -> None:
    found = refusal(OSError(number, os.strerror(number), "/irq"), "/irq")
    assert type(found) is kind
    assert text in str(found)


def test_only_a_lack_of_permission_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another user has mounted a FUSE filesystem over the directory, lstat(2) could block."""
    monkeypatch.setattr(Path, "lstat", lambda _path: pytest.fail("lstat"))
    for number in (errno.ENOTDIR, errno.ELOOP, errno.EIO):
        assert "/irq: " in str(refusal(OSError(number, os.strerror(number)), "/irq", is_directory=True))


def test_the_limit_of_inotify_instances_is_named() -> None:
    found = refusal(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "inotify"), "inotify")
    assert str(found) == "inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n"


def closes(path: Path) -> Callable[[], int]:
    """Return a function that counts how often a file has been closed after writing (IN_CLOSE_WRITE)."""
    inotify = Inotify()
    inotify.watch(str(path), ino.IN_CLOSE_WRITE | ino.IN_MODIFY)

    def count() -> int:
        buffer = memoryview(bytearray(1 << 16))
        events = parse_events(buffer[: inotify.read_into(buffer)])
        inotify.close()
        return sum(event.mask & ino.IN_CLOSE_WRITE != 0 for event in events)

    return count


def test_each_notification_is_one_write_and_close(start: StartWorld, reset: Signal, hwwd: Signal) -> None:
    world = start(reset, hwwd)
    resets, hwwds = closes(reset.path), closes(hwwd.path)
    world.write(reset, hwwd, reset, reset)
    assert (resets(), hwwds()) == (3, 1)
    assert reset.path.read_text() == "1"
    assert world.stats.snapshot() == Stats(delivered=4)
    assert world.events_of(reset.register, hwwd.register) == []


def test_a_write_does_not_truncate(start: StartWorld, irq: Path, reset: Signal) -> None:
    irq.mkdir(parents=True)
    write(reset.path, "0 and more")
    start(reset).write(reset)
    assert reset.path.read_text() == "1 and more"


def test_a_missing_state_file_is_recreated_and_then_written(
    start: StartWorld, irq: Path, reset: Signal, hwwd: Signal
) -> None:
    world = start(reset, hwwd)
    reset.path.unlink()
    world.write(reset)
    # The proxy recreates the file later, because the process that removed it might be about to remove the directory.
    assert list(irq.iterdir()) == [hwwd.path]
    assert world.pending == {"ihub_reset_irq": 1}
    assert world.triggered() + world.later() == []
    assert reset.path.read_text() == "1"
    assert world.pending == {}


@pytest.mark.parametrize("make", [kind_directory, kind_fifo, kind_socket, kind_symlink])
def test_a_blocked_notification_stays_pending_until_it_can_be_written(
    start: StartWorld,
    irq: Path,
    reset: Signal,
    hwwd: Signal,
    make: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    world = start(reset, hwwd)
    reset.path.unlink()
    make(reset.path)
    world.triggered()
    world.write(reset, hwwd, reset)
    world.later()
    assert hwwd.path.read_text() == "1"
    assert world.pending == {"ihub_reset_irq": 2}
    assert world.troubled
    assert world.stats.delivered == 1
    if make is kind_symlink:
        assert (irq / "elsewhere").read_text() == ""

    if make is kind_directory:
        reset.path.rmdir()
    else:
        reset.path.unlink()
    reset.path.touch()
    resets = closes(reset.path)
    world.later()
    assert resets() == 2
    assert world.pending == {}
    assert world.stats.delivered == 3
    assert [record.getMessage().split("; ")[0] for record in caplog.records][1:] == [f"{reset.path}: works again"]
    assert f"{reset.path}: cannot write: " in caplog.records[0].getMessage()


def test_a_device_does_not_block_the_proxy(start: StartWorld, reset: Signal) -> None:
    world = start(reset)
    leader, follower = os.openpty()
    try:
        reset.path.unlink()
        reset.path.symlink_to(os.ttyname(follower))
        world.write(reset)
        assert world.pending == {"ihub_reset_irq": 1}
    finally:
        os.close(leader)
        os.close(follower)


def test_pending_notifications_are_written_first(start: StartWorld, reset: Signal) -> None:
    world = start(reset)
    reset.path.unlink()
    reset.path.mkdir()
    world.write(reset)
    reset.path.rmdir()
    world.write(reset)
    assert world.pending == {"ihub_reset_irq": 2}


def test_pending_notifications_are_inherited(start: StartWorld, reset: Signal) -> None:
    world = start(reset)
    reset.path.unlink()
    reset.path.mkdir()
    world.write(reset, reset)
    reset.path.rmdir()
    successor = world.again()
    assert successor.open() == []
    assert successor.troubled
    resets = closes(reset.path)
    successor.restore()
    assert resets() == 2


def test_pending_notifications_of_a_removed_signal_are_dropped(
    start: StartWorld, reset: Signal, hwwd: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    world = start(reset, hwwd)
    reset.path.unlink()
    reset.path.mkdir()
    world.write(reset, reset)
    world.reload([hwwd])
    assert world.pending == {}
    assert world.stats.unknown == 2
    assert "no longer configured: 2 pending notifications dropped" in caplog.text


def test_notifications_read_before_a_reload_use_the_new_registers(
    start: StartWorld, reset: Signal, hwwd: Signal
) -> None:
    world = start(reset, hwwd)
    files = [world.registers.states.file_of(signal.name) for signal in (reset, hwwd, hwwd)]
    moved = attrs.evolve(hwwd, register="elsewhere")
    assert world.reload([moved]) == []
    world.registers.states.write(files)
    assert (world.stats.unknown, world.stats.delivered) == (1, 2)
    assert (reset.path.read_text(), hwwd.path.read_text(), moved.path.read_text()) == ("", "", "1")
    assert [file.count for file in [*files, world.registers.states.file_of(hwwd.name)]] == [0, 0, 0, 2]


def test_a_removed_state_register_is_recreated(start: StartWorld, irq: Path, reset: Signal, hwwd: Signal) -> None:
    world = start(reset, hwwd)
    reset.path.unlink()
    hwwd.path.rename(irq / "away")
    assert world.triggered() == []
    assert world.troubled
    assert world.later() == []
    assert reset.path.is_file()
    assert hwwd.path.is_file()
    assert not world.troubled


def test_every_write_counts(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    for number in range(1000):
        write(notify.path, str(number % 2))
    assert world.triggered() == ["redun_notify_irq"] * 1000


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC])
def test_a_close_without_a_write_counts(start: StartWorld, notify: Signal, flags: int) -> None:
    world = start(notify)
    os.close(os.open(notify.path, flags))
    assert world.triggered() == ["redun_notify_irq"]


def test_reading_and_changing_attributes_does_not_trigger(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    notify.path.read_text()
    os.utime(notify.path)
    notify.path.chmod(0o600)
    assert world.triggered() == []


def test_other_files_do_not_trigger(start: StartWorld, irq: Path, notify: Signal, reset: Signal) -> None:
    world = start(notify, reset)
    write(irq / "stranger")
    (irq / "stranger").rename(irq / "moved")
    (irq / "moved").unlink()
    write(reset.path)
    (irq.parent / "aside").mkdir()
    assert world.triggered() == []
    assert not world.troubled


def test_a_rename_onto_the_trigger_counts_once(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    for _ in range(3):
        remake(notify.path)
        assert world.triggered() == ["redun_notify_irq"]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_rename_right_after_our_own_creation_counts_once(start: StartWorld, notify: Signal) -> None:
    world = start(notify, opened=False)
    assert world.open() == []
    remake(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_removal_and_a_rename_count_once(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    notify.path.unlink()
    remake(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_several_renames_between_two_reads_count_each(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    for _ in range(3):
        remake(notify.path)
    write(notify.path)
    # The proxy was not yet watching the last file at this write, so the write and the last rename count as one.
    assert world.triggered() == ["redun_notify_irq"] * 3
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_removed_files_are_left_to_the_application_for_a_moment(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal
) -> None:
    world = start(notify, reset)
    notify.path.unlink()
    reset.path.unlink()
    assert world.triggered() + world.restore() == []
    assert list(irq.iterdir()) == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_removed_trigger_is_recreated_and_triggers_nothing(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    notify.path.unlink()
    assert world.triggered() == []
    assert world.troubled
    assert world.later() == []
    assert not world.troubled
    assert list(irq.iterdir()) == [notify.path]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_late_close_of_a_replaced_file_counts(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    late = os.open(notify.path, os.O_WRONLY)
    remake(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    os.close(late)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_replaced_file_is_forgotten_after_a_moment(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    notify.path.rename(irq / "away")
    assert world.triggered() == []
    assert world.later() == []
    assert not world.troubled
    write(irq / "away")
    assert world.triggered() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_trigger_that_reappears_at_once_stays_watched(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    notify.path.rename(irq / "away")
    assert world.triggered() == []
    (irq / "away").rename(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_trigger_that_reappears_late_stays_watched(
    start: StartWorld, clock: Clock, irq: Path, notify: Signal
) -> None:
    world = start(notify)
    notify.path.rename(irq / "away")
    assert world.triggered() == []
    clock.now += 2 * PATIENCE
    assert world.restore() == []
    assert notify.path.exists()
    (irq / "away").rename(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


@kinds
def test_a_trigger_replaced_by_another_type_of_file_is_reported_and_retried(
    start: StartWorld,
    notify: Signal,
    kind: str,
    make: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = start(notify)
    notify.path.unlink()
    make(notify.path)
    assert world.triggered() == []
    assert world.restore() == []
    assert world.troubled
    assert [record.getMessage() for record in caplog.records] == [
        f"{notify.path}: cannot watch: not a regular file but {kind}; retrying"
    ]
    caplog.set_level(logging.INFO)
    if kind == "a directory":
        notify.path.rmdir()
    else:
        notify.path.unlink()
    assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert caplog.records[-1].getMessage() == f"{notify.path}: works again"


def test_an_overflow_triggers_each_signal_once(
    start: StartWorld, notify: Signal, uart: Signal, reset: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    world = start(notify, uart, reset)
    assert world.take(world.registers.triggers.follow([Event(-1, ino.IN_Q_OVERFLOW, b"")])) == [notify.name, uart.name]
    assert world.stats.overflowed == 1
    assert "the inotify queue overflowed" in caplog.text


def test_an_overflow_of_the_kernel_queue_triggers_the_signal(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with (irq / "stranger").open("w"):
        for number in range(room // 2 + 10):
            (irq / f"x{number}").touch()
            (irq / f"x{number}").unlink()
    remake(notify.path)
    assert world.triggered() + world.restore() == ["redun_notify_irq"] * 2
    assert world.stats.overflowed == 1
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_close_of_an_unknown_watch_triggers_every_signal(start: StartWorld, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    event = Event(4711, ino.IN_CLOSE_WRITE, b"")
    assert world.take(world.registers.triggers.follow([event])) == [notify.name, uart.name]


@pytest.mark.parametrize("mask", [ino.IN_DELETE, ino.IN_MODIFY, ino.IN_IGNORED])
def test_other_events_of_an_unknown_watch_are_ignored(start: StartWorld, notify: Signal, mask: int) -> None:
    world = start(notify)
    assert world.take(world.registers.triggers.follow([Event(4711, mask, b"message_6_trig")])) == []


@pytest.mark.parametrize("mask", [ino.IN_CREATE, ino.IN_MOVED_TO])
def test_a_file_created_in_a_directory_no_longer_watched_triggers_by_its_name(
    start: StartWorld, notify: Signal, mask: int
) -> None:
    world = start(notify)
    events = [Event(4711, mask, name) for name in (b"message_6_trig", b"stranger")]
    assert world.take(world.registers.triggers.follow(events)) == [notify.name]


def test_a_replaced_directory_is_followed(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal, tmp_path: Path
) -> None:
    world = start(notify, reset)
    irq.rename(tmp_path / "away")
    irq.mkdir()
    assert world.triggered() == []
    assert world.later() == []
    world.write(reset)
    write(notify.path)
    assert reset.path.read_text() == "1"
    assert (tmp_path / "away" / reset.register).read_text() == ""
    assert world.triggered() == ["redun_notify_irq"]


def test_a_directory_replaced_with_a_written_trigger_counts(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    other = irq.with_name("other")
    other.mkdir()
    write(other / notify.register)
    irq.rename(irq.with_name("away"))
    other.rename(irq)
    assert world.triggered() + world.restore() == ["redun_notify_irq"]


def test_a_directory_replaced_while_it_is_opened_is_followed(
    start: StartWorld, irq: Path, notify: Signal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start(notify, opened=False)
    really_open = Directories._open

    def late(directories: Directories, directory: Directory, *, make: bool) -> None:
        really_open(directories, directory, make=make)
        patch.undo()
        # The parent directory is renamed before the proxy watches it, so no event reports the rename.
        irq.parent.rename(tmp_path / "above")
        irq.mkdir(parents=True)

    with monkeypatch.context() as patch:
        patch.setattr(Directories, "_open", late)
        finish_steps(world.registers.open(world.table))
    assert not world.troubled
    assert notify.path.exists()
    assert world.triggered() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_removed_directory_is_left_to_the_application_for_a_moment(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world = start(notify, reset)
    notify.path.unlink()
    reset.path.unlink()
    assert world.triggered() + world.restore() == []
    assert list(irq.iterdir()) == []
    irq.rmdir()
    assert world.triggered() + world.later() == []
    world.write(reset, reset)
    assert not irq.exists()
    assert world.pending == {"ihub_reset_irq": 2}
    irq.mkdir()
    write(notify.path)
    # The proxy reacts immediately, because it watches the parent directory.
    assert world.triggered() + world.restore() + world.triggered() == ["redun_notify_irq"]
    assert world.later() == []
    assert reset.path.read_text() == "1"
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" missing", " works again"]


@pytest.mark.parametrize("how", ["a minute", "a reload"])
def test_a_removed_directory_is_recreated_later(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal, how: str
) -> None:
    world = start(notify, reset)
    shutil.rmtree(irq.parent)
    assert world.triggered() + world.after(ABANDONED / 5) == []
    assert not irq.parent.exists()
    if how == "a minute":
        world.after(ABANDONED / 3)
    else:
        assert world.reload([notify, reset]) == []
    assert world.later() == []
    assert sorted(path.name for path in irq.iterdir()) == [reset.register, notify.register]
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert not world.troubled


def test_a_renamed_parent_directory_is_noticed(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    for _ in range(2):
        irq.parent.rename(irq.parent.with_name("away"))
        irq.mkdir(parents=True)
        assert world.triggered() == []
        assert world.later() == []
        write(notify.path)
        assert world.triggered() == ["redun_notify_irq"]
        (irq.parent.with_name("away") / irq.name / notify.register).unlink()
        (irq.parent.with_name("away") / irq.name).rmdir()
        irq.parent.with_name("away").rmdir()
        assert world.triggered() == []
        assert not world.troubled


def test_writes_to_a_replaced_directory_are_repeated(
    start: StartWorld, irq: Path, reset: Signal, tmp_path: Path
) -> None:
    world = start(reset)
    irq.rename(tmp_path / "away")
    irq.mkdir()
    # Write before the proxy reads the events of the rename.
    world.write(reset, reset)
    assert (tmp_path / "away" / reset.register).read_text() == "1"
    assert world.pending == {"ihub_reset_irq": 2}
    world.later()
    assert reset.path.read_text() == "1"
    assert world.pending == {}


def test_only_writes_to_the_replaced_directory_are_repeated(
    start: StartWorld, irq: Path, reset: Signal, tmp_path: Path
) -> None:
    other = Signal("other", IN, tmp_path / "other", "state")
    world = start(reset, other)
    irq.rename(tmp_path / "away")
    world.write(other, reset, other)
    assert world.pending == {"ihub_reset_irq": 1}
    assert other.path.read_text() == "1"


def test_a_write_before_the_directory_is_removed_and_recreated_is_repeated(
    start: StartWorld, irq: Path, reset: Signal, hwwd: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second write fails, which makes the proxy open the new directory."""
    world, is_replaced, write_one = start(reset, hwwd), False, StateFile.write

    def replaced_afterwards(file: StateFile) -> None:
        nonlocal is_replaced
        write_one(file)
        if not is_replaced:
            is_replaced = True
            shutil.rmtree(irq)
            irq.mkdir()
            for signal in (reset, hwwd):
                signal.path.touch()

    monkeypatch.setattr(StateFile, "write", replaced_afterwards)
    world.write(reset, hwwd, hwwd)
    assert world.pending == {"ihub_reset_irq": 1, "ihub_hwwd_irq": 2}
    world.later()
    assert [signal.path.read_text() for signal in (reset, hwwd)] == ["1", "1"]
    assert world.pending == {}


def test_a_missing_directory_is_reported_and_retried(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world = start(notify, reset)
    irq.rename(tmp_path / "away")
    irq.touch()
    assert world.triggered() == []
    world.write(reset)
    assert world.later() == []
    assert world.troubled
    assert world.pending == {"ihub_reset_irq": 1}
    irq.unlink()
    irq.mkdir()
    assert world.later() == []
    assert reset.path.read_text() == "1"
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{irq}: cannot open: Not a directory; retrying",
        f"{irq}: works again",
    ]


def test_a_directory_that_becomes_writable_is_watched(
    start: StartWorld, irq: Path, notify: Signal, reset: Signal
) -> None:
    world = start(notify, reset)
    other = irq.with_name("other")
    other.mkdir()
    other.chmod(0o555)
    irq.rename(irq.with_name("away"))
    other.rename(irq)
    with without_capability(CAP_DAC_OVERRIDE):
        assert world.triggered() + world.later() == []
        assert world.troubled
        irq.chmod(0o755)
        assert world.later() == []
        assert not world.troubled
        write(notify.path)
        assert world.triggered() == ["redun_notify_irq"]


def test_a_late_directory_that_becomes_writable_is_watched(
    start: StartWorld, clock: Clock, irq: Path, notify: Signal, reset: Signal
) -> None:
    world = start(notify, reset)
    irq.rename(irq.with_name("away"))
    irq.touch()
    assert world.triggered() + world.later() == []
    irq.unlink()
    irq.mkdir()
    irq.chmod(0o555)
    with without_capability(CAP_DAC_OVERRIDE):
        assert world.later() == []
        assert world.troubled
        irq.chmod(0o755)
        assert world.later() == []
        assert not world.troubled
    assert notify.path.is_file()
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_trigger_waits_for_write_permission(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    irq.chmod(0o555)
    with without_capability(CAP_DAC_OVERRIDE):
        irq.chmod(0o755)
        notify.path.unlink()
        irq.chmod(0o555)
        assert world.triggered() + world.later() == []
        assert world.troubled
        irq.chmod(0o755)
        assert world.later() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_nested_directories_are_followed(start: StartWorld, tmp_path: Path) -> None:
    outer = Signal("outer", OUT, tmp_path / "a", "trig")
    inner = Signal("inner", OUT, tmp_path / "a" / "b", "trig")
    world = start(outer, inner)
    (tmp_path / "a").rename(tmp_path / "away")
    inner.directory.mkdir(parents=True)
    assert world.triggered() == []
    assert world.later() == []
    write(inner.path)
    write(outer.path)
    assert world.triggered() == ["inner", "outer"]


def test_an_unreadable_parent_directory_is_accepted(start: StartWorld, irq: Path, notify: Signal) -> None:
    irq.parent.mkdir()
    irq.mkdir()
    irq.parent.chmod(0o311)
    try:
        with without_capability(CAP_DAC_OVERRIDE), without_capability(CAP_DAC_READ_SEARCH):
            world = start(notify)
    finally:
        irq.parent.chmod(0o755)
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]


def test_a_reload_keeps_pending_events_of_kept_signals(
    start: StartWorld, notify: Signal, uart: Signal, reset: Signal
) -> None:
    world = start(notify, reset)
    write(notify.path)
    assert world.reload([notify, uart, reset]) == []
    write(notify.path)
    write(uart.path)
    assert world.triggered() == ["redun_notify_irq", "redun_notify_irq", "uart_irq"]


def test_a_reload_does_not_trigger_existing_files(
    start: StartWorld, irq: Path, notify: Signal, uart: Signal, hwwd: Signal, tmp_path: Path
) -> None:
    world = start(notify)
    write(uart.path, "before")
    write(hwwd.path, "before")
    elsewhere = Signal("elsewhere", OUT, tmp_path / "elsewhere", "trig")
    elsewhere.directory.mkdir()
    write(elsewhere.path, "before")
    assert world.reload([notify, uart, hwwd, elsewhere]) == []
    assert world.triggered() == []
    assert [signal.path.read_text() for signal in (uart, hwwd, elsewhere)] == ["before"] * 3
    write(elsewhere.path)
    assert world.triggered() == ["elsewhere"]


def test_a_reload_removes_signals(start: StartWorld, notify: Signal, uart: Signal, tmp_path: Path) -> None:
    elsewhere = Signal("elsewhere", OUT, tmp_path / "elsewhere", "trig")
    world = start(notify, uart, elsewhere)
    write(uart.path)
    assert world.reload([notify]) == []
    assert world.triggered() == []
    write(notify.path)
    assert world.triggered() == ["redun_notify_irq"]
    for signal in (uart, elsewhere):
        write(signal.path)
        remake(signal.path)
    assert world.triggered() == []


def test_a_reload_does_not_forget_missing_files(start: StartWorld, irq: Path, notify: Signal, reset: Signal) -> None:
    world = start(notify, reset)
    for vanish in (notify.path.unlink, lambda: irq.rename(irq.with_name("away"))):
        vanish()
        assert world.triggered() == []
        world.reload([notify, reset])
        while world.troubled:
            assert world.later() == []
        assert notify.path.exists()
        write(notify.path)
        assert world.triggered() == ["redun_notify_irq"]


def test_a_removed_signal_is_unwatched_after_a_moment(start: StartWorld, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    world.reload([notify])
    assert world.later() == []
    write(uart.path)
    assert world.events_of(uart.register) == []
    assert not world.troubled


def test_a_signal_removed_and_added_again_stays_watched(start: StartWorld, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    world.reload([notify])
    assert world.reload([notify, uart]) == []
    assert world.later() == []
    write(uart.path)
    assert world.triggered() == ["uart_irq"]


def test_a_reload_renames_the_signal_of_a_trigger(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    assert world.reload([Signal("renamed", OUT, irq, notify.register)]) == []
    write(notify.path)
    assert world.triggered() == ["renamed"]


def test_a_reload_with_impossible_registers_is_refused(
    start: StartWorld, irq: Path, notify: Signal, tmp_path: Path
) -> None:
    world = start(notify)
    (tmp_path / "file").touch()
    (irq / "directory").mkdir()
    fine = Signal("fine", OUT, tmp_path / "fine", "trig")
    for wrong in (
        Signal("late", OUT, tmp_path / "file", "trig"),
        Signal("late", OUT, irq, "directory"),
        Signal("late", IN, irq, "directory"),
    ):
        with pytest.raises(ConfigError):
            world.reload([fine, wrong])
        assert world.registers.table.signals == (notify,)
        write(notify.path)
        write(fine.path)
        assert world.triggered() == ["redun_notify_irq"]
        assert world.later() == []
        assert not world.troubled
    write(fine.path)
    assert world.events_of(fine.register) == []


def test_events_between_two_processes_are_found(start: StartWorld, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    successor = world.again()
    write(notify.path)
    write(notify.path)
    assert successor.open() == ["redun_notify_irq"] * 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_trigger_replaced_between_two_processes_counts(
    start: StartWorld, notify: Signal, uart: Signal, times: int
) -> None:
    successor = start(notify, uart).again()
    for _ in range(times):
        remake(notify.path)
    assert successor.open() == ["redun_notify_irq"] * times
    write(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]
    # The successor has recorded the new watch, so the next process reports nothing.
    assert successor.again().open() == []


def test_a_trigger_found_before_its_event_is_read_counts_once(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    notify.path.unlink()
    assert world.triggered() == []
    remake(notify.path)
    assert world.restore() == []
    assert world.triggered() == ["redun_notify_irq"]
    assert world.later() == []


def test_a_recreated_trigger_counts_once_it_can_be_watched(
    start: StartWorld, notify: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start(notify)

    def refuse(_inotify: Inotify, path: str, _mask: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    notify.path.unlink()
    write(notify.path)
    with monkeypatch.context() as limit:
        limit.setattr(Inotify, "watch", refuse)
        assert world.triggered() + world.restore() == []
    assert world.restore() == ["redun_notify_irq"]
    assert world.later() == []


def test_a_trigger_recreated_between_two_processes_counts(start: StartWorld, notify: Signal) -> None:
    successor = start(notify).again()
    notify.path.unlink()
    write(notify.path)
    assert successor.open() == ["redun_notify_irq"]
    remake(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]
    assert successor.again().open() == []


def test_a_reload_drops_found_triggers_of_removed_signals(start: StartWorld, notify: Signal, uart: Signal) -> None:
    successor = start(notify, uart).again()
    notify.path.unlink()
    write(notify.path)
    finish_steps(successor.registers.open(successor.table))
    assert successor.reload([uart]) == []
    assert successor.triggered() == []


def test_a_trigger_removed_between_two_processes_does_not_count(start: StartWorld, notify: Signal) -> None:
    successor = start(notify).again()
    notify.path.unlink()
    assert successor.open() + successor.later() == []
    write(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]


def test_a_trigger_created_in_a_directory_that_was_then_replaced_counts(
    start: StartWorld, irq: Path, notify: Signal
) -> None:
    world = start(notify)
    irq.rename(irq.with_name("first"))
    irq.mkdir()
    assert world.triggered() == []
    # The application creates and writes the trigger. The proxy is killed before it reads the event for this write.
    write(notify.path)
    successor = world.again()
    irq.rename(irq.with_name("second"))
    irq.mkdir()
    assert successor.open() == [notify.name]


@pytest.mark.parametrize("pid", ["1", str(os.getpid())], ids=["another PID", "the same PID"])
@pytest.mark.parametrize("then", ["kept", "directory moved", "directory removed", "trigger removed"])
def test_triggers_that_a_killed_process_created_trigger_nothing(
    start: StartWorld, irq: Path, notify: Signal, uart: Signal, pid: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start(notify, uart, opened=False)
    with monkeypatch.context() as before:
        before.setattr("inco_trio.registers.directory.temporary_name", lambda: f".inco-trio.{pid}")
        finish_steps(world.registers.open(world.table))
    # The process is killed before it reads the events of the files that it created.
    successor = world.again()
    if then == "directory moved":
        irq.rename(irq.with_name("away"))
    elif then == "directory removed":
        shutil.rmtree(irq)
    elif then == "trigger removed":
        notify.path.unlink()
    assert successor.open() + successor.later() == []
    write(notify.path)
    assert successor.triggered() == [notify.name]
    third = successor.again()
    assert third.open() == []
    # An application creates the next file, so its creation counts as a notification.
    irq.rename(irq.with_name("away again"))
    irq.mkdir()
    write(uart.path)
    assert third.triggered() + third.later() == [uart.name]


def test_a_trigger_that_an_application_created_at_the_same_time_counts_after_a_crash(
    start: StartWorld, irq: Path, notify: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start(notify)
    notify.path.unlink()
    assert world.triggered() == []
    link = os.link

    def link_too_late(*names: str, **directories: Any) -> None:
        write(notify.path)
        link(*names, **directories)

    world.clock.now += EMPTIED
    with monkeypatch.context() as application:
        application.setattr(os, "link", link_too_late)
        assert world.restore() == []
    successor = world.again()
    irq.rename(irq.with_name("away"))
    irq.mkdir()
    assert successor.open() == [notify.name]


def test_a_trigger_created_and_removed_before_the_killed_process_created_it_counts(
    start: StartWorld, notify: Signal
) -> None:
    world = start(notify)
    notify.path.unlink()
    assert world.triggered() == []
    write(notify.path)
    notify.path.unlink()
    world.clock.now += EMPTIED
    assert world.restore() == []
    assert notify.path.exists()
    successor = world.again()
    assert successor.open() + successor.later() == [notify.name]


def test_watches_of_an_earlier_configuration_are_removed(start: StartWorld, notify: Signal, uart: Signal) -> None:
    successor = start(notify, uart).again([notify])
    assert successor.open() == []
    write(uart.path)
    assert successor.triggered() + successor.later() == []
    write(uart.path)
    assert successor.events_of(uart.register) == []
    write(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]


def test_a_directory_of_an_earlier_configuration_triggers_nothing(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    # Configure a trigger of the same name in another directory.
    elsewhere = Signal("redun_notify_irq", OUT, irq.with_name("elsewhere"), notify.register)
    successor = world.again([elsewhere])
    assert successor.open() == []
    remake(notify.path)
    assert successor.triggered() + successor.later() == []
    write(elsewhere.path)
    assert successor.triggered() == ["redun_notify_irq"]


def test_a_directory_of_an_earlier_configuration_that_is_configured_again_stays_watched(
    start: StartWorld, irq: Path, notify: Signal, uart: Signal
) -> None:
    world = start(notify)
    successor = world.again([Signal("uart_irq", OUT, irq.parent.with_name("elsewhere"), uart.register)])
    assert successor.open() == []
    assert successor.reload([notify]) + successor.later() == []
    irq.rename(irq.with_name("away"))
    irq.mkdir()
    write(notify.path)
    assert set(successor.triggered() + successor.later()) == {"redun_notify_irq"}
    write(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]


def test_an_unrecorded_watch_may_be_any_trigger(start: StartWorld, irq: Path, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    # Simulate a process that is killed after a rename, before it records the watch of the new file.
    remake(notify.path)
    world.registers.triggers.follow(world.events())
    write(notify.path)
    successor = world.again()
    assert successor.open() == ["redun_notify_irq"] * 2


def test_a_directory_configured_by_another_path_stays_watched(start: StartWorld, irq: Path, notify: Signal) -> None:
    world = start(notify)
    (irq.parent / "alias").symlink_to(irq)
    alias = Signal(notify.name, OUT, irq.parent / "alias", notify.register)
    successor = world.again([alias])
    assert successor.open() == []
    assert successor.later() == []
    # inotify has one watch per inode: if the old path's watch were removed, the new path would not be watched.
    write(notify.path)
    assert successor.triggered() == ["redun_notify_irq"]


@pytest.mark.parametrize("vanish", ["missing", "a directory"])
def test_a_reload_may_remove_a_missing_trigger(start: StartWorld, notify: Signal, uart: Signal, vanish: str) -> None:
    world = start(notify, uart)
    notify.path.unlink()
    if vanish == "a directory":
        notify.path.mkdir()
    for read in (False, True):
        if read:
            assert world.triggered() == []
        assert world.reload([uart]) == []
        assert world.reload([uart, notify] if vanish == "missing" else [uart]) == []
    assert world.triggered() + world.later() == []
    write(uart.path)
    assert world.triggered() == ["uart_irq"]
    assert not world.troubled


def test_one_directory_by_two_paths_is_refused(start: StartWorld, irq: Path, notify: Signal, uart: Signal) -> None:
    irq.mkdir(parents=True)
    alias = irq.with_name("alias")
    alias.symlink_to(irq)
    other = Signal(uart.name, OUT, alias, uart.register)
    with pytest.raises(ConfigError, match=f"^{alias}: the same directory as {irq} .use one path for both; "):
        start(notify, other, opened=False).open()
    world = start(notify)
    with pytest.raises(ConfigError, match="the same directory as"):
        world.reload([notify, other])
    write(notify.path)
    assert world.triggered() == [notify.name]


def test_a_directory_that_becomes_a_link_to_another_is_reported_once(
    start: StartWorld, irq: Path, notify: Signal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Signal("other", OUT, tmp_path / "other", "trig")
    world = start(notify, other)
    shutil.rmtree(other.directory)
    assert world.triggered() == []
    other.directory.symlink_to(irq)
    caplog.clear()
    assert world.triggered() + world.later() == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{other.directory}: cannot open: the same directory as {irq}; retrying"
    ]
    remake(notify.path)
    assert world.triggered() == [notify.name]
    other.directory.unlink()
    other.directory.mkdir()
    assert world.triggered() + world.later() == []
    write(other.path)
    assert world.triggered() == ["other"]


def test_two_triggers_that_are_one_file_are_refused(
    start: StartWorld, irq: Path, notify: Signal, uart: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    irq.mkdir(parents=True)
    notify.path.touch()
    uart.path.hardlink_to(notify.path)
    with pytest.raises(ConfigError, match=f"^{notify.path}: has 2 names .hard links. .replace it with a new file, or "):
        start(notify, uart, opened=False).open()
    uart.path.unlink()
    world = start(notify, uart)
    uart.path.unlink()
    uart.path.hardlink_to(notify.path)
    # The proxy did not create this hard link, so it must report the link and write nothing through it.
    assert world.triggered() + world.restore() == []
    assert f"{uart.path}: cannot watch: has 2 names (hard links); retrying" in caplog.text
    write(uart.path)
    assert world.triggered() == [notify.name]
    remake(uart.path)
    assert world.triggered() + world.later() == [uart.name]
    write(notify.path)
    write(uart.path)
    assert world.triggered() == [notify.name, uart.name]


def test_a_trigger_renamed_onto_another_counts_once(start: StartWorld, notify: Signal, uart: Signal) -> None:
    world = start(notify, uart)
    notify.path.rename(uart.path)
    assert world.triggered() == [uart.name]
    write(uart.path)
    assert world.triggered() == [uart.name]
    assert world.later() == []
    write(notify.path)
    write(uart.path)
    assert world.triggered() == [notify.name, uart.name]


def test_a_missing_trigger_noticed_while_restoring_others_is_recreated(
    start: StartWorld, notify: Signal, uart: Signal
) -> None:
    world = start(notify, uart)
    uart.path.unlink()
    assert world.triggered() == []
    # The proxy finds this file at the path of the other trigger before it reads the events of the rename.
    notify.path.rename(uart.path)
    world.clock.now += PATIENCE
    world.restore()
    world.triggered()
    world.later()
    assert notify.path.exists()
    write(notify.path)
    write(uart.path)
    assert world.triggered() == ["redun_notify_irq", "uart_irq"]


def test_a_trigger_recreated_and_blocked_at_once_counts(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    notify.path.unlink()
    write(notify.path)
    notify.path.unlink()
    notify.path.mkdir()
    assert world.triggered() == ["redun_notify_irq"]
    notify.path.rmdir()
    assert world.later() == []
    notify.path.unlink()
    notify.path.mkdir()
    notify.path.rmdir()
    notify.path.mkdir()
    assert world.triggered() + world.later() == []
    notify.path.rmdir()
    notify.path.mkdir()
    notify.path.rmdir()
    assert world.triggered() + world.later() == []


@pytest.mark.parametrize("first", ["directory", "file", "renamed file"])
def test_a_trigger_created_and_removed_before_the_proxy_creates_it_counts(
    start: StartWorld, notify: Signal, first: str
) -> None:
    """The first event in the queue, about the earlier file at this path, must not hide the events that follow it."""
    world = start(notify)
    notify.path.unlink()
    if first == "directory":
        notify.path.mkdir()
    assert world.triggered() == []
    if first == "directory":
        notify.path.rmdir()
    elif first == "file":
        write(notify.path)
        notify.path.unlink()
    else:
        write(notify.path)
        notify.path.rename(notify.path.with_name("away"))
    write(notify.path)
    notify.path.unlink()
    world.clock.now += EMPTIED
    # The proxy creates the file before it reads the events.
    assert world.restore() == []
    assert notify.path.exists()
    assert set(world.triggered() + world.later()) == {notify.name}
    write(notify.path)
    assert world.triggered() == [notify.name]


def test_a_write_that_fails_while_its_directory_is_restored_is_retried(
    start: StartWorld, hwwd: Signal, reset: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, full, write_there = start(hwwd, reset), True, os.write

    def write_if_there_is_room(fd: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_there(fd, data)

    monkeypatch.setattr("os.write", write_if_there_is_room)
    world.write(reset)
    full = False
    for _ in world.registers.restore():
        if world.pending:
            continue
        # Let another task run.
        full = True
        world.write(hwwd)
    assert world.pending == {"ihub_hwwd_irq": 1}
    full = False
    assert world.later() == []
    assert world.pending == {}


def test_a_frame_read_before_a_reload_is_written_to_the_moved_register(
    start: StartWorld, irq: Path, reset: Signal, tmp_path: Path
) -> None:
    world = start(reset)
    moved = Signal(reset.name, IN, tmp_path / "elsewhere", "other_state")
    assert world.reload([moved]) == []
    world.write(reset)
    assert moved.path.read_text() == "1"
    assert reset.path.read_text() == ""
    assert [path.name for path in moved.directory.iterdir()] == ["other_state"]


def test_our_own_files_in_a_removed_directory_trigger_nothing(
    start: StartWorld, irq: Path, notify: Signal, tmp_path: Path
) -> None:
    world = start(notify, opened=False)
    finish_steps(world.registers.open(world.table))
    moved = Signal(notify.name, OUT, tmp_path / "elsewhere", notify.register)
    # The proxy has not yet read the events for the creation of the first trigger.
    assert world.reload([moved]) == []
    assert world.triggered() + world.later() == []
    write(moved.path)
    assert world.triggered() == [notify.name]


def test_a_directory_inside_a_removed_one_is_still_followed(start: StartWorld, tmp_path: Path) -> None:
    outer = Signal("outer", OUT, tmp_path / "a", "trig")
    inner = Signal("inner", OUT, tmp_path / "a" / "b", "trig")
    world = start(outer, inner)
    assert world.reload([inner]) == []
    assert world.triggered() + world.later() == []
    (tmp_path / "a").rename(tmp_path / "away")
    inner.directory.mkdir(parents=True)
    assert world.triggered() + world.later() == []
    write(inner.path)
    assert world.triggered() == ["inner"]
    # No signal uses the outer directory any more, so its events are ignored.
    (tmp_path / "a" / "stranger").touch()
    assert world.events_of("stranger") == []


def test_retries_do_not_count_as_notifications(
    start: StartWorld, reset: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_write = os.write

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world = start(reset)
    resets = closes(reset.path)
    monkeypatch.setattr("os.write", full)
    world.write(reset, reset)
    world.after(1.0)
    monkeypatch.setattr("os.write", really_write)
    assert world.stats.write_failures > 2
    assert world.pending == {"ihub_reset_irq": 2}
    world.later()
    assert resets() == 2
    assert world.pending == {}


def test_a_file_replaced_while_the_disk_is_full_is_written(
    start: StartWorld, reset: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start(reset)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda _fd, _data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        world.write(reset)
    remake(reset.path, "0")
    assert world.triggered() == []
    world.later()
    assert reset.path.read_text() == "1"
    assert world.pending == {}


@pytest.mark.parametrize("register", ["trigger", "state"])
@kinds
def test_each_register_that_is_not_a_regular_file_is_refused_at_start(
    start: StartWorld,
    irq: Path,
    notify: Signal,
    reset: Signal,
    register: str,
    kind: str,
    make: Callable[[Path], None],
) -> None:
    irq.mkdir(parents=True)
    signal = notify if register == "trigger" else reset
    make(signal.path)
    with pytest.raises(ConfigError) as caught:
        start(notify, reset, opened=False).open()
    assert (
        str(caught.value) == f"{signal.path}: not a regular file but {kind} (remove it, or configure another register)"
    )


def test_no_file_is_created_in_a_directory_that_is_being_emptied(
    start: StartWorld, clock: Clock, irq: Path, notify: Signal, uart: Signal, reset: Signal
) -> None:
    world = start(notify, uart, reset)
    strangers = [irq / str(number) for number in range(20)]
    for path in strangers:
        path.touch()
    for path in (notify.path, uart.path, reset.path, *strangers):
        path.unlink()
        # After each removal, wait for less than PATIENCE: the next removal restarts the proxy's waiting time.
        clock.now += 0.8 * PATIENCE
        assert world.triggered() + world.restore() == []
        world.write(reset)
        assert not notify.path.exists()
    irq.rmdir()
    assert world.pending == {"ihub_reset_irq": 21}


def test_a_found_trigger_waits_only_for_events_already_queued(start: StartWorld, notify: Signal, uart: Signal) -> None:
    successor = start(notify, uart).again()
    for _ in range(3):
        write(uart.path)
    notify.path.unlink()
    write(notify.path)
    # Events arrive faster than the proxy reads them, so the queue is never empty.
    finish_steps(successor.registers.open(successor.table))
    names: list[str] = []
    for _ in range(20):
        for _ in range(3):
            write(uart.path)
        buffer = memoryview(bytearray(64))
        names += successor.take(
            successor.registers.triggers.follow(parse_events(buffer[: successor.inotify.read_into(buffer)]))
        )
        assert successor.inotify.queued
    assert names.count(notify.name) == 1
    assert successor.triggered().count(notify.name) == 0


def test_many_blocked_triggers_are_reported_in_one_line(
    start: StartWorld, irq: Path, notify: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    many = [Signal(f"s{number}", OUT, irq, f"t{number}") for number in range(300)]
    world = start(*many)
    caplog.set_level(logging.INFO)
    for signal in many:
        signal.path.unlink()
        signal.path.mkdir()
    assert world.triggered() + world.later() == []
    assert len(caplog.records) == 1
    assert "t0 (and 299 more in this directory): cannot watch: not a regular file but a directory" in caplog.text
    for signal in many:
        signal.path.rmdir()
    assert world.triggered() + world.later() == []
    assert caplog.records[-1].getMessage() == f"{many[0].path}: works again"
    write(many[7].path)
    assert world.triggered() == ["s7"]


def test_a_trigger_works_again_only_once_it_is_watched(
    start: StartWorld, notify: Signal, uart: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    """Replace the trigger with a directory, then with a hard link, and then delete it."""
    world = start(notify, uart)
    caplog.set_level(logging.INFO)
    other = notify.path.with_name("other")
    other.touch()
    notify.path.unlink()
    notify.path.mkdir()
    world.triggered()
    world.restore()
    notify.path.rmdir()
    notify.path.hardlink_to(other)
    world.triggered()
    world.restore()
    failed = [
        f"{notify.path}: cannot watch: {reason}; retrying"
        for reason in ("not a regular file but a directory", "has 2 names (hard links)")
    ]
    assert [record.getMessage() for record in caplog.records] == failed
    notify.path.unlink()
    world.triggered()
    world.restore()
    assert [record.getMessage() for record in caplog.records] == failed  # The proxy has not created the file yet.
    world.later()
    assert [record.getMessage() for record in caplog.records] == [*failed, f"{notify.path}: works again"]


def test_a_refused_trigger_that_is_removed_from_the_table_does_not_work_again(
    start: StartWorld, notify: Signal, uart: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    world = start(notify, uart)
    caplog.set_level(logging.INFO)
    notify.path.unlink()
    notify.path.mkdir()
    assert world.triggered() + world.later() == []
    assert world.reload([uart]) + world.later() == []
    assert "works again" not in caplog.text


def test_only_the_directory_of_a_written_file_is_checked(
    start: StartWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [Signal(f"s{number}", IN, tmp_path / f"d{number}", "state") for number in range(50)]
    world = start(*states)
    looks: list[bytes] = []
    really_stat = os.stat

    def noted(path: bytes, **how: Any) -> os.stat_result:
        looks.append(path)
        return really_stat(path, **how)

    monkeypatch.setattr("os.stat", noted)
    world.write(states[3])
    assert looks == [b"state", os.fsencode(states[3].directory)]
    # The proxy checked the file at the first write, and no event has reported a change since then.
    world.write(states[3])
    world.write(states[3], states[3])
    assert looks[2:] == [os.fsencode(states[3].directory)] * 2


def test_pending_notifications_are_written_in_turns(start: StartWorld, reset: Signal) -> None:
    world = start(reset)
    reset.path.unlink()
    world.write(*[reset] * 10_000)
    reset.path.touch()
    world.clock.now += EMPTIED
    assert sum(1 for _ in world.registers.restore()) >= 10_000 / 64
    assert world.pending == {}


def test_registers_work_without_proc(
    start: StartWorld, notify: Signal, reset: Signal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("directories", "directory"):
        monkeypatch.setattr(f"inco_trio.registers.{module}.proc_is_mounted", lambda: False)
    world = start(notify, reset)
    write(notify.path)
    world.write(reset)
    assert world.triggered() == [notify.name]
    assert reset.path.read_text() == "1"


def nested(tmp_path: Path) -> tuple[Signal, Signal]:
    """Return two triggers. The directory of the first is the parent of the second one's directory."""
    return Signal("outer", OUT, tmp_path / "a", "trig"), Signal("inner", OUT, tmp_path / "a" / "b", "trig")


def replace_and_write(path: Path) -> None:
    """Move a trigger file away and write a new one, which only an event of the directory reports."""
    path.rename(path.with_name("away"))
    write(path)


def test_a_directory_moved_to_the_path_of_another_one_is_watched(start: StartWorld, tmp_path: Path) -> None:
    one, two = (Signal(name, OUT, tmp_path / name, "trig") for name in ("one", "two"))
    world = start(one, two)
    shutil.rmtree(two.directory)
    assert world.triggered() + world.after(1) == []
    one.directory.rename(two.directory)
    world.triggered()
    world.later()
    replace_and_write(two.path)
    assert world.triggered() + world.later() == ["two"]
    two.directory.rename(tmp_path / "away")
    two.directory.mkdir()
    write(two.path)
    assert world.triggered() + world.later() == ["two"]


def test_a_replaced_parent_that_is_an_irq_directory_stays_watched(start: StartWorld, tmp_path: Path) -> None:
    outer, inner = nested(tmp_path)
    world = start(outer, inner)
    shutil.rmtree(inner.directory)
    assert world.triggered() + world.after(1) == []
    outer.directory.rename(tmp_path / "away")
    inner.directory.mkdir(parents=True)
    world.triggered()
    world.later()
    replace_and_write(outer.path)
    assert world.triggered() + world.later() == ["outer"]


def test_a_directory_that_was_untrusted_for_a_while_is_looked_at_again(start: StartWorld, tmp_path: Path) -> None:
    outer, inner = nested(tmp_path)
    world = start(outer, inner)
    outer.directory.chmod(0o1777)
    world.triggered()
    world.later()
    replace_and_write(outer.path)
    world.triggered()
    outer.directory.chmod(0o755)
    world.triggered()
    world.later()
    write(outer.path)
    assert world.triggered() + world.later() == ["outer"]


def test_a_shared_directory_that_was_moved_away_and_back_is_looked_at_again(
    clock: Clock, irq: Path, notify: Signal
) -> None:
    irq.mkdir(parents=True)
    world = World(clock, [notify], shared=(irq,))
    with world.ending:
        world.open()
        away = irq.with_name("away")
        irq.rename(away)
        world.triggered()
        replace_and_write(away / notify.register)
        away.rename(irq)
        assert world.triggered() + world.later() == [notify.name]
        write(notify.path)
        assert world.triggered() == [notify.name]


def test_files_that_come_and_go_leave_no_watches_behind(start: StartWorld, notify: Signal) -> None:
    world = start(notify)
    for _ in range(20):
        notify.path.unlink()
        write(notify.path)
        assert world.triggered() == [notify.name]
    assert world.later() == []
    triggers = world.registers.triggers
    assert list(triggers._by_wd) == [triggers.by_path[notify.path].wd]


def test_a_directory_at_the_path_of_a_trigger_in_a_replaced_directory_triggers_nothing(
    start: StartWorld, irq: Path, notify: Signal
) -> None:
    world = start(notify)
    notify.path.unlink()
    notify.path.mkdir()
    successor = world.again()
    irq.rename(irq.with_name("away"))
    irq.mkdir()
    assert successor.open() + successor.later() == []


@pytest.mark.parametrize("another", [False, True])
def test_a_trigger_written_between_two_processes_that_create_it_counts(
    start: StartWorld, notify: Signal, another: bool
) -> None:
    """Two processes create the file and end before they read an event."""
    world = start(notify)
    notify.path.unlink()
    for _ in range(2):
        world = world.again()
        finish_steps(world.registers.open(world.table))
        assert notify.path.exists()
        if another:
            notify.path.unlink()
            write(notify.path)
        notify.path.unlink()
    world = world.again()
    assert set(world.open() + world.later()) == ({notify.name} if another else set())


def test_a_trigger_written_between_two_files_of_the_proxy_counts(
    start: StartWorld, clock: Clock, notify: Signal
) -> None:
    world = start(notify)
    notify.path.unlink()
    assert world.triggered() == []
    clock.now += EMPTIED
    world.restore()
    notify.path.unlink()
    write(notify.path)
    notify.path.unlink()
    # A changed mount makes the proxy look at the file before it reads the events.
    world.registers.mounts_changed()
    world.restore()
    clock.now += EMPTIED
    world.restore()
    assert set(world.triggered()) == {notify.name}
