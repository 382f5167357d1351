"""Read tables batch by batch: Parquet, Arrow (IPC files and streams), and Hugging Face datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from llmtrain.data.files.byte_blocks import only_os_errors, open_seekable
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile, Format, RowSource

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_FORMATS: tuple[Format, ...] = ("parquet", "arrow")
BATCH_ROWS = 256
"""Rows that are read at a time."""

_BUFFER_BYTES = 1 << 20
"""Bytes of a column of a Parquet file that are read at a time."""

Restore = Callable[[Any], Any]


def tables_of(source: RowSource, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, int]]:
    """Read a table or dataset from the front, in tables of BATCH_ROWS, each with its share of the bytes on disk.

    Only `columns` are read where they are named. Raises OSError when a file cannot be read.
    """
    with only_os_errors():
        if isinstance(source, RowDataset):
            yield from _tables_of_dataset(source, columns)
            return
        with open_seekable(source) as stream:
            yield from (_parquet_tables if source.format == "parquet" else _arrow_tables)(source, stream, columns)


def schema_of(source: RowSource) -> pa.Schema:
    """Return names and types of a table's columns. Raises OSError when they cannot be read."""
    if isinstance(source, RowDataset):
        return source.dataset.features.arrow_schema
    from pyarrow import parquet

    with only_os_errors(), open_seekable(source) as stream:
        return parquet.read_schema(stream) if source.format == "parquet" else _open_arrow(stream).schema


def _parquet_tables(file: DataFile, stream: IO[bytes], columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, int]]:
    import pyarrow as pa
    from pyarrow import parquet

    # A row group may be as large as the file: read a page at a time, and not a row group (measured: faster, too).
    with parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES) as found:
        wanted = _wanted(found.schema_arrow.names, columns)
        names = None if columns is None else wanted
        batches = found.iter_batches(batch_size=BATCH_ROWS, columns=names)
        tables = (pa.Table.from_batches([batch]) for batch in batches)
        yield from _with_shares(tables, found.metadata.num_rows, file.size or 0)


def _arrow_tables(file: DataFile, stream: IO[bytes], columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, int]]:
    """Tables of an IPC file or stream, such as those in a folder of `save_to_disk`."""
    import pyarrow as pa

    reader = _open_arrow(stream)
    is_file = isinstance(reader, pa.RecordBatchFileReader)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        chosen = batch.select(_wanted(batch.schema.names, columns))
        for start in range(0, len(batch), BATCH_ROWS):
            table = pa.Table.from_batches([chosen.slice(start, BATCH_ROWS)])
            yield table, batch.nbytes * len(table) // len(batch)


def _open_arrow(stream: IO[bytes]) -> Any:
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return ipc.open_file(stream) if is_file else ipc.open_stream(stream)


def _tables_of_dataset(source: RowDataset, columns: Sequence[str] | None) -> Iterator[tuple[pa.Table, int]]:
    data = source.dataset
    shown = data.format["columns"]  # `set_format` may hide some, also before the dataset is saved
    data = data.select_columns(shown if columns is None else _wanted(shown, columns))
    metadata = data.features.arrow_schema.metadata  # tells the features, which the stored table need not
    tables = data.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return _with_shares((table.replace_schema_metadata(metadata) for table in tables), len(data), source.num_bytes)


def _wanted(names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Return the columns to read. Raises OSError where two have one name: one of them would be lost."""
    wanted = [name for name in names if columns is None or name in columns]
    if len(set(wanted)) < len(wanted):
        twice = next(name for name, count in Counter(wanted).items() if count > 1)
        raise OSError(f"two columns have the name {twice!r}: rename one")
    return wanted


def _with_shares(tables: Iterable[pa.Table], rows_left: int, bytes_left: int) -> Iterator[tuple[pa.Table, int]]:
    """Give each table its share of the bytes."""
    for table in tables:
        num_bytes = bytes_left * len(table) // max(1, rows_left)
        yield table, num_bytes
        rows_left, bytes_left = rows_left - len(table), bytes_left - num_bytes


def rows_of_table(table: pa.Table) -> list[tuple[dict[str, Any], str | None]]:
    """Make rows as the row access of pyarrow and datasets does, each with what is wrong with it, if anything is.

    A key of an object that is null is left out: Arrow gives all objects of a column all keys that one of them has.
    """
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        for name, restore in _restorers(table.schema):
            for row in rows:
                row[name] = restore(row[name])
    except (ValueError, LookupError, OverflowError, RecursionError) as error:  # of a value that Python does not know
        if len(table) == 1:
            return [({}, f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})")]
        return [row for index in range(len(table)) for row in rows_of_table(table.slice(index, 1))]
    return [(row, None) for row in rows]


def _restorers(schema: pa.Schema) -> list[tuple[str, Restore]]:
    """Return the functions for those columns whose values are not yet what was written."""
    features: Mapping[str, Any] = {}
    if b'"Json"' in (schema.metadata or {}).get(b"huggingface", b""):
        from datasets import Features

        features = Features.from_arrow_schema(schema)
    found = ((field.name, _restorer(field.type, features.get(field.name))) for field in schema)
    return [(name, restore) for name, restore in found if restore is not None]


def _restorer(kind: pa.DataType, feature: Any) -> Restore | None:
    """Return the function from a value of a type, as pyarrow gives it, to what was written; None where they are equal.

    `feature`: the same type in the words of datasets, None where it is not known.
    """
    import pyarrow as pa

    is_a = pa.types
    if getattr(feature, "_type", "Json" if isinstance(kind, pa.JsonType) else None) == "Json":
        return _decode_json if getattr(feature, "decode", True) else None
    if is_a.is_dictionary(kind) or is_a.is_run_end_encoded(kind):
        return _restorer(kind.value_type, None)
    if is_a.is_struct(kind):
        below = feature if isinstance(feature, dict) else {}
        return partial(_without_nulls, {field.name: _restorer(field.type, below.get(field.name)) for field in kind})
    if isinstance(kind, pa.BaseExtensionType):
        return _restorer(kind.storage_type, feature)
    if is_a.is_map(kind):
        pair = _restorer(kind.key_type, None) or _unchanged, _restorer(kind.item_type, None) or _unchanged
        return None if pair == (_unchanged, _unchanged) else partial(_each_item, *pair)
    if is_a.is_union(kind):
        of_kinds = [(one, restore) for one in kind if (restore := _restorer(one.type, None)) is not None]
        return partial(_of_union, of_kinds) if of_kinds else None
    if not is_a.is_nested(kind):
        return None
    inner = _restorer(kind.value_type, feature[0] if isinstance(feature, list) else getattr(feature, "feature", None))
    return None if inner is None else partial(_each_element, inner)


def _decode_json(value: Any) -> Any:
    from datasets import Json

    return Json().decode_example(value)


def _without_nulls(fields: Mapping[str, Restore | None], value: Any) -> Any:
    if value is None:
        return None
    given = ((name, fields.get(name), inner) for name, inner in value.items() if inner is not None)
    return {name: inner if restore is None else restore(inner) for name, restore, inner in given}


def _unchanged(value: Any) -> Any:
    return value


def _each_item(restore_key: Restore, restore: Restore, value: Any) -> Any:
    return None if value is None else [(restore_key(key), restore(item)) for key, item in value]


def _of_union(of_kinds: Sequence[tuple[pa.Field, Restore]], value: Any) -> Any:
    """Restore a value of one of several types: by the first that has its keys, or is a list as it is."""
    import pyarrow as pa

    for field, restore in of_kinds:
        keys = {inner.name for inner in field.type} if pa.types.is_struct(field.type) else None
        if isinstance(value, list) if keys is None else isinstance(value, dict) and keys == value.keys():
            return restore(value)
    return value


def _each_element(restore: Restore, value: Any) -> Any:
    return None if value is None else [restore(inner) for inner in value]
