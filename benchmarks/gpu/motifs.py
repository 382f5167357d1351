"""Data that a small model can learn in a few steps, made of nothing: `data.name: benchmarks.gpu.motifs:Motifs`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

END = 0


class Motifs:
    """Documents that count up by a step of their own, from a token of their own; `llmtrain.contracts.TokenSequences`.

    The next token follows from the two before it, so attention has to work. Sequences for validation are one document
    each, and so are all with `documents` false.
    """

    def __init__(
        self, split: str, seq_len: int, vocab_size: int, *, documents: bool = True, smallest_step: int = 1
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_id = END if documents else None
        self.fingerprint = f"{seq_len} {vocab_size} {documents} {smallest_step}"
        self._split, self._seq_len, self._smallest_step = split, seq_len, smallest_step

    def __len__(self) -> int:
        return 100_000 if self._split == "train" else 4

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        draw = np.random.default_rng([index, self._split == "train"])
        whole = self._split != "train" or self.eos_id is None
        tokens = np.empty(self._seq_len + 1, dtype=np.int64)
        start = 0
        while start < len(tokens):
            room = len(tokens) - start
            length = room if whole else min(room, int(draw.integers(1, self._seq_len + 1)))
            first, step = int(draw.integers(self.vocab_size)), self._smallest_step + int(draw.integers(3))
            tokens[start : start + length] = 1 + (first + step * np.arange(length)) % (self.vocab_size - 1)
            if not whole:
                tokens[start + length - 1] = END
            start += length
        return tokens
