"""Hugging Face datasets: a folder that `save_to_disk` wrote, a folder of data files, or a name on the Hub.

    hf://owner/name@config:split   ─ hub_part ───┐
    a folder of save_to_disk       ─ saved_part ─┴─▶ DatasetPart ─ open_dataset ─▶ datasets.Dataset

The `datasets` library is imported when a dataset is opened, and not before.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.data.hub_connection import hub_answers
from llmtrain.errors import ConfigError

HUB = "hf://"

_HUB_NAME = re.compile(r"(?P<path>hf://[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>.+))?")


class DatasetPart(NamedTuple):
    """A split of one configuration of a dataset, or a slice of that split."""

    path: str
    """A folder, or hf:// and a name."""
    config: str | None
    split: str
    revision: str | None

    @property
    def is_remote(self) -> bool:
        """True if the dataset is on the Hub: its content is not looked at again once it is prepared."""
        return self.path.startswith(HUB)

    @property
    def folder(self) -> Path:
        """The folder of a dataset on this machine."""
        return Path(self.path).expanduser()

    def __str__(self) -> str:
        config = f" {self.config}" if self.config else ""
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.path}{config} {self.split}{revision}"


@dataclass(frozen=True)
class RowDataset:
    """One split of a dataset, already on the disk and mapped into memory."""

    name: str
    """Name of the dataset in messages."""
    dataset: Any
    """A `datasets.Dataset`."""
    other_splits: tuple[str, ...] = ()
    """Splits that the dataset has too, where none was named and the default one was taken."""

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, approximately."""
        data = self.dataset.data
        return int(data.nbytes * len(self.dataset) / max(1, data.num_rows))


def hub_part(path: str, *, default_split: str = "train") -> DatasetPart | None:
    """Parse `hf://owner/name@config:split`, of which config and split may be missing; None for any other path."""
    named = _HUB_NAME.fullmatch(path)
    return DatasetPart(named["path"], named["config"], named["split"] or default_split, None) if named else None


def is_saved_dataset(folder: str | os.PathLike[str]) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    path = Path(folder)
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def saved_splits(folder: str, *, key: str) -> tuple[list[str], bool]:
    """Return the splits that `save_to_disk` wrote into a folder, and whether each has a folder of its own.

    Raises ConfigError, beginning with the config's `key`, when the file that names them cannot be read.
    """
    several, single = (Path(folder).expanduser() / name for name in ("dataset_dict.json", "state.json"))
    file = several if several.is_file() else single
    try:
        content = json.loads(file.read_text("utf-8"))
        if file is several:
            return [str(split) for split in content["splits"]], True
        return [content.get("_split") or "train"], False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {file} cannot be read ({error})") from error


def saved_part(path: str, *, key: str, default_split: str = "train") -> tuple[DatasetPart, str]:
    """Return the part of a saved dataset that is read when no split is named, and its name in messages.

    It is the only split, or of several the default one. Raises ConfigError as `saved_splits` does.
    """
    splits, are_several = saved_splits(path, key=key)
    if are_several:
        return DatasetPart(path, None, default_split, None), os.path.join(path, default_split)
    return DatasetPart(path, None, splits[0], None), path


def open_rows(part: DatasetPart, *, name: str, key: str, is_default: bool = False) -> RowDataset:
    """Open a part under the name that messages show; `is_default`: nobody named its split.

    Raises ConfigError, beginning with the config's `key`.
    """
    try:
        dataset = open_dataset(part)
        return RowDataset(name, dataset, _splits_beside(part, dataset, key=key) if is_default else ())
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _splits_beside(part: DatasetPart, dataset: Any, *, key: str) -> tuple[str, ...]:
    """Return the names of the other splits of the dataset that a part is of."""
    if not part.is_remote and is_saved_dataset(part.folder):
        splits, _ = saved_splits(part.path, key=key)
    else:
        splits = list(dataset.info.splits or ())
    return tuple(name for name in splits if name != part.split)


@lru_cache(maxsize=64)  # mapped into memory, so that many may be open
def open_dataset(part: DatasetPart) -> Any:
    """Open the `datasets.Dataset`. Raises ConfigError when it, its configuration or its split cannot be had."""
    import datasets  # takes a second

    try:
        if not part.is_remote and is_saved_dataset(part.folder):
            return _slice(datasets.load_from_disk(str(part.folder)), part)
        path = part.path.removeprefix(HUB) if part.is_remote else os.path.abspath(part.folder)
        with nullcontext() if not part.is_remote or hub_answers() else _offline():
            found = datasets.load_dataset(path, part.config, split=part.split, revision=part.revision)
    except Exception as error:  # of a dozen kinds: the library's own, those of its download and file layers
        raise ConfigError(f"dataset {part}: {_reason(error)}") from error
    if found is None or isinstance(found, dict):
        raise ConfigError(f"dataset {part}: is no single split")
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """Take what is in the local cache alone. The libraries read HF_HUB_OFFLINE only when they are imported."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _slice(found: Any, part: DatasetPart) -> Any:
    """Return what a split such as train[:1%] names of a dataset on disk."""
    import datasets

    if part.config is not None:
        raise ValueError("a dataset that was saved to disk has no configurations: remove configs")
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    wanted = datasets.ReadInstruction.from_spec(part.split)
    pieces = [
        splits[piece.splitname].select(range(piece.from_, piece.to))
        for piece in wanted.to_absolute({name: len(split) for name, split in splits.items()})
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError) or "Connection" in type(error).__name__ or "Offline" in type(error).__name__:
        return (
            "cannot be fetched from the Hub, and is not in the local cache: there is no connection. "
            "Download it elsewhere and name the folder, or try again with a connection"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
