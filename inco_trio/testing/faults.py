"""Reproducible faults of a link: rates and a seed decide which frames are affected."""

from __future__ import annotations

import random

import attrs

from inco_trio.errors import InvalidArgumentError

__all__ = ["Fate", "FrameFaults"]

LATE = 0.05
"""Additional delay of a reordered frame, in seconds."""
Fate = tuple[float, bytes, str]
"""The delay of a frame in seconds, the frame, and a description of its faults (empty if it has none)."""
RATES = ("drop", "double", "reorder", "corrupt")


@attrs.define
class FrameFaults:
    """Faults of a link: `drop`, `double`, `reorder` and `corrupt` are rates from 0 to 1. `delay` is in seconds.

    A reordered frame arrives 50 ms later. A corrupted frame has one wrong bit. Raises InvalidArgumentError.
    """

    drop: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0
    seed: int = 0
    _random: random.Random = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for name in RATES:
            rate = getattr(self, name)
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise InvalidArgumentError(f"{name}={rate!r}: expected a rate from 0 to 1")
        if not isinstance(self.seed, int):
            raise InvalidArgumentError(f"seed={self.seed!r}: expected an integer")
        if not isinstance(self.delay, int | float) or not 0 <= self.delay < float("inf"):
            raise InvalidArgumentError(f"delay={self.delay!r}: expected a number of seconds, 0 or more")
        self._random = random.Random(self.seed)  # noqa: S311 - reproducible on purpose

    def fates(self, frame: bytes) -> list[Fate]:
        """Apply the faults to a frame. Return its fate, or two fates if the frame is duplicated."""
        # Always draw five random numbers, so that changing one rate does not affect the other faults.
        drop, double, reorder, corrupt, place = (self._random.random() for _ in range(5))
        if drop < self.drop:
            return [(0.0, b"", "dropped")]
        done = []
        late = self.delay
        if reorder < self.reorder:
            late += LATE
            done.append("reordered")
        if corrupt < self.corrupt and frame:
            bit = int(place * len(frame) * 8)
            changed = bytearray(frame)
            changed[bit // 8] ^= 1 << bit % 8
            frame = bytes(changed)
            done.append("corrupted")
        fates = [(late, frame, " and ".join(done))]
        if double < self.double:
            fates.append((late, frame, "duplicated"))
        return fates
