"""Tests of the rules for trusted paths, and of attacks by ordinary users who own part of a path."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import itertools
import json
import logging
import math
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from inco_trio import trust as trust_module
from inco_trio.board_files import refuse_shared
from inco_trio.capture import recording
from inco_trio.capture.recording import Recorder
from inco_trio.cli import plot
from inco_trio.cli.parser import parse
from inco_trio.cli.plot import _save
from inco_trio.cli.run import _load
from inco_trio.config import Config
from inco_trio.control.client import Client
from inco_trio.control.protocol import ReloadRequest
from inco_trio.doctor.register_files import trusted
from inco_trio.doctor.result import Level
from inco_trio.errors import ConfigError, PermissionDeniedError, ResourceError
from inco_trio.frame import decode
from inco_trio.linux import users
from inco_trio.linux.files import TARGETS_MAX, fuse_user, open_output
from inco_trio.linux.inotify import IN_ATTRIB
from inco_trio.linux.libc import libc
from inco_trio.linux.process import overflow_uid
from inco_trio.registers import directories
from inco_trio.registers.diagnose import unreported_type
from inco_trio.registers.directories import ABANDONED
from inco_trio.service.launch import Launched
from inco_trio.signals import Direction, Signal, builtin_signals
from inco_trio.trust import Trust, UnfitFileError, open_trusted
from netns.hang import HANG
from tests.support_acl import add_acl
from tests.support_registers import Clock, World, finish_steps

pytestmark = pytest.mark.netns  # Changing owners needs root.

STRANGER, OWNER, GROUP = 12345, 12346, 12347
RENAME_EXCHANGE = 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    made.install(monkeypatch)
    return made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def state(home: Path) -> Signal:
    return Signal("ihub_reset_irq", Direction.INBOUND, home / "board" / "irq", "state")


@pytest.fixture
def trigger(state: Signal) -> Signal:
    return Signal("redun_notify_irq", Direction.OUTBOUND, state.directory, "trig")


@pytest.fixture
def world(clock: Clock, state: Signal, trigger: Signal) -> Iterator[World]:
    made = World(clock, [state, trigger])
    yield made
    made.ending.close()


def give(path: Path, uid: int = STRANGER, mode: int = 0o755) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


def refusal(path: Path, trust: Trust | None = None) -> str | None:
    """Return the reason why a directory is not trusted, or None if it is trusted."""
    try:
        fd, _ = open_trusted(path, trust or Trust())
    except UnfitFileError as error:
        return str(error.strerror).removeprefix("not trusted: ")
    os.close(fd)
    return None


def foreign_parent(irq: Path) -> Path:
    irq.mkdir(parents=True)
    return give(irq.parent)


def foreign_directory(irq: Path) -> Path:
    return give(irq)


def sticky_parent(irq: Path) -> Path:
    give(irq)
    irq.parent.chmod(0o1777)
    return irq


def symlink_of_a_stranger(irq: Path) -> Path:
    irq.parent.mkdir()
    give(irq.with_name("real"), 0)
    irq.symlink_to("real")
    os.lchown(irq, STRANGER, STRANGER)
    return irq


def symlink_into_a_foreign_directory(irq: Path) -> Path:
    foreign = give(irq.parent / "foreign")
    give(foreign / "irq", 0)
    irq.symlink_to(foreign / "irq")
    return foreign


@pytest.mark.parametrize(
    "prepare",
    [foreign_parent, foreign_directory, sticky_parent, symlink_of_a_stranger, symlink_into_a_foreign_directory],
)
def test_a_path_through_a_stranger_is_refused(world: World, state: Signal, prepare: Callable[[Path], Path]) -> None:
    component = prepare(state.directory)
    before = sorted(state.directory.iterdir())
    with pytest.raises(ConfigError) as caught:
        world.open()
    assert str(caught.value) == (
        f"{state.directory}: not trusted: {component} belongs to uid {STRANGER} "
        f"(run the proxy as this user, or trust this user with --irq-owner {STRANGER})"
    )
    assert sorted(state.directory.iterdir()) == before


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777], ids=oct)
@pytest.mark.parametrize("where", ["itself", "above"])
def test_a_directory_that_others_may_change_is_refused(world: World, state: Signal, mode: int, where: str) -> None:
    state.directory.mkdir(parents=True)
    place = state.directory if where == "itself" else state.directory.parent
    os.chown(place, 0, GROUP)
    place.chmod(mode)
    if (mode, where) == (0o1777, "above"):
        world.open()  # In a sticky directory, only root and the owner may rename an entry.
        return
    with pytest.raises(ConfigError) as caught:
        world.open()
    assert str(caught.value) == (
        f"{state.directory}: not trusted: other users may write to {place} (mode {mode:04o}) "
        f"(chmod go-w {place}, or use a directory below /run)"
    )


def test_a_private_group_may_write(home: Path) -> None:
    home.chmod(0o775)  # The group root has no members.
    assert refusal(home) is None
    add_acl(home, STRANGER)
    assert refusal(home) == f"the ACL of {home} lets other users write to it"


def test_a_private_group_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    root = pwd.getpwuid(0)
    assert users.is_private_group(root.pw_gid, 0)
    assert not users.is_private_group(STRANGER, 0)
    assert not users.is_private_group(root.pw_gid, STRANGER)
    assert users.user_name(0) == "root (uid 0)"


def test_the_primary_group_of_two_users_is_not_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """`useradd -g app other` adds no member to the group."""
    accounts = {name: pwd.struct_passwd((name, "x", uid, OWNER, "", "/", "/bin/sh")) for name, uid in
                (("app", OWNER), ("app2", OWNER), ("other", STRANGER))}  # fmt: skip
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(("app", "x", gid, [])))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: accounts["app"])
    monkeypatch.setattr(pwd, "getpwall", lambda: [*accounts.values()])
    monkeypatch.setattr(users, "_found", {})
    assert not users.is_private_group(OWNER, OWNER)
    del accounts["other"]
    # The databases are not searched again for each frame: they may be on the network.
    monkeypatch.setattr(users, "FRESH", math.inf)
    assert not users.is_private_group(OWNER, OWNER)
    monkeypatch.setattr(users, "FRESH", -1.0)
    assert users.is_private_group(OWNER, OWNER)


def test_the_users_are_not_searched_if_another_check_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_found", {})
    searched: list[str] = []

    def search() -> list[pwd.struct_passwd]:
        searched.append("all")
        return []

    monkeypatch.setattr(pwd, "getpwall", search)
    home.chmod(0o775)
    assert refusal(home) is None
    assert searched == ["all"]
    monkeypatch.setattr(users, "_found", {})
    add_acl(home, STRANGER)
    assert refusal(home) == f"the ACL of {home} lets other users write to it"
    home.chmod(0o777)
    assert refusal(home)
    assert searched == ["all"]


@pytest.mark.parametrize(
    ("text", "ids"), [("root", (0, None)), ("root:root", (0, 0)), (":7", (None, 7)), ("12:13", (12, 13))]
)
def test_an_owner_is_parsed(text: str, ids: tuple[int | None, int | None]) -> None:
    assert users.find_owner(text) == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "no such user",
        "root:no such group",
        "4294967295",
        ":4294967295",
        f"{1 << 32}",
        "9" * 5000,
        "\N{ARABIC-INDIC DIGIT SEVEN}",
    ],
)
def test_an_unknown_owner_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(text))}: "):
        users.find_owner(text)


@pytest.mark.parametrize(
    ("text", "ids"), [("007", (7, None)), ("0" * 20 + "33:0", (33, 0)), ("0" * 5000, (0, None)), (":042", (None, 42))]
)
def test_an_id_may_have_leading_zeros(text: str, ids: tuple[int | None, int | None]) -> None:
    assert users.find_owner(text) == ids


def test_an_owner_that_was_removed_refuses_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parse(["run", "unix:/x/a,peer=/x/b", "--irq-dir", str(tmp_path), "--irq-owner", "root"])

    def remove(_: str) -> None:
        raise KeyError("getpwnam(): name not found: 'root'")

    monkeypatch.setattr(pwd, "getpwnam", remove)
    with pytest.raises(ConfigError, match=r"^--irq-owner: 'root': no such user or group$"):
        _load(arguments)


FUSE = """
import ctypes, os, sys
from pathlib import Path
from inco_trio.trust import Trust, UnfitFileError, open_trusted
place, user, kind = sys.argv[1], int(sys.argv[2]), os.fsencode(sys.argv[4])
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id={user},group_id=0,allow_other".encode()
assert ctypes.CDLL(None).mount(b"x", os.fsencode(place), kind, 0, options) == 0
try:
    open_trusted(Path(place, "irq"), Trust(owner=int(sys.argv[3])))
except UnfitFileError as error:
    print(error.strerror)
"""
"""A program that mounts an unresponsive FUSE filesystem and opens a directory on it."""


@pytest.mark.parametrize("kind", ["fuse", "fuse.sshfs", "fuse.a\vb"])
@pytest.mark.parametrize("owner", [OWNER, STRANGER])
def test_a_fuse_filesystem_of_a_user_is_refused(home: Path, owner: int, kind: str) -> None:
    """A user's filesystem can report any owner, and can block the proxy for as long as the user wants."""
    place = give(home / "app", OWNER)
    command = ["unshare", "--mount", sys.executable, "-c", FUSE, str(place), str(OWNER), str(owner), kind]
    done = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
    assert done.stdout == f"not trusted: {place} is a FUSE filesystem of uid {OWNER}, which can block the proxy\n"


COVER = """
import ctypes, os, sys
from pathlib import Path
import pytest
from inco_trio.errors import ConfigError
from inco_trio.registers.directories import ABANDONED
from inco_trio.trust import Trust
from inco_trio.signals import Direction, Signal
from tests.support_registers import Clock, World
irq, cover, owner, missing = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "missing"
libc = ctypes.CDLL(None)
with pytest.MonkeyPatch.context() as patch:
    clock = Clock()
    clock.install(patch)
    state = Signal("in", Direction.INBOUND, irq, "state")
    trigger = Signal("out", Direction.OUTBOUND, irq, "trig")
    world = World(clock, [state, trigger])
    world.registers.directories.trust = Trust(owner=owner)
    world.open()
    if missing:
        for path in (state.path, trigger.path):
            path.unlink()
        irq.rmdir()
        world.later()
    fd = os.open("/dev/fuse", os.O_RDWR)
    mode = cover.stat().st_mode
    options = f"fd={fd},rootmode={mode:o},user_id={owner},group_id=0,allow_other".encode()
    assert libc.mount(b"x", os.fsencode(cover), b"fuse", 0, options) == 0
    for covered in (True, False):
        world.write(state)
        world.registers.mounts_changed()
        world.after(ABANDONED)
        if covered:
            print(world.pending, world.registers.problem(state))
            with pytest.raises(ConfigError):
                world.reload([state, trigger, Signal("new", Direction.INBOUND, cover / "new", "new")])
            assert libc.umount2(os.fsencode(cover), 2) == 0
            if missing:
                irq.mkdir()
                os.chown(irq, owner, owner)
    print(world.pending, state.path.read_text())
    world.triggered()
    trigger.path.write_text("1")
    print(world.triggered())
"""
"""A program that mounts an unresponsive FUSE filesystem over registers that are in use, and unmounts it later."""


@pytest.mark.parametrize(
    ("cover", "missing"),
    [(".", "missing"), (".", "there"), ("irq", "there"), ("irq/state", "there"), ("irq/trig", "there")],
)
def test_a_fuse_filesystem_over_registers_in_use_does_not_block(home: Path, cover: str, missing: str) -> None:
    place = give(home / "app", OWNER)
    irq = give(place / "irq", OWNER)
    command = ["unshare", "--mount", sys.executable, "-c", COVER, str(irq), str(place / cover), str(OWNER), missing]
    done = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
    covered, uncovered, triggered = done.stdout.splitlines()
    assert ("{'in': " in covered) == (cover != "irq/trig"), covered
    assert (uncovered, triggered) == ("{} 1", "['out']")


RACE = """
import ctypes, os, sys
from pathlib import Path
import pytest
from inco_trio.registers.directory import Directory
from inco_trio.trust import Trust
from inco_trio.signals import Direction, Signal
from tests.support_registers import Clock, World
irq, owner = Path(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None)
check, mounted = Directory.check, set()

def mount_afterwards(self, register, opened=None):
    check(self, register, opened)
    cover = os.fsencode(irq / os.fsdecode(register))
    if cover not in mounted and cover in covers:
        mounted.add(cover)
        fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fd},rootmode=100644,user_id={owner},group_id=0,allow_other,default_permissions".encode()
        assert libc.mount(b"x", cover, b"fuse", 0, options) == 0

with pytest.MonkeyPatch.context() as patch:
    clock = Clock()
    clock.install(patch)
    state = Signal("in", Direction.INBOUND, irq, "state")
    trigger = Signal("out", Direction.OUTBOUND, irq, "trig")
    covers = {os.fsencode(trigger.path)}
    for path in (state.path, trigger.path):
        path.touch()
        os.chown(path, owner, owner)
    world = World(clock, [state, trigger])
    world.registers.directories.trust = Trust(owner=owner)
    patch.setattr(Directory, "check", mount_afterwards)
    world.open()
    covers.add(os.fsencode(state.path))
    world.write(state)
    assert mounted == covers
    for cover in covers:
        assert libc.umount2(cover, 2) == 0
    trigger.path.write_text("1")
    print(world.pending, state.path.read_text(), world.triggered())
"""
"""A program that mounts a FUSE filesystem over each register immediately after the proxy has checked the register."""


def test_a_fuse_filesystem_that_is_mounted_between_check_and_open_does_not_block(home: Path) -> None:
    irq = give(give(home / "app", OWNER) / "irq", OWNER)
    command = ["unshare", "--mount", sys.executable, "-c", RACE, str(irq), str(OWNER)]
    done = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "{} 1 ['out']\n"


def test_a_fuse_filesystem_is_refused_without_a_trusted_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FUSE filesystem can report root as the owner of its files."""
    place = Path("/dev/pts")  # On every system, root has mounted this filesystem.
    assert refusal(place) is None
    monkeypatch.setattr(trust_module, "fuse_user", lambda _: STRANGER)
    assert str(refusal(place)).endswith(f" is a FUSE filesystem of uid {STRANGER}, which can block the proxy")
    assert refusal(place, Trust(user=STRANGER)) is None

    def without_proc(_: int) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(trust_module, "mount_id", without_proc)
    assert refusal(place) is None


@pytest.mark.parametrize("place", ["directory", "socket"])
def test_a_symlink_of_an_owner_does_not_claim_the_place_of_another_board(home: Path, place: str) -> None:
    """Otherwise the owner of a board could keep the boards of other owners from opening."""
    (home / "other").mkdir()
    app = give(home / "app", OWNER)
    target, link = (home / "other/irq", app / "irq") if place == "directory" else (home / "other/0", app / "0")
    link.symlink_to(target)
    os.lchown(link, OWNER, OWNER)
    configs = {
        "a": Config(f"unix:{app}/0,peer={app}/1", builtin_signals(app / "irq"), owner=OWNER),
        "b": Config(f"unix:{home}/other/0,peer={home}/other/1", builtin_signals(home / "other/irq"), owner=STRANGER),
    }
    assert refuse_shared(configs) == {}
    os.lchown(link, 0, 0)
    assert list(refuse_shared(configs)) == ["b"]


def test_a_new_mode_is_noticed_without_an_event_above(world: World, state: Signal) -> None:
    """A container sees the directory through a bind mount. Changes on the host cause no event above the mount."""
    world.registers.directories._watch_above = lambda *_, **__: None  # type: ignore[method-assign]
    world.open()
    world.restore()
    assert not world.troubled
    state.directory.chmod(0o777)
    world.triggered()
    assert world.troubled


@pytest.mark.parametrize("place", ["directory", "symlink", "mount"])
def test_the_directory_is_watched_for_attributes_only_if_no_watch_above_reports_them(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """If a watch includes IN_ATTRIB, the kernel looks for it at each access to a file in the directory."""
    directory = path = tmp_path / "irq"
    if place == "symlink":
        directory = tmp_path / "elsewhere"
        directory.mkdir()
        path.symlink_to("elsewhere")
    elif place == "mount":
        monkeypatch.setattr(directories, "mount_id", lambda fd: fd)  # as if the directory were the root of a mount
    world = World(clock, [Signal("state", Direction.INBOUND, path, "state")])
    with contextlib.closing(world.ending):
        world.open()
        world.restore()
        text = Path(f"/proc/self/fdinfo/{world.inotify.fd}").read_text()
        (mask,) = re.findall(rf"^inotify .*ino:{directory.stat().st_ino:x} .* mask:(\w+)", text, re.MULTILINE)
        assert bool(int(mask, 16) & IN_ATTRIB) == (place != "directory")
        # A new mode is noticed in each case.
        assert not world.troubled
        directory.chmod(0o700)
        world.triggered()
        assert world.troubled


LOOK = """
import ctypes, errno, logging, os, sys
from pathlib import Path
from typing import Any
from inco_trio.board_files import refuse_shared
from inco_trio.config import Config
from inco_trio.linux.capabilities import no_new_privileges
from inco_trio.linux.processes import Processes
from inco_trio.registers.diagnose import diagnose
from inco_trio.registers.refusals import refusal
from inco_trio.service.announcing import _request
from inco_trio.service.rivals import Rival, watchers
from inco_trio.service.sandbox import enter_sandbox
from inco_trio.signals import builtin_signals
from inco_trio.trust import Trust, open_trusted
look, cover, user = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
irq = cover / "irq"
signals = builtin_signals(irq)
config = Config(f"unix:{irq}/core0,peer={irq}/core1", signals)
process: Any = None

def sandbox():
    no_new_privileges()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    enter_sandbox([config], control=None, grows=False, has_fd_holder=False, log=False)

looks = {
    "reload": lambda: refuse_shared({"a": config}, {"a": config}),
    "diagnosis": lambda: [*diagnose(signals)],
    "rivals": lambda: watchers(signals, Processes((), False, True)),
    "report": lambda: _request(Rival(0, str(irq), process, "", is_link=False), config),
    "refusal": lambda: refusal(PermissionError(errno.EACCES, "denied"), irq, is_directory=True),
    "sandbox": sandbox,
    "start": lambda: open_trusted(irq, Trust()),
}
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id={user},group_id=0,allow_other".encode()
assert ctypes.CDLL(None).mount(b"x", os.fsencode(cover), b"fuse", 0, options) == 0
try:
    print(looks[look]())
except OSError as error:
    print(error)
"""
"""A program that mounts an unresponsive FUSE filesystem, and then accesses an IRQ directory on it."""


@pytest.mark.parametrize(
    ("look", "found"),
    [
        ("reload", "{{}}"),
        ("diagnosis", "['{irq}: on a filesystem of type fuse: the kernel may use several inodes for one file, so "),
        ("rivals", "[]"),
        ("report", "[Errno 13] on a FUSE filesystem of another user: '{cover}'"),
        ("refusal", "{irq}: denied: uid 0 must be able to read triggers and to write state files and their directory "),
        ("start", "[Errno 22] not trusted: {cover} is a FUSE filesystem of uid "),
        ("sandbox", "{cover}: the sandbox does not permit writing there, because it is a FUSE filesystem of another "),
    ],
)
def test_a_proxy_does_not_wait_for_a_fuse_filesystem_of_a_user(home: Path, look: str, found: str) -> None:
    """While one thread waits for such a filesystem, the process cannot end."""
    cover = give(home / "app", OWNER)
    (cover / "irq").mkdir()
    command = ["unshare", "--mount", sys.executable, "-c", LOOK, look, str(cover), str(OWNER)]
    done = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True)
    assert done.stdout.startswith(found.format(irq=cover / "irq", cover=cover)), done.stdout


COVERED = """
import ctypes, os, subprocess, sys
cover, user, *command = sys.argv[1:]
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id={user},group_id=0,allow_other".encode()
assert ctypes.CDLL(None).mount(b"x", os.fsencode(cover), b"fuse", 0, options) == 0
os.set_inheritable(fd, True)
os.execvp(command[0], command)
"""
"""A program that mounts an unresponsive FUSE filesystem over a directory, and becomes another program."""


def test_a_fuse_filesystem_over_one_board_does_not_affect_the_others(home: Path) -> None:
    """The filesystem exists before the proxy starts, and while it reloads and stops."""
    cover = give(home / "app", OWNER)
    boards = home / "boards"
    boards.mkdir()
    for name, irq in (("a", cover / "irq"), ("b", home / "irq")):
        irq.mkdir()
        board = {"link": f"unix:{home}/{name}.0,peer={home}/{name}.1", "irq_dir": str(irq)}
        (boards / f"{name}.json").write_text(json.dumps(board | ({"irq_owner": str(OWNER)} if name == "a" else {})))
    words = ("run", "--boards", boards, "--control", home / "control", "--sandbox", "on")
    prefix = ["unshare", "--mount", sys.executable, "-c", COVERED, str(cover), str(OWNER)]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core1,
        contextlib.closing(Launched(*words, log=home / "log", prefix=prefix)) as proxy,
    ):
        core1.settimeout(HANG)
        core1.bind(f"{home}/b.1")
        assert proxy.wait_ready(HANG), proxy.log
        for _ in range(2):
            (home / "irq" / "message_6_trig").write_text("1")
            assert decode(core1.recv(200)) == b"redun_notify_irq"
            with Client(home / "control") as client:
                assert client.request(ReloadRequest(), HANG).refused == ()
        assert proxy.stop() == 0
    assert f"a FUSE filesystem of uid {OWNER}, which can block the proxy" in proxy.log


def test_an_output_goes_to_the_directory_that_was_checked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, decoy = give(home / "app"), give(home / "decoy")
    (place / "link").symlink_to("out")
    readlink = os.readlink

    def replaced_afterwards(path: str, *, dir_fd: int) -> str:
        target = readlink(path, dir_fd=dir_fd)
        place.rename(home / "moved")
        decoy.rename(place)
        return target

    with monkeypatch.context() as patch:
        patch.setattr("os.readlink", replaced_afterwards)
        patch.setattr("os.path.realpath", lambda path: path)
        os.close(open_output(place / "link"))
    assert (home / "moved" / "out").exists()
    assert [*place.iterdir()] == []


def link_of_a_stranger(link: Path, target: Path) -> None:
    link.symlink_to(target)
    os.lchown(link, STRANGER, STRANGER)


def test_the_files_of_a_recording_follow_no_symlink_of_a_stranger(home: Path) -> None:
    place, victim = give(home / "app"), home / "victim"
    victim.write_text("precious")
    links = [place / f"r_{number:05}.pcapng" for number in (1, 3)]
    link_of_a_stranger(links[0], victim)
    with victim.open() as read:
        fcntl.flock(read, fcntl.LOCK_EX)  # A recorder that followed the link would find this lock.
        recorder = Recorder(place / "r.pcapng", size_max=1000)
    assert recorder.path.name == "r_00002.pcapng"
    recorder.mark(1, "x")
    link_of_a_stranger(links[1], victim)
    with pytest.raises(PermissionDeniedError) as refused:
        recorder.mark(1, "x" * 1000)
    assert str(refused.value) == f"{links[1]}: cannot be written: it is a symlink that another user owns"
    assert victim.read_text() == "precious"
    assert all(map(Path.is_symlink, links))


def test_a_recording_follows_no_symlink_of_a_stranger(home: Path) -> None:
    place, victim = give(home / "app"), home / "victim"
    victim.write_text("precious")
    link = place / "r.pcapng"
    link_of_a_stranger(link, victim)
    control = home / "control"
    words = ("run", f"unix:{home}/0,peer={home}/1", "--irq-dir", home / "irq", "--control", control)
    with contextlib.closing(Launched(*words, log=home / "log")) as proxy:
        assert proxy.wait_ready(HANG), proxy.log
        command = ["record", link, "--control", control, "--duration", "1ms"]
        done = subprocess.run(
            [sys.executable, "-m", "inco_trio", *map(str, command)],
            check=False,
            timeout=HANG,
            stderr=subprocess.PIPE,
            text=True,
        )
    text = f"inco-trio: error: {link}: cannot be written: it is a symlink that another user owns"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (77, text)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("command", ["record", "plot"])
def test_no_file_behind_a_symlink_of_a_stranger_is_removed(
    home: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, victim = give(home / "app"), home / "victim"
    victim.mkdir()
    for name in ("r_00001.pcapng", "r.svg"):
        (victim / name).write_text("precious")

    def replaced_afterwards(path: Path) -> int:
        fd = open_output(path)
        if path.name != "r_00001.pcapng":
            place.rename(home / "moved")
            link_of_a_stranger(place, victim)
        return fd

    monkeypatch.setattr(recording if command == "record" else plot, "open_output", replaced_afterwards)
    if command == "record":
        recorder = Recorder(place / "r.pcapng", size_max=1000, keep=1)
        recorder.mark(1, "x")
        recorder.mark(1, "x" * 1000)
        recorder.close()
        assert [path.name for path in recorder.written] == ["r_00002.pcapng"]
    else:
        monkeypatch.setattr("os.set_blocking", fail_to_write)
        with pytest.raises(ResourceError, match="No space left on device"):
            plot._save(b"picture", place / "r.svg")
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("r_00001.pcapng", "r.svg"), "precious"
    )


def fail_to_write(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_an_output_follows_no_symlink_of_a_stranger_to_a_directory(home: Path, mode: int) -> None:
    place, victim = give(home / "app", 0 if mode & 0o1000 else STRANGER, mode), home / "victim"
    victim.mkdir()
    link_of_a_stranger(place / "link", victim)
    ours = home / "ours"
    ours.symlink_to(place / "link" / ".")
    for path in (place / "link" / "out", ours / "out", place / "link" / ".." / "out"):
        with pytest.raises(PermissionError) as caught:
            open_output(path)
        assert caught.value.strerror == f"{place}/link is a symlink that another user owns"
    assert [*victim.iterdir()] == []
    assert not (home / "out").exists()


def test_an_output_may_be_below_a_symlink_of_our_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "a" / "b").mkdir(parents=True)
    (home / "link").symlink_to("a/b/../b")
    os.close(open_output(home / "link" / ".." / "out"))
    assert (home / "a" / "out").exists()
    monkeypatch.chdir(home)
    os.close(open_output(Path("link/relative")))
    assert (home / "a" / "b" / "relative").exists()
    fd = os.open(home / "a", os.O_PATH)
    os.close(open_output(Path(f"/proc/self/fd/{fd}/b/descriptor")))
    os.close(fd)
    assert (home / "a" / "b" / "descriptor").exists()
    (home / "a" / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_output(home / "a" / "loop" / "out")
    with pytest.raises(NotADirectoryError):
        open_output(home / "a" / "out" / "below")


def test_an_output_may_be_a_symlink_of_our_own(home: Path) -> None:
    def write(path: Path, text: bytes) -> None:
        fd = open_output(path)
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(text)

    chain, target = home / "chain", home / "target"
    chain.symlink_to("link")
    (home / "link").symlink_to(target)
    write(chain, b"through two links")
    assert target.read_bytes() == b"through two links"
    os.lchown(home / "link", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="it is a symlink that another user owns"):
        write(chain, b"lost")
    ours, theirs = os.pipe()
    write(Path(f"/proc/self/fd/{theirs}"), b"a pipe")
    assert os.read(ours, 100) == b"a pipe"
    for fd in (ours, theirs):
        os.close(fd)
    (home / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write(home / "loop", b"")
    with pytest.raises(FileNotFoundError):
        write(home / "missing" / "file", b"")


def test_an_output_with_an_absolute_path_needs_no_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = home / "private"
    private.mkdir(0o700)
    monkeypatch.chdir(private)
    os.seteuid(STRANGER)
    try:
        os.close(open_output(Path("/dev/null")))
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("owner", "mode", "accepted"),
    [(0, 0o755, True), (0, 0o1777, False), (0, 0o777, False), (0, 0o775, False), (STRANGER, 0o755, False)],
)
def test_an_output_is_no_hard_link_that_another_user_may_have_made(
    home: Path, owner: int, mode: int, accepted: bool
) -> None:
    """The sysctl fs.protected_hardlinks can be 0."""
    place, victim = give(home / "shared", owner, mode), home / "victim"
    victim.write_bytes(b"precious")
    out = place / "out.svg"
    out.hardlink_to(victim)
    (home / "link").symlink_to(out)
    for path in (out, home / "link"):
        if accepted:
            _save(b"plot", path)
            assert victim.read_bytes() == b"plot"
            continue
        with pytest.raises(PermissionDeniedError) as refused:
            _save(b"plot", path)
        text = "cannot be written: it is a hard link that another user may have made"
        assert str(refused.value) == f"{path}: {text} (choose a directory that only you can write)"
        with pytest.raises(PermissionDeniedError, match=text):
            Recorder(path)
        assert victim.read_bytes() == b"precious"
    out.unlink()
    _save(b"plot", out)
    _save(b"again", out)
    assert out.read_bytes() == b"again"


@pytest.mark.parametrize("again", [True, False])
def test_an_output_is_no_hard_link_that_is_removed_after_it_was_opened(
    home: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, victim = give(home / "shared", 0, 0o1777), home / "victim"
    victim.touch()
    out = place / "out"
    out.hardlink_to(victim)
    openat = os.open

    def removed_afterwards(path: str, flags: int, *args: Any, **options: Any) -> int:
        fd = openat(path, flags, *args, **options)
        if path == "out":
            out.unlink()
            if again:
                out.touch()
        return fd

    monkeypatch.setattr("os.open", removed_afterwards)
    with pytest.raises(OSError, match="it is a hard link" if again else "No such file"):
        open_output(out)


def test_a_plot_replaces_a_longer_file(home: Path) -> None:
    out = home / "plot.svg"
    out.write_bytes(b"longer than the plot")
    _save(b"plot", out)
    assert out.read_bytes() == b"plot"


def test_other_filesystems_have_no_fuse_user(home: Path) -> None:
    with contextlib.ExitStack() as stack:
        for path in (home, Path("/proc"), Path("/dev")):
            stack.callback(os.close, fd := os.open(path, os.O_PATH))
            assert fuse_user(fd) is None


def test_the_configured_owner_is_trusted(home: Path) -> None:
    owner = Trust(owner=OWNER)
    irq = give(give(home / "app", OWNER) / "irq", OWNER)
    assert refusal(irq, owner) is None
    assert refusal(irq) == f"{irq.parent} belongs to uid {OWNER}"
    link = irq.with_name("link")
    link.symlink_to("irq")
    os.lchown(link, OWNER, OWNER)
    assert refusal(link, owner) is None
    # The owner could otherwise redirect the proxy to any directory that root owns.
    give(irq, 0)
    assert refusal(irq, owner) == f"{irq} belongs to root (uid 0), but uid {OWNER} owns an earlier part of the path"
    link.unlink()
    link.symlink_to(home)
    os.lchown(link, OWNER, OWNER)
    assert refusal(link, owner) == f"/ belongs to root (uid 0), but uid {OWNER} owns an earlier part of the path"


def test_the_configured_group_may_write(home: Path) -> None:
    irq = give(home / "irq", 0, 0o775)
    os.chown(irq, 0, GROUP)
    assert refusal(irq, Trust(group=GROUP)) is None
    add_acl(irq, STRANGER)
    assert refusal(irq, Trust(group=GROUP)) == f"the ACL of {irq} lets other users write to it"
    give(irq.parent, 0, 0o775)
    os.chown(irq.parent, 0, GROUP)
    assert refusal(irq, Trust(group=GROUP)) == f"other users may write to {irq.parent} (mode 0775)"


def test_a_missing_directory_is_created_for_its_owner(home: Path) -> None:
    before = os.umask(0)
    try:
        os.close(open_trusted(home / "a" / "irq", Trust(OWNER, GROUP), make=True)[0])
        os.close(open_trusted(home / "b" / "irq", Trust(OWNER), make=True)[0])
    finally:
        os.umask(before)
    found = [(home / name).stat() for name in ("a", "a/irq", "b/irq")]
    assert [(each.st_uid, each.st_gid, each.st_mode & 0o7777) for each in found] == [
        (0, 0, 0o755), (OWNER, GROUP, 0o2775), (OWNER, 0, 0o755)
    ]  # fmt: skip
    give(home / "a", OWNER)
    (home / "a" / "irq").rmdir()
    with pytest.raises(UnfitFileError, match=f"{home}/a/irq is missing below a directory that uid {OWNER} owns"):
        open_trusted(home / "a" / "irq", Trust(OWNER), make=True)


def test_the_owner_of_a_new_directory_cannot_redirect_its_mode(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner may rename the directory in a sticky directory as soon as chown(2) returns."""
    home.chmod(0o1777)
    irq, victim = home / "irq", home / "victim"
    victim.touch(0o600)
    chown = os.chown

    def replaced_afterwards(*args: Any, **options: Any) -> None:
        chown(*args, **options)
        irq.rename(home / "moved")
        irq.symlink_to(victim)
        os.lchown(irq, OWNER, OWNER)

    monkeypatch.setattr("os.chown", replaced_afterwards)
    with pytest.raises(NotADirectoryError):
        open_trusted(irq, Trust(OWNER, GROUP), make=True)
    assert victim.stat().st_mode & 0o7777 == 0o600
    assert (home / "moved").stat().st_mode & 0o7777 == 0o2775


def test_symlinks_are_followed(home: Path) -> None:
    irq = give(home / "real" / "irq", 0)
    (home / "absolute").symlink_to(home / "real")
    (home / "real" / "relative").symlink_to("../real/./irq")
    assert refusal(home / "absolute" / "relative") is None
    (home / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_trusted(home / "loop" / "irq", Trust())
    (irq / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_trusted(irq / "file" / "irq", Trust())


def test_the_components_in_the_targets_of_symlinks_are_limited(home: Path) -> None:
    """The configured owner could otherwise block the proxy by a few symlinks through thousands of directories."""
    place = give(home / "app", OWNER)
    give(place / "a", OWNER)
    give(place / "irq", OWNER)
    for number, target in enumerate(("a/../" * (TARGETS_MAX // 4), "a/../" * (TARGETS_MAX // 4 - 2) + "0/irq")):
        (place / str(number)).symlink_to(target)
        os.lchown(place / str(number), OWNER, OWNER)
    assert refusal(place / "1", Trust(OWNER)) is None
    (place / "2").symlink_to("./a/../1")
    os.lchown(place / "2", OWNER, OWNER)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_trusted(place / "2", Trust(OWNER))


def test_a_relative_path_starts_in_the_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(home / "irq", 0)
    monkeypatch.chdir(home)
    assert refusal(Path("irq")) is None


def test_the_overflow_user_is_never_trusted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = overflow_uid()
    irq = give(home / "irq", nobody)
    why = f"{irq} belongs to uid {nobody}, which stands for all unmapped users"
    assert refusal(irq, Trust(owner=nobody)) == why
    monkeypatch.setattr("os.geteuid", lambda: nobody)
    assert refusal(irq) == why


def test_a_user_namespace_trusts_only_the_standard_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a user namespace that an ordinary user created, the host's root appears as the overflow user ID.
    monkeypatch.setattr(trust_module, "overflow_uid", lambda: 0)
    assert refusal(Path("/tmp")) == "/ belongs to uid 0, which stands for all unmapped users"  # noqa: S108
    monkeypatch.setattr(trust_module, "_maps_all_users", lambda: False)
    assert refusal(Path("/run")) is None
    assert refusal(Path("/usr/bin")) == "/usr belongs to uid 0, which stands for all unmapped users"


def test_a_checked_file_is_checked_again_once_the_group_may_change_the_directory(
    world: World, state: Signal, home: Path
) -> None:
    world.open()
    world.write(state)
    state.directory.chmod(0o775)
    world.triggered()
    world.restore()
    victim = home / "victim"
    victim.write_text("untouched")
    state.path.unlink()
    state.path.hardlink_to(victim)
    world.write(state)  # The proxy has not yet read the events that the replacement caused.
    assert victim.read_text() == "untouched"
    assert world.pending == {state.name: 1}


def attack_parent(irq: Path) -> Path:
    """Replace the IRQ directory with a symlink to another directory that root owns."""
    victim = give(irq.parent.parent / "victim", 0)
    irq.rename(irq.with_name("old"))
    irq.symlink_to(victim)
    os.lchown(irq, STRANGER, STRANGER)
    give(irq.parent)
    return victim


def attack_owner(irq: Path) -> Path:
    os.chown(irq, STRANGER, STRANGER)
    return irq


def attack_mode(irq: Path) -> Path:
    irq.chmod(0o777)
    return irq


def attack_mode_above(irq: Path) -> Path:
    irq.parent.chmod(0o777)
    return irq


def attack_acl(irq: Path) -> Path:
    add_acl(irq, STRANGER)
    return irq


@pytest.mark.parametrize("attack", [attack_parent, attack_owner, attack_mode, attack_mode_above, attack_acl])
def test_a_directory_that_is_not_trusted_any_more_is_left_alone(
    world: World, state: Signal, trigger: Signal, caplog: pytest.LogCaptureFixture, attack: Callable[[Path], Path]
) -> None:
    world.open()
    world.write(state)
    victim = attack(state.directory)
    world.triggered()
    assert world.troubled  # An event has reported the change, but triggered no notification.
    world.restore()
    before = sorted(victim.iterdir())
    world.write(state)
    world.after(ABANDONED)
    assert sorted(victim.iterdir()) == before
    assert world.pending == {state.name: 1}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"{state.directory}: cannot open: not trusted: ")
    assert "not trusted" in str(world.registers.problem(state))
    assert "not trusted" in str(world.registers.problem(trigger))

    caplog.set_level(logging.INFO)
    give(state.directory.parent, 0)
    if attack is attack_parent:
        state.directory.unlink()
        state.directory.with_name("old").rename(state.directory)
    else:
        if attack is attack_acl:
            os.removexattr(state.directory, "system.posix_acl_access")
        give(state.directory, 0)
    world.later()
    assert (world.pending, state.path.read_text()) == ({}, "1")
    assert world.registers.problem(state) is None
    assert f"{state.directory}: works again" in caplog.text
    world.triggered()
    trigger.path.write_text("1")
    assert world.triggered() == [trigger.name]


@contextmanager
def as_stranger(act: Callable[[], object]) -> Iterator[None]:
    """While the block runs, call `act` in a loop in a process that another user owns."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            while True:
                act()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_user_who_swaps_directories_all_the_time_gains_nothing(
    home: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user owns the parent and keeps swapping the IRQ directory with a symlink to a directory owned by root."""
    parent = give(home / "theirs", OWNER)
    victim = give(home / "victim", 0)
    for name in ("state", "trig"):
        (victim / name).write_text("untouched")
    irq = give(parent / "irq", OWNER)
    (parent / "link").symlink_to(victim)
    for path in (parent, irq, parent / "link"):
        os.lchown(path, STRANGER, STRANGER)
    place = os.open(parent, os.O_PATH)  # The other user cannot search pytest's directories.

    def swap() -> None:
        for _ in range(next(numbers)):
            libc.renameat2(place, ctypes.c_char_p(b"irq"), place, ctypes.c_char_p(b"link"), RENAME_EXCHANGE)
        # The proxy can open the directory only during a pause. If none is long enough, the test continues.
        time.sleep(next(pauses))

    numbers, pauses = itertools.cycle((1, 2, 3, 5, 8, 13, 21)), itertools.cycle((0, 0, 0.001, 0.1))

    signals = [Signal("in", Direction.INBOUND, irq, "state"), Signal("out", Direction.OUTBOUND, irq, "trig")]
    opened, refused = 0, set[str]()
    with as_stranger(swap):
        while opened < 5 or not refused:
            world = World(clock, signals)
            world.registers.directories.trust = Trust(owner=STRANGER)
            try:
                finish_steps(world.registers.open(world.table))
                opened += 1
                for _ in range(20):
                    # Read only once, because the swaps keep causing new events.
                    world.take(world.registers.triggers.follow(world.events()))
                    world.write(signals[0])
                    world.restore()
            except ConfigError as error:
                refused.add(str(error))
            finally:
                world.ending.close()
    os.close(place)
    # After a swap between two system calls, the second call finds a symlink, which it does not follow.
    reasons = ("owns an earlier part of the path", "Not a directory", "Too many levels of symbolic links")
    assert [text for text in refused if not any(reason in text for reason in reasons)] == []
    assert sorted(path.name for path in victim.iterdir()) == ["state", "trig"]
    assert {path.read_text() for path in victim.iterdir()} == {"untouched"}


def test_the_doctor_warns_of_an_untrusted_directory(home: Path) -> None:
    irq = give(home / "irq")
    (found,) = trusted(irq, Trust())
    assert (found.level, found.check) == (Level.WARN, "trusted")
    assert found.found.startswith(f"not trusted: {irq} belongs to uid {STRANGER}; run the proxy as this user, or ")
    assert [result.level for result in trusted(irq, Trust(STRANGER))] == [Level.OK]
    assert [*trusted(irq / "missing", Trust(STRANGER))] == []


@pytest.mark.parametrize("kind", ["fuse", "fuse.bindfs", "9p"])
def test_filesystems_with_several_inodes_for_a_file_are_reported(kind: str) -> None:
    assert unreported_type(kind)
    assert unreported_type("fuseblk") is None
    assert unreported_type(None) is None
