"""A user's program that imports inco-trio; a test type-checks it against the installed wheel and does not run it."""

from __future__ import annotations

from pathlib import Path

import trio

import inco_trio


async def answer(config: inco_trio.Config) -> int:
    """Answer every reset request with a switch-over; return the number of received frames."""
    async with inco_trio.open_proxy(config) as proxy:
        with proxy.events() as events:
            async for notification in events:
                if notification.signal.name == "ihub_reset_irq":
                    await proxy.send("redun_notify_irq")
        return proxy.stats.received


async def serve(path: Path) -> None:
    """Run the whole daemon as one task of a larger program."""
    config = inco_trio.Config(link="rpmsg4000", signals=inco_trio.read_board(path).signals)
    async with trio.open_nursery() as nursery:
        await nursery.start(inco_trio.serve, config)
