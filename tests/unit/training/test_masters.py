"""Weights in bfloat16 with float32 masters: what is computed in, what is saved, and how a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.config.loading.load import plain_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.resolve import Resolved
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer, narrow_weights, trains_narrow_weights
from llmtrain.training.setup.trained import TrainedHuggingFace, Vocabulary, train_huggingface
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import VOCAB_SIZE, tiny_huggingface, write_tiny_folder

CPU = torch.device("cpu")


def narrowed(folder: Path) -> tuple[TrainedHuggingFace, NamedOptimizer]:
    config = HuggingFaceConfig(path=str(folder))
    vocabulary = Vocabulary(size=VOCAB_SIZE, tokenizer_folder=folder)
    trained = train_huggingface(config, folder, vocabulary, seq_len=16, seed=3, precision="bf16-mixed", device=CPU)
    assert isinstance(trained, TrainedHuggingFace)
    masters = trained.narrow()
    return trained, build_optimizer(OptimizerConfig(lr=1e-3), trained.module, masters=masters)


def steps(trained: TrainedHuggingFace, optimizer: NamedOptimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, _ = trained.module.train()(random_batch(VOCAB_SIZE, seed=number))
        (loss_sum / 100).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum.item())
    return losses


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_weights_and_the_residual_stream_are_bfloat16_and_the_masters_are_the_weights_that_were_read() -> None:
    model, same = tiny_huggingface("llama").train(), tiny_huggingface("llama")
    dtypes: list[torch.dtype] = []
    model.layers()[1].register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    before = list(model.parameters())
    masters = narrow_weights(model)
    assert all(after is parameter for after, parameter in zip(model.parameters(), before, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        model(random_batch(VOCAB_SIZE))[0].backward()
    assert set(dtypes) == {torch.bfloat16}
    for parameter, expected in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(masters[parameter], expected)
        assert torch.equal(parameter, expected.bfloat16())
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16


def test_what_the_models_code_keeps_in_float32_and_what_is_frozen_stays() -> None:
    model = tiny_huggingface("llama")
    model.get_parameter("network.model.embed_tokens.weight").requires_grad_(False)
    masters = narrow_weights(model, keep=["norm", "q_proj"])
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    expected = {name for name, _ in model.named_parameters() if ".norm." in name or "q_proj" in name}
    assert wide == expected | {"network.model.embed_tokens.weight"}
    assert len(masters) == len(list(model.parameters())) - len(wide)


def test_a_checkpoint_holds_the_masters_as_its_weights_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "base")
    trained, optimizer = narrowed(folder)
    first = steps(trained, optimizer, range(3))
    assert first[-1] < first[0]
    saved, state = copies(optimizer.saved_weights(trained.tensors())), copies(optimizer.state_tensors())
    assert not any(name.endswith("/master") for name in state), "they are saved once"
    trained.write(tmp_path / "model", saved)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    live = dict(trained.module.network.named_parameters())
    for name, tensor in written.items():
        assert torch.equal(tensor, saved[name])
        assert torch.equal(tensor.bfloat16(), live[name])
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in written.values())

    again, resumed = narrowed(folder)
    with resumed.reading_weights():
        again.read(tmp_path / "model")
    resumed.load_state_tensors(state)
    assert steps(trained, optimizer, range(3, 6)) == steps(again, resumed, range(3, 6))
    for name, tensor in optimizer.saved_weights(trained.tensors()).items():
        assert torch.equal(tensor, resumed.saved_weights(again.tensors())[name]), name


def test_a_checkpoint_of_float32_weights_goes_on_with_masters_and_the_other_way_round(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "base")
    trained, optimizer = narrowed(folder)
    steps(trained, optimizer, range(2))
    saved, state = copies(optimizer.saved_weights(trained.tensors())), copies(optimizer.state_tensors())
    trained.write(tmp_path / "model", saved)
    model = tiny_huggingface("llama")
    plain = build_optimizer(OptimizerConfig(lr=1e-3), model)
    plain.load_state_tensors(state)
    assert plain.state_tensors().keys() == state.keys()
    again, resumed = narrowed(folder)
    with resumed.reading_weights():
        again.read(tmp_path / "model")
    resumed.load_state_tensors(copies(plain.state_tensors()))
    assert all(torch.equal(t, saved[name]) for name, t in resumed.saved_weights(again.tensors()).items())


def test_a_skipped_step_leaves_no_gradient(tmp_path: Path) -> None:
    trained, optimizer = narrowed(write_tiny_folder(tmp_path / "base"))
    with torch.autocast("cpu", torch.bfloat16):
        trained.module.train()(random_batch(VOCAB_SIZE))[0].backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in trained.module.parameters())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"strategy": "ddp"}, True),
        ({"strategy": "fsdp"}, False),
        ({"device": "cpu"}, False),
        ({"precision": "32"}, False),
        ({"key": "model.lora.r=4"}, False),
        ({"key": "model.dtype=float32"}, False),
        ({"key": "optimizer.master_weights=false"}, False),
        ({"key": "model.name=decoder"}, False),
    ],
    ids=str,
)
def test_all_weights_of_a_model_of_transformers_are_narrowed_on_a_gpu(changed: dict[str, str], expected: bool) -> None:
    key = changed.get("key", "run.seed=1")
    resolved = Resolved(
        changed.get("device", "cuda"),
        changed.get("precision", "bf16-mixed"),
        compile=False,
        strategy=changed.get("strategy", "single"),
        backend="nccl",
    )
    model = [] if key == "model.name=decoder" else ["model.name=huggingface", "model.path=owner/name"]
    config = plain_config(["data.name=synthetic", *model, key])
    assert trains_narrow_weights(config, resolved) is expected
