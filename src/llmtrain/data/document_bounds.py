"""Places where the documents of a batch begin, as kernels for sequences of different lengths read them. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cu_seqlens(document_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return `cu_seqlens` of `contracts.Batch` for `document_ids` [b, t].

    Neighbours with the same number are one document, and so is the padding of a row. There is a power of two of
    entries, so that code is compiled for few numbers of documents.
    """
    begins = np.ones(document_ids.shape, dtype=bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(begins)
    bounds = np.full(1 << len(starts).bit_length(), document_ids.size, dtype=np.int32)
    bounds[: len(starts)] = starts
    return bounds
