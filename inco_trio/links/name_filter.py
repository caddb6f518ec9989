"""Generate a socket filter (see linux/bpf.py) that accepts only frames whose payload can be one of the given names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from inco_trio.frame import FRAME_MAX, HEADER_LENGTH
from inco_trio.linux import bpf
from inco_trio.linux.bpf import ACCEPT, REJECT, Instruction

__all__ = ["DEPTHS", "FORMS", "SAMPLE", "accepts", "name_filter"]

DEPTHS = (64, 8, 4, 2, 1, 0)
"""How many bytes of a name a filter may compare, in order of preference. Fewer bytes make the filter shorter."""
FORMS = ((DEPTHS[0], True), *((depth, False) for depth in DEPTHS))
"""Depths, each with whether the filter also compares all padding, in order of preference.

Comparing the padding takes about 1,100 instructions.
"""
SAMPLE = 256
"""The filter also accepts one in SAMPLE other frames, selected at random. SAMPLE must be a power of two."""

_LOADS = {4: bpf.LOAD_WORD, 2: bpf.LOAD_HALF, 1: bpf.LOAD_BYTE}
_LOADS_AT_X = {4: bpf.LOAD_WORD_AT_X, 2: bpf.LOAD_HALF_AT_X, 1: bpf.LOAD_BYTE_AT_X}
_PADDING: Instruction = (bpf.JUMP, 0, 0, -1)
"""A jump to the code that compares the padding. `name_filter` inserts the offset."""
_LOADS_MAX = 64
"""Maximum number of loads in a part of this code, so that its conditional jumps are short."""


def accepts(payload: bytes, names: Collection[bytes], depth: int, *, padding: bool = False) -> bool:
    """Return whether `name_filter` with these arguments accepts a frame with this payload, apart from the sample."""
    return len(payload) <= FRAME_MAX - HEADER_LENGTH and any(_fits(payload, name, depth, padding) for name in names)


def _fits(payload: bytes, name: bytes, depth: int, padding: bool) -> bool:
    if len(payload) < len(name) or payload[:depth][: len(name)] != name[:depth]:
        return False
    return depth < len(name) or not payload[len(name) : None if padding else len(name) + 1].strip(b"\0")


def name_filter(names: Iterable[bytes], depth: int, *, padding: bool = False) -> list[Instruction]:
    """Return a filter that accepts frames with one of `names` and NUL padding, and a random sample of other frames.

    The filter compares only the length and the first `depth` bytes of each name. If `depth` is less than the length of
    a name, the filter also accepts some other frames. Without `padding`, it compares only one byte of padding.
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
        group = _compare(sorted(by_length[length]), 0, length, padding)
        too_short = [
            (bpf.LOAD_LENGTH, 0, 0, 0),
            (bpf.JUMP_IF_GREATER_OR_EQUAL, 1, 0, HEADER_LENGTH + length),
            # A frame that is too short for this name is too short for all longer names.
            (bpf.JUMP, 0, 0, len(group) + len(code) - len(sample)),
        ]
        code = [*too_short, *group, *code]
    too_long = [
        (bpf.LOAD_LENGTH, 0, 0, 0),
        (bpf.JUMP_IF_GREATER, 0, 1, FRAME_MAX),
        (bpf.JUMP, 0, 0, len(code) - len(sample)),
    ]
    code = [*too_long, *code]
    if padding:
        code = [(*one[:3], len(code) - at - 1) if one is _PADDING else one for at, one in enumerate(code)]
        code += [*_compare_padding(), *sample]
    return code


def _compare_padding() -> list[Instruction]:
    """Return code that accepts a frame with only NUL bytes from X to its end. For other frames, the next code runs.

    A load beyond the end of the frame would reject the frame. For each bit that is set in the number of remaining
    bytes, compare that power of two of bytes.
    """
    code: list[Instruction] = [ACCEPT]
    for exponent in range((FRAME_MAX - HEADER_LENGTH).bit_length()):
        size = 1 << exponent
        width = min(size, 4)
        part: list[Instruction] = [(bpf.COPY_FROM_X, 0, 0, 0), (bpf.ADD, 0, 0, size), (bpf.COPY_TO_X, 0, 0, 0)]
        for start in range(0, size, _LOADS_MAX * width):
            offsets = range(start, min(start + _LOADS_MAX * width, size), width)
            loads: list[Instruction] = []
            for offset in reversed(offsets):
                loads = [(_LOADS_AT_X[width], 0, 0, offset), (bpf.JUMP_IF_EQUAL, 0, len(loads) + 1, 0), *loads]
            # The second jump follows a byte that is not NUL.
            part = [*loads, (bpf.JUMP, 0, 0, 1), (bpf.JUMP, 0, 0, len(part) + len(code)), *part]
        code = [(bpf.LOAD_MEMORY, 0, 0, 0), (bpf.JUMP_IF_BITS, 1, 0, size), (bpf.JUMP, 0, 0, len(part)), *part, *code]
    return [(bpf.LOAD_LENGTH, 0, 0, 0), (bpf.SUBTRACT_X, 0, 0, 0), (bpf.STORE_MEMORY, 0, 0, 0), *code]


def _compare(names: Sequence[bytes], start: int, length: int, padding: bool) -> list[Instruction]:
    """Return code that accepts frames with one of `names` (`length` bytes each). For other frames, the next code runs.

    All `names` have the same first `start` bytes. The caller truncates them if the filter compares fewer bytes.
    """
    rest = len(names[0]) - start
    if not rest:
        if len(names[0]) < length:
            return [ACCEPT]
        end = HEADER_LENGTH + length
        return _at_the_end(end, [(bpf.SET_X, 0, 0, end), _PADDING] if padding else [ACCEPT])
    size = 4 if rest >= 4 else 2 if rest >= 2 else 1
    by_value: dict[bytes, list[bytes]] = {}
    for name in names:
        by_value.setdefault(name[start : start + size], []).append(name)
    code: list[Instruction] = []
    for value, same in reversed(by_value.items()):
        inner = _compare(same, start + size, length, padding)
        if code:
            inner.append((bpf.JUMP, 0, 0, len(code)))
        code = [*_unless_equal(int.from_bytes(value, "big"), len(inner)), *inner, *code]
    return [(_LOADS[size], 0, 0, HEADER_LENGTH + start), *code]


def _unless_equal(value: int, skipped: int) -> list[Instruction]:
    """Return code that skips the next `skipped` instructions unless the loaded value is `value`."""
    if skipped <= bpf.SHORT_JUMP:
        return [(bpf.JUMP_IF_EQUAL, 0, skipped, value)]
    return [(bpf.JUMP_IF_EQUAL, 1, 0, value), (bpf.JUMP, 0, 0, skipped)]


def _at_the_end(end: int, then: Sequence[Instruction]) -> list[Instruction]:
    """Return code that runs `then` if the frame ends at the offset `end` or has a NUL byte at this offset."""
    return [
        (bpf.LOAD_LENGTH, 0, 0, 0),
        (bpf.JUMP_IF_EQUAL, 2, 0, end),
        (bpf.LOAD_BYTE, 0, 0, end),
        (bpf.JUMP_IF_EQUAL, 0, len(then), 0),
        *then,
    ]
