"""Optimizers that hold more or less than usual: state in 8 bits, float32 copies of weights in 16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.resolve import Resolved
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.planning.step_memory import Step, step_memory
from llmtrain.training.optimizers import NamedOptimizer, adamw_8bit, build_optimizer, named
from tests.support.tiny import tiny_config

WIDTH = 128  # 128 × 128 elements are enough for 8 bits


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    table, inner = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH)
    return nn.ModuleDict({"table": table, "inner": inner, "norm": nn.LayerNorm(WIDTH)}).to(dtype)


def optimizer_of(model: nn.Module, **settings: Any) -> NamedOptimizer:
    return build_optimizer(OptimizerConfig.model_validate({"lr": 1e-3, **settings}), model)


def step(model: nn.Module, optimizer: NamedOptimizer, *, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# -- state in 8 bits ---------------------------------------------------------------------------------------------------


def test_state_in_8_bits_is_a_quarter_and_updates_nearly_as_adamw_does() -> None:
    whole, small = model_of(), model_of()
    optimizers = optimizer_of(whole), optimizer_of(small, name="adamw8bit")
    start = whole.get_parameter("inner.weight").detach().clone()
    for seed in range(20):
        step(whole, optimizers[0], seed=seed)
        step(small, optimizers[1], seed=seed)
    state = optimizers[1].state_tensors()
    assert state["inner.weight/state1"].dtype == state["inner.weight/state2"].dtype == torch.uint8
    assert state["inner.weight/absmax1"].numel() == WIDTH * WIDTH / 256
    assert state["inner.bias/state1"].dtype == torch.float32, "too small for 8 bits"
    assert state["table.weight/exp_avg"].dtype == torch.float32, "embeddings keep 32"
    moved = whole.get_parameter("inner.weight") - start
    apart = small.get_parameter("inner.weight") - whole.get_parameter("inner.weight")
    assert 0 < apart.norm() < 0.1 * moved.norm()
    for name in ("inner.bias", "norm.weight", "table.weight"):
        torch.testing.assert_close(small.get_parameter(name), whole.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_state_in_8_bits_that_is_saved_gives_the_same_next_steps_to_the_bit() -> None:
    model = model_of()
    optimizer = optimizer_of(model, name="adamw8bit")
    for seed in range(3):
        step(model, optimizer, seed=seed)
    saved, weights = copies(optimizer.state_tensors()), copies(dict(model.state_dict()))
    assert all(isinstance(tensor, Tensor) for tensor in saved.values())
    other = model_of()
    other.load_state_dict(weights)
    resumed = optimizer_of(other, name="adamw8bit")
    resumed.load_state_tensors(saved)
    for seed in range(3, 6):
        step(model, optimizer, seed=seed)
        step(other, resumed, seed=seed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name


def test_the_schedule_reaches_both_optimizers() -> None:
    model = model_of()
    optimizer = optimizer_of(model, name="adamw8bit")
    before = copies(dict(model.state_dict()))
    optimizer.set_lr_scale(0.0)
    step(model, optimizer, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("of", "to"), [("adamw8bit", "adamw"), ("adamw", "adamw8bit")])
def test_state_of_other_bits_is_rejected(of: str, to: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model, name=of)
    step(model, optimizer, seed=0)
    with pytest.raises(ConfigError, match="resume with the optimizer that the run was started with"):
        optimizer_of(model_of(), name=to).load_state_tensors(copies(optimizer.state_tensors()))


def test_where_it_cannot_run_it_says_why_and_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adamw_8bit, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"adamw8bit needs bitsandbytes: `.*pip install .*\[bnb\]'`, or take"):
            optimizer_of(model_of(), name="adamw8bit")
    from bitsandbytes.optim import AdamW8bit

    def fail(self: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand much more")

    monkeypatch.setattr(AdamW8bit, "step", fail)
    with pytest.raises(
        ConfigError, match=r"cannot run on cpu with this bitsandbytes \(no kernel for this device\): take"
    ):
        optimizer_of(model_of(), name="adamw8bit")


def test_what_is_planned_for_it_is_what_it_holds() -> None:
    config = tiny_config(d_model=96)
    model = Decoder(config, 100)
    planned = step_memory(
        model,
        Step(optimizer=OptimizerConfig(name="adamw8bit"), micro_batch_size=1, seq_len=8),
        Resolved("cpu", "32", False, "single", "gloo"),
    )
    optimizer = optimizer_of(model, name="adamw8bit")
    step(model, optimizer, seed=0)
    state = {name: t for name, t in optimizer.state_tensors().items() if "/qmap" not in name and "/step" not in name}
    held = sum(tensor.nbytes for tensor in state.values())
    assert planned.parts["optimizer_state"] == pytest.approx(held, abs=100)  # and a number of steps


# -- float32 copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
def test_weights_in_bfloat16_are_what_a_float32_copy_rounds_to(name: str) -> None:
    model = model_of(torch.bfloat16)
    optimizer = optimizer_of(model, name=name)
    for seed in range(4):
        step(model, optimizer, seed=seed)
        masters = {key.removesuffix("/master"): t for key, t in optimizer.state_tensors().items() if "/master" in key}
        assert masters.keys() == dict(model.named_parameters()).keys()
        for key, master in masters.items():
            assert master.dtype == torch.float32
            assert torch.equal(model.get_parameter(key), master.bfloat16()), key


def test_chunks_of_masters_are_updated_as_all_of_them_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (named.CHUNK, 2 * WIDTH, 1):  # an embedding has more elements, and is a chunk
        monkeypatch.setattr(named, "CHUNK", chunk)
        model = model_of(torch.bfloat16)
        model.get_submodule("norm").float()  # has no masters, and is updated once
        optimizer = optimizer_of(model)
        for seed in range(3):
            step(model, optimizer, seed=seed)
        found.append({**copies(dict(model.state_dict())), **copies(optimizer.state_tensors())})
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
    assert found[0]["norm.weight/step"] == 3


def test_updates_too_small_for_bfloat16_add_up_in_the_copy_alone() -> None:
    whole, kept, lost = model_of(), model_of(torch.bfloat16), model_of(torch.bfloat16)
    with torch.no_grad():
        whole.load_state_dict({name: tensor.float() for name, tensor in kept.state_dict().items()})
    start = whole.get_parameter("norm.weight").detach().clone()
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
    optimizers = (
        optimizer_of(whole, **settings),
        optimizer_of(kept, **settings),
        optimizer_of(lost, master_weights=False, **settings),
    )
    for _ in range(150):
        for model, optimizer in zip((whole, kept, lost), optimizers, strict=True):
            step(model, optimizer, seed=1)
    moved = (whole.get_parameter("norm.weight") - start).abs().mean().item()
    assert moved == pytest.approx(150e-4, rel=0.01)
    of_copy, without = ((m.get_parameter("norm.weight").float() - start).abs().mean().item() for m in (kept, lost))
    assert of_copy == pytest.approx(moved, rel=0.1)
    assert without == 0.0, "each was rounded away"
    assert not any("/master" in name for name in optimizers[2].state_tensors())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
def test_a_copy_that_is_saved_gives_the_same_next_steps_to_the_bit(name: str) -> None:
    model = model_of(torch.bfloat16)
    optimizer = optimizer_of(model, name=name)
    for seed in range(3):
        step(model, optimizer, seed=seed, size=0.01)
    other = model_of(torch.bfloat16)
    other.load_state_dict(copies(dict(model.state_dict())))
    resumed = optimizer_of(other, name=name)
    resumed.load_state_tensors(copies(optimizer.state_tensors()))
    for seed in range(3, 6):
        step(model, optimizer, seed=seed, size=0.01)
        step(other, resumed, seed=seed, size=0.01)
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[key]), key
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_checkpoint_without_the_copies_is_rejected_and_the_other_way_round() -> None:
    states = {}
    for kept in (True, False):
        model = model_of(torch.bfloat16)
        optimizer = optimizer_of(model, master_weights=kept)
        step(model, optimizer, seed=0)
        states[kept] = copies(optimizer.state_tensors())
    for kept in (True, False):
        with pytest.raises(ConfigError, match=r"/master: a float32 copy of weights that .*optimizer\.master_weights"):
            optimizer_of(model_of(torch.bfloat16), master_weights=kept).load_state_tensors(states[not kept])


def test_weights_in_float32_have_no_copy() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    step(model, optimizer, seed=0)
    assert not any("/master" in name for name in optimizer.state_tensors())
