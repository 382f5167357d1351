"""The predicted memory of a step, part by part, against what can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.models.decoder.decoder import Decoder
from tests.support.predicted_memory import memory_of
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("adam", 2), ("sgd", 1)])
def test_parameters_and_optimizer_state_are_counted_to_the_byte(optimizer: str, states: int) -> None:
    model = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    size = 4 * model.num_parameters()
    found = memory_of(optimizer=optimizer)
    steps = 4 * len(list(model.parameters())) if states == 2 else 0
    assert found.persistent == size * (1 + states) + steps


def test_muon_keeps_one_state_of_a_matrix() -> None:
    model = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "blocks." in n)
    adamw, muon = memory_of(), memory_of(optimizer="muon")
    num_matrices = sum(p.ndim == 2 and "blocks." in n for n, p in model.named_parameters())
    assert adamw.persistent - muon.persistent == 4 * matrices + 4 * num_matrices


def test_bf16_weights_take_half_the_bytes() -> None:
    assert memory_of(precision="bf16-true").parts["parameters"] * 2 == memory_of().parts["parameters"]


def test_activations_grow_with_the_batch_and_accumulated_gradients_add_to_them() -> None:
    one, four = memory_of(micro_batch_size=4), memory_of(micro_batch_size=16)
    assert four.transient / one.transient == pytest.approx(4, rel=0.1)
    accumulated = memory_of(micro_batch_size=16, num_micro_batches=3)
    model = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    assert accumulated.parts["gradients"] == 4 * model.num_parameters()
    assert four.parts["gradients"] == 0


def test_compiled_parts_keep_fewer_activations() -> None:
    shape: dict[str, Any] = {"micro_batch_size": 8, "seq_len": 64, "precision": "bf16-mixed"}
    eager, compiled = memory_of(**shape), memory_of(compiled=True, **shape)
    assert compiled.persistent == eager.persistent
    assert 0.2 < compiled.transient / eager.transient < 0.9


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_blocks_keep_only_their_inputs(compiled: bool) -> None:
    shape: dict[str, Any] = {"micro_batch_size": 4, "seq_len": 64, "num_layers": 6, "compiled": compiled}
    kept, half, recomputed = (memory_of(recomputed_blocks=count, **shape).transient for count in (0, 3, 6))
    assert recomputed < 0.5 * kept
    assert recomputed < half <= (kept + recomputed) / 2, "the number that fits is found on the line between both ends"


def test_the_fused_attention_of_gpus_keeps_no_scores() -> None:
    shape: dict[str, Any] = {"micro_batch_size": 1, "max_seq_len": 1024, "seq_len": 1024}
    assert memory_of(on_gpu=True, **shape).transient < 0.3 * memory_of(**shape).transient
