"""Tests of the socket filter for the names in a signal table. A classic BPF interpreter runs the filter."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inco_trio.frame import FRAME_MAX, HEADER_LENGTH, decode, encode
from inco_trio.links.name_filter import DEPTHS, FORMS, SAMPLE, accepts, name_filter
from inco_trio.linux import bpf
from tests.support_bpf import accepted

MAC = bytes(6)
NAMES = {b"ihub_reset_irq", b"ihub_hwwd_irq", b"ihub", b"i", b"x" * 64}

letters = st.text("ab", min_size=1, max_size=11).map(str.encode)
payloads = st.one_of(letters, st.binary(max_size=12), st.tuples(letters, st.binary(max_size=3)).map(b"".join))


def framed(payload: bytes) -> bytes:
    return encode(b"x", MAC)[:HEADER_LENGTH] + payload


@given(st.sets(letters, max_size=12), payloads, st.integers(0, 60), st.sampled_from(FORMS))
@example({b"ab", b"abab"}, b"aba", 0, (64, False))
@example({b"a"}, b"a\0b", 0, (64, False))
@example({b"a"}, b"a\0b", 0, (64, True))
def test_the_filter_accepts_what_its_description_says(
    names: set[bytes], payload: bytes, pad: int, form: tuple[int, bool]
) -> None:
    payload = payload.ljust(pad, b"\0")
    depth, padding = form
    code = name_filter(names, depth, padding=padding)
    assert accepted(code, framed(payload)) == accepts(payload, names, depth, padding=padding)
    if decode(framed(payload)) in names:
        assert accepted(code, framed(payload))


@given(st.sets(letters, max_size=12), letters, st.integers(0, 60))
def test_an_exact_filter_accepts_only_the_names(names: set[bytes], name: bytes, pad: int) -> None:
    assert accepted(name_filter(names, DEPTHS[0]), framed(name.ljust(pad, b"\0"))) == (name in names)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("pad", [0, 46, 1500])
def test_names_of_any_length_pass_with_any_padding(name: bytes, pad: int) -> None:
    for depth, padding in FORMS:
        assert accepted(name_filter(NAMES, depth, padding=padding), framed(name.ljust(pad, b"\0")))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_known_name_before_other_bytes_is_dropped(name: bytes) -> None:
    code = name_filter(NAMES, DEPTHS[0], padding=True)
    longest = FRAME_MAX - HEADER_LENGTH
    for length in (*range(len(name) + 1, 120), *range(longest - 40, longest + 1)):
        padded = name.ljust(length, b"\0")
        assert accepted(code, framed(padded))
        for last in {len(name), (len(name) + length) // 2, length - 1}:
            junk = padded[:last] + b"x" + padded[last + 1 :]
            assert not accepted(code, framed(junk)) or junk[: len(name) + 1] in NAMES


def test_a_known_name_in_a_frame_that_is_too_long_is_dropped() -> None:
    longest = b"ihub".ljust(FRAME_MAX - HEADER_LENGTH, b"\0")
    for depth, padding in FORMS:
        code = name_filter(NAMES, depth, padding=padding)
        assert accepted(code, framed(longest))
        assert not accepted(code, framed(longest + b"\0"))
        assert not accepts(longest + b"\0", NAMES, depth, padding=padding)


@pytest.mark.parametrize("payload", [b"", b"j", b"ihu", b"ihub_", b"ihub_reset_irqs", b"x" * 65, b"\0ihub", b"IHUB"])
def test_other_frames_are_dropped_except_for_a_sample(payload: bytes) -> None:
    code = name_filter(NAMES, DEPTHS[0])
    assert [random for random in range(2 * SAMPLE) if accepted(code, framed(payload), random=random)] == [0, SAMPLE]


def test_a_filter_of_many_names_has_long_jumps() -> None:
    names = {
        f"{a}{b}_{'common' * 3}_{number}".encode() for a in "abc" for b in string.ascii_lowercase for number in "12"
    }
    code = name_filter(names, DEPTHS[0])
    assert len(code) > bpf.SHORT_JUMP
    assert all(max(if_true, if_false) <= bpf.SHORT_JUMP for _, if_true, if_false, _ in code)
    assert all(accepted(code, framed(name)) for name in names)
    assert not any(accepted(code, framed(name[:-1] + b"3")) for name in names)


def test_a_filter_that_compares_less_is_shorter() -> None:
    names = {f"signal_{number:04}".encode() for number in range(1000)}
    lengths = [len(name_filter(names, depth)) for depth in DEPTHS]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > bpf.INSTRUCTIONS_MAX > lengths[-1]
