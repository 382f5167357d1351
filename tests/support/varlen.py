"""FlashAttention for sequences of different lengths on a CPU, for tests: importing this registers a reference for it.

It stands below PyTorch's own operators, which all calls pass through: forward, backward, compiled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward


def probabilities(
    q: Tensor, k: Tensor, begin: int, end: int, *, causal: bool, scale: float | None, window: list[int] | None
) -> Tensor:
    """Return the weights of one sequence, [h, t, t], by FlashAttention's meaning of a window: (keys before, after)."""
    left, right = (-1, 0) if causal else (window or (-1, -1))
    groups = q.shape[1] // k.shape[1]
    queries, keys = q[begin:end].double(), k[begin:end].double().repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * (scale or q.shape[-1] ** -0.5)
    slots = torch.arange(end - begin)
    after = slots - slots[:, None]
    hidden = (after > right) & (right >= 0) | (-after > left) & (left >= 0)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def reference_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, causal, scale, window = (*rest, None, None)[:5]
    out = torch.zeros_like(q)
    for begin, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
        if begin < end:
            weights = probabilities(q, k, begin, end, causal=causal, scale=scale, window=window)
            values = v[begin:end].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, _k: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, causal, _, scale, window = (*rest, None, None)[:6]
    groups = q.shape[1] // k.shape[1]
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    for begin, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
        if begin < end:
            weights = probabilities(q, k, begin, end, causal=causal, scale=scale, window=window)
            queries, wanted = q[begin:end].double(), grad[begin:end].double()
            keys, values = (x[begin:end].double().repeat_interleave(groups, 1) for x in (k, v))
            by_weight = torch.einsum("qhd,khd->hqk", wanted, values)
            by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True))
            by_score = by_score * (scale or q.shape[-1] ** -0.5)
            parts = (
                torch.einsum("hqk,khd->qhd", by_score, keys),
                torch.einsum("hqk,qhd->khd", by_score, queries).reshape(end - begin, -1, groups, q.shape[2]).sum(2),
                torch.einsum("hqk,qhd->khd", weights, wanted).reshape(end - begin, -1, groups, q.shape[2]).sum(2),
            )
            for all_of_it, part in zip(grads, parts, strict=True):
                all_of_it[begin:end] = part.to(q.dtype)
    return grads


_varlen_attn.register_kernel("cpu")(reference_forward)
_varlen_attn_backward.register_kernel("cpu")(reference_backward)
