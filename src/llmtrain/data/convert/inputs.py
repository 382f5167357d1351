"""From IN to what rows are read from, each with the name that its own file would have below OUT.

file · folder · glob · ChatGPT's .zip · folder of save_to_disk · owner/name of the Hub   ─→   Input …
"""

from __future__ import annotations

import glob
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import IO

from llmtrain.config.errors import ConfigError
from llmtrain.data.chat.row_files import (
    KINDS,
    RowDataset,
    RowFile,
    find_rows,
    format_of,
    refuse_mixed_splits,
)

_IN = "IN"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:.+)?")
_EXPORT = re.compile(r"conversations(-\d+)?\.json")
_EXPORT_OTHERS = ("chat.html", "user.json", "message_feedback.json")
"""What lies beside the conversations in an unpacked export of ChatGPT, and holds no rows."""


@dataclass(frozen=True)
class Input:
    """A file or dataset to convert."""

    source: RowFile | RowDataset
    name: str
    """Of the file below OUT, if that is a folder."""
    file: str | None = None
    """Where it is read from, if that is a file here."""


def find_inputs(paths: Sequence[str], *, split: str | None, subset: str | None, apart: bool) -> list[Input]:
    """What there is at `paths`, in their order.

    `apart`: each becomes a file of its own, so that a folder may hold several splits. Raises ConfigError where there
    is nothing to read, for a split or subset of what has none, and for a file that is named twice.
    """
    inputs = [one for path in paths for one in _inputs_at(os.path.expanduser(path), split, subset, apart)]
    for what, given in (("--split", split), ("--subset", subset)):
        if given is not None and not any(isinstance(one.source, RowDataset) for one in inputs):
            raise ConfigError(f"{what} {given}: {', '.join(paths)} is no Hugging Face dataset; leave {what} out")
    [(twice, count)] = Counter(one.source.name for one in inputs).most_common(1)
    if count > 1:
        raise ConfigError(f"{_IN}: {twice} is named twice")
    stems = Counter(one.name for one in inputs)
    whole = [
        one if stems[one.name] == 1 else replace(one, name=f"{one.name.removesuffix('.jsonl')}{_suffix(one)}")
        for one in inputs
    ]
    [(twice, count)] = Counter(one.name for one in whole).most_common(1)
    if count > 1:
        raise ConfigError(f"{_IN}: two files would become {twice} in OUT: convert them one after the other")
    return whole


def _inputs_at(path: str, split: str | None, subset: str | None, apart: bool) -> Iterator[Input]:
    if os.path.isfile(path):
        yield from _files(path, os.path.basename(path))
    elif os.path.isdir(path):
        yield from _folder(path, split, subset, apart)
    elif path.startswith("hf://") or (_HUB_ID.fullmatch(path) and format_of(path) is None):
        name = path.removeprefix("hf://")
        is_bare = name == path
        for what, given, mark in (("--split", split, ":"), ("--subset", subset, "@")):
            if given is not None and mark in name:
                raise ConfigError(f"{_IN}: {path} names what {what} {given} names: leave one of them out")
        named = f"hf://{name}{f'@{subset}' if subset else ''}{f':{split}' if split else ''}"
        try:
            found = find_rows(named, key=_IN)
        except ConfigError as error:
            taken = f"\nthere is no file or folder {path}, so it was taken for a dataset of the Hub" if is_bare else ""
            raise ConfigError(f"{error}{taken}") from error
        for source in found:
            yield Input(source, f"{re.split('[@:]', PurePath(name).name)[0]}.jsonl")
    elif "://" in path:
        for source in find_rows(path, key=_IN):
            yield Input(source, _with_jsonl(PurePath(source.name).name))
    elif glob.has_magic(path):
        files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        known = [file for file in files if _is_known(file)]
        if not known:
            raise ConfigError(f"{_IN}: there are no rows at {path}: give {KINDS}")
        for file in known:
            yield from _files(file, os.path.basename(file))
    else:
        find_rows(path, key=_IN)  # says that there is no such file


def _folder(path: str, split: str | None, subset: str | None, apart: bool) -> Iterator[Input]:
    name = os.path.basename(os.path.abspath(path))
    saved = os.path.join(path, "dataset_dict.json")
    if os.path.exists(saved) or os.path.exists(os.path.join(path, "state.json")) or split or subset:
        for one in _splits(saved) if apart and split is None and os.path.exists(saved) else [split]:
            source = _dataset(path, one, subset) if one or subset else find_rows(path, key=_IN)[0]
            yield Input(source, f"{one or name}.jsonl")
        return
    inside = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True))
    files = [file for file in inside if os.path.isfile(file)]
    if any(os.path.basename(file) in _EXPORT_OTHERS for file in files):
        export = [file for file in files if _EXPORT.fullmatch(os.path.basename(file))]
        files = export or files
    known = [file for file in files if _is_known(file)]
    if not known:
        raise ConfigError(f"{_IN}: there are no rows at {path}: give {KINDS}")
    if not apart:
        refuse_mixed_splits(path, known, _IN)
    for file in known:
        yield from _files(file, os.path.relpath(file, path))


def _splits(dataset_dict: str) -> list[str]:
    try:
        return [str(split) for split in json.loads(Path(dataset_dict).read_text("utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{_IN}: {dataset_dict} cannot be read ({error})") from error


def _dataset(path: str, split: str | None, subset: str | None) -> RowDataset:
    from llmtrain.data.prepare.hugging_face import DatasetPart, open_dataset

    wanted = split or "train"
    try:
        return RowDataset(f"{path}:{wanted}", open_dataset(DatasetPart(path, subset, wanted, None)))
    except ConfigError as error:
        raise ConfigError(f"{_IN}: {error}") from error


def _files(path: str, name: str) -> Iterator[Input]:
    if not path.lower().endswith(".zip"):
        for source in find_rows(path, key=_IN):
            yield Input(source, _with_jsonl(name), path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if _EXPORT.fullmatch(PurePath(member).name)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{_IN}: {path} cannot be read ({error})") from error
    if not members:
        raise ConfigError(
            f"{_IN}: {path} holds no conversations.json, as an export of ChatGPT does: unpack it, and give the files"
        )
    for member in members:
        inner = PurePath(member).name if len(members) > 1 else name.removesuffix(PurePath(name).suffix)
        yield Input(RowFile(f"{path}/{member}", "json", _opener(path, member)), _with_jsonl(inner), path)


def _opener(path: str, member: str) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:  # the member keeps the file open
            return archive.open(member)

    return opened


def _is_known(file: str) -> bool:
    return format_of(file) is not None or file.lower().endswith(".zip")


def _suffix(one: Input) -> str:
    name = one.source.name.removesuffix(".gz")
    return f"{PurePath(name).suffix}.jsonl"


def _with_jsonl(name: str) -> str:
    return str(PurePath(name.removesuffix(".gz")).with_suffix(".jsonl"))
