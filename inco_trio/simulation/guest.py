"""Core 1 as a QEMU guest: bare-metal firmware in the RISC-V machine `virt`; see netns/core1/README.md."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from inco_trio import real_clock
from inco_trio.errors import InvalidArgumentError, UnavailableError
from inco_trio.linux.inotify import IN_MODIFY, Inotify
from inco_trio.linux.process import end_with_parent
from inco_trio.service.launch import Wait, wait_readable
from inco_trio.simulation.world import Namespace, wait_running

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
"""The message that our firmware prints when it has started its network card."""
_DEADLINE = 300.0
"""Timeout of each wait, in seconds. Only a hang reaches this limit."""
_MACHINE = ("-machine", "virt", "-m", "16", "-bios", "none", "-global", "virtio-mmio.force-legacy=false")
_PLAIN = ("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio")


class GuestError(UnavailableError):
    """QEMU is missing, has refused a command or has exited, or the guest did not respond in time."""


class QemuNotFoundError(GuestError, FileNotFoundError):
    """QEMU is not installed."""


def unix_netdev(local: Path, remote: Path) -> dict[str, Any]:
    """Return the QEMU options for a network card that sends from the datagram socket `local` to `remote`.

    QEMU creates `local`. Requires QEMU 7.2 or later. Never send QEMU an empty datagram: it would stop receiving.
    """
    return {
        "type": "dgram",
        "local": {"type": "unix", "path": str(local)},
        "remote": {"type": "unix", "path": str(remote)},
    }


def tap_netdev(ifname: str) -> dict[str, Any]:
    """Return the QEMU options for a network card on the existing tap interface `ifname`."""
    return {"type": "tap", "ifname": ifname, "script": "no", "downscript": "no"}


def parse_counters(line: str) -> dict[str, int]:
    """Parse the counters in a report line from the firmware."""
    return {name: int(value) for name, value in (word.split("=") for word in line.split() if "=" in word)}


class Guest(contextlib.AbstractContextManager["Guest"]):
    """Core 1 as a QEMU guest. `with Guest(...) as guest:` waits until the guest is ready, and kills QEMU at the end.

    `netdev` is the result of `unix_netdev` or `tap_netdev`. `command_line` contains rules for the firmware. The
    firmware and QEMU append their output to the file `log`. With `reboot=False`, QEMU ends when the guest is reset.
    QEMU runs in the network namespace `namespace`, if given. Behind a tap, the firmware starts when the tap passes
    frames: until the kernel has activated the tap, a bridge drops the frames that the firmware sends at boot. A program
    that must also wait for other events passes its own `wait`. Exceptions from `wait` reach the caller; during the
    start, they also kill QEMU.

    The kernel kills QEMU when the thread that started it ends (PR_SET_PDEATHSIG in prctl(2)). Methods raise GuestError
    if QEMU is not running or does not respond in time. `start` raises ResourceError if the tap stays down for 2 min.

    `firmware` must print `ready` on its serial output when it is ready. `program` and `machine` replace the defaults.
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
        firmware: Path | str = FIRMWARE,
        program: str = QEMU,
        machine: Sequence[str] = _MACHINE,
        ready: str = READY,
    ) -> None:
        for name, text in {"command_line": command_line, "program": program, "ready": ready}.items():
            if not isinstance(text, str):
                raise InvalidArgumentError(f"{name}={text!r}: expected a string")
        if not isinstance(machine, list | tuple) or not all(isinstance(word, str) for word in machine):
            raise InvalidArgumentError(f"machine={machine!r}: expected a list of arguments for QEMU")
        if not isinstance(firmware, Path | str):
            raise InvalidArgumentError(f"firmware={firmware!r}: expected a path")
        self._tap: str | None = netdev["ifname"] if netdev["type"] == "tap" else None
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
            *(() if self._tap is None else ("-S",)),
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

    def __exit__(self, *raised: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """The output of the firmware and QEMU so far."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The PID of QEMU."""
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise GuestError("the guest is not running")
        return self._process

    def start(self) -> None:
        """Start QEMU, and return once its monitor answers. The firmware becomes ready later (see `wait_ready`)."""
        if self._process is not None:
            raise GuestError(f"the guest is already running (PID {self._process.pid})")
        program = shutil.which(self._program)
        if program is None:
            hint = "Debian: install qemu-system-misc" if self._program == QEMU else "install it, or correct `program`"
            raise QemuNotFoundError(f"{self._program} is not installed ({hint})")
        try:
            self._open(program)
            self._execute("qmp_capabilities")
            if self._tap is not None:
                wait_running(self._tap, self._namespace)
                self.cont()
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
            # Keep Ctrl-C away from QEMU: only the program that started QEMU must receive it.
            process_group=0,
        )

    def _exit_code(self) -> int:
        try:
            return self._running().wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            raise GuestError(f"QEMU has not ended within {_DEADLINE:g} s") from None

    def fileno(self) -> int:
        """Return a descriptor that is readable when QEMU has ended."""
        self._running()
        return self._end

    def raise_ended(self) -> NoReturn:
        """Wait until QEMU has ended, and raise GuestError with the exit code."""
        code = self._exit_code()
        lines = self.log.splitlines() or ["nothing"]
        raise GuestError(f"QEMU has ended with exit code {code}; its last output: {lines[-1]}") from None

    def _message(self, deadline: float) -> dict[str, Any]:
        """Return the next message from the QEMU monitor. Raises GuestError if none arrives before `deadline`."""
        while b"\n" not in self._received:
            if not self._wait([self._monitor.fileno()], max(0.0, deadline - real_clock.monotonic())):
                raise GuestError(f"QEMU's monitor has not answered within {_DEADLINE:g} s")
            part = b""
            with contextlib.suppress(ConnectionError):
                part = self._monitor.recv(65536)
            if not part:
                self.raise_ended()
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _execute(self, command: str) -> None:
        """Run a monitor command and wait for the answer; see QEMU's QMP reference manual."""
        self._running()
        deadline = real_clock.monotonic() + _DEADLINE
        self._commands += 1
        try:
            self._monitor.sendall(json.dumps({"execute": command, "id": self._commands}).encode())
        except ConnectionError:
            self.raise_ended()
        # Skip the greeting, events, and late answers to commands that were interrupted.
        while (answer := self._message(deadline)).get("id") != self._commands:
            pass
        if "error" in answer:
            raise GuestError(f"QEMU's monitor refused {command}: {answer['error']['desc']}")

    def wait_for(self, text: str) -> str:
        """Wait for an output line that contains `text`, and return it. Continue after the last returned line."""
        deadline = real_clock.monotonic() + _DEADLINE
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
                self.raise_ended()
            left = max(0.0, deadline - real_clock.monotonic())
            if not self._wait([self._changes.fd, self._end], left):
                raise GuestError(f"the guest has not printed {text!r} within {_DEADLINE:g} s; output:\n{self.log}")
            self._changes.read_into(memoryview(bytearray(4096)))

    def wait_ready(self) -> None:
        """After `start` or a reset, wait until the firmware has started its network card."""
        self.wait_for(self._ready)

    def wait_counters(self) -> dict[str, int]:
        """Wait for the firmware's next report and return its counters. The signal in `report_on=NAME` requests it."""
        return parse_counters(self.wait_for("core1: counters"))

    def stop(self) -> None:
        """Pause the guest. Frames then queue up until the buffers of QEMU and the socket are full."""
        self._execute("stop")

    def cont(self) -> None:
        """Resume the guest after `stop`."""
        self._execute("cont")

    def system_reset(self) -> None:
        """Reset the guest, which loses all frames in its memory. Call `wait_ready` to wait until it has booted."""
        self._execute("system_reset")

    def quit(self) -> int:
        """Stop QEMU through its monitor and return the exit code."""
        self._execute("quit")
        return self.wait()

    def wait(self) -> int:
        """Wait until QEMU has ended and return its exit code (negative if a signal killed it)."""
        code = self._exit_code()
        self.kill()
        return code

    def kill(self) -> None:
        """Kill QEMU if it is running (SIGKILL). `start` can start it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._closing.close()
