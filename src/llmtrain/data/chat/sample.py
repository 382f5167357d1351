"""A row of fine-tuning data as tokens: sample_maker.py makes samples, cache.py keeps them, items.py draws them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Sample(NamedTuple):
    """The tokens of one row, or of one assistant turn of it where a template cannot show all turns at once."""

    input_ids: NDArray[np.int32]
    """[n]"""
    supervised: NDArray[np.bool_]
    """[n] whether the model learns to write this very token (not the one after it)."""
    source: str
    """`file:line` of the row, for messages."""
