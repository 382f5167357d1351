"""Models of transformers through the checkpoint store: what comes back goes on bit for bit as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.models.huggingface.folder import (
    checkpoint_tensors,
    read_huggingface_folder,
    write_huggingface_folder,
)
from llmtrain.models.huggingface.load import build_huggingface
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.training.checkpoint import CheckpointStore, Snapshot, load_optimizer, newest_good
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import VOCAB_SIZE, write_tiny_folder


def start(base: Path, settings: dict[str, Any]) -> tuple[HuggingFaceModel, NamedOptimizer]:
    config = HuggingFaceConfig.model_validate({"path": str(base), **settings})
    model = build_huggingface(config, base, seed=0, precision="32").train()
    return model, build_optimizer(OptimizerConfig(lr=1e-2), model)


def step(model: HuggingFaceModel, optimizer: NamedOptimizer, number: int) -> None:
    torch.manual_seed(number)
    loss_sum, num_tokens = model(random_batch(VOCAB_SIZE, num_documents=3, ignored_fraction=0.3, seed=number))
    (loss_sum / num_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("family", "settings", "tied"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("llama", {"lora": {"r": 4, "dropout": 0.1}}, False),
        ("gpt2", {"lora": {"r": 4, "dora": True}}, True),
        ("llama", {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}, False),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    tmp_path: Path, family: str, settings: dict[str, Any], tied: bool
) -> None:
    base = write_tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    model, optimizer = start(base, settings)

    def write_model(folder: Path, weights: Any) -> None:
        write_huggingface_folder(folder, model=model, state_dict=weights, tokenizer_folder=base)

    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, config_yaml="", write_model=write_model)
    for number in (1, 2):
        step(model, optimizer, number)
    store.save(Snapshot(step=2, state={}, model=checkpoint_tensors(model), optimizer=optimizer.state_tensors()))
    step(model, optimizer, 3)  # while the save is under way
    store.close()

    newest = newest_good(tmp_path / "checkpoints")
    assert newest is not None
    again, its_optimizer = start(base, settings)
    read_huggingface_folder(newest[0] / "model", again)
    its_optimizer.load_state_tensors(load_optimizer(newest[0]))
    step(again, its_optimizer, 3)
    expected: dict[str, Tensor] = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_an_adapter_has_only_the_adapters_tensors(tmp_path: Path) -> None:
    model, _ = start(write_tiny_folder(tmp_path), {"lora": {"r": 4}})
    tensors = checkpoint_tensors(model)
    assert all("lora_" in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters(trainable=True)
