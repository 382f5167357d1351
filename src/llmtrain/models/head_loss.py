"""The loss over a model's output layer where that is more, or less, than one trainable matrix.

models/decoder/loss.py has the fast form: a plain trainable weight. Here are the others: a head that is frozen (then its
gradient, as large as the head, is never made), has a bias or adapters, or whose logits are capped (Gemma 2). As there,
chunks of tokens have their gradients computed right after their loss, and the backward pass proper only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.decoder.loss import ChunkKernels, next_token_loss

CHUNK_ELEMENTS = 2**25
"""Logits in one chunk: 128 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Head:
    """hidden → logits: `linear`, times `scale`, capped smoothly at ± `softcap`."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether logits are a product with one weight, and a factor."""
        return type(self.linear) is nn.Linear and self.softcap is None and getattr(self.linear, "bias", None) is None

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, d] → […, vocab]."""
        logits: Tensor = self.linear(hidden.to(_weight_dtype(self.linear, hidden)))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden_nd: Tensor, labels_n: Tensor, *, kernels: ChunkKernels | None = None) -> Tensor:
        """The sum of -log softmax(logits)[label], float32 scalar; every label is a token."""
        parameters = [parameter for parameter in self.linear.parameters() if parameter.requires_grad]
        if self.is_plain and parameters:
            hidden_nd = hidden_nd if self.scale == 1.0 else hidden_nd * self.scale
            return next_token_loss(hidden_nd, parameters[0], labels_n, kernels=kernels)
        wants_grad = torch.is_grad_enabled() and (hidden_nd.requires_grad or bool(parameters))
        device = hidden_nd.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
        if wants_grad and dtype == torch.float16:  # too narrow for gradients that the loss scale has not reached
            return self._chunk_loss(hidden_nd, labels_n)
        if wants_grad:
            loss: Tensor = _LossAndGradients.apply(hidden_nd, labels_n, self._chunk_loss, *parameters)  # type: ignore[no-untyped-call]
            return loss
        size = chunk_tokens(labels_n, self.linear)
        chunks = zip(torch.split(hidden_nd, size), torch.split(labels_n, size), strict=True)
        return torch.stack([self._chunk_loss(hidden, labels) for hidden, labels in chunks]).sum()

    def _chunk_loss(self, hidden_nd: Tensor, labels_n: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_nd).float(), labels_n, reduction="sum")


def chunk_tokens(labels_n: Tensor, linear: nn.Module) -> int:
    """Tokens in a chunk, so that its logits stay small."""
    vocab_size = getattr(linear, "out_features", None) or max(p.shape[0] for p in linear.parameters())
    return max(16, min(CHUNK_ELEMENTS // int(vocab_size), max(1, labels_n.numel())))


class _LossAndGradients(torch.autograd.Function):
    """Loss and gradients in one go, of the hidden states and of the head's trainable parameters."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, labels_n: Tensor, chunk_loss: Callable[[Tensor, Tensor], Tensor], *params: Tensor
    ) -> Tensor:
        size = chunk_tokens(labels_n, chunk_loss.__self__.linear)  # type: ignore[attr-defined]
        losses, hidden_grads = [], []
        grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in params]
        for chunk, labels in zip(torch.split(hidden_nd, size), torch.split(labels_n, size), strict=True):
            with torch.enable_grad():
                hidden = chunk.detach().requires_grad_()
                loss = chunk_loss(hidden, labels)
            hidden_grad, *of_params = torch.autograd.grad(loss, [hidden, *params])
            for total, grad in zip(grads, of_params, strict=True):
                total += grad
            losses.append(loss.detach())
            hidden_grads.append(hidden_grad)
        ctx.save_for_backward(torch.cat(hidden_grads), *(g.to(p.dtype) for g, p in zip(grads, params, strict=True)))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *grads = ctx.saved_tensors
        scale = grad_outputs[0]
        scaled = [(grad * scale).to(grad.dtype) for grad in grads]
        return (hidden_grad * scale).to(hidden_grad.dtype), None, None, *scaled


def _weight_dtype(linear: nn.Module, hidden: Tensor) -> torch.dtype:
    """What the head computes in outside of autocast, which sees to it itself."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden.dtype
    weight = getattr(linear, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else hidden.dtype
