"""Next-token cross-entropy in chunks, without the logits of all tokens at once.

The vocabulary makes the logits the largest tensor of a step (4096 tokens × 8192 × 4 bytes = 134 MB for a 14M model).
So the loss goes over the tokens in chunks, and computes a chunk's gradient right after its loss, while the logits are
in the cache. A chunk takes one product, one pass for the maxima, one for the exponentials, and the two products of the
backward. The backward pass itself only scales these gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmtrain.contracts import IGNORE_INDEX
from llmtrain.models.device_type import device_type_of

CHUNK_TOKENS_CPU = 1024
CHUNK_TOKENS_GPU = 8192
CHUNK_LOGITS_CPU = 2**25
CHUNK_LOGITS_GPU = 2**27
"""128 and 512 MiB of float32: with a large vocabulary a chunk has fewer tokens."""
GPU_TILE = 128
"""Number of tokens: a product with a multiple of this number of rows fills the tiles that a GPU computes."""


class ChunkKernels(NamedTuple):
    """Functions that compute one chunk.

    They are compiled, and the loop over the chunks is not, so that all chunks share the compiled code. An unrolled loop
    would compile each chunk separately.
    """

    gradients: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Tensor, int], Tensor]


def compiled_kernels(**options: Any) -> ChunkKernels:
    """Return the kernels, compiled with `options` of torch.compile."""
    return ChunkKernels(torch.compile(_chunk_gradients, **options), torch.compile(_chunk_loss, **options))


def next_token_loss(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    labels_n: Tensor,
    *,
    chunked: bool = True,
    kernels: ChunkKernels | None = None,
) -> Tensor:
    """Return the sum over supervised tokens of -log softmax(hidden · weightᵀ)[label], a float32 scalar.

    `chunked=False` is the plain formula, kept to test against.
    """
    device = hidden_nd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
    if not chunked:
        return _plain_loss(hidden_nd, weight_vd, labels_n)
    if dtype == torch.float16:
        return _float16_loss(hidden_nd, weight_vd, labels_n)
    kernels = kernels or ChunkKernels(_chunk_gradients, _chunk_loss)
    hidden_nd = hidden_nd.to(dtype)
    if torch.is_grad_enabled() and (hidden_nd.requires_grad or weight_vd.requires_grad):
        loss: Tensor = _ChunkedLoss.apply(hidden_nd, weight_vd, labels_n, kernels)  # type: ignore[no-untyped-call]
        return loss
    weight, vocab_size = _padded(weight_vd.to(dtype)), weight_vd.shape[0]
    chunks = _chunks(hidden_nd, labels_n, vocab_size=vocab_size)
    return torch.stack([kernels.loss(hidden, weight, labels, vocab_size) for hidden, labels in chunks]).sum()


def chunk_tokens(vocab_size: int, *, device: str, num_tokens: int) -> int:
    """Return the number of tokens in a chunk of `num_tokens`. The loss holds the logits of one chunk at a time.

    On a GPU chunks are as equal as multiples of 128 can be: such products fill its tiles, and chunks of one size share
    compiled code.
    """
    if device == "cpu":
        return max(16, min(CHUNK_TOKENS_CPU, CHUNK_LOGITS_CPU // vocab_size))
    largest = max(GPU_TILE, min(CHUNK_TOKENS_GPU, CHUNK_LOGITS_GPU // vocab_size) // GPU_TILE * GPU_TILE)
    num_chunks = max(1, math.ceil(num_tokens / largest))
    return max(1, math.ceil(num_tokens / num_chunks / GPU_TILE)) * GPU_TILE


def padded_vocab_size(vocab_size: int, *, device: str) -> int:
    """Return the rows of the output matrix that the loss multiplies by: on a GPU a multiple of 128."""
    return vocab_size if device == "cpu" else math.ceil(vocab_size / GPU_TILE) * GPU_TILE


def _padded(weight_vd: Tensor) -> Tensor:
    """Return the matrix with rows of zeros up to `padded_vocab_size`. Each chunk masks the logits of these rows."""
    vocab_size = weight_vd.shape[0]
    missing = padded_vocab_size(vocab_size, device=device_type_of(weight_vd.device)) - vocab_size
    return F.pad(weight_vd, (0, 0, 0, missing)) if missing else weight_vd


def _chunks(hidden_nd: Tensor, labels_n: Tensor, *, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = chunk_tokens(vocab_size, device=device_type_of(hidden_nd.device), num_tokens=len(hidden_nd))
    return zip(torch.split(hidden_nd, size), torch.split(labels_n, size), strict=True)


def _plain_loss(hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor) -> Tensor:
    logits = F.linear(hidden_nd, weight_vd).float()
    return F.cross_entropy(logits, labels_n, ignore_index=IGNORE_INDEX, reduction="sum")


def _float16_loss(hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor) -> Tensor:
    """Return the sum by plain cross-entropy, a chunk at a time.

    float16 is too narrow for gradients before the loss scale multiplies them, and for sums of exponentials. So autograd
    computes the gradients, and recomputes each chunk's logits for them instead of keeping all of them.
    """

    def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # its cache would sum the chunks' gradients in float16
            return _plain_loss(hidden.to(torch.float16), weight_vd.to(torch.float16), labels)

    chunks = list(_chunks(hidden_nd, labels_n, vocab_size=weight_vd.shape[0]))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.stack([chunk_loss(*chunk) for chunk in chunks]).sum()
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Return the sum of a chunk's losses, without gradients."""
    logits = (hidden @ weight.t())[:, :vocab_size].float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def _chunk_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, weight_grad: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the sum of a chunk's losses and the gradient of `hidden`.

    The chunk's gradient of the weight is added to `weight_grad` (float32; None where the weight is frozen).

    With e = exp(logits - max) and its sum s, the gradient of the logits is e/s - onehot(label). `scaled` is s times
    that, in the dtype of the products: e is written in the same pass that sums it, and the division by s is applied to
    the rows of `hidden` and of its gradient, which are narrow. Each entry is rounded once, as if the gradient itself
    had been rounded. Rows of `weight` from `vocab_size` on are padding: e is 0 there, and so is every gradient.
    """
    supervised = (labels != IGNORE_INDEX)[:, None]
    labels = labels.clamp(min=0)[:, None]
    logits = (hidden @ weight.t()).float()
    if vocab_size < weight.shape[0]:
        padding = torch.arange(weight.shape[0], device=logits.device) >= vocab_size
        logits = logits.masked_fill(padding, -math.inf)
    peak = logits.amax(-1, keepdim=True)
    exponentials = (logits - peak).exp()
    total = exponentials.sum(-1, keepdim=True)
    label_logit = logits.gather(1, labels)
    loss = torch.where(supervised, peak + total.log() - label_logit, 0.0).sum()
    scaled = exponentials.to(hidden.dtype)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    scaled[rows, labels[:, 0]] = ((label_logit - peak).exp() - total)[:, 0].to(hidden.dtype)
    row_scale = torch.where(supervised, 1.0 / total, 0.0)
    hidden_grad = ((scaled @ weight) * row_scale).to(hidden.dtype)
    if weight_grad is not None:
        weight_grad.add_(scaled.t() @ (hidden * row_scale).to(hidden.dtype))
    return loss, hidden_grad


class _ChunkedLoss(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor, kernels: ChunkKernels) -> Tensor:
        weight, vocab_size = _padded(weight_vd.to(hidden_nd.dtype)), weight_vd.shape[0]
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_vd.requires_grad else None
        losses, hidden_grads = [], []
        for hidden, labels in _chunks(hidden_nd, labels_n, vocab_size=vocab_size):
            loss, hidden_grad = kernels.gradients(hidden, weight, labels, weight_grad, vocab_size)
            losses.append(loss)
            hidden_grads.append(hidden_grad)
        if weight_grad is not None:
            weight_grad = weight_grad[:vocab_size].to(weight_vd.dtype)
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        if weight_grad is not None:
            weight_grad = (weight_grad * scale).to(weight_grad.dtype)
        return (hidden_grad * scale).to(hidden_grad.dtype), weight_grad, None, None
