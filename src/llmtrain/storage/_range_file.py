"""An object as a file: read at any position, ahead where it is read in order."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO, cast

FIRST_BYTES = 1 << 18
MOST_BYTES = 1 << 23
"""A read after a seek asks for FIRST_BYTES; each that follows on the one before for twice as many, up to MOST_BYTES."""


def open_ranges(read_range: Callable[[int, int], bytes], size: int) -> BinaryIO:
    """Open an object of `size` bytes whose ranges, (start, length), are read by `read_range`."""
    return cast(BinaryIO, io.BufferedReader(_RangeFile(read_range, size), buffer_size=1 << 16))


class _RangeFile(io.RawIOBase):
    """Bytes of an object, of which one block is kept: the last that was asked for."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range = read_range
        self._size = size
        self._position = 0
        self._block = b""
        self._block_start = 0
        self._next_bytes = FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"negative seek position {begin + offset}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        inside = self._position - self._block_start
        if not 0 <= inside < len(self._block):
            inside = self._fetch(wanted)
        data = self._block[inside : inside + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> int:
        """Read the block that begins at the position. Return where in it the position is: 0."""
        goes_on = self._position == self._block_start + len(self._block)
        self._next_bytes = min(2 * self._next_bytes, MOST_BYTES) if goes_on and self._block else FIRST_BYTES
        length = min(max(wanted, self._next_bytes), self._size - self._position)
        self._block = self._read_range(self._position, length)
        self._block_start = self._position
        return 0
