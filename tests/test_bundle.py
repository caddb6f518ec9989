"""Tests of the descriptor bundle: reading it leaves it unchanged, and an invalid bundle is reported."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.errors import ResourceError
from inco_trio.linux.sockets import RECEIVED_WITH_DATA
from inco_trio.persist.bundle import MESSAGE_FDS, SCM_MAX_FD, Bundle
from netns.hang import HANG
from tests.support_proxy import Cupboard

INVALID = "fd store: the stored bundle of descriptors is invalid: starting without it; the notifications in it are lost"

KILLED = """
import os, sys
from inco_trio.persist.bundle import Bundle
from tests.support_proxy import Cupboard

class Killed(Cupboard):
    def store(self, name, fd):
        os._exit(9)

Bundle(Killed({"bundle": int(sys.argv[1])}))
"""
"""A successor program that is killed after it has read the bundle and before it stores a new one."""


def contents(bundle: Bundle) -> dict[str, str]:
    return {name: os.pread(fd, 100, 0).decode() for name, fd in bundle.kept.items()}


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def memfd(stack: ExitStack) -> Callable[[str], int]:
    def make(content: str) -> int:
        fd = os.memfd_create(content)
        stack.callback(os.close, fd)
        os.write(fd, content.encode())
        return fd

    return make


@pytest.fixture
def filled(stack: ExitStack, memfd: Callable[[str], int]) -> Cupboard:
    """Return an fd store with the bundle of a process that has ended."""
    store = Cupboard()
    stack.callback(store.close)
    bundle = Bundle(store)
    for name in ("b1/inflight", "b1/history", "b2/inflight"):
        bundle.store(name, memfd(name))
    bundle.remove("b1/history")
    bundle.store("b2/inflight", memfd("newer"))
    bundle.close()
    return store


EXPECTED = {"b1/inflight": "b1/inflight", "b2/inflight": "newer"}


def test_two_successors_read_the_same_bundle(filled: Cupboard) -> None:
    held = filled.heir().kept["bundle"]
    for _ in range(2):
        store = Cupboard({"bundle": held})
        heir = Bundle(store)
        assert contents(heir) == EXPECTED
        assert not any(os.get_inheritable(fd) for fd in heir.kept.values())
        heir.close()
        os.close(store.kept["bundle"])
    os.close(held)


def test_a_successor_that_is_killed_before_it_stores_a_bundle_loses_no_descriptor(filled: Cupboard) -> None:
    for _ in range(2):
        fd = filled.kept["bundle"]
        done = subprocess.run([sys.executable, "-c", KILLED, str(fd)], pass_fds=[fd], check=False)
        assert done.returncode == 9
    heir = Bundle(filled.heir())
    assert contents(heir) == EXPECTED
    heir.close()


def test_a_bundle_whose_writer_still_runs_is_read_without_waiting(memfd: Callable[[str], int]) -> None:
    store = Cupboard()
    running = Bundle(store)
    running.store("b1/inflight", memfd("b1/inflight"))
    heir = Bundle(store.heir())
    assert contents(heir) == {"b1/inflight": "b1/inflight"}
    heir.close()
    running.close()
    store.close()


def test_superseded_descriptors_are_closed(filled: Cupboard, memfd: Callable[[str], int]) -> None:
    before = open_descriptors()
    heir = Bundle(filled.heir())
    heir.close()
    # Only the two copies of the bundle in the test's fd store stay open.
    assert open_descriptors() <= before + 1


def invalid(kind: str, stack: ExitStack, fd: int) -> int:
    """Return the descriptor of an invalid bundle."""
    entry, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.enter_context(entry)
    stack.enter_context(queue)
    messages: dict[str, list[tuple[bytes, list[int]]]] = {
        "no sign": [(b"b1/inflight\n", [fd])],
        "no line end": [(b"+b1/inflight", [fd])],
        "an empty name": [(b"+\n", [fd])],
        "a NUL byte": [(b"+a\0b\n", [fd])],
        "too few descriptors": [(b"+b1/inflight\n+b1/link\n", [fd])],
        "too many descriptors": [(b"+b1/inflight\n", [fd, fd])],
        "a descriptor for a removal": [(b"-b1/inflight\n", [fd])],
        "random bytes": [(bytes(range(256)), [])],
        "the most descriptors": [(b"+b1/inflight\n", [fd] * SCM_MAX_FD)],
    }
    for text, fds in messages[kind]:
        socket.send_fds(entry, [text], fds)
    return queue.fileno()


KINDS = [
    "no sign", "no line end", "an empty name", "a NUL byte", "too few descriptors", "too many descriptors",
    "a descriptor for a removal", "random bytes", "the most descriptors",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_invalid_bundle_is_reported_and_replaced(
    kind: str, stack: ExitStack, memfd: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    store = Cupboard({"bundle": invalid(kind, stack, memfd("content"))})
    before = open_descriptors()
    heir = Bundle(store)
    assert heir.kept == {}
    assert caplog.messages == [INVALID]
    heir.close()
    assert open_descriptors() == before
    caplog.clear()
    following = Bundle(store.heir())
    assert (following.kept, caplog.messages) == ({}, [])
    following.close()
    store.close()


def is_known(option: int) -> bool:
    """Return whether this kernel has a socket option."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        except OSError:
            return False
    return True


@pytest.mark.parametrize("option", [option for option in RECEIVED_WITH_DATA if is_known(option)])
def test_a_bundle_whose_socket_adds_other_data_to_full_messages_is_read(
    option: int, memfd: Callable[[str], int]
) -> None:
    store, content = Cupboard(), memfd("content")
    bundle = Bundle(store)
    fill(bundle, MESSAGE_FDS, content)
    bundle._renew()
    bundle.close()
    with socket.socket(fileno=os.dup(store.kept["bundle"])) as queue:
        queue.setsockopt(socket.SOL_SOCKET, option, 1)
    following = store.heir()
    before = open_descriptors()
    heir = Bundle(following)
    assert len(heir.kept) == MESSAGE_FDS
    heir.close()
    assert open_descriptors() == before
    following.close()
    store.close()


@pytest.mark.parametrize("listens", [False, True])
def test_a_socket_that_cannot_contain_a_bundle_is_reported(
    listens: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if listens:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
    store = Cupboard({"bundle": sock.detach()})
    heir = Bundle(store)
    assert (heir.kept, caplog.messages) == ({}, [INVALID])
    heir.close()
    store.close()


@pytest.mark.parametrize("kind", ["file", "datagrams", "network"])
def test_a_bundle_of_the_wrong_kind_is_reported(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    held = {
        "file": lambda: os.open("/dev/null", os.O_RDWR),
        "datagrams": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        "network": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(),
    }[kind]()
    store = Cupboard({"bundle": held})
    heir = Bundle(store)
    assert heir.kept == {}
    assert caplog.messages == ["fd store: the stored descriptor bundle is of the wrong kind: starting without it"]
    heir.close()
    store.close()


def test_a_stored_link_of_the_wrong_kind_is_reported(
    memfd: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    store = Cupboard()
    bundle = Bundle(store)
    bundle.store("b1/link", memfd("no socket"))
    bundle.close()
    heir = Bundle(store.heir())
    assert heir.kept == {}
    assert caplog.messages == ["fd store: the stored descriptor b1/link is of the wrong kind: starting without it"]
    heir.close()
    store.close()


@pytest.fixture
def many(stack: ExitStack) -> Iterator[None]:
    """Permit as many open descriptors as the kernel allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fill(bundle: Bundle, number: int, fd: int, times: int = 1) -> None:
    for each in range(times * number):
        bundle.store(f"{each % number:064}/inflight", fd)


@pytest.mark.usefixtures("many")
def test_more_descriptors_than_a_usual_send_buffer_holds_are_stored(memfd: Callable[[str], int]) -> None:
    """A send buffer of 212,992 bytes, the default, holds 11 messages with names of this length."""
    store = Cupboard()
    bundle = Bundle(store)
    fill(bundle, 12 * MESSAGE_FDS, memfd("content"))
    bundle._renew()
    bundle.close()
    heir = Bundle(store.heir())
    assert len(heir.kept) == 12 * MESSAGE_FDS
    heir.close()
    store.close()


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("size", [1, 10_000])
def test_descriptors_that_do_not_fit_are_refused(
    memfd: Callable[[str], int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's minimum holds only part of a message, and the larger size holds only one message."""
    store, number = Cupboard(), 2 * MESSAGE_FDS
    monkeypatch.setattr("inco_trio.persist.bundle.SEND_BUFFER", 1 << 17)
    bundle = Bundle(store)
    content = memfd("content")
    fill(bundle, number, content)
    before = open_descriptors()
    monkeypatch.setattr("inco_trio.persist.bundle.SEND_BUFFER", size)
    stored = len(store.stored)
    # The changes do not fail while the current queue has room, although a new queue has none.
    with pytest.raises(ResourceError, match=rf"^cannot store descriptors: {number} descriptors exceed "):
        fill(bundle, number, content, times=10)
    assert len(store.stored) == stored
    assert open_descriptors() == before
    monkeypatch.undo()
    heir = Bundle(store.heir())  # The stored queue is unchanged.
    assert len(heir.kept) == number
    heir.close()
    bundle.close()
    store.close()


def test_changes_do_not_fill_the_queue(memfd: Callable[[str], int]) -> None:
    """The queue keeps replaced descriptors open, such as the former sockets of a link."""
    store = Cupboard()
    bundle = Bundle(store)
    content = memfd("content")
    for _ in range(3 * MESSAGE_FDS):
        bundle.store("b1/link", content)
    assert len(store.stored) > 2
    assert bundle._changes <= MESSAGE_FDS
    bundle.close()
    store.close()


IN_TRANSIT_MAX = 1000
STRANGER = 54321
CHANGED = """
import os, resource, sys
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.fdstore import OverfullError
from tests.support_proxy import Cupboard

class Store(Cupboard):
    def store(self, name, fd):
        if refuses:
            raise OverfullError("full")
        super().store(name, fd)

user, limit, number, changes = map(int, sys.argv[1:5])
refuses = False
os.setresuid(user, user, user)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
store = Store()
bundle = Bundle(store)
for each in range(number):
    bundle.store(f"b{each}/inflight", 0)
refuses = len(sys.argv) > 5
for each in range(changes):
    bundle.store(f"b{each % number}/inflight", 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
heir = Bundle(store.heir())
print(len(heir.kept))
"""
"""A program that stores descriptors and replaces some of them, with a limit for the descriptors in transit."""


@pytest.mark.parametrize(
    ("number", "changes", "refuses"), [(400, 2000, ()), (600, 350, ()), (300, 400, ("refuses",))], ids=str
)
def test_changes_are_stored_while_a_second_queue_exceeds_the_limit(
    number: int, changes: int, refuses: tuple[str, ...]
) -> None:
    """Descriptors in transit count for all processes of a user, so the program runs as a user without processes."""
    words = [str(STRANGER), str(IN_TRANSIT_MAX), str(number), str(changes), *refuses]
    project = Path(__file__).parents[1]
    # This user may not write the coverage data.
    env = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=project,
        env=env,
        timeout=HANG,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{number}\n", "")


def test_too_low_a_limit_of_descriptors_is_an_error_that_keeps_the_bundle(memfd: Callable[[str], int]) -> None:
    store = Cupboard()
    bundle = Bundle(store)
    content = memfd("content")
    for number in range(MESSAGE_FDS):
        bundle.store(f"b{number}/inflight", content)
    bundle.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    heir = store.heir()
    before = open_descriptors()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
        with pytest.raises(ResourceError, match=r"^cannot take over the stored descriptors: [^\n]*raise ulimit -n$"):
            Bundle(heir)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before
    following = Bundle(heir)
    assert len(following.kept) == MESSAGE_FDS
    following.close()
    heir.close()
    store.close()
