"""What somebody else writes on top of inco-trio: it is type-checked against the installed wheel, not run."""

from __future__ import annotations

from pathlib import Path

import trio

import inco_trio


async def answer(config: inco_trio.Config) -> int:
    """Answer every reset request with a switch-over; return the number of frames seen."""
    async with inco_trio.open_proxy(config) as proxy:
        with proxy.events() as events:
            async for notification in events:
                if notification.signal.name == "ihub_reset_irq":
                    await proxy.send("redun_notify_irq")
        return proxy.stats.received


async def serve(path: Path) -> None:
    """Run the whole daemon as one task of a bigger program."""
    config = inco_trio.Config(link="rpmsg4000", signals=inco_trio.read_board(path).signals)
    async with trio.open_nursery() as nursery:
        await nursery.start(inco_trio.serve, config)
