"""Find what `convert` reads at IN, each with the name that its own file would have below OUT.

file · folder · glob · ChatGPT's .zip · folder of save_to_disk · owner/name of the Hub   ─→   ConversionInput …
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from llmtrain.data.files.datasets import (
    HUB,
    DatasetPart,
    RowDataset,
    hub_part,
    is_saved_dataset,
    open_rows,
    saved_splits,
)
from llmtrain.data.files.find import (
    DataFile,
    RowSource,
    find_rows,
    format_of,
    local_file,
    reject_mixed_splits,
    remote_files,
    row_files,
    split_suffix,
    with_known_formats,
)
from llmtrain.errors import ConfigError
from llmtrain.storage.address import is_remote, local_path

_IN = "IN"
_EXPORT = re.compile(r"conversations(-\d+)?\.json")
_EXPORT_OTHERS = ("chat.html", "user.json", "message_feedback.json")
"""Files beside the conversations in an unpacked export of ChatGPT that hold no rows."""


@dataclass(frozen=True)
class ConversionInput:
    """A file or dataset to convert."""

    source: RowSource
    name: str
    """Name of the file below OUT, if OUT is a folder."""
    file: str | None = None
    """Path that is read, if it is a local file."""


def find_inputs(paths: Sequence[str], *, split: str | None, subset: str | None, apart: bool) -> list[ConversionInput]:
    """Find what there is at `paths`, in their order.

    `apart`: each becomes a file of its own, so that a folder may hold several splits. Raises ConfigError where there
    is nothing to read, for a split or subset of what has none, and for a file that is named twice.
    """
    inputs = [one for path in paths for one in _inputs_at(os.path.expanduser(local_path(path)), split, subset, apart)]
    for what, given in (("--split", split), ("--subset", subset)):
        if given is not None and not any(isinstance(one.source, RowDataset) for one in inputs):
            raise ConfigError(f"{what} {given}: {', '.join(paths)} is no Hugging Face dataset; leave {what} out")
    if twice := _repeated([one.source.name for one in inputs]):
        raise ConfigError(f"{_IN}: {twice} is named twice")
    stems = Counter(one.name for one in inputs)
    whole = [
        one if stems[one.name] == 1 else replace(one, name=f"{one.name.removesuffix('.jsonl')}{_suffix(one)}")
        for one in inputs
    ]
    if twice := _repeated([one.name for one in whole]):
        raise ConfigError(f"{_IN}: two files would become {twice} in OUT: convert them one after the other")
    return whole


def splits_beside(one: ConversionInput) -> tuple[str, ...]:
    """Return the splits of its dataset that are left out, as none was named."""
    return one.source.other_splits if isinstance(one.source, RowDataset) else ()


def _repeated(names: Sequence[str]) -> str | None:
    [(name, count)] = Counter(names).most_common(1)
    return name if count > 1 else None


def _inputs_at(path: str, split: str | None, subset: str | None, apart: bool) -> Iterator[ConversionInput]:
    if os.path.isdir(path) and (is_saved_dataset(path) or split or subset):
        yield from _splits_of_folder(path, split, subset, apart)
    elif hub_part(path) or _may_be_on_the_hub(path):
        yield from _on_the_hub(path, split, subset)
    elif is_remote(path):
        for source in remote_files(path, _IN):
            assert source.remote is not None
            yield ConversionInput(source, _with_jsonl(source.remote.inside))
    else:
        files = row_files(path, _IN, choose=_with_rows)
        if os.path.isdir(path) and not apart:
            reject_mixed_splits(path, files, _IN)
        for file in files:
            yield from _files(file, os.path.relpath(file, path) if os.path.isdir(path) else os.path.basename(file))


def _may_be_on_the_hub(path: str) -> bool:
    """Return whether this is owner/name, and nothing on this machine."""
    part = hub_part(HUB + path)
    has_owner = part is not None and "/" in part.path.removeprefix(HUB)
    return has_owner and format_of(path) is None and not os.path.exists(path)


def _with_rows(files: Sequence[str]) -> list[str]:
    names = [os.path.basename(file) for file in files]
    if any(name in _EXPORT_OTHERS for name in names):
        export = [file for file, name in zip(files, names, strict=True) if _EXPORT.fullmatch(name)]
        files = export or files
    return [file for file in files if file.lower().endswith(".zip") or with_known_formats([file])]


def _on_the_hub(path: str, split: str | None, subset: str | None) -> Iterator[ConversionInput]:
    name = path.removeprefix(HUB)
    for what, given, mark in (("--split", split, ":"), ("--subset", subset, "@")):
        if given is not None and mark in name:
            raise ConfigError(f"{_IN}: {path} names what {what} {given} names: leave one of them out")
    named = f"{HUB}{name}{f'@{subset}' if subset else ''}{f':{split}' if split else ''}"
    try:
        found = find_rows(named, key=_IN)
    except ConfigError as error:
        taken = f"\nthere is no file or folder {path}, so it was taken for a dataset of the Hub" if name == path else ""
        raise ConfigError(f"{error}{taken}") from error
    for source in found:
        yield ConversionInput(source, f"{re.split('[@:]', PurePath(name).name)[0]}.jsonl")


def _splits_of_folder(path: str, split: str | None, subset: str | None, apart: bool) -> Iterator[ConversionInput]:
    splits, are_several = saved_splits(path, key=_IN) if is_saved_dataset(path) else ([], False)
    for one in splits if apart and split is None and are_several else [split]:
        if one or subset:
            part = DatasetPart(path, subset, one or "train", None)
            default = split is None and not apart
            source: RowSource = open_rows(part, name=f"{path}:{part.split}", key=_IN, is_default=default)
        else:
            [source] = find_rows(path, key=_IN)
        yield ConversionInput(source, f"{one or os.path.basename(os.path.abspath(path))}.jsonl")


def _files(path: str, name: str) -> Iterator[ConversionInput]:
    if not path.lower().endswith(".zip"):
        yield ConversionInput(local_file(path, _IN), _with_jsonl(name), path)
        return
    from fsspec.implementations.zip import ZipFileSystem

    try:
        archive = ZipFileSystem(path)
        members = [member for member in archive.find("") if _EXPORT.fullmatch(PurePath(member).name)]
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{_IN}: {path} cannot be read ({error})") from error
    if not members:
        raise ConfigError(
            f"{_IN}: {path} holds no conversations.json, as an export of ChatGPT does: unpack it, and give the files"
        )
    for member in members:
        inner = PurePath(member).name if len(members) > 1 else name.removesuffix(PurePath(name).suffix)
        source = DataFile(f"{path}/{member}", "json", path=member, filesystem=archive)
        yield ConversionInput(source, _with_jsonl(inner), path)


def _suffix(one: ConversionInput) -> str:
    return f"{split_suffix(one.source.name)[0]}.jsonl"


def _with_jsonl(name: str) -> str:
    return str(PurePath(name.removesuffix(split_suffix(name)[1])).with_suffix(".jsonl"))
