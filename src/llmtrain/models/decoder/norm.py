"""Norms. They compute in float32 and return the dtype of their input. decoder.py applies them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.sections.model import NormConfig


class RMSNorm(nn.Module):
    """Computes x / rms(x) · weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class LayerNorm(nn.Module):
    """Computes (x - mean) / std · weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


Norm = RMSNorm | LayerNorm


def build_norm(config: NormConfig, *, width: int) -> Norm:
    """Build the norm of a config, over `width` features."""
    return (RMSNorm if config.type == "rmsnorm" else LayerNorm)(width, eps=config.eps)
