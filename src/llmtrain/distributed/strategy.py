"""Which strategy `auto` takes, and why: from what training keeps and what a process has. No torch.

    one process                                    single
    weights, gradients, optimizer state fit        ddp    every process holds the whole model
    they do not                                    fsdp   each holds a part

Matrices are never split over processes (fsdp_tp) unless the config says so: that pays only where links are fast, and
with batches that data parallelism alone cannot share.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE_FOR_STATE = 0.6
"""Of a process's memory; the rest is for activations, logits, buckets of gradients and what the allocator wastes."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and the reason in words."""

    strategy: str
    because: str


def choose_strategy(*, world_size: int, state_bytes: int, memory_bytes: int) -> Choice:
    """For `world_size` processes of `memory_bytes` each. `state_bytes`: what training keeps of the whole model."""
    if world_size == 1:
        return Choice("single", "one process")
    what = f"weights, gradients and optimizer state take {_size(state_bytes)}"
    if state_bytes <= SHARE_FOR_STATE * memory_bytes:
        return Choice("ddp", f"{what}, which fit into the {_size(memory_bytes)} of each process")
    part = f"each of {world_size} processes holds {_size(state_bytes // world_size)}"
    return Choice("fsdp", f"{what}, over {SHARE_FOR_STATE:.0%} of the {_size(memory_bytes)} of a process: {part}")


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e6:.3g} MB"
