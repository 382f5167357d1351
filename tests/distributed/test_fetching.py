"""Of several processes one asks the Hub for a model; the others find what it has fetched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.training.setup.data import fetch_folders
from tests.support.ranks import RankPool
from tests.support.tiny_huggingface import write_tiny_folder


def fetch(hub: Path, *, has_it: bool) -> tuple[Path | None, Path | None]:
    """What this rank gets of a Hub that lies in a folder, with a list of the ranks that asked it."""
    config = Config(
        model=HuggingFaceConfig(path="owner/name", tokenizer="owner/words"), data=ChatConfig(train="rows.jsonl")
    )
    distributed = DistributedConfig(timeout_sec=60)
    resolved = resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)

    def snapshot_download(path: str, *, local_files_only: bool = False, **_: Any) -> str:
        fetched = hub / f"{path.replace('/', '-')}.fetched"
        if local_files_only and not fetched.exists():
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            with (hub / "asked").open("a") as asked:
                asked.write(f"{os.environ['RANK']} {path}\n")
            if not has_it:
                raise ConnectionError("no network")
            fetched.touch()
        return str(hub / "model")

    with (
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(huggingface_hub.HfApi, "model_info"),
        mock.patch.object(huggingface_hub, "snapshot_download", snapshot_download),
    ):
        return fetch_folders(config, Engine(resolved, distributed=distributed))


def there_and_back(hub: Path) -> tuple[Path | None, Path | None]:
    return fetch(hub, has_it=True)


def without_a_network(hub: Path) -> str:
    try:
        fetch(hub, has_it=False)
    except ConfigError as error:
        return str(error)
    return ""


def test_one_rank_fetches_model_and_tokenizer_for_all(two_ranks: RankPool, tmp_path: Path) -> None:
    model = write_tiny_folder(tmp_path / "model")
    assert two_ranks.run(there_and_back, tmp_path) == [(model, model)] * 2
    assert (tmp_path / "asked").read_text().splitlines() == ["0 owner/name", "0 owner/words"]


def test_what_nobody_can_have_is_told_by_each(two_ranks: RankPool, tmp_path: Path) -> None:
    told = two_ranks.run(without_a_network, tmp_path)
    assert ["the Hub cannot be reached" in each for each in told] == [True, True]
