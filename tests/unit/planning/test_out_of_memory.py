"""The cheapest change that fits, and the message that names it."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.loading.load import plain_config
from llmtrain.config.sections.schema import Config
from llmtrain.planning.failed_allocation import HeldMemory
from llmtrain.planning.out_of_memory import (
    RECOMPUTATION,
    Bounds,
    Changes,
    Fit,
    changed,
    cheapest,
    correction,
    describe,
    needed,
    usable_bytes,
)
from llmtrain.planning.step_memory import PARTS

GB = 10**9
NOW: dict[str, int] = dict.fromkeys(PARTS, 0) | {
    "parameters": 2 * GB, "gradients": 2 * GB, "optimizer_state": 4 * GB, "activations": 40 * GB, "logits": 10 * GB,
}  # fmt: skip


def config(*overrides: str) -> Config:
    return plain_config(["data.name=synthetic", "data.seq_len=1024", "trainer.micro_batch_size=12", *overrides])


def bounds(**different: Any) -> Bounds:
    values = {"sequences": 12, "world_size": 1, "strategy": "single", "can_use_bf16": True}
    return Bounds(**{**values, **different})


def held(**different: int) -> HeldMemory:
    values = {
        "parameters": 2 * GB, "gradients": 2 * GB, "optimizer_state": 4 * GB,
        "peak": 70 * GB, "requested": 12 * GB, "available": 80 * GB, "total": 81 * GB,
    }  # fmt: skip
    return HeldMemory(**{**values, **different})


def predicted(original: Config) -> Any:
    """Predict 8 GB that stay, and what comes and goes: by the micro-batch, less with each of the costlier changes."""

    def predict(changes: Changes) -> int:
        new = changed(original, changes)
        per_sequence = 5.0 * new.data.seq_len / 1024
        per_sequence *= {"none": 1, "selective": 0.6, "full": 0.2}[new.trainer.activation_checkpointing]
        per_sequence *= 0.6 if new.trainer.precision == "bf16-mixed" else 1
        fixed = 8 / 4 if new.distributed.strategy == "fsdp" else 8
        return round((fixed + per_sequence * new.trainer.micro_batch_size) * GB)

    return predict


@pytest.mark.parametrize(
    ("room_gb", "changes", "gigabytes"),
    [
        (60, {"trainer.micro_batch_size": 6, "trainer.grad_accum_steps": 2}, 38),
        (34, {"trainer.micro_batch_size": 4, "trainer.grad_accum_steps": 3}, 28),
        (13, {"trainer.micro_batch_size": 1, "trainer.grad_accum_steps": 12}, 13),
        (
            12,
            {"trainer.micro_batch_size": 1, "trainer.grad_accum_steps": 12, RECOMPUTATION: "selective"},
            11,
        ),
        (10, {"trainer.micro_batch_size": 2, "trainer.grad_accum_steps": 6, RECOMPUTATION: "full"}, 10),
        (
            9,
            {"trainer.micro_batch_size": 1, "trainer.grad_accum_steps": 12, RECOMPUTATION: "full"},
            9,
        ),
        (
            8.7,
            {
                "trainer.micro_batch_size": 1, "trainer.grad_accum_steps": 12,
                RECOMPUTATION: "full", "trainer.precision": "bf16-mixed",
            },
            8.6,
        ),
    ],
)  # fmt: skip
def test_the_cheapest_change_comes_first_and_is_no_larger_than_needed(
    room_gb: float, changes: Changes, gigabytes: float
) -> None:
    original = config()

    assert cheapest(original, predicted(original), limit=room_gb * GB, bounds=bounds()) == Fit(
        changes, round(gigabytes * GB)
    )


def test_several_ranks_shard_before_sequences_become_shorter() -> None:
    original = config("trainer.activation_checkpointing=full")

    on_four = cheapest(
        original,
        predicted(original),
        limit=7 * GB,
        bounds=bounds(world_size=4, strategy="ddp", can_use_bf16=False, recomputation=()),
    )
    alone = cheapest(original, predicted(original), limit=8.5 * GB, bounds=bounds(can_use_bf16=False, recomputation=()))
    nothing = cheapest(original, predicted(original), limit=8 * GB, bounds=bounds(can_use_bf16=False, recomputation=()))

    assert on_four
    assert on_four.changes == {
        "trainer.micro_batch_size": 4, "trainer.grad_accum_steps": 3, "distributed.strategy": "fsdp"
    }  # fmt: skip
    assert alone
    assert alone.changes == {"trainer.micro_batch_size": 1, "trainer.grad_accum_steps": 12, "data.seq_len": 512}
    assert nothing is None


def test_a_configured_global_batch_size_needs_no_accumulation_steps() -> None:
    original = config("trainer.global_batch_size=24")

    fit = cheapest(original, predicted(original), limit=60 * GB, bounds=bounds(sequences=24))

    assert fit
    assert fit.changes == {"trainer.micro_batch_size": 8}


def test_a_prediction_that_was_too_low_scales_its_temporary_tensors() -> None:
    factor = correction(held(), NOW)  # 82 GB were needed at least, and 58 predicted

    assert factor == pytest.approx((82 - 8) / 50)
    assert needed(NOW, corrected_by=factor) == 82 * GB
    assert correction(held(peak=20 * GB), NOW) == 1
    assert usable_bytes(held()) == 0.95 * 80 * GB
    assert usable_bytes(held(peak=30 * GB)) == 0.95 * 42 * GB, "the failed request is not available"


def test_memory_of_other_processes_is_named_and_the_run_may_be_tried_again() -> None:
    crowded = held(available=50 * GB, peak=45 * GB, requested=6 * GB)

    assert not crowded.would_fail_again
    assert held().would_fail_again
    lines = describe(crowded, NOW, None, device="cuda:0", step=3).splitlines()
    assert lines[0] == (
        "out of memory on cuda:0 in step 3: 6.00 GB more were requested; at most 45.00 GB were held, and this process "
        "can have 50.00 GB of 81.00 GB"
    )
    assert [line.split() for line in lines[1:9]] == [
        ["held", "predicted"],
        ["parameters", "2.00", "GB", "2.00", "GB"],
        ["gradients", "2.00", "GB", "2.00", "GB"],
        ["optimizer", "state", "4.00", "GB", "4.00", "GB"],
        ["the", "rest", "37.00", "GB", "50.00", "GB"],
        ["activations", "40.00", "GB"],
        ["logits", "10.00", "GB"],
        ["total", "45.00", "GB", "58.00", "GB"],
    ]
    assert lines[9] == "other processes hold 31.00 GB: without them the step may fit as it is"
