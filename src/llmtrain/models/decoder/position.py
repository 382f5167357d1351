"""Position encodings that act inside attention. Learned positions are an embedding, which decoder.py adds.

Rotary (one for the model) ── tables for the positions of this forward ──▶ rotate() in every attention layer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RotaryTables(NamedTuple):
    """What `rotate` needs for some positions; b is 1 when all rows of the batch have the same positions."""

    cos: Tensor
    """[b, 1, t, 1, head_dim / 2] float32."""
    signed_sin: Tensor
    """[b, 1, t, 2, head_dim / 2] float32: minus the sine, then the sine."""


class Rotary(nn.Module):
    """Tables of rotary position embeddings (Su et al. 2021, arXiv:2104.09864), for positions below max_seq_len.

    The tables are neither parameters nor buffers: they stay float32 when the model is cast, DDP need not broadcast
    them, checkpoints need not hold them, and a model that leaves the meta device gets them filled. Passed into the
    compiled graph from outside they are read; computed inside it, every kernel that rotates would compute sines anew
    (12 % of a training step on a CPU).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, *, base: float, max_seq_len: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.max_seq_len = max_seq_len
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        dims = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32)
        positions = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        angles = positions[:, None] / self.base ** (dims / self.head_dim)
        self.cos = angles.cos()[:, None]
        self.sin = torch.stack((-angles.sin(), angles.sin()), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """What `.to`, `.cuda` and `.to_empty` call: follow to the device, and to nothing else."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.cos.device)).device
        if device != self.cos.device:
            self._fill(device)
        return self

    def forward(self, positions: Tensor | int) -> RotaryTables:
        """Tables for positions 0 … n - 1, or for each row's positions [b, t]."""
        if isinstance(positions, int):
            return RotaryTables(self.cos[None, None, :positions], self.sin[None, None, :positions])
        return RotaryTables(self.cos[positions][:, None], self.sin[positions][:, None])


def rotate(x_bthd: Tensor, tables: RotaryTables) -> Tensor:
    """Turns each pair (i, i + head_dim/2) by its position's angle; returns [b, h, t, d] in x's dtype.

    The halves are swapped by a flip, not by a concatenation: that is one pass over memory when it is compiled, and
    its gradient one more.
    """
    b, t, h, d = x_bthd.shape
    halves = x_bthd.reshape(b, t, h, 2, d // 2).permute(0, 2, 1, 3, 4).float()
    turned = halves * tables.cos + halves.flip(-2) * tables.signed_sin
    return turned.flatten(-2).to(x_bthd.dtype)
