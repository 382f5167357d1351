"""Computes attention of a compiled model of transformers on a CPU by the decoder's blocked attention.

PyTorch's fused kernel takes three times as long there in bfloat16, and more if rows are short (docs/performance.md).
The function is registered with transformers under its own name and gets the same masks as `sdpa`. It calls `sdpa` in
all cases that it does not cover.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtrain.models.decoder import mask
from llmtrain.models.decoder.attention import ONE_BLOCK, blocked_attention
from llmtrain.models.device_type import device_type_of

BLOCKED = "llmtrain_blocked"
WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions", "sliding_window"}
"""Arguments that models pass to any attention and that have no effect here. The mask already includes a window."""


def choose_blocked(causal_lm: Any) -> None:
    """Replace `sdpa` by this attention in a model on a CPU. Only compiled blocks become faster by it."""
    on_cpu = device_type_of(next(causal_lm.parameters()).device) == "cpu"
    if on_cpu and causal_lm.config._attn_implementation == "sdpa" and causal_lm._can_set_attn_implementation():
        causal_lm.set_attn_implementation(BLOCKED)


def blocked_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute query [b, h, t, d], key and value [b, n, s, d] → [b, t, h, d].

    `attention_mask` is [b, 1, t, s], or None for causal attention. Only training is covered: generation has many
    lengths, and each would be compiled. In training, packed rows have one length, and one graph serves all lengths that
    need one block of queries. With several blocks, each length would be compiled, so these use `sdpa`.
    """
    (b, h, t, d), s = query.shape, key.shape[2]
    is_covered = (
        module.training
        and t == s <= (ONE_BLOCK if attention_mask is None else mask.EXPLICIT_MAX_KEYS)
        and dropout == 0.0
        and scaling in (None, d**-0.5)
        and value.shape[-1] == d
        and getattr(module, "is_causal", True)
        and all(given is None or name in WITHOUT_EFFECT for name, given in rest.items())
    )
    if not is_covered:
        theirs, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
        return theirs, None
    if attention_mask is None:
        slots = torch.arange(t, device=query.device)
        attention_mask = (slots <= slots[:, None])[None, None]
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.where(attention_mask, 0.0, float("-inf"))
    return blocked_attention(query, key, value, attention_mask).view(b, t, h, d), None


AttentionInterface.register(BLOCKED, blocked_forward)
AttentionMaskInterface.register(BLOCKED, sdpa_mask)
