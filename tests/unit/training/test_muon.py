"""Muon: the weights and state of torch's Muon, batches of one shape, bfloat16 only where it is native."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.training.optimizers import build, build_optimizer, muon
from llmtrain.training.optimizers.muon import Muon, orthogonalize

SHAPES = ((8, 8), (8, 20), (20, 8), (8, 8), (8, 20), (3, 1))
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9}


def matrices(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, steps: int = 4) -> list[Tensor]:
    torch.manual_seed(4)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


class ReferenceMuon(torch.optim.Muon):
    """torch's Muon, but in float32."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
            super().step()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("reference", "dtype", "tolerance"),
    [(torch.optim.Muon, torch.bfloat16, 1e-3), (ReferenceMuon, torch.float32, 1e-5)],
    ids=["bfloat16", "float32"],
)
def test_weights_and_state_are_those_of_torch_on_the_same_dtype(
    reference: type[torch.optim.Muon], dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs = matrices(), matrices()
    optimizer = Muon(ours, **OPTIONS, dtype=dtype)
    expected = reference(theirs, **OPTIONS, adjust_lr_fn="match_rms_adamw")
    for a, b in zip(train(optimizer, ours), train(expected, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * 4)
    for parameter, other in zip(ours, theirs, strict=True):
        assert optimizer.state[parameter].keys() == expected.state[other].keys() == {"momentum_buffer"}
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected.state[other]["momentum_buffer"])


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    parameters = matrices()
    before = parameters[1].detach().clone()
    optimizer = Muon(parameters, **OPTIONS, dtype=torch.float32)
    for parameter in parameters[2:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), before)
    assert set(optimizer.state) == set(parameters[2:])


def test_batches_are_bounded_and_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, one_by_one = matrices(), matrices()
    expected = train(Muon(at_once, **OPTIONS, dtype=torch.float32), at_once)
    monkeypatch.setattr(muon, "MAX_BATCH_ELEMENTS", 64)
    sizes = [[parameter.shape for parameter in batch] for batch in muon._batches(one_by_one)]
    assert sizes == [[(8, 8)], [(8, 8)], [(8, 20)], [(8, 20)], [(20, 8)], [(3, 1)]]
    for a, b in zip(train(Muon(one_by_one, **OPTIONS, dtype=torch.float32), one_by_one), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_singular_values_come_close_to_one_and_singular_vectors_stay(rows: int, columns: int, scale: float) -> None:
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side))[0]
    right = torch.linalg.qr(torch.randn(columns, side))[0]
    values = torch.rand(side) * 0.9 + 0.1
    found = left.T @ orthogonalize((left * values * scale) @ right.T[None])[0] @ right
    assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.3)).all()
    torch.testing.assert_close(found, torch.diag(found.diagonal()), rtol=0, atol=2e-3)


def test_a_gradient_of_zeros_gives_no_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])


@pytest.mark.parametrize("native", [True, False])
def test_products_are_in_bfloat16_only_where_it_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "computes_bf16", lambda device: native)
    dtypes: list[torch.dtype] = []

    def watched(batch: Tensor) -> Tensor:
        dtypes.append(batch.dtype)
        return orthogonalize(batch)

    monkeypatch.setattr(muon, "orthogonalize", watched)
    model = Blocks()
    optimizer = build_optimizer(OptimizerConfig(name="muon"), model)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert dtypes == [torch.bfloat16 if native else torch.float32]


def test_state_without_momentum_is_loaded_again() -> None:
    first, second = (build_optimizer(OptimizerConfig(name="muon", momentum=0.0), Blocks()) for _ in range(2))
    for parameter in first.parameters:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.load_state_tensors(first.state_tensors())
    assert second.state_tensors().keys() == first.state_tensors().keys() == {"blocks.0.weight/momentum_buffer"}


@pytest.mark.slow
def test_compiled_products_give_the_same_weights() -> None:
    eager, compiled = matrices(), matrices()
    expected = train(Muon(eager, **OPTIONS, dtype=torch.float32), eager)
    found = train(Muon(compiled, **OPTIONS, dtype=torch.float32, compiled=True), compiled)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
