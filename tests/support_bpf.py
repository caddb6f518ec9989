"""A classic BPF interpreter for tests of socket filters (the kernel's Documentation/networking/filter.rst)."""

from __future__ import annotations

from collections.abc import Sequence

from inco_trio.linux import bpf
from inco_trio.linux.bpf import Instruction

__all__ = ["accepted"]

SIZES = {bpf.LOAD_WORD: 4, bpf.LOAD_HALF: 2, bpf.LOAD_BYTE: 1}
SIZES_AT_X = {bpf.LOAD_WORD_AT_X: 4, bpf.LOAD_HALF_AT_X: 2, bpf.LOAD_BYTE_AT_X: 1}


def accepted(
    code: Sequence[Instruction], frame: bytes, *, interface: int = 0, kind: int = 1, random: int = 1, tagged: int = 0
) -> bool:
    """Return whether a filter accepts a frame that arrived on `interface` with the packet type `kind`.

    `tagged` is the EtherType of a VLAN tag that the kernel has left in the frame.
    """
    protocol = tagged or int.from_bytes(frame[12:14], "big")
    about = {bpf.PROTOCOL: protocol, bpf.PACKET_TYPE: kind, bpf.INTERFACE: interface, bpf.RANDOM: random}
    value = at = x = memory = 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        if operation in SIZES:
            size = SIZES[operation]
            if operand in about:
                value = about[operand]
            elif operand + size > len(frame):
                return False
            else:
                value = int.from_bytes(frame[operand : operand + size], "big")
        elif operation in SIZES_AT_X:
            start, size = x + operand, SIZES_AT_X[operation]
            if start + size > len(frame):
                return False
            value = int.from_bytes(frame[start : start + size], "big")
        elif operation == bpf.SET_X:
            x = operand
        elif operation == bpf.COPY_TO_X:
            x = value
        elif operation == bpf.COPY_FROM_X:
            value = x
        elif operation == bpf.ADD:
            value += operand
        elif operation == bpf.SUBTRACT_X:
            value -= x
        elif operation == bpf.STORE_MEMORY:
            memory = value
        elif operation == bpf.LOAD_MEMORY:
            value = memory
        elif operation == bpf.LOAD_LENGTH:
            value = len(frame)
        elif operation == bpf.AND:
            value &= operand
        elif operation == bpf.JUMP:
            at += operand
        elif operation == bpf.RETURN:
            return operand > 0
        else:
            true = {
                bpf.JUMP_IF_EQUAL: value == operand,
                bpf.JUMP_IF_BITS: bool(value & operand),
                bpf.JUMP_IF_GREATER: value > operand,
                bpf.JUMP_IF_GREATER_OR_EQUAL: value >= operand,
            }[operation]
            at += if_true if true else if_false
