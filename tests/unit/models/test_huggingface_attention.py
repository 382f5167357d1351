"""Attention for packed rows on a CPU: what `sdpa` gives, and `sdpa` itself for what it does not cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmtrain.models.decoder.attention import blocked_attention
from llmtrain.models.huggingface.attention import BLOCKED, blocked_forward
from llmtrain.models.huggingface.model import block_causal
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import FAMILIES, VOCAB_SIZE, WITHOUT_SDPA, tiny_huggingface

NOT_COVERED = {"gemma3", "granite", "opt", "falcon"}
"""Scores have another scale; Falcon calls its attention itself."""
DOCUMENTS = torch.tensor([[0] * 100 + [1] * 170 + [2] * 30, [0] * 299 + [1]])


def heads(num_heads: int, *, seed: int, length: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, num_heads, 16, generator=generator).transpose(1, 2).requires_grad_()


def layer(*, groups: int = 2) -> nn.Module:
    module = nn.Module().train()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that blocked attention is called with."""
    real: Callable[..., Tensor] = blocked_attention
    lengths: list[int] = []

    def counted(query: Tensor, *rest: Any) -> Tensor:
        lengths.append(query.shape[2])
        return real(query, *rest)

    monkeypatch.setattr("llmtrain.models.huggingface.attention.blocked_attention", counted)
    return lengths


@pytest.mark.parametrize(("mask", "length"), [(None, 200), (block_causal(DOCUMENTS), 300)], ids=["causal", "documents"])
def test_outputs_and_gradients_are_those_of_sdpa(mask: Tensor | None, length: int, calls: list[int]) -> None:
    found = []
    for attention in (blocked_forward, sdpa_attention_forward):
        query, key, value = (heads(n, seed=seed, length=length) for seed, n in enumerate((4, 2, 2)))
        out, _ = attention(layer(), query, key, value, mask, scaling=16**-0.5)
        out.square().sum().backward()
        found.append((out, query.grad, key.grad, value.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert calls == [length]


@pytest.mark.parametrize(
    ("module", "options", "length"),
    [
        (layer().eval(), {}, 200),
        (layer(), {"dropout": 0.1}, 200),
        (layer(), {"scaling": 0.3}, 200),
        (layer(), {"is_causal": False}, 200),
        (layer(), {"position_bias": torch.zeros(1)}, 200),
        (layer(), {}, 256),
    ],
    ids=["evaluation", "dropout", "another scale", "both ways", "a bias", "two blocks without a mask"],
)
def test_sdpa_computes_what_blocked_attention_does_not_cover(
    module: nn.Module, options: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> Tensor:
        raise AssertionError("it does not cover this")

    monkeypatch.setattr("llmtrain.models.huggingface.attention.blocked_attention", unwanted)
    query, key, value = (heads(n, seed=seed, length=length) for seed, n in enumerate((4, 2, 2)))

    out, _ = blocked_forward(module, query, key, value, None, **options)

    assert out.shape == (2, length, 4, 16)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_SDPA])
def test_compiled_blocks_use_blocked_attention_for_packed_rows(family: str, calls: list[int]) -> None:
    batch = random_batch(VOCAB_SIZE, seq_len=24, num_documents=4)
    model = tiny_huggingface(family, attention="sdpa").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = float(model(batch)[0].detach())
    assert not calls

    model.compile_parts(backend="eager")
    loss_sum, _ = model(batch)
    loss_sum.backward()

    assert float(loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
    assert set(calls) == (set() if family in NOT_COVERED else {24})
    assert (model.causal_lm.config._attn_implementation == BLOCKED) == (family != "falcon")


def test_rows_of_any_length_share_few_graphs() -> None:
    """For each of the two kinds of block: one length, any, and those that are left to `sdpa`; and for the loss."""
    lengths = [24, 40, 33, 57, 255, 256, 300, 511, 512, 600, 25]
    model = tiny_huggingface("llama", attention="sdpa").train()
    batches = [random_batch(VOCAB_SIZE, seq_len=length) for length in lengths]
    expected = [float(model(batch)[0].detach()) for batch in batches]
    counter = CompileCounter()

    model.compile_parts(backend=counter)
    found = []
    for batch in batches:
        loss_sum, _ = model(batch)
        loss_sum.backward()
        found.append(float(loss_sum.detach()))

    assert found == pytest.approx(expected, rel=1e-5)
    assert model.causal_lm.config._attn_implementation == BLOCKED
    assert counter.frame_count <= 8
