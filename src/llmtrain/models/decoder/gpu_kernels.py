"""Attention on a GPU to documents, in windows and with ALiBi: two kernels that read no mask of [t, t].

    varlen   FlashAttention over the flattened batch: documents by where they begin, windows by their size
    flex     flex_attention, compiled: everything else, with a mask of blocks of 128 × 128

mask.py makes a dense mask for what neither takes: dropout of the weights, short rows, old GPUs. Cached decoding has few
queries and always takes a dense mask.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils._triton import has_triton

from llmtrain.config.sections.model import DecoderConfig

log = logging.getLogger("llmtrain.device")
BLOCK = 128
"""Number of queries and of keys in a block of a BlockMask."""
FLEX_MIN_TOKENS = 256
"""Shorter rows take a dense mask, which is small. flex_attention is compiled for each length of rows."""
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_OPTIONS = inspect.signature(varlen_attn).parameters.keys()
TAKES_WINDOW = "window_size" in _OPTIONS
"""False in torch 2.10, which has `is_causal` instead."""
TAKES_GQA = "enable_gqa" in _OPTIONS
"""False before torch 2.12, where the kernel takes groups of heads without being told."""


class KernelInputs(NamedTuple):
    """Inputs of a kernel in place of a mask: one of the two, or none where the causal mask is enough."""

    cu_seqlens: Tensor | None = None
    block_mask: BlockMask | None = None


def kernel_inputs(
    config: DecoderConfig,
    input_ids: Tensor,
    *,
    dtype: torch.dtype,
    dropout: float,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> KernelInputs | None:
    """Return what the kernel for a batch [b, t] reads. None: it takes a dense mask, which is said once if that is slow.

    `dtype` is that of the queries. `cu_seqlens` describes the same documents as `document_ids`; see `contracts.Batch`.
    """
    b, t = input_ids.shape
    why_not_varlen = _why_not_varlen(config, dtype=dtype, dropout=dropout)
    if document_ids is not None and cu_seqlens is None:
        why_not_varlen = "it was not told where documents begin"
    if why_not_varlen is None:
        if cu_seqlens is None:
            cu_seqlens = torch.arange(b + 1, dtype=torch.int32, device=input_ids.device) * t
        return KernelInputs(cu_seqlens=cu_seqlens)
    if t < FLEX_MIN_TOKENS:
        return None
    if why_not_flex := _why_not_flex(config, dropout=dropout):
        _say_once(
            "attention takes a dense mask, which is slow for long rows. "
            f"FlashAttention does not fit: {why_not_varlen}; flex_attention does not: {why_not_flex}"
        )
        return None
    if input_ids.device.type != "cuda":  # only planned for a GPU: causal attention takes the same memory
        return KernelInputs()
    return KernelInputs(
        block_mask=build_block_mask(input_ids, document_ids=document_ids, window=config.attention.window)
    )


def varlen_attention(
    q_bhtd: Tensor,
    k_bntd: Tensor,
    v_bntd: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Compute causal attention within each sequence of the flattened batch, [b, t, h · d].

    Sequence i is from `cu_seqlens[i]` to `cu_seqlens[i + 1]` - 1. None is longer than `max_length`, by default t.
    """
    b, h, t, d = q_bhtd.shape
    longest = t if max_length is None else max_length
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_bhtd, k_bntd, v_bntd))
    options: dict[str, Any] = {"is_causal": True}
    if TAKES_WINDOW:
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    if TAKES_GQA:
        options["enable_gqa"] = h != k.shape[1]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.reshape(b, t, h * d)


def block_attention(
    q_bhtc: Tensor, k_bntc: Tensor, v_bntd: Tensor, block_mask: BlockMask, *, slopes: Tensor | None = None
) -> Tensor:
    """Compute attention under a BlockMask, [b, t, h · d]. `slopes` [h] are ALiBi's."""

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None
        return score + slopes[head] * (key - query)

    compute: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = compute(
        q_bhtc,
        k_bntc,
        v_bntd,
        score_mod=None if slopes is None else biased,
        block_mask=block_mask,
        scale=v_bntd.shape[-1] ** -0.5,
        enable_gqa=q_bhtc.shape[1] != k_bntc.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def build_block_mask(input_ids: Tensor, *, document_ids: Tensor | None, window: int | None) -> BlockMask:
    """Return which blocks of keys each block of queries reads, and the mask inside of them.

    A block is left out if it is in the future, before the window, or if no document number lies in the ranges of both
    blocks. It needs no mask inside if all of its pairs are allowed, and it does not reach beyond the row.
    """
    t, device = input_ids.shape[1], input_ids.device
    num_blocks = -(-t // BLOCK)
    keys = torch.arange(num_blocks, device=device)
    queries = keys[:, None]
    some, every = (keys <= queries)[None], ((keys < queries) & ((queries + 1) * BLOCK <= t))[None]
    if window is not None:
        some = some & ((keys + 1) * BLOCK - 1 > queries * BLOCK - window)
        every = every & (keys * BLOCK > (queries + 1) * BLOCK - 1 - window)
    if document_ids is not None:
        slots = torch.arange(num_blocks * BLOCK, device=device).clamp(max=t - 1)
        least, most = document_ids[:, slots].view(-1, num_blocks, BLOCK).aminmax(dim=-1)
        some = some & (least[:, None] <= most[:, :, None]) & (least[:, :, None] <= most[:, None])
        every = every & (least[:, None] == most[:, :, None]) & (least[:, :, None] == most[:, None])

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = key <= query
        if window is not None:
            found = found & (key > query - window)
        if document_ids is not None:
            found = found & (document_ids[batch, query] == document_ids[batch, key])
        return found

    partial, full = some & ~every, some & every
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(t, t)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return of [b, q, k] bool the number of true keys [b, 1, q], and the keys [b, 1, q, k], true ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _why_not_varlen(config: DecoderConfig, *, dtype: torch.dtype, dropout: float) -> str | None:
    if config.positional.encoding == "alibi":
        return "it has no ALiBi"
    if config.key_dim != config.head_dim:
        return "queries and keys are wider than values"
    lacks = varlen_lacks(config.head_dim, dtype=dtype, dropout=dropout, window=config.attention.window)
    return lacks or gpu_lacks_flash()


def varlen_lacks(head_dim: int, *, dtype: torch.dtype, dropout: float, window: int | None) -> str | None:
    """Return why `varlen_attention` cannot compute such heads; None if it can."""
    if head_dim % 8 or head_dim > 256:
        return f"the width of a head is {head_dim}, not a multiple of 8 up to 256"
    if dtype not in VARLEN_DTYPES:
        return f"it computes in 16 bits, not in {dtype}"
    if dropout > 0.0:
        return "it has no dropout (model.attention.dropout)"
    if window is not None and not TAKES_WINDOW:
        return f"it has no window in torch {torch.__version__}"
    return None


def _why_not_flex(config: DecoderConfig, *, dropout: float) -> str | None:
    if dropout > 0.0:
        return "it has no dropout (model.attention.dropout)"
    if config.head_dim < 16:
        return f"the width of a head is {config.head_dim}, less than 16"
    if torch.cuda.is_available() and not has_triton():
        return "Triton is not installed, or does not know this GPU"
    return None


@cache
def gpu_lacks_flash() -> str | None:
    """Return why this machine's GPU has no FlashAttention. None on a machine without a GPU, which plans for one."""
    if not torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch is without it"
    capability = torch.cuda.get_device_capability()
    return (
        None if capability >= (8, 0) else f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    )


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Return the kernel's function for blocks that are not compiled. Without compilation it would store all scores."""
    return torch.compile(flex_attention)


@cache
def _say_once(message: str) -> None:
    log.warning(message)
