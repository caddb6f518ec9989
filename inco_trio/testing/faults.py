"""What a bad wire does to frames, at rates and with a seed: it is the same each time."""

from __future__ import annotations

import random

import attrs

from inco_trio.errors import InvalidArgumentError

__all__ = ["Fate", "FrameFaults"]

LATE = 0.05
"""Seconds by which a reordered frame comes after those that were behind it."""

Fate = tuple[float, bytes, str]
"""Seconds until a frame comes, the frame, and what was done to it (empty: nothing)."""

RATES = ("drop", "double", "reorder", "corrupt")


@attrs.define
class FrameFaults:
    """Each of `drop`, `double`, `reorder` and `corrupt` is a rate, 0 to 1; `delay` is in seconds, for each frame.

    A reordered frame comes 50 ms later than it would; of a corrupted one, one bit is turned.

    Raises InvalidArgumentError.
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
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r}: is no rate, which is a number from 0 to 1")
        if not 0 <= self.delay < float("inf"):
            raise InvalidArgumentError(f"delay={self.delay!r}: is not a number of seconds, 0 or more")
        self._random = random.Random(self.seed)  # noqa: S311 - the same each time on purpose

    def fates(self, frame: bytes) -> list[Fate]:
        """What becomes of a frame: nothing, one or two of it."""
        # Always as many numbers, so that one rate does not change what another one does.
        drop, double, reorder, corrupt, place = (self._random.random() for _ in range(5))
        done = []
        late = self.delay
        if drop < self.drop:
            return [(0.0, b"", "dropped")]
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
            fates.append((late, frame, "doubled"))
        return fates
