"""Random tokens for checks and benchmarks: each window is drawn by itself, a pure function of (seed, split, window)."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np

from llmtrain.data.order import Ints, WindowOrder


@dataclass(frozen=True, kw_only=True)
class SyntheticWindows:
    """`num_windows` windows of seq_len + 1 tokens that are drawn uniformly from [0, vocab_size).

    Neighbouring windows share no token, unlike those of a text; the validation windows have a key of their own.
    """

    num_windows: int
    seq_len: int
    vocab_size: int
    seed: int
    split: Literal["train", "val"]

    def open(self, order: WindowOrder | None, *, world_size: int = 1) -> SyntheticWindows:
        """Return itself: there is nothing to keep."""
        return self

    @property
    def fetches(self) -> bool:
        """Return False: nothing is fetched."""
        return False

    def expect(self, windows: Ints) -> bool:
        """Return True: there is nothing to hold."""
        return True

    def read(self, windows: Ints, out: Ints) -> Ints:
        """Fill `out` [n, seq_len + 1] with complete windows; return the number of tokens of each, [n]."""
        digest = sha256(f"synthetic/{self.seed}/{self.split}".encode()).digest()
        key = int.from_bytes(digest[:16], "little")
        for row, window in zip(out, windows.tolist(), strict=True):
            # The low counter word counts blocks inside the window, the next one is the window.
            bits = np.random.Philox(key=key, counter=[0, window, 0, 0]).random_raw(len(row))
            row[:] = bits % np.uint64(self.vocab_size)
        return np.full(len(out), self.seq_len + 1)
