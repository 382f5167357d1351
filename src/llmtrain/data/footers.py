"""Token shards that have no manifest, as other tools and older versions wrote them: what their footers tell.

    a folder of Parquet files with a column `tokens` or `input_ids` ─ footers ─→ records like those of a manifest

Counting is reading the footer of each file, so thousands of files take a while: the records are kept in an index beside
the shards, or in the cache folder where that cannot be written. Text and its bytes, and the tokenizer, are not known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from llmtrain.atomic import write_text
from llmtrain.data.manifest import RowGroups, Shard
from llmtrain.data.prepare.parallel import LocalExecutor, ordered_map, resolve_num_workers
from llmtrain.data.shards import TOKENS_COLUMNS
from llmtrain.errors import ConfigError

INDEX_NAME = ".llmtrain-index.json"
_INDEX_VERSION = 1


def read_footers(files: Sequence[Path], *, vocab_size: int, key: str, cache_dir: Path) -> list[Shard]:
    """Return the record of each file, with its full path, and with 0 for the bytes of text, which are not known.

    The hash is that of size and footer, which holds the places, sizes and statistics of all that is in the file. Raises
    ConfigError when a file is no token shard, or holds tokens outside of the vocabulary.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        by_folder[file.parent].append(file)
    found: dict[Path, Shard] = {}
    for folder, of_folder in by_folder.items():
        index = _read_index(folder, cache_dir)
        missing = [file for file in of_folder if _entry(index, file) is None]
        executor = LocalExecutor(resolve_num_workers(None))
        made = ordered_map(lambda file: _read_footer(file, key=key), missing, executor=executor)
        for file, (shard, largest) in zip(missing, made, strict=True):
            index[file.name] = {
                "mtime_ns": file.stat().st_mtime_ns,
                "largest_token": largest,
                "shard": shard.model_dump(mode="json"),
            }
        if missing:
            _write_index(folder, index, cache_dir)
        for file in of_folder:
            entry = index[file.name]
            if entry["largest_token"] is not None and entry["largest_token"] >= vocab_size:
                raise ConfigError(
                    f"{key}: {file} holds the token {entry['largest_token']}, but data.tokenizer has {vocab_size} "
                    "tokens: it is not the tokenizer that made these shards"
                )
            found[file] = Shard.model_validate(entry["shard"]).model_copy(update={"path": str(file)})
    return [found[file] for file in files]


def _entry(index: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Return the index's entry of a file, if it is still the same file."""
    entry: dict[str, Any] | None = index.get(file.name)
    status = file.stat()
    if entry is None or (entry.get("mtime_ns"), entry["shard"]["size"]) != (status.st_mtime_ns, status.st_size):
        return None
    return entry


def _read_footer(file: Path, *, key: str) -> tuple[Shard, int | None]:
    """Return a shard's record, and its largest token where the statistics tell."""
    try:
        with pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            column = next((name for name in TOKENS_COLUMNS if name in parquet.schema_arrow.names), None)
            if column is None:
                raise ConfigError(
                    f"{key}: {file} has no column {' or '.join(TOKENS_COLUMNS)}, only "
                    f"{', '.join(parquet.schema_arrow.names)}: it is no token shard"
                )
            type_ = parquet.schema_arrow.field(column).type
            is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
            if not is_list or not pa.types.is_integer(type_.value_type):
                raise ConfigError(f"{key}: {file}: the column {column} is {type_}, not a list of integers")
            tokens_of, largest = [], []
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                chunk = next(
                    chunk
                    for chunk in map(group.column, range(group.num_columns))
                    if chunk.path_in_schema.split(".")[0] == column
                )
                statistics = chunk.statistics
                if statistics is not None and statistics.has_null_count:
                    tokens = chunk.num_values - statistics.null_count  # an empty list counts as a value that is null
                else:
                    tokens = len(parquet.read_row_group(number, columns=[column]).column(0).combine_chunks().flatten())
                tokens_of.append(tokens)
                if statistics is not None and statistics.has_min_max:
                    largest.append(int(statistics.max))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{key}: {file}: cannot be read as Parquet ({error})") from error
    shard = Shard(
        path=file.name,
        size=file.stat().st_size,
        sha256=_footer_hash(file),
        rows=metadata.num_rows,
        tokens=sum(tokens_of),
        bytes=0,
        row_groups=RowGroups(
            documents=tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)),
            tokens=tuple(tokens_of),
            bytes=(0,) * len(tokens_of),
        ),
    )
    return shard, max(largest, default=None)


def _footer_hash(file: Path) -> str:
    """Hash size and footer. The last 8 bytes of a Parquet file are the length of its footer and its magic word."""
    with file.open("rb") as stream:
        size = stream.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(str(size).encode() + stream.read(length)).hexdigest()


def _index_paths(folder: Path, cache_dir: Path) -> tuple[Path, Path]:
    return folder / INDEX_NAME, cache_dir / "indexes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"


def _read_index(folder: Path, cache_dir: Path) -> dict[str, Any]:
    for path in _index_paths(folder, cache_dir):
        try:
            document = json.loads(path.read_bytes())
            if document["version"] == _INDEX_VERSION:
                entries: dict[str, Any] = document["shards"]
                for entry in entries.values():
                    Shard.model_validate(entry["shard"])
                    assert "largest_token" in entry
                return entries
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ValidationError):
            continue  # none, or none of ours: the footers are read again
    return {}


def _write_index(folder: Path, index: dict[str, Any], cache_dir: Path) -> None:
    """Keep it where that is possible; without it the footers are read again next time."""
    data = json.dumps({"version": _INDEX_VERSION, "shards": index}, indent=1)
    for path in _index_paths(folder, cache_dir):
        try:
            if path.parent != folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, data)
        except OSError:
            continue
        return
