"""Where a command finds the configuration: `--config FILE` or $UDRV_JSON_PATH."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from inco_trio.errors import UsageError

__all__ = ["config_path", "configuration_argument"]


def configuration_argument(sub: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    sub.add_argument("--config", type=Path, metavar="FILE", help="udrv.json (default: $UDRV_JSON_PATH)")


def config_path(args: argparse.Namespace) -> Path:
    """The configuration that was named. Raises UsageError if none was."""
    path: Path | None = args.config
    if path is None and (named := os.environ.get("UDRV_JSON_PATH")):
        path = Path(named)
    if path is None:
        raise UsageError("no configuration: give --config FILE, or set UDRV_JSON_PATH (`run` also takes --irq-dir DIR)")
    return path
