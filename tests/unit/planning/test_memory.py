"""What a process holds besides a step's tensors, and what sharding leaves of them on each rank."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.planning.memory import overhead, sharded
from llmtrain.planning.step_memory import StepMemory
from tests.support.predicted_memory import memory_of

GB = 10**9


def test_a_checkpoint_before_the_last_step_adds_its_copy_to_the_peak() -> None:
    step = memory_of()
    shape: dict[str, Any] = {"on_gpu": False, "compiled": False, "process_bytes": 10**9}
    parts = overhead(step, saves_on_the_way=True, **shape)
    assert parts["checkpoint_copy"] == step.persistent
    assert parts["process"] > 10**9
    assert overhead(step, saves_on_the_way=True, on_gpu=True, compiled=True, process_bytes=10**9) == {}


def test_recomputed_blocks_fragment_the_heap() -> None:
    step = memory_of(recomputed_blocks=2)
    shape: dict[str, Any] = {"on_gpu": False, "process_bytes": 10**9, "saves_on_the_way": False}
    otherwise = 100 * step.transient
    four, sixteen = (
        overhead(step, compiled=False, transient_if_kept=otherwise, num_blocks=n, **shape)["heap_holes"]
        for n in (4, 16)
    )
    assert four == pytest.approx(2 * sixteen, rel=0.01)
    assert four > 40 * step.transient
    half, none = (
        overhead(step, compiled=False, transient_if_kept=otherwise, num_blocks=4, recomputed_share=share, **shape)
        for share in (0.5, 0.0)
    )
    assert none == overhead(step, compiled=False, **shape)
    assert half["heap_holes"] == pytest.approx((none["heap_holes"] + four) / 2, rel=0.01)
    compiled = [overhead(step, compiled=True, transient_if_kept=kept, **shape) for kept in (None, otherwise)]
    assert compiled[0] == compiled[1]


def test_a_sharded_rank_holds_its_part_and_the_gathered_layers() -> None:
    decoder = Decoder(load_config("quickstart").config.decoder(wanted_by="a test"), 300)
    parts = {"parameters": 4 * GB, "gradients": 4 * GB, "optimizer_state": 8 * GB, "logits": GB}
    of_one = StepMemory(parts=parts, persistent=12 * GB)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    rest = decoder.num_parameters() - len(decoder.blocks) * block
    found = sharded(of_one, decoder, ranks=4, precision="bf16-mixed")
    assert found.parts == {
        "parameters": GB,
        "gradients": GB,
        "optimizer_state": 2 * GB,
        "logits": GB,
        "gathered": 2 * (rest + 2 * block) + 4 * max(rest, block),
    }
    assert found.persistent == 3 * GB
    adding_up = sharded(of_one, decoder, ranks=4, precision="bf16-mixed", accumulates=True)
    assert adding_up.parts == {**found.parts, "gradients": 4 * GB}
