"""The ranks that save a checkpoint together, and how they talk while training goes on: over a group of their own.

Collectives on the group that trains would get mixed up with those of the training step, and wait for each other for
ever. So this is another group, over gloo, on tensors on the CPU, and only the thread that saves uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Gang:
    """`size` ranks, of which this is `rank`. Alone, nothing is sent."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value (small, plain), on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

    def send(self, tensor: Tensor, *, to: int) -> None:
        """Send a tensor's bytes; returns when `tensor` may change."""
        dist.send(tensor, group=self.group, group_dst=to)

    def receive(self, tensor: Tensor, *, sender: int) -> None:
        """Fill `tensor` with what `sender` sends."""
        dist.recv(tensor, group=self.group, group_src=sender)


ALONE = Gang()
