"""The ranks that save a checkpoint together, and their process group, which they use while training continues.

In the training group, the collectives of a save would mix with those of a training step and deadlock. So this is a
second process group, over gloo and for tensors on the CPU, and only the thread that saves uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """A group of `size` ranks, in which this process has the number `rank`. A group of one sends nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that does what must be done only once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value (small, plain), on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

    def send(self, tensor: Tensor, *, to: int) -> None:
        """Send a tensor's bytes. Once this returns, `tensor` may be changed."""
        dist.send(tensor, group=self.group, group_dst=to)

    def receive(self, tensor: Tensor, *, sender: int) -> None:
        """Overwrite `tensor` with the bytes that the rank `sender` sends."""
        dist.recv(tensor, group=self.group, group_src=sender)


ALONE = RankGroup()
