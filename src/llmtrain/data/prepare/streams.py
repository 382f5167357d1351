"""The bytes of a file, unpacked, block by block: no file has to fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa

from llmtrain.data.prepare.inputs import SourceFile


def read_blocks(file: SourceFile, *, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file's content, and how many bytes on disk each took.

    Raises OSError or pa.ArrowException when it cannot be read, or is not packed as its name says.
    """
    with open(file.path, "rb") as raw:
        stream = raw if file.compression is None else pa.CompressedInputStream(raw, file.compression)
        position = 0
        while block := stream.read(block_bytes):
            yield block, raw.tell() - position
            position = raw.tell()


def read_whole(file: SourceFile) -> bytes:
    """All of a file's content. Raises what `read_blocks` does."""
    return b"".join(block for block, _ in read_blocks(file, block_bytes=1 << 24))


@contextmanager
def open_anywhere(file: SourceFile) -> Iterator[IO[bytes]]:
    """A file's content to be read at any position, as Parquet asks for: a packed one is unpacked to a temporary file.

    Raises what `read_blocks` does.
    """
    if file.compression is None:
        with open(file.path, "rb") as plain:
            yield plain
        return
    with tempfile.TemporaryFile() as unpacked:
        for block, _ in read_blocks(file, block_bytes=1 << 24):
            unpacked.write(block)
        unpacked.seek(0)
        yield unpacked
