"""Compiled equals eager, and a compiled step done twice gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmtrain.contracts import Batch
from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import TINY_VOCAB_SIZE, decoder_variants, random_batch, tiny_config

PAIRWISE = ["mha-rope-rmsnorm-swiglu-qk_norm", "gqa-learned-layernorm-mlp", "gqa-rope-layernorm-swiglu"]
"""Each two of the parts meet in one of these; compiling all would take minutes."""

WINDOW: dict[str, Any] = {"mask": "sliding_window", "window": 70}
OTHERS: dict[str, dict[str, Any]] = {
    "complex-rope-window-sandwich-geglu": {
        "attention": {"variant": "complex", "num_kv_heads": 2, "qk_norm": True, **WINDOW},
        "norm": {"placement": "sandwich"},
        "ffn": {"variant": "geglu"},
    },
    "complex-alibi-causal-post-mlp": {
        "attention": {"variant": "complex"},
        "positional": {"encoding": "alibi"},
        "norm": {"type": "layernorm", "placement": "post"},
        "ffn": {"variant": "mlp", "activation": "relu2", "bias": True},
    },
    "mqa-alibi-window-parallel": {
        "attention": {"variant": "mqa", **WINDOW},
        "positional": {"encoding": "alibi"},
        "parallel_layers": True,
    },
    "gqa-sinusoidal-window-post": {
        "attention": {"variant": "gqa", "num_kv_heads": 2, **WINDOW},
        "positional": {"encoding": "sinusoidal"},
        "norm": {"placement": "post"},
    },
    "mha-none-causal-sandwich-parallel": {
        "positional": {"encoding": "none"},
        "norm": {"type": "layernorm", "placement": "sandwich"},
        "parallel_layers": True,
    },
}
"""The rest of the variants, each in one of these at least; 300 tokens, so that there are blocks that skip keys."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As on every CPU run."""
    torch.use_deterministic_algorithms(True)
    torch.compiler.reset()
    yield
    torch.use_deterministic_algorithms(False)


def gradients(decoder: Decoder, batch: Batch, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step."""
    decoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_sum, num_tokens = decoder(batch)
    (loss_sum / num_tokens).backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return {"loss": loss_sum.detach(), **found}


def fresh(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(tiny_config(**changes, init_std=0.1), TINY_VOCAB_SIZE)


def assert_all_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *, tolerance: float) -> None:
    """Relative to each tensor's norm, or to a thousandth of the largest: a key's bias has no gradient but noise."""
    assert first.keys() == second.keys()
    least = 1e-3 * max(float(tensor.norm()) for name, tensor in second.items() if name != "loss")
    for name in first:
        error = (first[name] - second[name]).norm() / second[name].norm().clamp(min=least)
        assert float(error) < tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("variant", PAIRWISE)
def test_compiled_equals_eager(variant: str) -> None:
    decoder, batch = fresh(**decoder_variants()[variant]), random_batch(num_documents=3, ignored_fraction=0.1)
    eager = gradients(decoder, batch)
    decoder.compile(fullgraph=True)
    assert_all_close(gradients(decoder, batch), eager, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_blocks_of_other_variants_compiled_one_by_one_equal_eager(variant: str) -> None:
    decoder = fresh(**OTHERS[variant], max_seq_len=300)
    batch = random_batch(seq_len=300, num_documents=3, ignored_fraction=0.1)
    eager = gradients(decoder, batch)
    decoder.compile_parts(fullgraph=True)
    assert_all_close(gradients(decoder, batch), eager, tolerance=1e-4)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_equal_eager() -> None:
    decoder, batch = fresh(), random_batch(num_documents=3)
    eager = gradients(decoder, batch)
    decoder.compile_parts(fullgraph=True)
    assert_all_close(gradients(decoder, batch), eager, tolerance=1e-4)


@pytest.mark.slow
def test_compiled_training_in_bfloat16_is_bit_identical_when_repeated() -> None:
    decoder, batch = fresh(), random_batch(batch_size=4, seq_len=64, num_documents=3)
    eager = gradients(decoder, batch, autocast=True)
    decoder.compile(fullgraph=True)
    first, second = (gradients(decoder, batch, autocast=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_all_close(first, eager, tolerance=0.05)
    assert all(not name.startswith("_orig_mod") for name in decoder.state_dict())


@pytest.mark.slow
def test_a_compiled_decoder_takes_other_batch_sizes_and_evaluates() -> None:
    decoder, plain = fresh(num_layers=1), fresh(num_layers=1)
    decoder.compile()
    for batch_size in (4, 3, 1):
        batch = random_batch(batch_size=batch_size)
        assert_all_close(gradients(decoder, batch), gradients(plain, batch), tolerance=1e-4)
        with torch.no_grad():
            assert float(decoder.eval()(batch)[0]) == pytest.approx(float(plain(batch)[0]), rel=1e-5)
        decoder.train()


def test_an_eager_step_done_twice_gives_the_same_bits() -> None:
    decoder, batch = fresh(), random_batch(num_documents=3)
    first, second = (gradients(decoder, batch, autocast=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
