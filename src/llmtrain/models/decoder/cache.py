"""Key/value cache for decoding: static, batched, for prompts of different lengths. attention.py fills it.

Rows are padded on the left, so that all of them write to the same slot:

    slot         0    1    2    3    4
    row 0        pad  pad  a    b    c        first_slots[0] = 2; a slot's position is its distance from the first slot
    row 1        d    e    f    g    h        first_slots[1] = 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.contracts import PADDING_DOCUMENT


class KVCache:
    """Keys and values of the tokens seen so far, of every layer."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        first_slots: Tensor | None = None,
    ) -> None:
        shape = (config.num_layers, batch_size, config.attention.kv_heads, max_len)
        self.keys = torch.zeros(*shape, config.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, config.head_dim, dtype=dtype, device=device)
        self.document_ids = torch.zeros(batch_size, max_len, dtype=torch.int32, device=device)
        self.first_slots = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if first_slots is not None:
            self.first_slots.copy_(first_slots)
        self.least_padding = 0 if first_slots is None else int(first_slots.min())
        self.max_len = max_len
        self.length = 0
        """Slots in use, the same for all rows."""

    def append_documents(self, num_tokens: int, document_ids: Tensor | None) -> None:
        """Record the documents of the next `num_tokens` slots, 0 if none are given, before the layers write them."""
        slots = torch.arange(self.length, self.length + num_tokens, device=self.first_slots.device)
        padding = slots < self.first_slots[:, None]
        ids = torch.zeros_like(padding, dtype=torch.int32) if document_ids is None else document_ids.to(torch.int32)
        self.document_ids[:, self.length : self.length + num_tokens] = ids.masked_fill(padding, PADDING_DOCUMENT)

    def positions(self, num_tokens: int) -> Tensor:
        """Return [b, t] positions of the next `num_tokens` tokens; padding has position 0."""
        slots = torch.arange(self.length, self.length + num_tokens, device=self.first_slots.device)
        return (slots - self.first_slots[:, None]).clamp(min=0)

    def write(self, layer: int, k_bntc: Tensor, v_bntd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values. Return those of all tokens so far, [b, kv_heads, s, …]."""
        end = self.length + k_bntc.shape[2]
        self.keys[layer, :, :, self.length : end] = k_bntc
        self.values[layer, :, :, self.length : end] = v_bntd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows and drop all others, which then take neither time nor positions."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.first_slots.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.document_ids, self.first_slots = self.document_ids[index], self.first_slots[index]
        if rows:
            self.least_padding = int(self.first_slots.min())

    @property
    def is_full(self) -> bool:
        """True if the next token has no slot."""
        return self.length == self.max_len

    def empty_rows(self, rows: Sequence[int]) -> None:
        """Drop the tokens of these rows, which then need neither slots nor positions; the rows keep their places."""
        self.first_slots[list(rows)] = self.length
        self.document_ids[list(rows), : self.length] = PADDING_DOCUMENT
        self.least_padding = int(self.first_slots.min())

    def replace_rows(self, rows: Sequence[int], other: KVCache) -> None:
        """Put the rows of `other`, which holds no more slots than this one, in the places of `rows`.

        Their last tokens go to the last slot, as in all rows.
        """
        places, begin, end = list(rows), self.length - other.length, self.length
        self.keys[:, places, :, begin:end] = other.keys[:, :, :, : other.length]
        self.values[:, places, :, begin:end] = other.values[:, :, :, : other.length]
        self.document_ids[places, :begin] = PADDING_DOCUMENT
        self.document_ids[places, begin:end] = other.document_ids[:, : other.length]
        self.first_slots[places] = other.first_slots + begin
        self.least_padding = int(self.first_slots.min())

    def drop_padding(self) -> None:
        """Remove the slots that are padding in all rows."""
        by, end = self.least_padding, self.length
        if by == 0:
            return
        self.keys[:, :, :, : end - by] = self.keys[:, :, :, by:end].clone()
        self.values[:, :, :, : end - by] = self.values[:, :, :, by:end].clone()
        self.document_ids[:, : end - by] = self.document_ids[:, by:end].clone()
        self.first_slots -= by
        self.length, self.least_padding = end - by, 0

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more slots as used, after all layers have written."""
        self.length += num_tokens
