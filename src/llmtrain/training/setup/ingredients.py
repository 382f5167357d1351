"""Find out what a run is made of, with the hashes of all files, and keep it in the run's folder.

    config + folders + data ─▶ base model, tokenizer, training data, validation data ─▶ <run>/lineage.json

A large model takes a while to hash, so a thread of its own does it beside the training. A run that goes on keeps what
it recorded when it began.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.atomic import file_sha256
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import DataConfig, TokensConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnDataConfig, OwnModelConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import MANIFEST_NAME, Manifest, Shard, find_manifest, read_manifest
from llmtrain.data.remote_shards import RemoteShard
from llmtrain.data.remote_sources import RemoteManifest, find_remote_shards
from llmtrain.data.tokens import shard_cache
from llmtrain.errors import ConfigError
from llmtrain.models.companions import tokenizer_files
from llmtrain.runs.lineage import LINEAGE_NAME, Ingredient, hashed_files, remote_sha256, write_lineage
from llmtrain.storage.address import is_remote, parse_address, shown
from llmtrain.storage.local_copies import copied_from
from llmtrain.storage.versions import commit_in

if TYPE_CHECKING:
    from llmtrain.storage.finding import StoredObject
    from llmtrain.training.setup.data import RunData

log = logging.getLogger("llmtrain.run")

MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "adapter_config.json")


@contextmanager
def recorded_ingredients(run: Path, config: Config, data: RunData) -> Iterator[None]:
    """Write lineage.json beside what the block does, and wait for it at the end. A failure is a warning."""

    def record() -> None:
        try:
            write_lineage(run, list(ingredients(config, data)))
        except (OSError, ConfigError) as error:
            log.warning("%s is not written, so that `llmtrain lineage` cannot check this run: %s", LINEAGE_NAME, error)

    thread = threading.Thread(target=record, name="lineage", daemon=True)
    if not (run / LINEAGE_NAME).exists():
        thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()


def ingredients(config: Config, data: RunData) -> Iterator[Ingredient]:
    """Yield what the run is made of. Raises OSError or ConfigError for what cannot be read any more."""
    model, folders = config.model, data.folders
    if isinstance(model, HuggingFaceConfig):
        if folders.model is not None and model.init == "pretrained":
            yield _model(model.path, folders.model)
    elif model.init_from is not None:
        yield _model(model.init_from, Path(model.init_from))
    for section in (model, config.data):
        if isinstance(section, OwnModelConfig | OwnDataConfig):
            yield _code(section.name)
    facts = data.training.facts
    if facts.tokenizer is not None:
        files = hashed_files(facts.tokenizer, tokenizer_files(facts.tokenizer))
        origin = copied_from(facts.tokenizer)
        yield Ingredient(
            kind="tokenizer",
            name=origin or str(facts.tokenizer),
            folder=_absolute(facts.tokenizer),
            revision=commit_in(origin) if origin else None,
            files=files,
        )
    for kind, paths in (("training data", data.train_paths), ("validation data", data.val_paths)):
        for path in paths:
            yield from _rows(kind, path) if isinstance(config.data, ChatConfig) else _shards(kind, path, config.data)


def _code(name: str) -> Ingredient:
    """Return the file of a class of the user's own, which was imported by now."""
    file = Path(str(sys.modules[name.partition(":")[0]].__file__))
    return Ingredient(
        kind="code", name=name, folder=_absolute(file.parent), files=hashed_files(file.parent, (file.name,))
    )


def _model(name: str, folder: Path) -> Ingredient:
    is_snapshot = folder.parent.name == "snapshots"  # of the Hub's cache, which names it by its commit
    return Ingredient(
        kind="base model",
        name=name,
        folder=_absolute(folder),
        revision=folder.name if is_snapshot else commit_in(name),
        files=hashed_files(folder, (*MODEL_FILES, *tokenizer_files(folder))),
    )


def _shards(kind: str, path: str, config: DataConfig) -> Iterator[Ingredient]:
    """Yield the shards at a path: a folder, a file, or a glob of them, whose shards stand together by folder."""
    if is_remote(path):
        assert isinstance(config, TokensConfig)
        for found, shards in find_remote_shards(path, shard_cache(config), key="data"):
            yield _remote(kind, path, found, shards)
        return
    named = os.path.expanduser(path)
    places = [Path(_absolute(Path(found))) for found in sorted(glob.glob(named, recursive=True)) or [named]]
    for folder, inside in groupby(places, key=lambda place: find_manifest(place)):
        if folder is not None:
            yield _prepared(kind, path, folder, [place.relative_to(folder) for place in inside])
            continue
        for place in inside:  # shards of another tool
            home, pattern = (place, "*.parquet") if place.is_dir() else (place.parent, place.name)
            yield Ingredient(kind=kind, name=path, folder=str(home), files=hashed_files(home, (pattern,)))


def _prepared(kind: str, path: str, folder: Path, places: Sequence[Path]) -> Ingredient:
    """Return the shards at some places below the folder of a manifest, with the hashes that it records."""
    manifest = read_manifest(folder)
    shards = {
        shard.path: shard.sha256
        for split in manifest.splits.values()
        for shard in split.shards
        if any(Path(shard.path).is_relative_to(place) for place in places)
    }
    return Ingredient(
        kind=kind,
        name=path,
        folder=_absolute(folder),
        files={MANIFEST_NAME: file_sha256(folder / MANIFEST_NAME), **shards},
        facts=_facts(manifest),
    )


def _remote(kind: str, path: str, found: RemoteManifest, shards: Mapping[RemoteShard, Shard]) -> Ingredient:
    """Return the shards at an address, with the hash of the manifest and those that it records."""
    return Ingredient(
        kind=kind,
        name=shown(path),
        folder=found.folder.shown,
        files={MANIFEST_NAME: found.sha256, **{shard.path: shard.sha256 for shard in shards.values()}},
        facts=_facts(found.manifest),
    )


def _facts(manifest: Manifest) -> dict[str, Any]:
    kept = manifest.model_dump(mode="json", exclude_none=True, include={"options", "inputs", "tokenizer", "counts"})
    identity = {"name", "version", "library", "function_sha256", "documents"}
    kept["steps"] = [
        {
            **record.model_dump(mode="json", exclude_none=True, include=identity),
            "dropped": sum(rule.documents for rule in record.dropped.values()),
        }
        for record in manifest.steps
    ]
    return {**kept, "prepared_by": f"llmtrain {manifest.tool_version}"}


def _rows(kind: str, path: str) -> Iterator[Ingredient]:
    from llmtrain.data.files.find import DataFile, find_rows  # here: shards need neither datasets nor pyarrow's readers

    files: dict[str, str] = {}
    for source in find_rows(path, key="data.train"):
        if isinstance(source, DataFile) and source.remote is not None:
            yield _object(kind, source.name, source.remote)
        elif isinstance(source, DataFile):
            files[source.name] = file_sha256(Path(source.name))
        else:
            yield Ingredient(kind=kind, name=source.name, revision=str(source.dataset._fingerprint))
    if files:
        yield Ingredient(kind=kind, name=path, folder=_absolute(Path()), files=files)


def _object(kind: str, name: str, found: StoredObject) -> Ingredient:
    """Return an object of a store with its etag, its commit in lakeFS, and the hash of its content, which is read."""
    place = found.address
    return Ingredient(
        kind=kind,
        name=name,
        folder=shown(place.root),
        revision=commit_in(str(place)),
        files={parse_address(name).key: remote_sha256(str(place))},
        facts={"etag": found.entry.etag, "bytes": found.entry.size},
    )


def paths_of(value: str | Sequence[str] | None) -> list[str]:
    """Return the paths under `data.val`."""
    return [value] if isinstance(value, str) else list(value or [])


def _absolute(path: Path) -> str:
    return os.path.abspath(path.expanduser())
