"""Options of an analysis. Imports nothing heavy, so that the command line can make it."""

from __future__ import annotations

from typing import NamedTuple

from llmtrain.data.inspection.block_sample import BlockSample

NUM_LISTED = 100
SAMPLE_BYTES = 1 << 28
"""Bytes of files from which on text and rows are sampled, unless a share is asked for. Of shards it is row groups."""


class AnalysisOptions(NamedTuple):
    """Wishes of the user."""

    share: float | None = None
    """Share of the blocks to analyse; None: all of a small corpus, of a large one as many as take a minute or so."""
    seed: int = 0
    tokenizer: str | None = None
    """Tokenizer for texts and bare rows; None: words are counted."""
    num_listed: int = NUM_LISTED
    """Tokens, pairs and centralities that the report lists."""

    def sample_of(self, num_bytes: int) -> BlockSample:
        """Return the sample of files of this size."""
        share = min(1.0, SAMPLE_BYTES / max(1, num_bytes)) if self.share is None else self.share
        return BlockSample(share, self.seed)
