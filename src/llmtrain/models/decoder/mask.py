"""Attention masks and ALiBi's bias, built once a forward pass for all layers.

A mask is indexed by slots. A row's slots are its padding, if there is a cache, and then its tokens in order, so a
difference of slots is a difference of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.models.decoder.cache import KVCache
from llmtrain.models.decoder.position import RotaryTables
from llmtrain.models.device_type import device_type_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

EXPLICIT_MAX_KEYS = 2048
"""Longest rows for which the CPU computes attention explicitly. For longer ones the scores take too much memory."""


class AttentionInputs(NamedTuple):
    """Inputs that all layers share, built once a forward pass."""

    mask: Tensor | None
    """[1 or b, 1, t, s]. If `explicit`, float32 that is added to the scores. Otherwise bool, true where a query may
    attend to a key; or None for plain causal attention of t queries to t keys; or with ALiBi [1 or b, h, t, s] float32
    that includes the bias."""
    rope: RotaryTables | None
    explicit: bool
    """True if scores, softmax and product are computed here and not by the fused kernel."""
    slopes: Tensor | None = None
    """[h] float32: ALiBi's slopes. Explicit attention and flex_attention apply them themselves, so that no bias for
    each head is stored."""
    window: int | None = None
    """Largest number of keys that a query attends to. The mask includes it; here it tells which keys to leave out."""
    cu_seqlens: Tensor | None = None
    """[n + 1] int32, if gpu_kernels.varlen_attention computes attention, instead of a mask; see `contracts.Batch`."""
    block_mask: BlockMask | None = None
    """If gpu_kernels.block_attention computes attention, instead of a mask."""


def build_mask(
    num_queries: int,
    *,
    document_ids: Tensor | None,
    cache: KVCache | None,
    device: torch.device,
    window: int | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor | None, bool]:
    """Return the mask of a forward pass, and whether attention is explicit, which decides the mask's form.

    `document_ids` [b, s] number the documents of all keys. A query attends to keys of its own document that are not
    after it and, with a `window`, at most window - 1 before it. It always attends to itself, so no row of scores is
    empty. The fused kernel's own causal mask aligns the first query with the first key, which is wrong if a cache holds
    earlier keys. So it is used only without a cache.
    """
    past = 0 if cache is None else cache.length
    explicit = device_type_of(device) == "cpu" and past + num_queries <= EXPLICIT_MAX_KEYS
    if document_ids is None and cache is None and window is None and slopes is None and not explicit:
        return None, False
    key_slots = torch.arange(past + num_queries, device=device)
    query_slots = key_slots[past:, None]
    allowed = (key_slots <= query_slots)[None, None]
    if window is not None:
        allowed = allowed & (key_slots > query_slots - window)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, past:, None] == document_ids[:, None, :])[:, None]
    if explicit:
        return torch.where(allowed, 0.0, float("-inf")), True
    if slopes is not None:
        return torch.where(allowed, slopes[:, None, None] * (key_slots - query_slots), float("-inf")), False
    return allowed, False


class Alibi(nn.Module):
    """ALiBi's slopes of the heads that this rank computes; see `alibi_slopes`. Nothing is stored."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self._first, self._end = 0, num_heads

    def keep_share(self, index: int, *, of: int) -> None:
        """Keep only the heads of share `index` of `of` equal shares."""
        size = self.num_heads // of
        self._first, self._end = index * size, (index + 1) * size

    def forward(self, device: torch.device) -> Tensor:
        """Return [h] float32 slopes on `device`."""
        return alibi_slopes(self.num_heads, device=device)[self._first : self._end]


def alibi_slopes(num_heads: int, *, device: torch.device) -> Tensor:
    """Return [h] float32: how fast each head's scores fall with distance (Press et al. 2022, arXiv:2108.12409).

    For a power of two they are 2^(-8/h), 2^(-16/h), … . For other numbers, as in the authors' code, they are those of
    the power of two below, followed by every second one of the power of two above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (8 / power)
    between = (torch.arange(num_heads - power, device=device, dtype=torch.float32) * 2 + 1) * (4 / power)
    return torch.exp2(-torch.cat((exponents, between)))
