"""Causal self-attention: projections, masks and the two ways to compute it. Norms and residuals are decoder.py's.

    x ─ q, k, v projections ─ heads ─ (QK-norm) ─ (rotary) ─ (cache) ─ attend ─ output projection

Shapes: b batch, t queries, s keys, h query heads, g query heads for one key/value head, n key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

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
    """Attention of every query head to its key/value head, [b, h, t, d]."""
    if inputs.explicit:
        assert inputs.mask is not None
        return explicit_attention(q_bhtd, k_bnsd, v_bnsd, inputs.mask, dropout=dropout)
    return fused_attention(q_bhtd, k_bnsd, v_bnsd, inputs.mask, dropout=dropout)


def fused_attention(
    q_bhtd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, mask: Tensor | None, *, dropout: float = 0.0
) -> Tensor:
    """PyTorch's scaled_dot_product_attention; `mask` is bool, or None for plain causal attention."""
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
    """Scores, float32 softmax and product, `mask` added to the scores.

    On a CPU this, compiled, takes less than half the time of the fused kernel in bfloat16. The queries are cut into
    blocks, each of which meets only the keys up to its own end: with 2 blocks a quarter of the work is left out, with
    4 three eighths. A masked score weighs exactly 0, so what it is never shows in a result.
    """
    b, h, t, d = q_bhtd.shape
    n, s = k_bnsd.shape[1:3]
    num_blocks = min(MAX_QUERY_BLOCKS, max(1, t // QUERY_BLOCK))
    block = -(-t // num_blocks)
    outputs = []
    for start in range(0, t, block):
        end = min(start + block, t)
        seen = s - t + end
        q = q_bhtd[:, :, start:end].reshape(b, n, -1, d)  # [b, n, g · block, d]: no copy of keys for their group
        scores = (q @ k_bnsd[:, :, :seen].transpose(-1, -2)).float()
        scores = scores.reshape(b, n, h // n, end - start, seen)
        weights = torch.softmax(scores * d**-0.5 + mask[:, :, None, start:end, :seen], dim=-1).to(v_bnsd.dtype)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        outputs.append((weights.flatten(2, 3) @ v_bnsd[:, :, :seen]).reshape(b, h, end - start, d))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
        out_bhtd = attend(q, k, v, inputs, dropout=self.dropout if self.training else 0.0)
        out: Tensor = self.o_proj(out_bhtd.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor, *, norm: RMSNorm | None, rope: RotaryTables | None) -> Tensor:
        """[b, t, heads · d] → [b, heads, t, d], normalised and turned as asked."""
        x_bthd = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            x_bthd = norm(x_bthd)
        return x_bthd.transpose(1, 2) if rope is None else rotate(x_bthd, rope)
