"""The output layer of a model of transformers, and the loss for output layers that are not a single matrix.

models/decoder/loss.py has the fast loss for a single weight matrix. Here is the loss for a head with a bias or
adapters, or with capped logits (Gemma 2). As there, the gradients of a chunk of tokens are computed right after its
loss, and the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.models.decoder.loss import ChunkKernels, chunk_tokens, next_token_loss
from llmtrain.models.device_type import device_type_of


@dataclass(frozen=True)
class Head:
    """Maps hidden states to logits: `linear`, times `scale`, capped smoothly at ± `softcap`."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """True if the logits are the product with one weight matrix, times a factor."""
        return type(self.linear) is nn.Linear and self.softcap is None and getattr(self.linear, "bias", None) is None

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits: […, d] → […, vocab]."""
        logits: Tensor = self.linear(hidden.to(_weight_dtype(self.linear, hidden)))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden_nd: Tensor, labels_n: Tensor, *, kernels: ChunkKernels | None = None) -> Tensor:
        """Return the sum of -log softmax(logits)[label], a float32 scalar. Every label is a token."""
        if self.is_plain:
            hidden_nd = hidden_nd.to(_weight_dtype(self.linear, hidden_nd))
            hidden_nd = hidden_nd if self.scale == 1.0 else hidden_nd * self.scale
            return next_token_loss(hidden_nd, cast(Tensor, self.linear.weight), labels_n, kernels=kernels)
        parameters = [parameter for parameter in self.linear.parameters() if parameter.requires_grad]
        wants_grad = torch.is_grad_enabled() and (hidden_nd.requires_grad or bool(parameters))
        device = hidden_nd.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
        if wants_grad and dtype != torch.float16:
            loss: Tensor = _LossAndGradients.apply(hidden_nd, labels_n, self._chunk_loss, *parameters)  # type: ignore[no-untyped-call]
            return loss
        size = _chunk_size(self.linear, hidden_nd)
        chunks = list(zip(torch.split(hidden_nd, size), torch.split(labels_n, size), strict=True))
        if not wants_grad or len(chunks) == 1:
            return torch.stack([self._chunk_loss(*chunk) for chunk in chunks]).sum()
        # float16 is too narrow for gradients before the loss scale multiplies them. So autograd computes them, and
        # recomputes each chunk's logits; its cache would sum the gradients of the chunks in float16.
        enabled = torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            losses = [checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def _chunk_loss(self, hidden_nd: Tensor, labels_n: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_nd).float(), labels_n, reduction="sum")


def _chunk_size(linear: nn.Module, hidden_nd: Tensor) -> int:
    vocab_size = getattr(linear, "out_features", None) or max(p.shape[0] for p in linear.parameters())
    return chunk_tokens(int(vocab_size), device=device_type_of(hidden_nd.device), num_tokens=len(hidden_nd))


class _LossAndGradients(torch.autograd.Function):
    """Computes the loss together with the gradients of the hidden states and of the head's trainable parameters."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, labels_n: Tensor, chunk_loss: Callable[[Tensor, Tensor], Tensor], *params: Tensor
    ) -> Tensor:
        size = _chunk_size(chunk_loss.__self__.linear, hidden_nd)  # type: ignore[attr-defined]
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
    """Return the dtype that the head computes in; under autocast, which casts itself, that of `hidden`."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden.dtype
    weight = getattr(linear, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else hidden.dtype
