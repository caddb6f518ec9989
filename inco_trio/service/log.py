"""The log, on standard error: text for people, or one JSON object a line.

Text has no time stamps: the supervisor's logger writes them.
"""

from __future__ import annotations

import json
import logging
import time

__all__ = ["log_statistics", "set_up_logging"]

logger = logging.getLogger(__name__)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"inco-trio: {record.levelname.lower()}: {super().format(record)}"


def set_up_logging(log_format: str, *, verbose: bool) -> None:
    """Send the package's log to standard error as `text` or `json`; `verbose` shows each notification."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    package = logging.getLogger("inco_trio")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)


def log_statistics(counters: dict[str, int]) -> None:
    """Log the counters, by name."""
    text = " ".join(f"{name}={count}" for name, count in counters.items())
    logger.info("statistics: %s", text, extra={"event": "statistics", "fields": counters})
