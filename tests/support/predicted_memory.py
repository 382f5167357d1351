"""The predicted memory of a tiny decoder's step, for tests that vary one setting at a time."""

from __future__ import annotations

from typing import Any

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.resolve import Resolved
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.planning.step_memory import Step, StepMemory, step_memory
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config


def memory_of(
    *,
    optimizer: str = "adamw",
    precision: str = "32",
    compiled: bool = False,
    on_gpu: bool = False,
    micro_batch_size: int = 2,
    num_micro_batches: int = 1,
    seq_len: int = 16,
    **changes: Any,
) -> StepMemory:
    """Return the predicted memory of a step; `changes` are those of the decoder's config and `Step`'s."""
    recomputed_blocks = changes.pop("recomputed_blocks", 0)
    documents = changes.pop("mask_documents", False)
    step = Step(
        optimizer=OptimizerConfig.model_validate({"name": optimizer}),
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        num_micro_batches=num_micro_batches,
        recomputed_blocks=recomputed_blocks,
        mask_documents=documents,
    )
    resolved = Resolved("cuda" if on_gpu else "cpu", precision, compiled, "single", "gloo")
    return step_memory(Decoder(tiny_config(**changes), TINY_VOCAB_SIZE), step, resolved)
