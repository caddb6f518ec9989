"""Growing pauses between attempts."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Pauses in seconds that grow up to CAP, with random variation. CAP also bounds how long recovery takes."""

    FIRST = 0.005
    CAP = 0.08

    def __init__(self) -> None:
        self._pause = self.FIRST

    def next(self) -> float:
        pause = self._pause * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load, hides nothing
        self._pause = min(self._pause * 2, self.CAP)
        return pause

    def reset(self) -> None:
        """Return to the first pause, after a success."""
        self._pause = self.FIRST
