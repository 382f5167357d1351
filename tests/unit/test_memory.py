"""The predicted memory of a step, part by part, against what can be counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.training import OptimizerConfig
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.testing.tiny import TINY_VOCAB_SIZE, decoder_variants, tiny_config
from llmtrain.training.memory import StepMemory, overhead, parameters_by_part, step_memory


def memory_of(
    *,
    optimizer: str = "adamw",
    micro_batch_size: int = 2,
    num_micro_batches: int = 1,
    precision: str = "32",
    compiled: bool = False,
    on_gpu: bool = False,
    activation_checkpointing: bool = False,
    seq_len: int = 16,
    **changes: Any,
) -> StepMemory:
    return step_memory(
        lambda: Decoder(tiny_config(**changes), TINY_VOCAB_SIZE),
        vocab_size=TINY_VOCAB_SIZE,
        optimizer=OptimizerConfig.model_validate({"name": optimizer}),
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        num_micro_batches=num_micro_batches,
        documents=False,
        precision=precision,
        compiled=compiled,
        on_gpu=on_gpu,
        activation_checkpointing=activation_checkpointing,
    )


@pytest.mark.parametrize("name", decoder_variants())
def test_parts_add_up_to_the_model(name: str) -> None:
    model = Decoder(tiny_config(**decoder_variants()[name]), TINY_VOCAB_SIZE)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == model.num_parameters()
    assert "other" not in parts
    blocks = model.blocks
    assert parts["attention"] == sum(
        p.numel() for b in blocks for n, p in b.named_parameters() if n.startswith("attention.") and "norm" not in n
    )
    assert parts["feed_forward"] == sum(
        p.numel() for b in blocks for n, p in b.named_parameters() if n.startswith("feed_forward.")
    )


def test_parts_of_a_small_decoder_by_hand() -> None:
    parts = parameters_by_part(Decoder(tiny_config(tie_embeddings=False), TINY_VOCAB_SIZE))
    assert parts == {
        "embedding": 61 * 32,
        "attention": 2 * 4 * 32 * 32,
        "feed_forward": 2 * 3 * 32 * 48,
        "norms": 5 * 32,
        "head": 61 * 32,
    }


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


def test_half_the_bytes_when_the_weights_are_bf16() -> None:
    assert memory_of(precision="bf16-true").parts["parameters"] * 2 == memory_of().parts["parameters"]


def test_activations_grow_with_the_batch_and_gradients_meet_them_when_they_accumulate() -> None:
    one, four = memory_of(micro_batch_size=4), memory_of(micro_batch_size=16)
    assert four.transient / one.transient == pytest.approx(4, rel=0.1)
    accumulated = memory_of(micro_batch_size=16, num_micro_batches=3)
    model = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    assert accumulated.parts["gradients"] == 4 * model.num_parameters()
    assert four.parts["gradients"] == 0


def test_compiled_parts_keep_less() -> None:
    shape: dict[str, Any] = {"micro_batch_size": 8, "seq_len": 64, "precision": "bf16-mixed"}
    eager, compiled = memory_of(**shape), memory_of(compiled=True, **shape)
    assert compiled.persistent == eager.persistent
    assert 0.2 < compiled.transient / eager.transient < 0.9


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_blocks_keep_their_inputs_alone(compiled: bool) -> None:
    shape: dict[str, Any] = {"micro_batch_size": 4, "seq_len": 64, "num_layers": 6, "compiled": compiled}
    assert memory_of(activation_checkpointing=True, **shape).transient < 0.5 * memory_of(**shape).transient


def test_the_fused_attention_of_gpus_keeps_no_scores() -> None:
    shape: dict[str, Any] = {"micro_batch_size": 1, "max_seq_len": 1024, "seq_len": 1024}
    assert memory_of(on_gpu=True, **shape).transient < 0.3 * memory_of(**shape).transient


def test_a_checkpoint_on_the_way_is_copied_beside_the_step() -> None:
    step = memory_of()
    shape: dict[str, Any] = {"on_gpu": False, "compiled": False, "process_bytes": 10**9}
    parts = overhead(step, saves_on_the_way=True, **shape)
    assert parts["checkpoint_copy"] == step.persistent
    assert parts["process"] > 10**9
    assert overhead(step, saves_on_the_way=True, on_gpu=True, compiled=True, process_bytes=10**9) == {}


def test_blocks_that_are_computed_again_leave_holes_for_what_they_made_in_between() -> None:
    step = memory_of(activation_checkpointing=True)
    shape: dict[str, Any] = {"on_gpu": False, "process_bytes": 10**9, "saves_on_the_way": False}
    otherwise = 100 * step.transient
    four, sixteen = (
        overhead(step, compiled=False, kept_otherwise=otherwise, num_blocks=n, **shape)["heap_holes"] for n in (4, 16)
    )
    assert four == pytest.approx(2 * sixteen, rel=0.01)
    assert four > 40 * step.transient
    compiled = [overhead(step, compiled=True, kept_otherwise=kept, **shape) for kept in (None, otherwise)]
    assert compiled[0] == compiled[1]
