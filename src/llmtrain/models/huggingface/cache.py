"""Key/value cache of a model of transformers, for prompts of different lengths padded on the left.

It implements DecodingCache of `generation.decoding`. The tensors are in transformers' DynamicCache, which supports
sliding windows and hybrid layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class HuggingFaceCache:
    """Keys and values of the tokens seen so far, and which slots of each row are padding."""

    def __init__(self, config: Any, *, batch_size: int, first_slots: Tensor | None, device: torch.device) -> None:
        self.past = DynamicCache(config=config)
        self.length = 0
        self._first_slots = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if first_slots is not None:
            self._first_slots.copy_(first_slots)
        self._is_padded = first_slots is not None and bool(first_slots.any())

    def mask(self, num_tokens: int) -> Tensor | None:
        """Return [b, s]: 1 for each slot with a token, including the next `num_tokens`, 0 for padding.

        Return None if there is no padding.
        """
        if not self._is_padded:
            return None
        slots = torch.arange(self.length + num_tokens, device=self._first_slots.device)
        return (slots >= self._first_slots[:, None]).long()

    def positions(self, num_tokens: int) -> Tensor:
        """Return [b, t] positions of the next `num_tokens` tokens; padding has position 0."""
        slots = torch.arange(self.length, self.length + num_tokens, device=self._first_slots.device)
        return (slots - self._first_slots[:, None]).clamp(min=0)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more slots as used, after the model has read them."""
        self.length += num_tokens

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows and drop all others."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._first_slots.device)
        self.past.batch_select_indices(index)
        self._first_slots = self._first_slots[index]
        self._is_padded = bool(self._first_slots.any())
