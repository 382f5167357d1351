"""From the paths in a config to what rows are read from: files of known kinds, and Hugging Face datasets.

    "rows.jsonl"  "more/*.csv"  "folder"  "s3://bucket/x.parquet"   ─→ RowFile, with its format and how to open it
    "folder of save_to_disk"    "hf://owner/name@config:split"      ─→ RowDataset

Reading them is `rows`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, cast

from llmtrain.config.errors import ConfigError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""By suffix, before a `.gz` if there is one."""

KINDS = (
    "a .jsonl, .json, .csv or .parquet file, a folder or glob of these, or a Hugging Face dataset (owner/name:split)"
)

_HUB_NAME = re.compile(r"(?P<path>hf://[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>.+))?")
_TRAIN_NAME = re.compile(r"\btrain(ing)?\b")
_HELD_OUT_NAME = re.compile(r"\b(val|valid|validation|dev|test|eval)\b")


@dataclass(frozen=True)
class RowFile:
    """A file of rows."""

    name: str
    """As messages show it."""
    format: str
    """jsonl, json, csv or parquet."""
    open: Callable[[], IO[bytes]]
    """From the front, unpacked. Can be sent to another process."""
    size: int | None = None
    """Bytes on this machine's disk; None of a remote file."""


@dataclass(frozen=True)
class RowDataset:
    """A Hugging Face dataset: one split, already on the disk and mapped into memory."""

    name: str
    dataset: Any


def find_rows(paths: str | Sequence[str], *, key: str, default_split: str = "train") -> list[RowFile | RowDataset]:
    """What there is at `paths`, in their order. `key` is the config's, for messages.

    `default_split` is taken of a dataset with several splits where the path names none (`hf://owner/name:split`, or the
    split's own folder). Raises ConfigError where there is nothing to read, or a folder mixes splits.
    """
    found: list[RowFile | RowDataset] = []
    for path in [paths] if isinstance(paths, str) else paths:
        found += _rows_at(os.path.expanduser(path), key, default_split)
    [(twice, count)] = Counter(source.name for source in found).most_common(1)
    if count > 1:
        raise ConfigError(f"{key}: {twice} is named twice; its rows would come twice in an epoch")
    return found


def _rows_at(path: str, key: str, default_split: str) -> Sequence[RowFile | RowDataset]:
    if named := _HUB_NAME.fullmatch(path):
        split = named["split"] or default_split
        return [_dataset(named["path"], named["config"], split, key=key, name=f"{named['path']}:{split}")]
    if "://" in path:
        return _remote_files(path, key)
    if os.path.isfile(path):
        return [_local_file(path, key)]
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
            return [_saved_dataset(path, key, default_split)]
        inside = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True))
        return _known_files(path, [file for file in inside if os.path.isfile(file)], key)
    if glob.has_magic(path):
        return _known_files(path, sorted(filter(os.path.isfile, glob.glob(path, recursive=True))), key)
    raise ConfigError(f"{key}: {path}: no such file (looked in {os.getcwd()}): give {KINDS}")


def _known_files(path: str, files: Iterable[str], key: str) -> list[RowFile]:
    files = list(files)
    known = [file for file in files if format_of(file)]
    if not known:
        others = f"; it has {os.path.basename(files[0])}, which is of no such kind" if files else ""
        raise ConfigError(f"{key}: there are no rows at {path}{others}: give {KINDS}")
    if os.path.isdir(path):
        refuse_mixed_splits(path, known, key)
    return [_local_file(file, key) for file in known]


def refuse_mixed_splits(folder: str, files: Sequence[str], key: str) -> None:
    """Raise ConfigError where a folder's files are of training and held out, as far as their names tell."""
    names = [os.path.relpath(file, folder).replace("_", " ") for file in files]
    train = next((file for file, name in zip(files, names, strict=True) if _TRAIN_NAME.search(name)), None)
    held_out = next((file for file, name in zip(files, names, strict=True) if _HELD_OUT_NAME.search(name)), None)
    if train and held_out:
        raise ConfigError(f"{key}: {folder} holds {train} and {held_out}, which must not be mixed: name one of them")


def _local_file(path: str, key: str) -> RowFile:
    return RowFile(path, _checked_format(path, key), partial(_open_local, path), os.path.getsize(path))


def _open_local(path: str) -> IO[bytes]:
    return _decompressed(open(path, "rb"), path)


def _open_remote(filesystem: Any, name: str) -> IO[bytes]:
    return _decompressed(filesystem.open(name, "rb"), name)


def _remote_files(path: str, key: str) -> list[RowFile]:
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        names = sorted(filesystem.glob(inner)) if glob.has_magic(inner) else [inner]
        missing = not names or not filesystem.isfile(names[0])
    except ImportError as error:
        raise ConfigError(f"{key}: {path} needs a package that is not installed ({error})") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error})") from error
    if missing:
        raise ConfigError(f"{key}: there are no rows at {path}: give {KINDS}")

    shown = [filesystem.unstrip_protocol(name) for name in names]
    return [
        RowFile(url, _checked_format(url, key), partial(_open_remote, filesystem, name))
        for url, name in zip(shown, names, strict=True)
    ]


def _decompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if name.endswith(".gz") else stream


def format_of(name: str) -> str | None:
    """The kind of rows that a file's name says it holds: jsonl, json, csv or parquet."""
    return FORMATS.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)


def _checked_format(name: str, key: str) -> str:
    found = format_of(name)
    if found is None:
        raise ConfigError(f"{key}: {name} is of no known kind: give {KINDS}, and name it so")
    return found


def _saved_dataset(path: str, key: str, default_split: str) -> RowDataset:
    state = os.path.join(path, "state.json")
    if not os.path.isfile(state):  # several splits
        return _dataset(path, None, default_split, key=key, name=os.path.join(path, default_split))
    try:
        with open(state, encoding="utf-8") as stream:
            split = json.load(stream).get("_split") or "train"
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {state} cannot be read ({error})") from error
    return _dataset(path, None, split, key=key, name=path)


def _dataset(path: str, config: str | None, split: str, *, key: str, name: str) -> RowDataset:
    from llmtrain.data.prepare.hugging_face import DatasetPart, open_dataset

    try:
        return RowDataset(name, open_dataset(DatasetPart(path, config, split, None)))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
