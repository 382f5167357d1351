"""Steps as a GPU would take them: for what the host waits, and what a step changes whose numbers are not finite.

The code for a GPU runs on the CPU (`assume_device_type`), where an operator that reads a value can be counted; or on
tensors that claim to be on a GPU, which shows what is copied to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from llmtrain.config.sections.lora import LoraConfig
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.models.device_type import assume_device_type
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import add_lora, add_lora_to_decoder
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.step import gradient_norm, update
from tests.support.steps import as_loaded, micro_batches, tiny_training
from tests.support.tiny import random_batch, tiny_decoder
from tests.support.tiny_huggingface import tiny_huggingface, tiny_network
from tests.support.waits import Waits


def adapted_decoder() -> nn.Module:
    decoder = tiny_decoder()
    add_lora_to_decoder(decoder, LoraConfig(r=2))
    return decoder


def adapted_huggingface() -> nn.Module:
    return HuggingFaceModel(add_lora(tiny_network("llama", attention="sdpa"), LoraConfig(r=2)))


PACKED = {"num_documents": 3}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "decoder": (tiny_decoder, {}, {}),
    "decoder, documents, muon": (tiny_decoder, {"name": "muon"}, PACKED),
    "decoder, sgd": (tiny_decoder, {"name": "sgd"}, {}),
    "decoder, float16": (tiny_decoder, {"precision": "16-mixed"}, {}),
    "decoder, bfloat16 weights": (lambda: tiny_decoder().bfloat16(), {"precision": "bf16-true"}, {}),
    "decoder, lora": (adapted_decoder, {}, PACKED),
    "llama, all weights": (lambda: tiny_huggingface("llama", attention="sdpa"), {}, {}),
    "llama, lora, packed": (adapted_huggingface, {}, PACKED),
    "mistral, a window, packed": (lambda: tiny_huggingface("mistral", attention="sdpa"), {}, PACKED),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_reads_from_a_gpu_its_loss_and_norm_and_nothing_else(
    case: tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, options, batch = case
    read: list[int] = []
    to_host = Engine.to_host

    def counted(self: Engine, values: Tensor) -> Callable[[], list[float]]:
        read.append(len(values))
        return to_host(self, values)

    monkeypatch.setattr(Engine, "to_host", counted)
    with assume_device_type("cuda"):
        training = tiny_training(build(), **options)
        first, second = (micro_batches(step, **batch) for step in range(2))
        training.step(first)  # tries what is not known yet: the model's head and packing
        with Waits() as waits:
            training.step(second)
    assert not waits.values
    assert read == [2, 2]
    assert training.state.skipped_steps == 0


class Bigrams(nn.Module):
    """Rows of a table as logits, through a matrix that Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 11)])


def with_gradients(optimizer: NamedOptimizer, *, seed: int, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizer.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if bad:
        grad = optimizer.parameters[0].grad
        assert grad is not None
        grad[0, 0] = float("nan")


def everything(model: nn.Module, optimizer: NamedOptimizer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in {**model.state_dict(), **optimizer.state_tensors()}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_others_are_those_of_a_cpu(
    name: str, dtype: torch.dtype
) -> None:
    found = []
    for device_type, bad_steps in (("cpu", ()), ("cuda", (0, 2))):
        model = Bigrams().to(dtype)
        config = OptimizerConfig.model_validate({"name": name, "lr": 0.01, "weight_decay": 0.1})
        optimizer = build_optimizer(config, model, bf16=False)
        with assume_device_type(device_type):
            for number in range(4):
                if number in bad_steps:
                    before = everything(model, optimizer)
                    with_gradients(optimizer, seed=9, bad=True)
                    with Waits() as waits:
                        update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
                    after = everything(model, optimizer)
                    optimizer.zero_grad()
                    assert all(parameter.grad is None for parameter in optimizer.parameters)
                    assert all(torch.equal(after[key], value) for key, value in before.items())
                    assert bool(waits.values) == (name == "sgd" and number == 0), "its momenta are not there yet"
                with_gradients(optimizer, seed=number)
                update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
        found.append(everything(model, optimizer))
    for key, expected in found[0].items():
        assert torch.equal(found[1][key], expected), key


def on_gpu(model: nn.Module) -> Any:
    """The model on a GPU, without values."""

    def move(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    return model._apply(move)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("build", "name"), [(tiny_decoder, "adamw"), (tiny_decoder, "muon"), (adapted_huggingface, "adamw")]
)
def test_only_the_batch_is_copied_to_a_gpu(build: Callable[[], nn.Module], name: str) -> None:
    """Not the backward pass, which asks for the GPU's context."""
    batch: dict[str, Any] = {**as_loaded(random_batch(num_documents=2, ignored_fraction=0.4))}
    with unset_fake_temporarily():
        model = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = on_gpu(model)
        if isinstance(model, HuggingFaceModel):
            model.assume_standard()
        optimizer = build_optimizer(OptimizerConfig.model_validate({"name": name}), model, bf16=True)
        with Waits() as waits:
            loss_sum, count = model({key: value.to("cuda", non_blocking=True) for key, value in batch.items()})
            for parameter in optimizer.parameters:
                parameter.grad = torch.zeros_like(parameter)
            norm = gradient_norm(optimizer)
            numbers = torch.stack([loss_sum, norm])
            update(optimizer, grad_norm=norm, max_grad_norm=1.0, loss_scale=2.0, finite=numbers.isfinite().all())
    assert (loss_sum.device.type, count.device.type, numbers.device.type) == ("cuda",) * 3
    assert waits.copies == len(batch)
    assert not waits.values
