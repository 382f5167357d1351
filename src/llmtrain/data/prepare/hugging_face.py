"""Hugging Face datasets: a folder that `save_to_disk` wrote, a folder of data files, or a name on the Hub.

The `datasets` library is imported when a config names one, and not before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from llmtrain.config.errors import ConfigError
from llmtrain.data.hub import hub_answers

HUB = "hf://"


class DatasetPart(NamedTuple):
    """One configuration of a dataset, and of it a split or a slice."""

    path: str
    """A folder, or hf:// and a name."""
    config: str | None
    split: str
    revision: str | None

    @property
    def is_remote(self) -> bool:
        """On the Hub: what it holds is not looked at again once it is prepared."""
        return self.path.startswith(HUB)

    def __str__(self) -> str:
        config = f" {self.config}" if self.config else ""
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.path}{config} {self.split}{revision}"


def is_saved_dataset(folder: str | os.PathLike[str]) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    path = Path(folder)
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


@lru_cache(maxsize=64)  # mapped into memory, so that many may be open
def open_dataset(part: DatasetPart) -> Any:
    """The `datasets.Dataset`. Raises ConfigError when it, its configuration or its split cannot be had."""
    import datasets  # takes a second

    name = part.path.removeprefix(HUB)
    try:
        if not part.is_remote and is_saved_dataset(name):
            return _slice(datasets.load_from_disk(os.path.expanduser(name)), part)
        path = name if part.is_remote else os.path.abspath(os.path.expanduser(name))
        with nullcontext() if not part.is_remote or hub_answers() else _offline():
            found = datasets.load_dataset(path, part.config, split=part.split, revision=part.revision)
    except Exception as error:  # of a dozen kinds: the library's own, those of its download and file layers
        raise ConfigError(f"dataset {part}: {_reason(error)}") from error
    if found is None or isinstance(found, dict):
        raise ConfigError(f"dataset {part}: is no single split")
    return found


def columns_of(part: DatasetPart) -> pa.Schema:
    """Names and types of the columns."""
    return open_dataset(part).features.arrow_schema


def size_of_dataset(part: DatasetPart) -> int:
    """Bytes of the part in memory, about."""
    data = open_dataset(part)
    return int(data.data.nbytes * len(data) / max(1, data.data.num_rows))


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
    """What a split such as train[:1%] names of a dataset on disk."""
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
