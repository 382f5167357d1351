"""Next-token cross-entropy without the logits of the whole batch.

The vocabulary makes the logits the largest tensor of a step (4096 tokens × 8192 × 4 bytes = 134 MB for a 14M model).
So the loss goes over the tokens in chunks, and computes a chunk's gradient right after its loss, while the logits are
in the cache: per chunk one product, one pass for the maxima, one for the exponentials, and the two products of the
backward. The backward pass proper only scales what is already there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.contracts import IGNORE_INDEX

CHUNK_TOKENS_CPU = 1024
CHUNK_TOKENS_GPU = 8192


def next_token_loss(hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor, *, chunked: bool = True) -> Tensor:
    """The sum over supervised tokens of -log softmax(hidden · weightᵀ)[label], float32 scalar.

    `chunked=False` is the plain formula, kept to test against and for float16, whose range is too small for the
    chunked one (sums of exponentials reach the size of the vocabulary).
    """
    device = hidden_nd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
    if not chunked or dtype == torch.float16:
        logits = F.linear(hidden_nd, weight_vd).float()
        return F.cross_entropy(logits, labels_n, ignore_index=IGNORE_INDEX, reduction="sum")
    hidden_nd = hidden_nd.to(dtype)
    if torch.is_grad_enabled() and (hidden_nd.requires_grad or weight_vd.requires_grad):
        loss: Tensor = _ChunkedLoss.apply(hidden_nd, weight_vd, labels_n)  # type: ignore[no-untyped-call]
        return loss
    return _loss_only(hidden_nd, weight_vd.to(dtype), labels_n)


def _chunk_tokens(device: torch.device) -> int:
    return CHUNK_TOKENS_CPU if device.type == "cpu" else CHUNK_TOKENS_GPU


def _loss_only(hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor) -> Tensor:
    """The same sum where no gradient is wanted."""
    total = torch.zeros((), dtype=torch.float32, device=hidden_nd.device)
    chunk = _chunk_tokens(hidden_nd.device)
    for hidden, labels in zip(torch.split(hidden_nd, chunk), torch.split(labels_n, chunk), strict=True):
        logits = (hidden @ weight_vd.t()).float()
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one go.

    With e = exp(logits - max) and s = its sum, the gradient of the logits is e/s - onehot(label). It is kept as s times
    that, `scaled`, in the dtype of the products: e is written in the very pass that sums it, and the division by s is
    applied to rows of `hidden` and of its gradient, which are narrow. Each entry is rounded once, as if the gradient
    itself had been rounded.
    """

    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor) -> Tensor:
        weight = weight_vd.to(hidden_nd.dtype)
        chunk = _chunk_tokens(hidden_nd.device)
        losses, hidden_grads = [], []
        weight_grad = torch.zeros((), dtype=torch.float32, device=hidden_nd.device)
        for hidden, labels in zip(torch.split(hidden_nd, chunk), torch.split(labels_n, chunk), strict=True):
            supervised = (labels != IGNORE_INDEX)[:, None]
            labels = labels.clamp(min=0)[:, None]
            logits = (hidden @ weight.t()).float()
            peak = logits.amax(-1, keepdim=True)
            exponentials = (logits - peak).exp()
            total = exponentials.sum(-1, keepdim=True)
            label_logit = logits.gather(1, labels)
            losses.append(torch.where(supervised, peak + total.log() - label_logit, 0.0).sum())
            scaled = exponentials.to(hidden.dtype)
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            scaled[rows, labels[:, 0]] = ((label_logit - peak).exp() - total)[:, 0].to(hidden.dtype)
            row_scale = torch.where(supervised, 1.0 / total, 0.0)
            hidden_grads.append(((scaled @ weight) * row_scale).to(hidden.dtype))
            weight_grad = weight_grad + (scaled.t() @ (hidden * row_scale).to(hidden.dtype)).float()
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad.to(weight_vd.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        return (hidden_grad * scale).to(hidden_grad.dtype), (weight_grad * scale).to(weight_grad.dtype), None
