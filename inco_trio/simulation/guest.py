"""A real second core: the firmware beside this file, in QEMU's RISC-V machine `virt`; see netns/core1/README.md.

Nothing here needs a privilege but a tap, nor an event loop: every wait is for a line of the serial output, an answer of
QEMU's monitor or its end, and none is a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inco_trio.errors import UnavailableError
from inco_trio.linux.inotify import IN_MODIFY, Inotify
from inco_trio.linux.process import end_with_parent
from inco_trio.service.launch import Wait, wait_readable
from inco_trio.simulation.world import Namespace

__all__ = [
    "FIRMWARE",
    "MAC",
    "QEMU",
    "Guest",
    "GuestError",
    "QemuNotFoundError",
    "parse_counters",
    "tap_netdev",
    "unix_netdev",
]

QEMU = "qemu-system-riscv64"
FIRMWARE = Path(__file__).with_name("firmware") / "core1.elf"
MAC = "52:54:00:00:00:01"

READY = "core1: ready"
"""What our firmware says once its card is started."""
_DEADLINE = 300.0
"""Seconds after which a wait is an error: it only stops a hang."""


_MACHINE = ("-machine", "virt", "-m", "16", "-bios", "none", "-global", "virtio-mmio.force-legacy=false")
_PLAIN = ("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio")


class GuestError(UnavailableError):
    """QEMU is not installed, refuses a command or has ended, or the guest does not do what the caller waits for."""


class QemuNotFoundError(GuestError, FileNotFoundError):
    """QEMU is not installed."""


def unix_netdev(local: Path, remote: Path) -> dict[str, Any]:
    """QEMU's card is the datagram socket `local`, which QEMU makes anew; its frames go to whoever is bound at `remote`.

    Needs QEMU 7.2. A datagram of 0 bytes ends QEMU's reception for good: send none.
    """
    return {
        "type": "dgram",
        "local": {"type": "unix", "path": str(local)},
        "remote": {"type": "unix", "path": str(remote)},
    }


def tap_netdev(ifname: str) -> dict[str, Any]:
    """QEMU's card is the far end of the tap `ifname`, which exists already."""
    return {"type": "tap", "ifname": ifname, "script": "no", "downscript": "no"}


def parse_counters(line: str) -> dict[str, int]:
    """The counters of a line that the firmware says when it is asked for a report."""
    return {name: int(value) for name, value in (word.split("=") for word in line.split() if "=" in word)}


class Guest:
    """Core 1 as a guest of QEMU; `with Guest(...) as guest:` returns once it is ready, and kills it at the end.

    `netdev` is one of `unix_netdev` and `tap_netdev`. `command_line` holds the firmware's rules. `log` is a file that
    gets what the firmware and QEMU say, appended. With `reboot=False`, QEMU ends when the guest resets itself or is
    reset. QEMU runs in the network namespace `namespace`, where one is given. `wait` is for a program that has more to
    wait for, as a signal of its user: what it raises ends the method, and at the start QEMU too.

    QEMU ends with the thread that started it, whatever ends that (PR_SET_PDEATHSIG in prctl(2)). Where nothing else is
    said, a method that cannot do its work within 20 s, or for want of a running QEMU, raises `GuestError`.

    Another `firmware` says `ready` on its serial output once it is; another `program` has other `machine` arguments.
    """

    def __init__(
        self,
        netdev: Mapping[str, Any],
        command_line: str = "",
        *,
        log: Path,
        mac: str = MAC,
        reboot: bool = True,
        namespace: Namespace | None = None,
        wait: Wait = wait_readable,
        firmware: Path = FIRMWARE,
        program: str = QEMU,
        machine: Sequence[str] = _MACHINE,
        ready: str = READY,
    ) -> None:
        self._program = program
        self._ready = ready
        self._arguments = [
            *machine,
            *("-kernel", str(firmware)),
            *_PLAIN,
            *("-netdev", json.dumps({"id": "link", **netdev})),
            *("-device", f"virtio-net-device,netdev=link,mac={mac}"),
            *("-append", command_line),
            *(() if reboot else ("-no-reboot",)),
        ]
        self._namespace = namespace
        self._wait = wait
        self._log = log
        self._seen = 0
        self._commands = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Guest:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """All that the firmware and QEMU have said."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise GuestError("the guest is not running")
        return self._process

    def start(self) -> None:
        """Start QEMU, and return once its monitor answers; the firmware is ready a moment later."""
        if self._process is not None:
            raise GuestError(f"the guest is running already, as process {self._process.pid}")
        program = shutil.which(self._program)
        if program is None:
            raise QemuNotFoundError(
                f"{self._program} is not installed: install the package that has it (Debian: qemu-system-misc)"
            )
        try:
            self._open(program)
            self._execute("qmp_capabilities")
        except BaseException:
            self.kill()
            raise

    def _open(self, program: str) -> None:
        closing = self._closing = contextlib.ExitStack()
        self._monitor, theirs = socket.socketpair()
        closing.callback(self._monitor.close)
        self._received = b""
        with theirs, self._log.open("ab") as output:
            self._seen = output.tell()
            self._changes = Inotify()
            closing.callback(self._changes.close)
            self._changes.watch(str(self._log), IN_MODIFY)
            self._process = self._spawn(program, theirs.fileno(), output.fileno())
        self._end = os.pidfd_open(self._process.pid)
        closing.callback(os.close, self._end)

    def _spawn(self, program: str, monitor: int, output: int) -> subprocess.Popen[bytes]:
        parent, namespace = os.getpid(), self._namespace

        def prepare() -> None:
            if not end_with_parent(parent):
                os._exit(1)
            if namespace is not None:
                namespace.enter()

        qmp = ("-chardev", f"socket,id=qmp,fd={monitor}", "-mon", "chardev=qmp,mode=control")
        return subprocess.Popen(
            [program, *self._arguments, *qmp],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[monitor],
            preexec_fn=prepare,
            # A group of its own: Ctrl-C is for the program that started it.
            process_group=0,
        )

    def _exit_code(self) -> int:
        try:
            return self._running().wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            raise GuestError(f"QEMU has not ended within {_DEADLINE:g} s") from None

    def fileno(self) -> int:
        """A descriptor that is readable once QEMU has ended."""
        self._running()
        return self._end

    def ended(self) -> GuestError:
        """The error that tells of QEMU's end, which it waits for."""
        code = self._exit_code()
        said = self.log.splitlines() or ["nothing"]
        return GuestError(f"QEMU has ended with exit code {code}; the last that it said: {said[-1]}")

    def _message(self, deadline: float) -> dict[str, Any]:
        """The next message of the monitor, until the monotonic time `deadline`."""
        while b"\n" not in self._received:
            if not self._wait([self._monitor.fileno()], max(0.0, deadline - time.monotonic())):
                raise GuestError(f"QEMU's monitor has not answered within {_DEADLINE:g} s")
            part = b""
            with contextlib.suppress(ConnectionError):
                part = self._monitor.recv(65536)
            if not part:
                raise self.ended()
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _execute(self, command: str) -> None:
        """Have the monitor do something, and wait until it has; see QEMU's QMP reference manual."""
        self._running()
        deadline = time.monotonic() + _DEADLINE
        self._commands += 1
        try:
            self._monitor.sendall(json.dumps({"execute": command, "id": self._commands}).encode())
        except ConnectionError:
            raise self.ended() from None
        # Between them come a greeting, events, and answers that nobody has waited for long enough.
        while (answer := self._message(deadline)).get("id") != self._commands:
            pass
        if "error" in answer:
            raise GuestError(f"QEMU's monitor refuses: {answer['error']['desc']}")

    def wait_for(self, text: str) -> str:
        """The next line with `text` in it, once it is there, after the last line that such a wait has returned."""
        deadline = time.monotonic() + _DEADLINE
        self._running()
        while True:
            ended = bool(self._wait([self._end], 0))
            with self._log.open("rb") as log:
                log.seek(self._seen)
                for line in log:
                    if text.encode() in line and line.endswith(b"\n"):
                        self._seen = log.tell()
                        return line.decode(errors="replace").rstrip("\n")
            if ended:
                raise self.ended()
            left = max(0.0, deadline - time.monotonic())
            if not self._wait([self._changes.fd, self._end], left):
                raise GuestError(f"the guest has not said {text!r} within {_DEADLINE:g} s; it said:\n{self.log}")
            self._changes.read_into(memoryview(bytearray(4096)))

    def wait_ready(self) -> None:
        """Wait until the firmware has started its card, also after a reset; what it sends at boot it sends after."""
        self.wait_for(self._ready)

    def wait_counters(self) -> dict[str, int]:
        """The counters of its next report, which a signal has asked for (`report_on=NAME`)."""
        return parse_counters(self.wait_for("core1: counters"))

    def stop(self) -> None:
        """Pause the guest; frames wait, as far as QEMU and its socket have room."""
        self._execute("stop")

    def cont(self) -> None:
        """Go on after `stop`."""
        self._execute("cont")

    def system_reset(self) -> None:
        """Reset the guest at once, with all that it holds; `wait_ready` returns when it is there again."""
        self._execute("system_reset")

    def quit(self) -> int:
        """End QEMU by its monitor; returns its exit code."""
        self._execute("quit")
        return self.wait()

    def wait(self) -> int:
        """Wait for QEMU's end; returns its exit code, negative for a signal."""
        code = self._exit_code()
        self.kill()
        return code

    def kill(self) -> None:
        """End QEMU by SIGKILL, if it runs; `start` starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._closing.close()
