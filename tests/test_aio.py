"""Tests of asyncio code inside a Trio program, on the real kernel and with a real MQTT broker.

Importing trio-asyncio changes asyncio for the whole process. Each `scenario` therefore runs in its own process,
`python -m tests.test_aio`. The tests of `aio.open_proxy` are in test_aio_proxy.py.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio
import trio.testing
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from inco_trio import ClosedError, Config, Notification, Proxy, UnknownSignalError, builtin_signals, open_proxy
from inco_trio.simulation.world import Cores, Namespace, Peer
from netns.hang import HANG
from tests.support_pages import comparable, parts

PROJECT = Path(__file__).parents[1]
RESET = b"ihub_reset_irq"
NOTIFY = "redun_notify_irq"


def python(filters: list[str]) -> list[str]:
    """Return the beginning of a command line that runs Python with pytest's warning filters."""
    return [sys.executable, *(part for line in filters for part in ("-W", line))]


@attrs.frozen
class World:
    """The configuration and core 1 of a scenario, which runs in core 0's namespace."""

    config: Config
    core1: Peer


Scenario = Callable[[World], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Callable[[pytest.Config, Cores, Path], None]:
    """Return a test that runs `function` in a separate process."""

    @pytest.mark.netns
    def test(pytestconfig: pytest.Config, cores: Cores, irq_dir: Path) -> None:
        descriptors = (cores.core0.fd, cores.core1.fd)
        done = subprocess.run(
            [
                *python(pytestconfig.getini("filterwarnings")),
                *("-m", "tests.test_aio", function.__name__),
                *map(str, (*descriptors, cores.link, irq_dir)),
            ],
            cwd=PROJECT,
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{function.__name__} failed:\n{done.stdout}"

    SCENARIOS[function.__name__] = function
    test.__doc__ = function.__doc__
    return test


def play(name: str, core0: str, core1: str, link: str, irq_dir: str) -> None:
    """Run the scenario `name` in this process."""
    cores = Cores(Namespace(int(core0)), Namespace(int(core1)), link)
    with cores.peer() as peer:
        cores.core0.enter()
        world = World(Config(link, builtin_signals(Path(irq_dir))), peer)

        trio.run(SCENARIOS[name], world)


async def reset(world: World, proxy: Proxy, count: int = 1) -> None:
    """Send the reset signal from core 1 `count` times, and return once the proxy has delivered all of them."""
    with proxy.events(count) as events:
        for _ in range(count):
            world.core1.send(RESET)
        for _ in range(count):
            await events.receive()


@scenario
async def test_callback_receives_each_notification_in_order_and_may_send(world: World) -> None:
    from inco_trio import aio

    entry, seen = trio.open_memory_channel[Notification](2)

    async def callback(notification: Notification) -> None:
        if notification.signal.name != NOTIFY:
            await aio.AsyncioProxy(proxy).send(NOTIFY)
        entry.send_nowait(notification)

    async with open_proxy(world.config) as proxy, trio.open_nursery() as nursery:
        await nursery.start(aio.on_notification, proxy, callback)
        await reset(world, proxy)
        got = [await seen.receive(), await seen.receive()]
        nursery.cancel_scope.cancel()
    assert [n.signal.name for n in got] == [RESET.decode(), NOTIFY]
    assert got[0].monotonic_ns <= got[1].monotonic_ns


@scenario
async def test_error_of_the_callback_reaches_the_caller_unchanged(world: World) -> None:
    from inco_trio import aio

    error = ValueError("from asyncio")

    async def callback(notification: Notification) -> None:
        raise error

    async def handle(*, task_status: trio.TaskStatus[None]) -> None:
        with pytest.raises(ValueError, match="from asyncio") as raised:
            await aio.on_notification(proxy, callback, task_status=task_status)
        assert raised.value is error

    async with open_proxy(world.config) as proxy:
        async with trio.open_nursery() as nursery:
            await nursery.start(handle)
            await reset(world, proxy)
        await reset(world, proxy)
        assert proxy.stats.delivered == 2, "the proxy stopped delivering"


@scenario
async def test_callback_cleans_up_when_trio_cancels_it(world: World) -> None:
    from inco_trio import aio

    called = trio.Event()
    steps = []

    async def callback(notification: Notification) -> None:
        called.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            steps.append("cleaned up")
            raise

    async def handle(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        async with trio.open_nursery() as inner:
            await inner.start(aio.on_notification, proxy, callback)
            task_status.started(inner.cancel_scope)
        steps.append("returned")

    async with open_proxy(world.config) as proxy:
        async with trio.open_nursery() as nursery:
            scope = await nursery.start(handle)
            await reset(world, proxy)
            await called.wait()
            scope.cancel()
        assert steps == ["cleaned up", "returned"]
        await reset(world, proxy)


@scenario
async def test_slow_callback_does_not_stall_the_proxy(world: World) -> None:
    from inco_trio import aio

    called, handled = trio.Event(), 0
    go_on = asyncio.Event()

    async def callback(notification: Notification) -> None:
        nonlocal handled
        called.set()
        await go_on.wait()
        handled += 1

    async with trio.open_nursery() as nursery, open_proxy(world.config) as proxy:
        await nursery.start(functools.partial(aio.on_notification, proxy, callback, buffer=2))
        await reset(world, proxy)
        await called.wait()
        await reset(world, proxy, 9)
        assert proxy.stats.delivered == 10
        assert proxy.stats.events_lost == 7, "the callback handles one event, the buffer holds two"
        go_on.set()
    assert handled == 3


@scenario
async def test_main_can_send_and_return_a_value(world: World) -> None:
    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> int:
        with pytest.raises(UnknownSignalError, match="nothing: not an outbound signal"):
            await proxy.send("nothing")
        await proxy.send(NOTIFY)
        return (await proxy.stats()).sent

    async with open_proxy(world.config) as proxy:
        assert await aio.run(proxy, main) == 1
        assert world.core1.receive()[14:].rstrip(b"\0") == NOTIFY.encode()


@scenario
async def test_cancelled_wait_for_an_event_loses_no_event(world: World) -> None:
    """In each run, cancel the wait one turn of the loop later, until the event arrives before the cancellation."""
    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> int:
        with proxy.events() as events:
            for turns in itertools.count():
                waiting = asyncio.ensure_future(anext(events))
                sending = asyncio.create_task(proxy.send(NOTIFY))
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait({waiting})
                await sending
                if not waiting.cancelled():
                    break
                await anext(events)
        return turns

    async with open_proxy(world.config) as proxy:
        cancelled = await aio.run(proxy, main)
        assert cancelled > 1
        assert proxy.stats.sent == cancelled + 1


class CancelAtFetch(trio.abc.Instrument):
    """Cancels the first of two readers before or after the step in which its fetch takes the next notification."""

    def __init__(self, readers: list[asyncio.Future[Notification]], *, before: bool) -> None:
        self._readers, self._before = readers, before

    def _cancel(self, task: trio.lowlevel.Task) -> None:
        # The fetch of the second reader waits for the lock, so the first reader's fetch takes the next step.
        if task.name.endswith("._fetch"):
            self._readers[0].cancel()
            trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._before:
            self._cancel(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._before:
            self._cancel(task)


async def cancel_at_fetch(world: World, *, before: bool) -> None:
    """Cancel the first of two readers when its fetch takes the only notification: the second reader must receive it."""
    import trio_asyncio

    from inco_trio import aio

    readers: list[asyncio.Future[Notification]] = []

    async def main(asyncio_proxy: aio.AsyncioProxy) -> None:
        blocked = trio_asyncio.trio_as_aio(trio.testing.wait_all_tasks_blocked)
        with asyncio_proxy.events() as events:
            for _ in range(2):
                readers.append(asyncio.ensure_future(anext(events)))
                await blocked()
            trio.lowlevel.add_instrument(CancelAtFetch(readers, before=before))
            world.core1.send(RESET)
            await asyncio.wait(readers)
            assert readers[0].cancelled()
            assert readers[1].result().sequence == 1
            left = asyncio.ensure_future(anext(events))
            await blocked()
        with pytest.raises(ClosedError, match="the event stream is closed"):
            await left

    with trio.fail_after(HANG):
        async with open_proxy(world.config) as proxy:
            await aio.run(proxy, main)


@scenario
async def test_the_event_of_a_reader_cancelled_before_its_fetch_reaches_another_reader(world: World) -> None:
    await cancel_at_fetch(world, before=True)


@scenario
async def test_the_event_of_a_reader_cancelled_after_its_fetch_reaches_another_reader(world: World) -> None:
    await cancel_at_fetch(world, before=False)


@scenario
async def test_events_end_with_the_proxy(world: World) -> None:
    from inco_trio import aio

    started = trio.Event()
    ended = trio.Event()

    async def main(proxy: aio.AsyncioProxy) -> None:
        with proxy.events() as events:
            started.set()
            assert [event async for event in events] == []
        with pytest.raises(ClosedError):
            await proxy.send(NOTIFY)
        ended.set()

    async with trio.open_nursery() as nursery, open_proxy(world.config) as proxy:
        nursery.start_soon(aio.run, proxy, main)
        await started.wait()
    assert ended.is_set()


@scenario
async def test_run_uses_an_open_loop_and_leaves_it_open(world: World) -> None:
    import trio_asyncio

    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> tuple[asyncio.AbstractEventLoop, asyncio.Task[bool]]:
        return asyncio.get_running_loop(), asyncio.create_task(asyncio.Event().wait())

    async with open_proxy(world.config) as proxy, trio_asyncio.open_loop() as loop:
        # asyncio keeps only weak references to tasks, so an unreferenced task can be garbage-collected while it waits.
        tasks = []
        for _ in range(2):
            used, left = await aio.run(proxy, main)
            tasks.append(left)
            assert used is loop
            assert not left.done()


@scenario
async def test_run_cancels_remaining_tasks_of_its_own_loop(world: World) -> None:
    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> asyncio.Task[bool]:
        return asyncio.create_task(asyncio.Event().wait())

    async with open_proxy(world.config) as proxy:
        assert (await aio.run(proxy, main)).cancelled()


@scenario
async def test_errors_of_main_and_of_a_task_are_both_raised(world: World) -> None:
    from inco_trio import aio

    async def fail_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("second")

    async def main(proxy: aio.AsyncioProxy) -> None:
        tasks.append(asyncio.create_task(fail_at_the_end()))
        await asyncio.sleep(0)
        raise ValueError("first")

    tasks: list[asyncio.Task[None]] = []
    async with open_proxy(world.config) as proxy:
        with pytest.raises(BaseExceptionGroup) as raised:
            await aio.run(proxy, main)
    assert raised.group_contains(ValueError, match="first")
    assert raised.group_contains(LookupError, match="second")


@scenario
async def test_cancelled_error_of_main_reaches_the_caller(world: World) -> None:
    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> None:
        raise asyncio.CancelledError

    async with open_proxy(world.config) as proxy:
        with pytest.raises(asyncio.CancelledError):
            await aio.run(proxy, main)


def documented(word: str, directory: Path) -> Path:
    """Copy the program with `word` in its first line from docs/asyncio.md to a file; return the file's path."""
    text = (PROJECT / "docs/asyncio.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (program,) = (each for each in programs if word in each.partition("\n")[0])
    path = directory / word
    path.write_text(program)
    return path


def commands_of_the_page(test: str) -> list[str]:
    """Return the blocks of docs/asyncio.md that are marked as run by `test`."""
    return [block.text for block in parts("asyncio") if block.value == f"test_aio.py::{test}"]


def received(core1: Peer) -> bytes:
    """Wait for the next frame and return its payload."""
    select.select([core1.fileno()], [], [])
    return core1.receive()[14:]


class Program:
    """A running program that prints a given message when it is ready."""

    def __init__(self, namespace: Namespace, command: list[str]) -> None:
        self.process = namespace.run(
            lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
        )
        self.said = b""

    def wait_said(self, text: bytes) -> None:
        """Wait until the program has printed `text`."""
        while text not in self.said:
            self.read()

    def read(self) -> None:
        """Wait for more output."""
        assert self.process.stdout is not None
        part = os.read(self.process.stdout.fileno(), 4096)
        assert part, f"{self.process.args!r}: ended too early; it printed: {self.said.decode()}"
        self.said += part

    def close(self) -> None:
        """Kill the program and print its output."""
        self.process.kill()
        rest = self.process.communicate()[0]
        # pytest shows this output if the test fails.
        sys.stderr.write(f"{self.process.args!r} ended; it printed:\n{(self.said + rest).decode()}")


@pytest.fixture
def start(cores: Cores) -> Iterator[Callable[..., Program]]:
    """Yield a function that starts a program in core 0's namespace: `start(*command)`."""
    with ExitStack() as stack:

        def start(*command: str | Path) -> Program:
            program = Program(cores.core0, [str(part) for part in command])
            stack.callback(program.close)
            return program

        yield start


@pytest.fixture
def mqtt(cores: Cores, start: Callable[..., Program], tmp_path: Path) -> Iterator[Client]:
    """Start a broker in core 0's namespace; yield a client whose `userdata` is the queue of received messages."""
    mosquitto = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
    assert mosquitto, "mosquitto: not found (install the package mosquitto)"
    configuration = tmp_path / "mosquitto.conf"
    # Inside a user namespace, mosquitto cannot switch to another user.
    configuration.write_text("listener 1883 127.0.0.1\nallow_anonymous true\nuser root\nlog_dest stderr\n")
    start(mosquitto, "-c", configuration).wait_said(b" running\n")

    messages: queue.Queue[MQTTMessage] = queue.Queue()
    client = Client(CallbackAPIVersion.VERSION2, userdata=messages)
    client.on_message = lambda _client, _messages, message: messages.put(message)
    cores.core0.run(lambda: client.connect("127.0.0.1"))
    client.loop_start()
    yield client
    client.disconnect()
    client.loop_stop()


@pytest.mark.netns
def test_documented_callback(
    pytestconfig: pytest.Config, start: Callable[..., Program], cores: Cores, core1: Peer, irq_dir: Path, tmp_path: Path
) -> None:
    command = python(pytestconfig.getini("filterwarnings"))
    program = start(*command, documented("callback.py", tmp_path), cores.link, irq_dir)
    program.wait_said(b"ready\n")
    core1.send(RESET)
    program.wait_said(b"outbound redun_notify_irq\n")
    # The callback must not answer this notification.
    (irq_dir / "message_6_trig").write_text("1")
    program.wait_said(b"inbound ihub_reset_irq\noutbound redun_notify_irq\noutbound redun_notify_irq\n")
    program.process.terminate()
    assert program.process.wait() == 0
    assert [received(core1), received(core1)] == [NOTIFY.encode()] * 2
    assert not select.select([core1.fileno()], [], [], 0)[0]


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_documented_asyncio_program(
    pytestconfig: pytest.Config,
    start: Callable[..., Program],
    cores: Cores,
    core1: Peer,
    irq_dir: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    command = python(pytestconfig.getini("filterwarnings"))
    answer = start(*command, documented("answer.py", tmp_path), cores.link, irq_dir)
    answer.wait_said(b"ready\n")
    core1.send(RESET)
    assert received(core1) == NOTIFY.encode()
    answer.wait_said(b"answered ihub_reset_irq\n")
    answer.process.send_signal(number)
    assert answer.process.wait() == 0


def page_shell(command: str, directory: Path) -> list[str]:
    """Return the command line of a shell that runs a command of the page in `directory`."""
    # `exec` replaces the shell, so that a signal to this process reaches the program.
    programs = "".join(
        f'{name}() {{ exec {sys.executable} {arguments} "$@"; }}\n'
        for name, arguments in (("python", ""), ("inco-trio", "-m inco_trio"))
    )
    return ["bash", "-c", f"cd {directory}\n{programs}{command}"]


def output(command: str, directory: Path) -> str:
    """Run a command of the page to its end, and return its output."""
    line = page_shell(command, directory)
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, timeout=HANG, check=True).stdout


@pytest.mark.netns
def test_documented_asyncio_program_runs_without_a_board(start: Callable[..., Program], tmp_path: Path) -> None:
    run, play_core1, answer, printed = commands_of_the_page("test_documented_asyncio_program_runs_without_a_board")
    documented("answer.py", tmp_path)
    # The warning that core 1 has ended may come before the last line of the output.
    program = start(*page_shell(f"exec 2> warnings\n{run}", tmp_path))
    program.wait_said(b"ready\n")
    assert comparable(output(play_core1, tmp_path)) == comparable(answer)
    program.wait_said(printed.encode())
    program.process.terminate()
    assert program.process.wait() == 0


@pytest.mark.netns
def test_documented_callback_runs_without_a_board(start: Callable[..., Program], tmp_path: Path) -> None:
    run, play_core1, printed = commands_of_the_page("test_documented_callback_runs_without_a_board")
    documented("callback.py", tmp_path)
    # The warning that core 1 has ended may come before the last line of the output.
    program = start(*page_shell(f"exec 2> warnings\n{run}", tmp_path))
    program.wait_said(b"ready\n")
    assert "outbound redun_notify_irq" in output(play_core1, tmp_path)
    program.wait_said(printed.encode())
    program.process.terminate()
    assert program.process.wait() == 0


@pytest.mark.netns
@pytest.mark.parametrize("ends_first", ["program", "proxy"])
def test_documented_client_of_the_control_socket(
    start: Callable[..., Program], tmp_path: Path, ends_first: str
) -> None:
    run, watch, play_core1, printed = commands_of_the_page("test_documented_client_of_the_control_socket")
    documented("watch.py", tmp_path)
    proxy = start(*page_shell(run, tmp_path))
    proxy.wait_said(b"ready\n")
    program = start(*page_shell(f"export PYTHONWARNINGS=error\n{watch}", tmp_path))
    program.wait_said(b"answer: ")
    output(play_core1, tmp_path)
    program.wait_said(printed.encode())
    if ends_first == "program":
        program.process.send_signal(signal.SIGINT)
    else:
        proxy.process.terminate()
    assert (program.process.wait(), program.said.decode()) == (0, printed)
    assert program.process.stdout is not None
    assert program.process.stdout.read() == b""


@pytest.mark.netns
def test_documented_connection_to_mqtt(
    pytestconfig: pytest.Config,
    start: Callable[..., Program],
    mqtt: Client,
    cores: Cores,
    core1: Peer,
    irq_dir: Path,
    tmp_path: Path,
) -> None:
    messages: queue.Queue[MQTTMessage] = mqtt.user_data_get()
    mqtt.subscribe("board/inbound/+", qos=1)
    # The broker retains this message, so the test does not have to wait until the program has connected.
    mqtt.publish(f"board/outbound/{NOTIFY}", "now", qos=1, retain=True)
    command = python(pytestconfig.getini("filterwarnings"))
    program = start(*command, documented("mqtt_board.py", tmp_path), cores.link, irq_dir, "127.0.0.1")

    assert received(core1) == NOTIFY.encode()
    for name in ("ihub_reset_irq", "ihub_hwwd_irq"):
        before = time.monotonic_ns()
        core1.send(name.encode())
        message = messages.get()
        assert message.topic == f"board/inbound/{name}"
        assert before < int(message.payload) < time.monotonic_ns()
    mqtt.publish("board/outbound/nothing", qos=1)
    program.wait_said(b"nothing: not an outbound signal of rpmsg4000 (expected one of: redun_notify_irq)\n")
    mqtt.publish(f"board/outbound/{NOTIFY}", qos=1)
    assert received(core1) == NOTIFY.encode()
    assert messages.empty(), "an outbound signal came back as a message"

    program.process.terminate()
    assert program.process.wait() == 0


@pytest.mark.netns
def test_documented_connection_to_mqtt_runs_without_a_board(
    start: Callable[..., Program], mqtt: Client, cores: Cores, tmp_path: Path
) -> None:
    subscribe, run, play_core1, printed = commands_of_the_page(
        "test_documented_connection_to_mqtt_runs_without_a_board"
    )
    documented("mqtt_board.py", tmp_path)
    # The broker retains this message: it shows that a client has subscribed.
    mqtt.publish(f"board/outbound/{NOTIFY}", "now", qos=1, retain=True)
    subscriber = start(*page_shell(subscribe, tmp_path))
    subscriber.wait_said(b" now\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core1:
        core1.bind(str(tmp_path / "core1"))
        start(*page_shell(run, tmp_path))
        core1.recv(4096)
        (tmp_path / "core1").unlink()
    cores.core0.run(lambda: output(play_core1, tmp_path))
    # The program and mosquitto_pub are two clients, so the order of their messages varies.
    subscriber.wait_said(f"/{NOTIFY} 1\n".encode())
    while subscriber.said.count(b"\n") < 3:
        subscriber.read()
    said = subscriber.said.decode().replace(f"board/outbound/{NOTIFY} now\n", "")
    assert comparable(said) == comparable(printed)


def test_trio_asyncio_is_only_imported_where_it_is_needed(pytestconfig: pytest.Config) -> None:
    code = """
import asyncio, importlib, pkgutil, sys, trio
before = asyncio.get_event_loop_policy
import inco_trio
for module in pkgutil.iter_modules(inco_trio.__path__):
    if module.name != "__main__":
        importlib.import_module(f"inco_trio.{module.name}")
assert "trio_asyncio" not in sys.modules
assert asyncio.get_event_loop_policy is before

async def main(proxy):
    pass

try:
    trio.run(inco_trio.aio.run, None, main)
except ImportError:
    # trio-asyncio 0.16 supports Python up to 3.13.
    assert sys.version_info >= (3, 14)
else:
    assert "trio_asyncio" in sys.modules
    assert asyncio.get_event_loop_policy is not before
"""
    subprocess.run([*python(pytestconfig.getini("filterwarnings")), "-c", code], check=True)


def test_error_names_trio_asyncio_if_it_does_not_support_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inco_trio import aio

    async def main(proxy: aio.AsyncioProxy) -> None:
        raise AssertionError

    (tmp_path / "trio_asyncio.py").write_text("import asyncio\nasyncio.removed\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trio_asyncio", raising=False)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(ImportError, match=f"trio-asyncio .* does not work with Python {version} .*removed.*newer"):
        trio.run(aio.run, cast("Proxy", None), main)


if __name__ == "__main__":
    play(*sys.argv[1:])
