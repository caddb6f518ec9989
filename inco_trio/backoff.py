"""Exponential backoff between attempts."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Exponential backoff with jitter. Pauses grow up to CAP (seconds), so CAP limits how long a recovery takes."""

    FIRST = 0.005
    CAP = 0.08

    def __init__(self, first: float = FIRST, factor: float = 2) -> None:
        self._first = self._pause = first
        self._factor = factor

    def next(self) -> float:
        pause = self._pause * random.uniform(0.8, 1.2)  # noqa: S311 - not for cryptography
        self._pause = min(self._pause * self._factor, self.CAP)
        return pause

    def reset(self) -> None:
        """After a successful attempt, start again with the shortest pause."""
        self._pause = self._first
