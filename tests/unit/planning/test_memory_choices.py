"""How many blocks the backward pass computes again, by the mode, the memory and what the model can do."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.training import TrainerConfig
from llmtrain.planning.memory_choices import choose_recomputed_blocks

GB = 10**9


def model_of(num_blocks: int = 8, checkpointable: Sequence[int] | None = None) -> Any:
    return SimpleNamespace(num_blocks=num_blocks, checkpointable=checkpointable or range(num_blocks + 1))


def chosen(room_gb: float, *, model: Any = None, **trainer: Any) -> tuple[int, list[int]]:
    """Return the number of blocks, and the numbers for which the memory was predicted: 80 GB less 5 for each block."""
    asked: list[int] = []

    def predict(count: int) -> int:
        asked.append(count)
        return (80 - 5 * count) * GB

    config = TrainerConfig(**{"activation_checkpointing": "auto", **trainer})
    return choose_recomputed_blocks(config, model or model_of(), predict, available=room_gb * GB), asked


def test_a_mode_names_the_number_and_nothing_is_predicted() -> None:
    counts = [chosen(1, activation_checkpointing=mode) for mode in ("none", "selective", "full")]
    assert counts == [(0, []), (4, []), (8, [])]
    assert chosen(1, model=model_of(5), activation_checkpointing="selective") == (3, [])


@pytest.mark.parametrize(
    ("room_gb", "expected"),
    [(90, (0, [0])), (80, (1, [0, 8])), (74, (2, [0, 8])), (60, (5, [0, 8])), (42.2, (8, [0, 8])), (10, (8, [0, 8]))],
)
def test_auto_takes_the_fewest_blocks_that_fit_with_a_margin(room_gb: float, expected: tuple[int, list[int]]) -> None:
    assert chosen(room_gb) == expected


def test_a_budget_is_taken_as_it_is() -> None:
    assert chosen(1000, memory_budget_gb=65)[0] == 3
    assert chosen(1, memory_budget_gb=80)[0] == 0


def test_a_model_with_one_switch_recomputes_all_blocks_and_one_without_keeps_them() -> None:
    assert chosen(74, model=model_of(8, [0, 8]))[0] == 8
    assert chosen(10, model=model_of(8, [0])) == (0, [])


def test_recomputation_that_saves_nothing_is_not_chosen() -> None:
    config = TrainerConfig(activation_checkpointing="auto")
    assert choose_recomputed_blocks(config, model_of(), lambda count: 80 * GB + count, available=GB) == 0


@pytest.mark.parametrize(("old", "mode"), [("true", "full"), ("false", "none"), ("auto", "auto")])
def test_configs_of_older_runs_keep_their_meaning(old: str, mode: str) -> None:
    config = load_config("quickstart", [f"trainer.activation_checkpointing={old}"]).config
    assert cast(str, config.trainer.activation_checkpointing) == mode
