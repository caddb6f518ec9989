"""The metrics of all boards of this host, for Prometheus: each scrape asks every proxy. See docs/metrics.md."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import trio
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from inco_trio.control.client import Client, sockets
from inco_trio.errors import IncoError, InvalidArgumentError, PermissionDeniedError, ResourceError
from inco_trio.metrics.openmetrics import Family, families, shown
from inco_trio.problems import Problems

__all__ = ["Boards", "serve"]

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds in which a proxy answers; a scrape is not to wait for one that stands still."""
ALL = 5.0
"""Seconds in which all do; Prometheus waits for 10, by default."""
AT_ONCE = 64
"""Proxies that are asked at once."""


class Boards(Collector):
    """Asks the proxies at `controls`, or all that are found."""

    def __init__(self, controls: Sequence[Path] | None = None) -> None:
        self._controls = controls
        self._problems = Problems()
        self._names: dict[Path, str] = {}
        """What was found at a path: one that stands still keeps its name."""

    def collect(self) -> Iterator[Metric]:
        """Ask them; a proxy that does not answer is told, and not waited for."""
        paths = sockets() if self._controls is None else self._controls
        end = time.monotonic() + ALL
        with ThreadPoolExecutor(AT_ONCE) as asking:
            answers = list(asking.map(lambda path: self._ask(path, end), paths))
        up = GaugeMetricFamily("inco_trio_proxy_up", "Whether the proxy answers.", labels=["proxy"])
        metrics: dict[str, Metric] = {}
        names: set[str] = set()
        for path, (proxy, found) in zip(paths, answers, strict=True):
            if proxy is None:
                continue  # A socket that was left.
            # As on interfaces of one name in two network namespaces: series of the same labels are refused.
            name = shown(str(path) if proxy in names else proxy)
            names.add(proxy)
            up.add_metric([name], found is not None)
            for family in found or ():
                kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
                known = f"inco_trio_{family.name}"
                metric = metrics.setdefault(known, kind(known, family.text))
                for labels, value in family.samples:
                    told = {"proxy": name} | {key: shown(label) for key, label in labels.items()}
                    metric.add_sample(known + ("_total" if family.kind == "counter" else ""), told, float(value))
        yield GaugeMetricFamily("inco_trio_proxies", "Proxies that were found.", value=len(up.samples))
        yield up
        yield from metrics.values()

    def _ask(self, path: Path, end: float) -> tuple[str | None, list[Family] | None]:
        """Name and metrics of the proxy at `path`: no metrics if it does not answer, nor a name if nobody is there."""
        patience = max(PATIENCE / 40, min(PATIENCE, end - time.monotonic()))
        try:
            with Client(path, patience) as client:
                self._names[path] = str(client.greeting["name"])
                found = list(families(client.request({"request": "status"}, patience)["status"]))
        except IncoError as error:
            if self._controls is None and isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                self._names.pop(path, None)
                return None, None
            self._problems.failed(path, error.reason)
            return self._names.get(path, str(path)), None
        except (LookupError, TypeError, AttributeError):
            self._problems.failed(path, "who listens there does not tell what inco-trio of this version does")
            return self._names.get(path, str(path)), None
        self._problems.well(path)
        return self._names[path], found


async def serve(address: str, port: int, controls: Sequence[Path] | None, ready: Callable[[], None]) -> None:
    """Answer scrapes until cancelled. Raises InvalidArgumentError, PermissionDeniedError, ResourceError."""
    listen = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Later(Boards(controls)))
    try:
        server, thread = start_http_server(port, address, registry)
    except PermissionError as error:
        raise PermissionDeniedError(f"--listen {listen}: {error.strerror}: name a port from 1024 on") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"--listen {listen}: somebody listens there already: end that, or name another port"
            ) from error
        raise InvalidArgumentError(f"--listen {listen}: cannot listen there: {error.strerror}") from error
    logger.info("http://%s/metrics", listen)
    ready()
    try:
        await trio.sleep_forever()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Later(Collector):
    """A collector that is not asked when it is registered."""

    def __init__(self, boards: Boards) -> None:
        self._boards = boards

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        return self._boards.collect()
