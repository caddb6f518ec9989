"""A table of numbers in shared memory."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

__all__ = ["KEY", "PAGE", "TABLE", "NumberTable"]

PAGE = 4096
KEY = 64
RECORD = KEY + 8
RECORDS = 65536
"""Size of a table in entries. One entry always stays unused. The kernel allocates memory only for entries in use."""
TABLE = -(-RECORD * RECORDS // PAGE) * PAGE
"""Size of a table in bytes."""


class NumberTable:
    """Maps keys (1 to 64 bytes, no trailing NUL) to positive numbers in shared memory. A missing key reads as 0.

    Raises ValueError if the memory has duplicate keys, a key that `is_key` rejects, or a number above `largest`.
    Storing a new key raises OSError (ENOSPC) and changes nothing if the table is full.
    """

    def __init__(self, view: memoryview, largest: int = (1 << 63) - 1, is_key: Callable[[bytes], bool] = bool) -> None:
        self._keys = view
        self._numbers = view[RECORDS * KEY : RECORDS * RECORD].cast("Q")
        self.places: dict[bytes, int] = {}
        """The index of each key whose number is not 0."""
        self._free: list[int] = []
        self._end = 0
        # Entries have no gaps, so the first empty key ends the table.
        while self._end < RECORDS and (key := self._key(self._end)):
            if number := self._numbers[self._end]:
                if key in self.places or number > largest or not is_key(key):
                    raise ValueError(f"a table has an invalid entry: {key!r}, {number}")
                self.places[key] = self._end
            else:
                self._free.append(self._end)
            self._end += 1
        if self._end == RECORDS and not self._free:
            raise ValueError("a table is full")

    def _key(self, index: int) -> bytes:
        return bytes(self._keys[index * KEY : (index + 1) * KEY]).rstrip(b"\0")

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self.places))

    def __getitem__(self, key: bytes) -> int:
        index = self.places.get(key)
        return 0 if index is None else self._numbers[index]

    def __setitem__(self, key: bytes, number: int) -> None:
        index = self.places.get(key)
        if index is None:
            if not number:
                return
            if self._free:
                index = self._free.pop()
            elif self._end < RECORDS - 1:
                index, self._end = self._end, self._end + 1
            else:
                # `__init__` refuses memory without an unused entry, so the next process could not use a full table.
                raise OSError(errno.ENOSPC, f"more than {RECORDS - 1} entries in a table (configure fewer signals)")
            # Write the key first: if the process dies before it writes the number, the entry is unused.
            self._keys[index * KEY : (index + 1) * KEY] = key.ljust(KEY, b"\0")
            self.places[key] = index
        self._numbers[index] = number
        if not number:
            del self.places[key]
            self._free.append(index)
