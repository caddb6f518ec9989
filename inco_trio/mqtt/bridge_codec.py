"""The MQTT payloads of a bridge: batches of numbered frames, reports and status. This module does no I/O."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import attrs

from inco_trio.frame import FRAME_MAX

__all__ = ["NUMBER_MAX", "Batch", "decode_report", "decode_status", "encode_report", "encode_status"]

NUMBER_MAX = 1 << 62
"""Highest frame number. Stored numbers above it are invalid (see `bridge_progress`)."""
_HEADER = struct.Struct("!4s8sQ?")
_MAGIC = b"inw1"
_LENGTH = struct.Struct("!H")


@attrs.frozen
class Batch:
    """Frames of one side, in order."""

    boot: bytes
    """8 bytes that identify the numbering. Each new socket starts a new numbering."""
    first: int
    """The number of the first frame."""
    frames: Sequence[bytes]
    report: bool = False
    """Whether the sender requests a report of the last number that the other side has written."""

    def encode(self) -> bytes:
        parts = [_HEADER.pack(_MAGIC, self.boot, self.first, self.report)]
        for frame in self.frames:
            parts += _LENGTH.pack(len(frame)), frame
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: bytes) -> Batch:
        """Return the batch in a payload. Raises ValueError if the payload is not valid."""
        try:
            magic, boot, first, report = _HEADER.unpack_from(payload)
            place, frames = _HEADER.size, []
            while place < len(payload):
                (length,) = _LENGTH.unpack_from(payload, place)
                frame = payload[place + _LENGTH.size : place + _LENGTH.size + length]
                if not 0 < length <= FRAME_MAX or len(frame) != length:
                    raise ValueError("wrong frame length")
                frames.append(frame)
                place += _LENGTH.size + length
        except struct.error as error:
            raise ValueError(str(error)) from error
        if magic != _MAGIC or not 0 < first <= NUMBER_MAX - len(frames):
            raise ValueError("wrong header")
        return cls(boot, first, frames, report)


def encode_report(boot: bytes, number: int) -> bytes:
    """Return the payload of a report that contains the last written number of the numbering `boot`."""
    return json.dumps({"boot": boot.hex(), "number": number}).encode()


def decode_report(payload: bytes) -> tuple[bytes, int]:
    """Return the numbering and the last written number in a report. Raises ValueError if the report is invalid."""
    boot, number = _fields(payload, boot=str, number=int)
    if number < 0:
        raise ValueError("number: negative")
    return bytes.fromhex(boot), number


def encode_status(state: str, instance: str, connection: int) -> bytes:
    """Return the payload of a status: `online`, `offline`, or `left` after another process has taken over this side.

    `instance` identifies the process, and `connection` counts its connections to the broker.
    """
    return json.dumps({"state": state, "instance": instance, "connection": connection}).encode()


def decode_status(payload: bytes) -> tuple[str, str, int]:
    """Return the fields `state`, `instance` and `connection`. Raises ValueError if one is missing or invalid."""
    state, instance, connection = _fields(payload, state=str, instance=str, connection=int)
    return state, instance, connection


def _fields(payload: bytes, **types: type) -> list[Any]:
    try:
        body = json.loads(payload)
        values = [body[key] for key in types]
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not all(map(isinstance, values, types.values())):
        raise ValueError("a value has the wrong type")
    return values
