"""Guard a service of core 0: python guard.py COMMAND [ARGUMENT ...]

ihub_hwwd_irq: core 1 has received no sign of life from the service; the guard restarts the service.
ihub_reset_irq: core 1 is about to reset the board; the guard stops the service and exits.
The guard answers both with redun_notify_irq when it has finished. UDRV_JSON_PATH is the path of the board's file.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import trio
from inotify_simple import INotify, flags

from inco_trio import read_board


async def stop(service: trio.Process) -> None:
    """Terminate the service, and kill it if it does not exit."""
    with trio.move_on_after(5):  # A service might ignore SIGTERM.
        service.terminate()
        await service.wait()
    service.kill()
    await service.wait()


async def guard(command: list[str], board: Path) -> None:
    """Run the command until core 1 announces that it will reset the board."""
    signals = {signal.name: signal for signal in read_board(board).signals}
    answer = signals["redun_notify_irq"].path
    with INotify() as inotify:
        interrupts = {}
        for name in ("ihub_hwwd_irq", "ihub_reset_irq"):
            # Also watch MODIFY: an event between two unread CLOSE_WRITE events keeps the kernel from merging them.
            watch = inotify.add_watch(signals[name].directory, flags.CLOSE_WRITE | flags.MODIFY)
            interrupts[watch, signals[name].register] = name
        async with trio.open_nursery() as nursery:

            async def start() -> trio.Process:
                service: trio.Process = await nursery.start(partial(trio.run_process, command, check=False))
                print(f"{command[0]} runs as process {service.pid}", flush=True)
                return service

            service = await start()
            while True:
                await trio.lowlevel.wait_readable(inotify)
                for event in inotify.read(timeout=0):
                    closed = event.mask & flags.CLOSE_WRITE
                    name = interrupts.get((event.wd, event.name), "") if closed else ""
                    if event.mask & flags.Q_OVERFLOW:
                        name = "ihub_hwwd_irq"  # The kernel dropped events. A restart is always safe.
                    if name:
                        await stop(service)
                    if name == "ihub_hwwd_irq":
                        service = await start()
                    if name:
                        answer.write_text("1")
                    if name == "ihub_reset_irq":
                        return


if __name__ == "__main__":
    if not sys.argv[1:] or "UDRV_JSON_PATH" not in os.environ:
        sys.exit(__doc__)
    trio.run(guard, sys.argv[1:], Path(os.environ["UDRV_JSON_PATH"]))
