"""Generate a socket filter (see linux/bpf.py) that accepts only frames whose payload can be one of the given names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from inco_trio.frame import HEADER_LENGTH
from inco_trio.linux import bpf
from inco_trio.linux.bpf import ACCEPT, REJECT, Instruction

__all__ = ["DEPTHS", "SAMPLE", "accepts", "name_filter"]

DEPTHS = (64, 8, 4, 2, 1, 0)
"""How many bytes of a name a filter may compare, in order of preference. Fewer bytes make the filter shorter."""
SAMPLE = 256
"""The filter also accepts one in SAMPLE other frames, selected at random. SAMPLE must be a power of two."""

_LOADS = {4: bpf.LOAD_WORD, 2: bpf.LOAD_HALF, 1: bpf.LOAD_BYTE}


def accepts(payload: bytes, names: Collection[bytes], depth: int) -> bool:
    """Return whether `name_filter(names, depth)` accepts a frame with this payload, apart from the random sample."""
    return any(_fits(payload, name, depth) for name in names)


def _fits(payload: bytes, name: bytes, depth: int) -> bool:
    if len(payload) < len(name) or payload[:depth][: len(name)] != name[:depth]:
        return False
    return depth < len(name) or payload[len(name) : len(name) + 1] in (b"", b"\0")


def name_filter(names: Iterable[bytes], depth: int) -> list[Instruction]:
    """Return a filter that accepts frames with one of `names` and NUL padding, and a random sample of other frames.

    The filter compares only the length and the first `depth` bytes of each name. If `depth` is less than the length of
    a name, the filter also accepts some other frames.
    """
    by_length: dict[int, set[bytes]] = {}
    for name in names:
        by_length.setdefault(len(name), set()).add(name[:depth])
    sample = [
        (bpf.LOAD_WORD, 0, 0, bpf.RANDOM),
        (bpf.AND, 0, 0, SAMPLE - 1),
        (bpf.JUMP_IF_EQUAL, 0, 1, 0),
        ACCEPT,
        REJECT,
    ]
    code: list[Instruction] = sample
    for length in sorted(by_length, reverse=True):
        # A load beyond the end of the frame would reject the frame, so compare the length first.
        group = _compare(sorted(by_length[length]), 0, length)
        too_short = [
            (bpf.LOAD_LENGTH, 0, 0, 0),
            (bpf.JUMP_IF_GREATER_OR_EQUAL, 1, 0, HEADER_LENGTH + length),
            # A frame that is too short for this name is too short for all longer names.
            (bpf.JUMP, 0, 0, len(group) + len(code) - len(sample)),
        ]
        code = [*too_short, *group, *code]
    return code


def _compare(names: Sequence[bytes], start: int, length: int) -> list[Instruction]:
    """Return code that accepts frames with one of `names` (`length` bytes each). For other frames, the next code runs.

    All `names` have the same first `start` bytes. The caller truncates them if the filter compares fewer bytes.
    """
    rest = len(names[0]) - start
    if not rest:
        return [ACCEPT] if len(names[0]) < length else _accept_the_end(HEADER_LENGTH + length)
    size = 4 if rest >= 4 else 2 if rest >= 2 else 1
    by_value: dict[bytes, list[bytes]] = {}
    for name in names:
        by_value.setdefault(name[start : start + size], []).append(name)
    code: list[Instruction] = []
    for value, same in reversed(by_value.items()):
        inner = _compare(same, start + size, length)
        if code:
            inner.append((bpf.JUMP, 0, 0, len(code)))
        code = [*_unless_equal(int.from_bytes(value, "big"), len(inner)), *inner, *code]
    return [(_LOADS[size], 0, 0, HEADER_LENGTH + start), *code]


def _unless_equal(value: int, skipped: int) -> list[Instruction]:
    """Return code that skips the next `skipped` instructions unless the loaded value is `value`."""
    if skipped <= bpf.SHORT_JUMP:
        return [(bpf.JUMP_IF_EQUAL, 0, skipped, value)]
    return [(bpf.JUMP_IF_EQUAL, 1, 0, value), (bpf.JUMP, 0, 0, skipped)]


def _accept_the_end(end: int) -> list[Instruction]:
    """Return code that accepts a frame that ends at the offset `end` or has a NUL byte at this offset."""
    return [
        (bpf.LOAD_LENGTH, 0, 0, 0),
        (bpf.JUMP_IF_EQUAL, 2, 0, end),
        (bpf.LOAD_BYTE, 0, 0, end),
        (bpf.JUMP_IF_EQUAL, 0, 1, 0),
        ACCEPT,
    ]
