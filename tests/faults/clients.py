"""Clients of the control socket that start and end during the soak test: some never read, and all are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType

from tests.support_control import COMMAND

__all__ = ["Clients"]

KINDS: dict[str, tuple[str, ...]] = {
    "monitor": ("monitor", "--json"),
    "monitor, filtered": ("monitor", "--direction", "inbound", "--count", "1000"),
    "record": ("record", "FILE", "--size", "1000000", "--keep", "2"),
    "status": ("status", "--json"),
    "status, live": ("status", "--watch", "0.05"),
    "status, metrics": ("status", "--openmetrics"),
}
MANY = 6
"""Number of clients that run at the same time."""
LIFE = 2.0
"""Maximum lifetime of a client in seconds."""


class Clients:
    """Clients of the control socket `control`. While the block runs, threads start them one after another."""

    def __init__(self, control: Path, work: Path, seed: int) -> None:
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.tracebacks: list[str] = []
        self._control, self._work = control, work
        self._chance = random.Random(seed)  # noqa: S311 - no cryptography
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._follow, args=(number,)) for number in range(MANY)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, number: int) -> None:
        """Run one client after another."""
        while not self._stop.is_set():
            kind = self._chance.choice(sorted(KINDS))
            words = [str(self._work / f"client{number}.pcapng") if word == "FILE" else word for word in KINDS[kind]]
            ours, theirs = os.pipe()
            with (
                (self._work / f"client{number}.err").open("w+") as said,
                subprocess.Popen(
                    [*COMMAND, *words, "--control", str(self._control)], stdout=theirs, stderr=said
                ) as process,
            ):
                os.close(theirs)
                self.started[kind] += 1
                end = self._chance.choice(["killed", "interrupted", "stopped", "deaf", "left"])
                self.ended[end] += 1
                self._read(ours, deaf=end == "deaf")
                if end == "stopped":
                    process.send_signal(signal.SIGSTOP)
                    self._stop.wait(LIFE)
                if end == "interrupted":
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(LIFE)  # The client might not handle SIGINT yet, or might block on its full pipe.
                process.kill()
                process.wait()
                said.seek(0)
                text = said.read()
                # If SIGINT arrives before our code runs, Python itself prints a traceback.
                if "Traceback" in text and (end != "interrupted" or "run_command" in text):
                    self.tracebacks.append(f"{kind}, {end}:\n{text}")
            with contextlib.suppress(OSError):
                os.close(ours)

    def _read(self, fd: int, *, deaf: bool) -> None:
        """Read a client's output for a while. If `deaf`, read nothing, so that the client blocks."""
        os.set_blocking(fd, False)
        begun = self._chance.uniform(0, LIFE)
        for _ in range(int(begun / 0.02) + 1):
            if not deaf:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 1 << 16)
            if self._stop.wait(0.02):  # Limit the rate of the reads.
                return
