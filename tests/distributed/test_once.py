"""What is done once, by one rank, is done before the others look for it: data prepared, models fetched."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.training.setup.data import fetch_folders
from llmtrain.training.setup.start import check_agreement
from tests.support.ranks import RankFailed, RankPool


def make_engine() -> Engine:
    distributed = DistributedConfig(timeout_sec=60)
    return Engine(
        resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed),
        distributed=distributed,
    )


def note(folder: Path, line: str) -> None:
    with (folder / "notes").open("a") as file:
        file.write(f"{line}\n")


def take_turns(folder: Path, times: int) -> None:
    engine = make_engine()
    for _ in range(times):
        with engine.main_first():
            note(folder, f"{engine.rank} begins")
            if engine.is_main:
                time.sleep(0.3)
                note(folder, "0 is done")
        engine.sum(0)  # all have come through


def decide_differently() -> str:
    engine = make_engine()
    check_agreement(engine)
    engine.resolved = replace(engine.resolved, precision="bf16-mixed" if engine.rank else "32")
    try:
        check_agreement(engine)
    except ConfigError as error:
        return str(error)
    return ""


def read_differently(key: str, values: list[Any]) -> str:
    engine = make_engine()
    keys = [f"{key}={values[engine.rank]}", f"run.device={['cpu', 'auto'][engine.rank]}"]
    try:
        check_agreement(engine, config=load_config("quickstart", keys).config)
    except ConfigError as error:
        return str(error)
    return ""


def fail_on_main() -> None:
    engine = make_engine()
    with engine.main_first():
        if engine.is_main:
            raise ValueError("nothing could be made")


def fetch_a_model(folder: Path) -> Path | None:
    """As a start does it, but from a folder that only the first one has to fill."""
    engine = make_engine()

    def fetch(model: Any) -> tuple[Path, Path]:
        if not (folder / "model").exists():
            note(folder, f"rank {engine.rank} downloads {model.path}")
            time.sleep(0.5)
            (folder / "model").mkdir()
        return folder / "model", folder / "model"

    config = mock.Mock(
        model=HuggingFaceConfig(name="huggingface", path="owner/model"),
        data=mock.Mock(spec=ChatConfig, tokenizer=None),
    )
    with mock.patch("llmtrain.models.huggingface.load.fetch", fetch):
        found, _ = fetch_folders(config, engine)
    return found


@pytest.mark.parametrize("times", [1, 2])
def test_the_others_wait_until_the_first_rank_is_done(two_ranks: RankPool, tmp_path: Path, times: int) -> None:
    """Also a second time in one process, with an engine of its own."""
    two_ranks.run(take_turns, tmp_path, times)
    assert (tmp_path / "notes").read_text().splitlines() == ["0 begins", "0 is done", "1 begins"] * times


def test_four_ranks_fetch_a_model_once(four_ranks: RankPool, tmp_path: Path) -> None:
    assert four_ranks.run(fetch_a_model, tmp_path) == [tmp_path / "model"] * 4
    assert (tmp_path / "notes").read_text() == "rank 0 downloads owner/model\n"


def test_when_the_first_rank_fails_the_others_do_not_wait_for_ever(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match="nothing could be made"):
        two_ranks.run(fail_on_main)


@pytest.mark.parametrize(
    ("key", "values", "named"),
    [
        ("optimizer.lr", [0.001, 0.01], "optimizer.lr is 0.001 on rank 0 and 0.01 on rank 1"),
        ("data.seq_len", [64, 128], "data.seq_len is 64 on rank 0 and 128 on rank 1"),
        (
            "tracking.mlflow.tracking_uri",
            ["https://a:hunter2@x", "https://b:letmein@x"],
            "tracking.mlflow.tracking_uri is",
        ),
        ("logging.level", ["INFO", "DEBUG"], ""),
    ],
)
def test_ranks_that_read_different_configs_name_the_key(
    two_ranks: RankPool, key: str, values: list[Any], named: str
) -> None:
    told = two_ranks.run(read_differently, key, values)
    assert told[0] == told[1]
    assert (f"the processes read different configs: {named}" in told[0]) == bool(named)
    assert "hunter2" not in told[0]
    assert "letmein" not in told[0]


def test_machines_that_decide_differently_are_told_of_on_each(two_ranks: RankPool) -> None:
    told = two_ranks.run(decide_differently)
    assert told[0] == told[1]
    assert "(rank 0: 32, compile False; rank 1: bf16-mixed, compile False): set trainer.precision" in told[0]
