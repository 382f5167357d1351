"""Position encodings with tables: rotary, which acts inside attention, and sinusoidal, which decoder.py adds.

    Rotary (one for the model) ── tables for the positions of this forward ──▶ rotate() in every attention layer

Learned positions are an embedding in decoder.py. ALiBi is a bias in mask.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config.sections.model import RopeScalingConfig

SINUSOIDAL_BASE = 10000.0


class RotaryTables(NamedTuple):
    """Cosines and sines of some positions, for `rotate`. b is 1 if all rows of the batch have the same positions."""

    cos: Tensor
    """[b, 1, t, 1, head_dim / 2] float32."""
    signed_sin: Tensor
    """[b, 1, t, 2, head_dim / 2] float32: minus the sine, then the sine."""


class Rotary(nn.Module):
    """Tables of rotary position embeddings (Su et al. 2021, arXiv:2104.09864), for positions below max_seq_len.

    The tables are neither parameters nor buffers. So they stay float32 when the model is cast, DDP does not broadcast
    them, checkpoints do not contain them, and they are filled when a model leaves the meta device. They are inputs of
    the compiled graph. If the graph computed them, every kernel that rotates would compute the sines again, which takes
    12 % of a training step on a CPU.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, *, base: float, max_seq_len: int, scaling: RopeScalingConfig | None = None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.scaling = scaling
        self.max_seq_len = max_seq_len
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        dims = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32)
        positions = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        periods = self.base ** (dims / self.head_dim)
        if self.scaling is not None:
            periods = scaled_periods(periods, self.scaling)
        angles = positions[:, None] / periods
        self.cos = angles.cos()[:, None]
        self.sin = torch.stack((-angles.sin(), angles.sin()), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move the tables to the new device, and cast nothing. `.to`, `.cuda` and `.to_empty` call this."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.cos.device)).device
        if device != self.cos.device:
            self._fill(device)
        return self

    def forward(self, positions: Tensor | int) -> RotaryTables:
        """Return the tables for positions 0 … n - 1, or for each row's positions [b, t]."""
        if isinstance(positions, int):
            return RotaryTables(self.cos[None, None, :positions], self.sin[None, None, :positions])
        return RotaryTables(self.cos[positions][:, None], self.sin[positions][:, None])


def scaled_periods(periods: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Scale periods (tokens per radian) for positions beyond the original length.

    linear multiplies all by `factor` (Chen et al. 2023, arXiv:2306.15595). llama3 does as Llama 3.1 and transformers: a
    dimension that turns fewer than `low_freq_factor` times in the original length is slowed by `factor`, and one that
    turns more than `high_freq_factor` times is unchanged. In between the frequency changes linearly with the number of
    turns.
    """
    if scaling.rope_type == "linear":
        return periods * scaling.factor
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None
    assert low is not None
    assert high is not None
    turns = length / (2 * math.pi * periods)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return periods / (kept + (1 - kept) / scaling.factor)


class Sinusoidal(nn.Module):
    """Sines and cosines of fixed frequencies, added to the embeddings (Vaswani et al. 2017, arXiv:1706.03762).

    The table is neither a parameter nor a buffer, for the same reasons as in `Rotary`.
    """

    table: Tensor

    def __init__(self, width: int, *, max_seq_len: int) -> None:
        super().__init__()
        self.width = width
        self.max_seq_len = max_seq_len
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        dims = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        positions = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        angles = positions[:, None] / SINUSOIDAL_BASE ** (dims / self.width)
        self.table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, : self.width]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sinusoidal:
        """Move the table to the new device, and cast nothing."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.table.device)).device
        if device != self.table.device:
            self._fill(device)
        return self

    def forward(self, positions: Tensor | int) -> Tensor:
        """Return [n, width] float32 for positions 0 … n - 1, or [b, t, width] for each row's positions [b, t]."""
        return self.table[:positions] if isinstance(positions, int) else self.table[positions]


def rotate(x_bthd: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate each pair (i, i + head_dim/2) by its position's angle. Return [b, h, t, d] in x's dtype.

    A flip swaps the halves, not a concatenation: compiled, that is one pass over memory, and one more for its gradient.
    """
    b, t, h, d = x_bthd.shape
    halves = x_bthd.reshape(b, t, h, 2, d // 2).permute(0, 2, 1, 3, 4).float()
    turned = halves * tables.cos + halves.flip(-2) * tables.signed_sin
    return turned.flatten(-2).to(x_bthd.dtype)


def restarting_positions(document_ids: Tensor) -> Tensor:
    """Return [b, t] int64 positions that restart at 0 at each document of a row."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values
