"""Causal self-attention: projections, masks and the two ways to compute it. Norms and residuals are decoder.py's.

    x ─ q, k, v projections ─ heads ─ (QK-norm) ─ (rotary) ─ (cache) ─ attend ─ output projection

Shapes: b batch, t queries, s keys, h query heads, g query heads for one key/value head, n key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import DecoderConfig
from llmtrain.models.decoder.cache import KVCache
from llmtrain.models.decoder.norm import RMSNorm
from llmtrain.models.decoder.position import RotaryTables, rotate

EXPLICIT_MAX_KEYS = 2048
"""Longest rows for which the CPU computes attention explicitly; over it the memory of the scores weighs more."""

QUERY_BLOCK = 128
MAX_QUERY_BLOCKS = 4


class AttentionInputs(NamedTuple):
    """What all layers share, built once a forward."""

    mask: Tensor | None
    """[1 or b, 1, t, s]. Explicit: float32, added to the scores. Else bool, true where a query may look, or None, which
    stands for plain causal attention of t queries to t keys."""
    rope: RotaryTables | None
    explicit: bool
    """Compute scores, softmax and product ourselves instead of calling the fused kernel."""


def build_mask(
    num_queries: int, *, document_ids: Tensor | None, cache: KVCache | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask of a forward, and whether attention is explicit, which decides the mask's form.

    `document_ids` [b, s] number the documents of all keys. A query may look at keys of its own document that are not
    after it; it may always look at itself, so that no row of scores is empty. The fused kernel's own causal mask
    aligns the first query with the first key, which is wrong as soon as a cache holds earlier keys: it is used without
    a cache only.
    """
    past = 0 if cache is None else cache.length
    explicit = device.type == "cpu" and past + num_queries <= EXPLICIT_MAX_KEYS
    if document_ids is None and cache is None and not explicit:
        return None, False
    key_slots = torch.arange(past + num_queries, device=device)
    allowed = (key_slots <= key_slots[past:, None])[None, None]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, past:, None] == document_ids[:, None, :])[:, None]
    if not explicit:
        return allowed, False
    return torch.where(allowed, 0.0, float("-inf")), True


def attend(q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, inputs: AttentionInputs, *, dropout: float) -> Tensor:
    """Attention of every query head to its key/value head, [b, t, h · d]."""
    mask = inputs.mask
    if not inputs.explicit:
        out_bhtd = fused_attention(q_bhtd, k_bnsd, v_bnsd, mask, dropout=dropout)
        return out_bhtd.transpose(1, 2).flatten(2)
    assert mask is not None
    if torch.compiler.is_compiling() and dropout == 0.0:
        return blocked_attention(q_bhtd, k_bnsd, v_bnsd, mask)
    return explicit_attention(q_bhtd, k_bnsd, v_bnsd, mask, dropout=dropout)


def fused_attention(
    q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, mask: Tensor | None, *, dropout: float = 0.0
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, [b, h, t, d]; `mask` is bool, or None for plain causal attention."""
    return F.scaled_dot_product_attention(
        q_bhtd,
        k_bnsd,
        v_bnsd,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=q_bhtd.shape[1] != k_bnsd.shape[1],
    )


def explicit_attention(q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, mask: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Scores, float32 softmax and product, [b, t, h · d]; `mask` is added to the scores.

    The queries are cut into blocks, each of which meets only the keys up to its own end: with 2 blocks a quarter of the
    work is left out, with 4 three eighths. A masked score weighs exactly 0, so what it is never shows in a result.
    """
    b, h, t, d = q_bhtd.shape
    n, s = k_bnsd.shape[1:3]
    outputs = []
    for start, end in query_blocks(t):
        seen = s - t + end
        q = q_bhtd[:, :, start:end].reshape(b, n, -1, d)  # [b, n, g · block, d]: no copy of keys for their group
        scores = (q @ k_bnsd[:, :, :seen].transpose(-1, -2)).float().reshape(b, n, h // n, end - start, seen)
        weights = torch.softmax(scores * d**-0.5 + mask[:, :, None, start:end, :seen], dim=-1).to(v_bnsd.dtype)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        outputs.append((weights.flatten(2, 3) @ v_bnsd[:, :, :seen]).reshape(b, h, end - start, d))
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(b, t, h * d)


def blocked_attention(q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, mask: Tensor) -> Tensor:
    """The same as `explicit_attention` without dropout, written for the compiler; [b, t, h · d]."""
    out: Tensor = _BlockedAttention.apply(q_bhtd, k_bnsd, v_bnsd, mask)  # type: ignore[no-untyped-call]
    return out


def query_blocks(num_queries: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries."""
    num_blocks = min(MAX_QUERY_BLOCKS, max(1, num_queries // QUERY_BLOCK))
    block = -(-num_queries // num_blocks)
    return [(start, min(start + block, num_queries)) for start in range(0, num_queries, block)]


class _BlockedAttention(torch.autograd.Function):
    """Explicit attention with as few passes over the scores as there can be.

    Forward, a pass for the maxima and one that writes e = exp(score - max) in the products' dtype while it sums it; the
    division by the sum waits for the output, which is narrower. Backward, one pass: with o' = grad_out / sum and
    D = rowsum(o' ∘ out), the gradient of the scores is e ∘ (o' · vᵀ - D) (as in Dao et al. 2022, arXiv:2205.14135).
    Left to autograd, a float32 softmax goes to memory and back twice in each direction. Slices are made contiguous
    because the library's product copies them otherwise, slowly.
    """

    @staticmethod
    def forward(ctx: Any, q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, mask: Tensor) -> Tensor:
        b, h, t, d = q_bhtd.shape
        n, s = k_bnsd.shape[1:3]
        k, v = k_bnsd.reshape(b * n, s, d), v_bnsd.reshape(b * n, s, d)
        exponentials, inverse_sums, outputs = [], [], []
        for start, end in query_blocks(t):
            rows, seen = end - start, s - t + end
            q = q_bhtd[:, :, start:end].reshape(b * n, -1, d)
            scores = torch.bmm(q, k[:, :seen].contiguous().transpose(1, 2)).reshape(b, n, h // n, rows, seen)
            biased = scores.float() * d**-0.5 + mask[:, :, None, start:end, :seen]
            exponential = (biased - biased.amax(-1, keepdim=True)).exp()
            inverse_sum = 1.0 / exponential.sum(-1, keepdim=True)
            exponential = exponential.to(v.dtype)
            product = torch.bmm(exponential.reshape(b * n, -1, seen), v[:, :seen].contiguous())
            out = (product.reshape(b, n, h // n, rows, d) * inverse_sum).to(v.dtype)
            outputs.append(out.reshape(b, h, rows, d).transpose(1, 2))
            exponentials.append(exponential)
            inverse_sums.append(inverse_sum)
        out_bthd = torch.cat(outputs, dim=1)
        ctx.save_for_backward(q_bhtd, k_bnsd, v_bnsd, out_bthd, *exponentials, *inverse_sums)
        return out_bthd.reshape(b, t, h * d)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_bhtd, k_bnsd, v_bnsd, out_bthd, *rest = ctx.saved_tensors
        exponentials, inverse_sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        b, h, t, d = q_bhtd.shape
        n, s = k_bnsd.shape[1:3]
        dtype = v_bnsd.dtype
        k, v = k_bnsd.reshape(b * n, s, d), v_bnsd.reshape(b * n, s, d)
        out_bhtd = out_bthd.transpose(1, 2)
        grad_bhtd = grad_outputs[0].reshape(b, t, h, d).transpose(1, 2)
        blocks = query_blocks(t)
        q_grads, k_grads, v_grads = [], [], []
        for (start, end), exponential, inverse_sum in zip(blocks, exponentials, inverse_sums, strict=True):
            rows, seen = end - start, s - t + end
            q = q_bhtd[:, :, start:end].reshape(b * n, -1, d)
            grad = grad_bhtd[:, :, start:end].reshape(b, n, h // n, rows, d).float() * inverse_sum
            shift = (grad * out_bhtd[:, :, start:end].reshape(b, n, h // n, rows, d).float()).sum(-1, keepdim=True)
            grad = grad.to(dtype).reshape(b * n, -1, d)
            weight_grad = torch.bmm(grad, v[:, :seen].contiguous().transpose(1, 2)).reshape(exponential.shape)
            score_grad = (exponential.float() * (weight_grad.float() - shift) * d**-0.5).to(dtype)
            score_grad = score_grad.reshape(b * n, -1, seen)
            q_grads.append(torch.bmm(score_grad, k[:, :seen].contiguous()).reshape(b, h, rows, d))
            k_grads.append(torch.bmm(score_grad.transpose(1, 2), q))
            v_grads.append(torch.bmm(exponential.reshape(b * n, -1, seen).transpose(1, 2), grad))
        ends = [s - t + end for _, end in blocks]
        k_grad, v_grad = (_sum_prefixes(grads, ends).reshape(k_bnsd.shape) for grads in (k_grads, v_grads))
        return torch.cat(q_grads, dim=2), k_grad, v_grad, None


def _sum_prefixes(grads: list[Tensor], ends: list[int]) -> Tensor:
    """The sum of tensors [m, end, d] of growing length, each of which begins at key 0: [m, s, d]."""
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        covering = [grad[:, start:end].float() for grad, its_end in zip(grads, ends, strict=True) if its_end >= end]
        parts.append(sum(covering[1:], start=covering[0]).to(grads[0].dtype))
    return torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Multi-head and grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = attention.dropout
        q_width, kv_width = attention.num_heads * config.head_dim, attention.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_width, bias=attention.bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=attention.bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=attention.bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=attention.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm.eps) if attention.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm.eps) if attention.qk_norm else None

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        q = self._heads(self.q_proj(x), norm=self.q_norm, rope=inputs.rope)
        k = self._heads(self.k_proj(x), norm=self.k_norm, rope=inputs.rope)
        v = self._heads(self.v_proj(x), norm=None, rope=None)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        out: Tensor = self.o_proj(attend(q, k, v, inputs, dropout=self.dropout if self.training else 0.0))
        return out

    def _heads(self, x: Tensor, *, norm: RMSNorm | None, rope: RotaryTables | None) -> Tensor:
        """[b, t, heads · d] → [b, heads, t, d], normalised and turned as asked."""
        x_bthd = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            x_bthd = norm(x_bthd)
        return x_bthd.transpose(1, 2) if rope is None else rotate(x_bthd, rope)
