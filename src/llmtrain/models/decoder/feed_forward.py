"""Feed-forward layers: [b, t, d_model] → [b, t, d_model], without norm and residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.sections.model import DecoderConfig


class GatedMLP(nn.Module):
    """Computes down(activation(gate(x)) · up(x)): SwiGLU with SiLU, GEGLU with GELU (Shazeer 2020, arXiv:2002.05202).

    Gate and up are two products, not one. The halves of a joint product are strided, and that costs the compiled
    elementwise code a third more than the larger product saves.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.ffn.bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.ffn.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.ffn.bias)
        self.activation = config.ffn.activation_name
        self.dropout = config.ffn.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self.gate_proj(x), self.activation) * self.up_proj(x)
        return F.dropout(self.down_proj(hidden), self.dropout, self.training)


class MLP(nn.Module):
    """Computes down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.ffn.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.ffn.bias)
        self.activation = config.ffn.activation_name
        self.dropout = config.ffn.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self.up_proj(x), self.activation)
        return F.dropout(self.down_proj(hidden), self.dropout, self.training)


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation by its name, elementwise; relu2 is the square of relu (So et al. 2021, arXiv:2109.08668)."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return _gelu_tanh(x)
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    assert name == "silu", name
    return F.silu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU by tanh. Compiled for a CPU it is written as a sigmoid, the same function in half the time."""
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


FeedForward = GatedMLP | MLP


def build_feed_forward(config: DecoderConfig) -> FeedForward:
    """Build the feed-forward layer of a config."""
    return (MLP if config.ffn.variant == "mlp" else GatedMLP)(config)
