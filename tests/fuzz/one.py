"""Run one fuzz target until it fails or libFuzzer stops: `python -m tests.fuzz.one TARGET [OPTION...]`."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["inco_trio"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    logging.disable()
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
