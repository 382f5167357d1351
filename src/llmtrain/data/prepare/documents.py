"""Reading the corpus: files are cut into pieces of work, and a piece is read into documents.

    inputs ─ CorpusReader.pieces ─→ CorpusPiece … ─ CorpusReader.read ─→ CorpusDocument …
             one thread, in order                   any thread

A text file is one document, a row of JSONL, JSON, Parquet, Arrow or a dataset is one, by its adapter. Text files, and
JSONL in blocks, are read by whoever works on the piece. What can only be read from the front (compressed files, JSON,
the columns of tables) is read piece by piece as the pieces are asked for, and goes along with them. The same files give
the same pieces, so a corpus is read once to choose and again to encode, and never has to fit into memory. How rows are
read is `data.files.read`; which documents stay is `selection`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.files.byte_blocks import not_utf8, read_lines_at, read_whole, unreadable
from llmtrain.data.files.find import DataFile
from llmtrain.data.files.json_rows import TEXT_KEYS, is_lines
from llmtrain.data.files.read import Content, Row, contents, num_lines, parse, rows_of
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.files.tables import schema_of
from llmtrain.data.prepare.adapters import Adapter, load_adapter
from llmtrain.data.prepare.inputs import CorpusFile, CorpusInput
from llmtrain.errors import ConfigError

BLOCK_BYTES = 1 << 22
"""Work is handed out, and files are hashed, in blocks of this size: a large file is read by several workers."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unit:
    """Portion that a worker reads at a time: some whole text files, or a piece of a file of rows."""

    input_name: str
    files: tuple[CorpusFile, ...]
    start: int = 0
    """Start of the piece in the file: in bytes for JSONL, else in rows."""


@dataclass(frozen=True)
class CorpusPiece:
    """A unit, with what was already read of it."""

    unit: Unit
    data: Content | None = None
    """None: nothing, since whoever works on it reads it."""
    num_bytes: int = 0
    """Bytes of the file that the data took."""
    error: str | None = None
    """Why the file cannot be read from here on."""


@dataclass(frozen=True)
class CorpusDocument:
    """A document, or (`error`) what stands in its place."""

    file: CorpusFile
    row: int
    """Zero for a text file; else counted from the first row of the unit, in JSONL over its lines."""
    text: str = ""
    error: str | None = None
    line: int | None = None
    """Line of the error, counted from one; in JSONL from the first line of the unit. Of a table, the row's number."""
    id: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class UnitContent:
    """A unit, read."""

    documents: list[CorpusDocument]
    num_bytes: int
    """Bytes of the unit's files, or of its part of one."""
    num_lines: int
    """Lines that begin in the unit (JSONL), blank ones too."""
    block_hashes: tuple[tuple[bytes, ...], ...]
    """SHA-256 of the blocks of each file of the unit, as `file_hash` joins them; none when it cannot be read. Those
    of a file that is read from the front come with its first piece; a dataset has none."""


@dataclass(frozen=True)
class CorpusReader:
    """Reads the documents of inputs. Made by `open_corpus`."""

    inputs: Sequence[CorpusInput]
    adapter: Adapter
    text_columns: dict[CorpusFile, str]
    """Text column of each file of rows."""

    def pieces(self) -> Iterator[CorpusPiece]:
        """Cut the corpus into pieces, in reading order. What is wrong with a file goes along in its place."""
        for source in self.inputs:
            group: list[CorpusFile] = []
            group_bytes = 0
            for file in source.files:
                size = file.size if file.format == "text" else 0
                if group and (file.format != "text" or group_bytes + size > BLOCK_BYTES):
                    yield CorpusPiece(Unit(source.name, tuple(group)))
                    group, group_bytes = [], 0
                if file.format == "text":
                    group.append(file)
                    group_bytes += size
                else:
                    yield from self._pieces_of_rows(source.name, file)
            if group:
                yield CorpusPiece(Unit(source.name, tuple(group)))

    def read(self, piece: CorpusPiece) -> UnitContent:
        """Read the documents of a piece. What is wrong with a file or row is in its `CorpusDocument.error`."""
        unit = piece.unit
        file = unit.files[0]
        if file.format == "text":
            return _read_texts(unit)
        if piece.error is not None:
            documents, lines = [CorpusDocument(file, 0, error=piece.error)], 0
        elif piece.data is not None:
            documents = list(self._documents(file, piece.data, unit.start))
            lines = num_lines(piece.data) if isinstance(piece.data, bytes) else 0
        else:
            return self._read_block_of_lines(unit)
        is_first = unit.start == 0 and file.dataset is None
        return UnitContent(documents, piece.num_bytes, lines, (_hashes_of(file) if is_first else (),))

    def _pieces_of_rows(self, name: str, file: CorpusFile) -> Iterator[CorpusPiece]:
        source = file.open()
        start = 0
        columns = self.adapter.columns_to_read(self.text_columns.get(file, ""))
        try:
            if isinstance(source, DataFile) and source.compression is None and is_lines(source):
                for start in range(0, max(file.size, 1), BLOCK_BYTES):
                    yield CorpusPiece(Unit(name, (file,), start))
                return
            for data, num_bytes in contents(source, block_bytes=BLOCK_BYTES, columns=columns):
                yield CorpusPiece(Unit(name, (file,), start), data, num_bytes)
                start += len(data)
        except OSError as error:
            yield CorpusPiece(Unit(name, (file,), start), error=unreadable(error))
            return
        if start == 0:
            yield CorpusPiece(Unit(name, (file,), 0), [], file.size)

    def _documents(self, file: CorpusFile, data: Content, start: int) -> Iterator[CorpusDocument]:
        text_column = self.text_columns.get(file, "")
        config = file.dataset.config if file.dataset else None
        for index, (line, values, wrong, inside) in enumerate(parse(data, begins_file=start == 0)):
            row = line - 1 if isinstance(data, bytes) else index
            try:
                if wrong is not None:
                    raise RowError(wrong)
                found = self.adapter.read(values, text_column=text_column)
                yield CorpusDocument(file, row, text=found.text, id=found.id, subset=found.subset or config)
            except RowError as error:
                number = start + line if isinstance(data, pa.Table) else line
                yield CorpusDocument(file, row, error=f"{inside} {error}" if inside else str(error), line=number)

    def _read_block_of_lines(self, unit: Unit) -> UnitContent:
        (file,) = unit.files
        source = file.open()
        assert isinstance(source, DataFile)
        try:
            block, lines = read_lines_at(source, unit.start, block_bytes=BLOCK_BYTES)
        except OSError as error:
            return UnitContent([CorpusDocument(file, 0, error=unreadable(error))], 0, 0, ((),))
        documents = list(self._documents(file, lines, unit.start))
        hashes: tuple[bytes, ...] = (hashlib.sha256(block).digest(),) if block else ()
        if by_etag := _hash_of_etag(source):
            hashes = by_etag if unit.start == 0 else ()
        return UnitContent(documents, len(block), num_lines(lines), (hashes,))


def open_corpus(inputs: Sequence[CorpusInput], options: PrepareConfig) -> CorpusReader:
    """Make a reader of the inputs' documents.

    Raises ConfigError when the adapter or a dataset cannot be had, and when a file has no field that could be the text.
    """
    adapter = load_adapter(options.adapter)
    columns = {}
    for source in inputs:
        for file in source.files:
            if file.format != "text" and adapter.function is None:
                columns[file] = options.text_column or _find_text_column(file)
                if options.text_column is not None:
                    _check_column(file, options.text_column)
    return CorpusReader(inputs, adapter, columns)


def file_hash(block_hashes: Sequence[bytes]) -> bytes:
    """Return the hash of a file: sha256 over the sha256 of each block of BLOCK_BYTES."""
    return hashlib.sha256(b"".join(block_hashes)).digest()


def hash_file(file: CorpusFile) -> bytes:
    """Return `file_hash` of a file; of nothing when it cannot be read, as `read` has it. Of an object, by its etag.

    Of a dataset in a folder: over the names and hashes of the files there.
    """
    if file.dataset is None:
        return file_hash(_hashes_of(file))
    digest = hashlib.sha256()
    folder = file.dataset.folder
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = path.relative_to(folder).as_posix()
        digest.update(os.fsencode(name) + b"\0" + file_hash(_hash_blocks(DataFile(str(path), "text"))))
    return digest.digest()


def _hashes_of(file: CorpusFile) -> tuple[bytes, ...]:
    assert isinstance(file.found, DataFile)
    return _hash_of_etag(file.found) or _hash_blocks(file.found)


def _hash_of_etag(file: DataFile) -> tuple[bytes, ...]:
    """Return the hash of an object's etag, which stands for those of its blocks: it need not be read for that."""
    etag = file.remote.entry.etag if file.remote is not None else None
    return (hashlib.sha256(f"etag {etag}".encode()).digest(),) if etag else ()


def _hash_blocks(file: DataFile) -> tuple[bytes, ...]:
    try:
        with file.open_compressed() as stream:
            blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
            return tuple(hashlib.sha256(block).digest() for block in blocks)
    except OSError:
        return ()


def _read_texts(unit: Unit) -> UnitContent:
    documents = []
    hashes: list[tuple[bytes, ...]] = []
    num_bytes = 0
    for file in unit.files:
        source = file.open()
        assert isinstance(source, DataFile)
        try:
            data = read_whole(source)
        except OSError as error:
            documents.append(CorpusDocument(file, 0, error=unreadable(error)))
            hashes.append(_hashes_of(file))
            continue
        documents.append(_decoded(file, data))
        if source.compression is None and not _hash_of_etag(source):
            view = memoryview(data)
            blocks = (view[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
            hashes.append(tuple(hashlib.sha256(block).digest() for block in blocks))
            num_bytes += len(data)
        else:
            hashes.append(_hashes_of(file))
            num_bytes += file.size
    return UnitContent(documents, num_bytes=num_bytes, num_lines=0, block_hashes=tuple(hashes))


def _decoded(file: CorpusFile, data: bytes) -> CorpusDocument:
    try:
        return CorpusDocument(file, 0, text=data.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return CorpusDocument(file, 0, error=not_utf8(error), line=line)


# -- which field holds the text ----------------------------------------------------------------------------------------


def _check_column(file: CorpusFile, column: str) -> None:
    """Raise ConfigError if a table has no such column: its rows could not say which columns there are instead."""
    if file.format in ("parquet", "arrow", "dataset"):
        with suppress(OSError):  # reading it will say why
            names = schema_of(file.open()).names
            if column not in names:
                where, others = file.dataset or file.path, ", ".join(map(repr, names)) or "none"
                raise ConfigError(f"{where}: has no field {column!r}, only {others}: correct prepare.text_column")


def _find_text_column(file: CorpusFile) -> str:
    """Find the field with the text: by the types of the columns, or by the first row that is an object."""
    source = file.open()
    with suppress(OSError):  # reading it will say why
        if file.format in ("parquet", "arrow", "dataset"):
            schema = schema_of(source)
            kinds = {field.name: "text" if _is_text(field.type) else str(field.type) for field in schema}
            return _usual_column(str(file.dataset or file.path), kinds)
    for row in rows_of([source], block_bytes=1 << 16):
        if isinstance(row, Row):
            kinds = {
                name: "text" if isinstance(value, str) else type(value).__name__ for name, value in row.values.items()
            }
            return _usual_column(row.source, kinds)
    return TEXT_KEYS[0]


def _is_text(kind: pa.DataType) -> bool:
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _usual_column(where: str, kinds: Mapping[str, str]) -> str:
    """Return the first of TEXT_KEYS that holds text. `kinds`: what each field holds, "text" or something else."""
    for column in TEXT_KEYS:
        if kinds.get(column) == "text":
            return column
    shown = [f"{name!r} ({kind})" if name in TEXT_KEYS else repr(name) for name, kind in kinds.items()]
    raise ConfigError(
        f"{where}: none of the usual text fields ({', '.join(TEXT_KEYS)}) holds text, among "
        f"{', '.join(shown) or 'none'}: name the field in prepare.text_column"
    )
