"""Find what is at a path: files of known formats, and Hugging Face datasets.

    "rows.jsonl"  "more/*.csv"  "folder"  "s3://bucket/folder"      ─▶ DataFile, with its format and how to open it
    "folder of save_to_disk"    "hf://owner/name@config:split"      ─▶ RowDataset

The table of formats is here alone. A new format gets a line in it, and a reader in `read`.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

from llmtrain.data.files.datasets import RowDataset, hub_part, is_saved_dataset, open_rows, saved_part
from llmtrain.errors import ConfigError
from llmtrain.storage.address import is_remote, local_path, shown
from llmtrain.storage.failures import AccessDenied, NoObject, StorageError
from llmtrain.storage.finding import StoredObject, find_objects, has_wildcard, is_one_object

Format = Literal["jsonl", "json", "csv", "parquet", "arrow", "text"]
Compression = Literal["gzip", "zstd"]

log = logging.getLogger("llmtrain.data")

ROW_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""The format of a file of rows, by its suffix before that of the compression."""
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_TEXT = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .svg .css .scss .csv .tsv
.py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .cs .java .kt .kts .scala .groovy .go .rs .swift .m .mm
.js .jsx .mjs .cjs .ts .tsx .vue .rb .php .pl .pm .lua .r .jl .hs .ml .mli .fs .fsx .ex .exs .erl .hrl .clj .cljs
.el .lisp .scm .rkt .f .f90 .f95 .for .pas .d .dart .zig .nim .v .sv .vhd .vhdl .asm .s .sql .sh .bash .zsh .fish .ps1
.bat .cmake .mk .gradle .toml .ini .cfg .conf .yaml .yml .proto .graphql .tf .tcl .vim
"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
"""Suffixes of text and source code, for who reads whole files as text."""

KINDS = (
    "a .jsonl, .json, .csv, .parquet or .arrow file (also .gz or .zst), a folder or glob of these, or a Hugging Face "
    "dataset (hf://owner/name:split)"
)

_TRAIN_NAME = re.compile(r"\btrain(ing)?\b")
_HELD_OUT_NAME = re.compile(r"\b(val|valid|validation|dev|test|eval)\b")


@dataclass(frozen=True)
class DataFile:
    """A file of rows or text. It can be sent to another process."""

    name: str
    """Its path or URL, as messages show it."""
    format: Format
    compression: Compression | None = None
    path: str | None = None
    """Path inside `filesystem`."""
    filesystem: Any = None
    """An archive that holds the file, as a file system of fsspec."""
    remote: StoredObject | None = None
    """The object of a store that the file is."""

    @property
    def size(self) -> int | None:
        """Bytes, compressed; None of a file in an archive, or one that cannot be had."""
        if self.remote is not None:
            return self.remote.entry.size
        try:
            return os.stat(self.name).st_size if self.filesystem is None else None
        except OSError:
            return None  # reading it will say why

    def open_compressed(self) -> IO[bytes]:
        """Open the file as it is."""
        if self.remote is not None:
            return self.remote.open()
        if self.filesystem is None:
            return open(self.name, "rb")
        return cast(IO[bytes], self.filesystem.open(self.path or self.name, "rb"))

    def open(self) -> IO[bytes]:
        """Open the file's content, decompressed, to be read from the front."""
        stream = self.open_compressed()
        if self.compression is None:
            return stream
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(stream, self.compression))


RowSource = DataFile | RowDataset


def find_rows(paths: str | Sequence[str], *, key: str, default_split: str = "train") -> list[RowSource]:
    """Find what there is at `paths`, in their order. `key` is the config's, for messages.

    `default_split` is taken of a dataset with several splits where the path names none (`hf://owner/name:split`, or the
    split's own folder). Raises ConfigError where there is nothing to read, or a folder mixes splits.
    """
    found: list[RowSource] = []
    for path in [paths] if isinstance(paths, str) else paths:
        found += _rows_at(os.path.expanduser(local_path(path)), key, default_split)
    for source in found:
        if isinstance(source, RowDataset) and source.other_splits:
            log.info(
                "%s: this one split is read of %s: it has %s too", key, source.name, ", ".join(source.other_splits)
            )
    [(twice, count)] = Counter(source.name for source in found).most_common(1)
    if count > 1:
        raise ConfigError(f"{key}: {twice} is named twice; its rows would come twice in an epoch")
    return found


def _rows_at(path: str, key: str, default_split: str) -> Sequence[RowSource]:
    if part := hub_part(path, default_split=default_split):
        is_default = hub_part(path, default_split="") != part
        return [open_rows(part, name=f"{part.path}:{part.split}", key=key, is_default=is_default)]
    if is_remote(path):
        return remote_files(path, key)
    if os.path.isdir(path) and is_saved_dataset(path):
        part, name = saved_part(path, key=key, default_split=default_split)
        return [open_rows(part, name=name, key=key, is_default=True)]
    files = row_files(path, key)
    if os.path.isdir(path):
        reject_mixed_splits(path, files, key)
    return [local_file(file, key) for file in files]


def with_known_formats(files: Sequence[str]) -> list[str]:
    """Return the files whose names tell that they hold rows."""
    return [file for file in files if format_of(file)]


def row_files(path: str, key: str, *, choose: Callable[[Sequence[str]], list[str]] = with_known_formats) -> list[str]:
    """Return the files of rows at a local path: the file itself, or those in a folder or of a glob, sorted.

    `choose` takes those with rows out of all files there. Raises ConfigError where there are none.
    """
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        matches = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
    elif glob.has_magic(path):
        matches = glob.glob(path, recursive=True)
    else:
        raise ConfigError(f"{key}: {path}: no such file (looked in {os.getcwd()}): give {KINDS}")
    files = sorted(filter(os.path.isfile, matches))
    chosen = choose(files)
    if not chosen:
        others = f"; it has {os.path.basename(files[0])}, which is of no such kind" if files else ""
        raise ConfigError(f"{key}: there are no rows at {path}{others}: give {KINDS}")
    return chosen


def reject_mixed_splits(folder: str, files: Sequence[str], key: str) -> None:
    """Raise ConfigError where a folder's files are of training and held out, as far as their names tell."""
    names = [os.path.relpath(file, folder).replace("_", " ") for file in files]
    train = next((file for file, name in zip(files, names, strict=True) if _TRAIN_NAME.search(name)), None)
    held_out = next((file for file, name in zip(files, names, strict=True) if _HELD_OUT_NAME.search(name)), None)
    if train and held_out:
        raise ConfigError(f"{key}: {folder} holds {train} and {held_out}, which must not be mixed: name one of them")


def local_file(path: str, key: str) -> DataFile:
    """Return the file of rows at `path`. Raises ConfigError where its name tells no format."""
    return DataFile(path, _checked_format(path, key), compression_of(path))


def remote_files(address: str, key: str) -> list[DataFile]:
    """Return the files of rows at an address: an object, or those in a folder or of a glob.

    Raises ConfigError where there are none, or the store denies access, and StorageError where it fails.
    """
    found = objects_at(address, key, otherwise=f"give {KINDS}")
    if not is_one_object(address, found):
        chosen = [one for one in found if format_of(one.path)]
        if not chosen:
            raise ConfigError(
                f"{key}: there are no rows at {shown(address)}; it has {found[0].inside}, which is of no such kind: "
                f"give {KINDS}"
            )
        if not has_wildcard(address):
            reject_mixed_splits(shown(address), [one.name for one in chosen], key)
        found = chosen
    return [remote_file(one, key) for one in found]


def remote_file(found: StoredObject, key: str) -> DataFile:
    """Return an object of rows as a file. Raises ConfigError where its name tells no format."""
    return DataFile(found.name, _checked_format(found.path, key), compression_of(found.path), remote=found)


def objects_at(address: str, key: str, *, otherwise: str) -> list[StoredObject]:
    """Return the objects at an address, as `find_objects`, with messages that begin with the config's `key`.

    `otherwise` says what else could be given. Raises ConfigError where there are none, or the store denies access, and
    StorageError where it fails.
    """
    try:
        return find_objects(address)
    except (NoObject, ConfigError) as error:
        raise ConfigError(
            f"{key}: {error}; {otherwise}" if isinstance(error, NoObject) else f"{key}: {error}"
        ) from error
    except AccessDenied as error:
        raise ConfigError(f"{key}: {error}") from error
    except StorageError as error:
        raise StorageError(f"{key}: {error}") from error


def split_suffix(name: str) -> tuple[str, str]:
    """Return the suffix that tells what a file holds, and the one that tells its compression (or nothing)."""
    stem, suffix = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")


def format_of(name: str) -> Format | None:
    """Return the format of rows that a file's name tells, None where it tells none."""
    return ROW_FORMATS.get(split_suffix(name)[0])


def compression_of(name: str) -> Compression | None:
    """Return the compression that a file's name tells."""
    return COMPRESSIONS.get(split_suffix(name)[1])


def _checked_format(name: str, key: str) -> Format:
    found = format_of(name)
    if found is None:
        raise ConfigError(f"{key}: {name} is of no known kind: give {KINDS}, and name it so")
    return found
