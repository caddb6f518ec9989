"""Show a board's signals live on a web page: python signals_page.py LINK IRQ_DIR [PORT]

The program is the proxy of the board. The page counts notifications and has a button for each outbound signal.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from inco_trio import Config, UnknownSignalError, aio, builtin_signals

PAGE = Path(__file__).with_name("page.html")
PATIENCE = 2.0
"""Timeout in seconds for sending a signal to core 1 after a click."""


class SignalsPage:
    """The HTTP request handlers of the page, which use an open proxy."""

    def __init__(self, proxy: aio.Proxy) -> None:
        self._proxy = proxy
        self._rows: dict[str, dict[str, Any]] = {
            each.name: {"name": each.name, "direction": each.direction.value, "count": 0, "last": None}
            for each in proxy.config.signals
        }
        self._changed = asyncio.Event()
        self._ended = False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Count the proxy's notifications until the proxy closes."""
        with self._proxy.events() as events:
            async for event in events:
                row = self._rows[event.signal.name]
                row["count"] += 1
                row["last"] = event.time_ns / 1e9
                self._notify()

    async def page(self, _: web.Request) -> web.FileResponse:
        """Handle GET /: return the page."""
        return web.FileResponse(PAGE)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Handle GET /events: send all rows now and after each change. A slow reader gets only the latest state."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        while not self._ended:
            changed = self._changed
            await response.write(f"data: {json.dumps([*self._rows.values()])}\n\n".encode())
            await changed.wait()
        return response

    async def send(self, request: web.Request) -> web.Response:
        """Handle POST /send/NAME: send the signal NAME."""
        try:
            async with asyncio.timeout(PATIENCE):  # The browser gets an answer even if core 1 is not running.
                await self._proxy.send(request.match_info["name"])
        except UnknownSignalError as error:
            return web.Response(status=404, text=f"{error}\n")
        except TimeoutError:
            return web.Response(status=504, text="core 1 is not running: the signal may be sent once it starts\n")
        return web.Response(status=204)

    async def end(self, _: web.Application) -> None:
        """End all event streams when the server shuts down."""
        self._ended = True
        self._notify()


async def main(link: str, irq_dir: str, port: str = "8080") -> None:
    """Serve the page until SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with aio.open_proxy(Config(link, builtin_signals(Path(irq_dir)))) as proxy:
        page = SignalsPage(proxy)
        app = web.Application()
        app.add_routes([web.get("/", page.page), web.get("/events", page.events), web.post("/send/{name}", page.send)])
        app.on_shutdown.append(page.end)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(port)).start()
        following = asyncio.create_task(page.follow())
        host, bound = runner.addresses[0][:2]
        print(f"listening on http://{host}:{bound}", flush=True)
        await stop.wait()
        await runner.cleanup()
        following.cancel()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
