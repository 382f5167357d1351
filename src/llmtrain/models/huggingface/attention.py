"""Computes attention of a model of transformers by the decoder's kernels, where these are faster than `sdpa`.

    compiled, on a CPU   blocked attention. PyTorch's fused kernel takes three times as long there in bfloat16, and more
                         if rows are short (docs/performance.md).
    packed, on a GPU     FlashAttention for sequences of different lengths, which reads no mask

The functions are registered with transformers under names of their own and get the same masks as `sdpa`. They call
`sdpa` in all cases that they do not cover.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtrain.models.decoder import gpu_kernels, mask
from llmtrain.models.decoder.attention import ONE_BLOCK, blocked_attention
from llmtrain.models.device_type import device_type_of

BLOCKED = "llmtrain_blocked"
VARLEN = "llmtrain_varlen"


class NotCovered(Exception):
    """Raised by attention that cannot compute what a layer asks for."""


WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions", "sliding_window"}
"""Arguments that models pass to any attention and that have no effect here. The mask already includes a window."""


def choose_attention(causal_lm: Any, *, compiled: bool) -> None:
    """Replace `sdpa` in a model on its final device. On a CPU only compiled blocks become faster by that."""
    if causal_lm.config._attn_implementation != "sdpa" or not causal_lm._can_set_attn_implementation():
        return
    device_type = device_type_of(next(causal_lm.parameters()).device)
    if device_type == "cpu" and compiled:
        causal_lm.set_attn_implementation(BLOCKED)
    if device_type == "cuda" and _takes_varlen(causal_lm):
        causal_lm.set_attn_implementation(VARLEN)


def _takes_varlen(causal_lm: Any) -> bool:
    """Return whether FlashAttention computes all that a model's layers do, as far as its config says.

    Only models that support flash attention tell each layer's window to the attention. A model is tried before it is
    trained on packed rows, and this attention is not used if a trial fails.
    """
    config = causal_lm.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        causal_lm._supports_flash_attn
        and layers <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attention_dropout", 0.0)
        and gpu_kernels.gpu_lacks_flash() is None
    )


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


def varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute query [1, h, t, d], key and value [1, n, t, d] → [1, t, h, d] of the sequences of `cu_seq_lens_q`.

    Without these it is `sdpa`; with them `attention_mask` is not read. Raises NotCovered for what the kernel cannot do.
    """
    cu_seqlens, window = rest.get("cu_seq_lens_q"), rest.get("sliding_window")
    if cu_seqlens is None:
        theirs, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
        return theirs, None
    # Rotary tables in float32 make queries and keys float32. Autocast changes the inputs of `sdpa`, but not of this.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    d = query.shape[-1]
    if (
        gpu_kernels.varlen_lacks(d, dtype=dtype, dropout=dropout, window=window)
        or value.shape[-1] != d
        or scaling not in (None, d**-0.5)
        or not getattr(module, "is_causal", True)
        or any(rest.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    ):
        raise NotCovered
    out = gpu_kernels.varlen_attention(query, key, value, cu_seqlens, window=window, max_length=rest["max_length_q"])
    return out.view(*out.shape[:2], -1, d), None


AttentionInterface.register(BLOCKED, blocked_forward)
AttentionInterface.register(VARLEN, varlen_forward)
AttentionMaskInterface.register(BLOCKED, sdpa_mask)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
