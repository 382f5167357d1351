"""Read the bytes of a file, decompressed, block by block: no file has to fit into memory."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from llmtrain.data.files.find import DataFile

_OTHERS = {
    b"\x1f\x8b": "is compressed by gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: let its name end in .zst",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
"""First bytes of files that are not UTF-8 text."""


def read_blocks(file: DataFile, *, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Read blocks of a file's content, decompressed, each with the number of bytes on disk that it took.

    Raises OSError when it cannot be read, or is not compressed as its name says.
    """
    with only_os_errors(), file.open_compressed() as raw:
        stream: Any = raw
        if file.compression is not None:
            import pyarrow

            stream = pyarrow.CompressedInputStream(raw, file.compression)
        position = 0
        while block := stream.read(block_bytes):
            yield block, raw.tell() - position
            position = raw.tell()


def read_whole(file: DataFile) -> bytes:
    """Read all of a file's content. Raises what `read_blocks` does."""
    with only_os_errors(), file.open() as stream:
        return stream.read()


def read_lines_at(file: DataFile, start: int, *, block_bytes: int) -> tuple[bytes, bytes]:
    """Read the block at `start` of a file that is not compressed, and the bytes of the lines that begin in it.

    These are without the end of a line that began before, and with the rest of the last one.
    """
    with file.open_compressed() as stream:
        stream.seek(max(start - 1, 0))
        begins_line = start == 0 or stream.read(1) == b"\n"
        block = stream.read(block_bytes)
        first = 0 if begins_line else block.find(b"\n") + 1
        if first == len(block) or (first == 0 and not begins_line):
            return block, b""
        rest = b"" if block.endswith(b"\n") else stream.readline()
        return block, block[first:] + rest


def unreadable(error: OSError) -> str:
    """Word why a file cannot be read."""
    return f"cannot be read ({error.strerror or str(error) or type(error).__name__})"


def not_utf8(error: UnicodeDecodeError) -> str:
    """Word which byte is no UTF-8, and what the file is instead if its first bytes say so."""
    byte = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
    instead = next((what for begin, what in _OTHERS.items() if error.object.startswith(begin)), None)
    return f"is not UTF-8 text ({byte})" + (f"; it {instead}" if instead else "")


@contextmanager
def only_os_errors() -> Iterator[None]:
    """Raise what the libraries that decompress and decode raise as OSError, of one line."""
    try:
        yield
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise OSError(str(error) or type(error).__name__) from error
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise OSError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


@contextmanager
def open_seekable(file: DataFile) -> Iterator[IO[bytes]]:
    """Open a file to be read at any position, as Parquet asks for: decompressed to a temporary file if need be."""
    if file.compression is None:
        with file.open_compressed() as plain:
            yield plain
        return
    with tempfile.TemporaryFile() as decompressed:
        for block, _ in read_blocks(file, block_bytes=1 << 24):
            decompressed.write(block)
        decompressed.seek(0)
        yield decompressed
