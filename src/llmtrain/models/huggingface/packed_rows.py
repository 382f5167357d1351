"""Tells transformers whether rows hold several documents. It would ask a GPU itself, and wait.

transformers builds a mask for several documents, and leaves a plain causal one to the kernel. It decides by a value of
the positions. Training knows the answer from the batch; everywhere else transformers decides as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

_theirs: Callable[[Tensor], Tensor | None] = masking_utils.find_packed_sequence_indices
_known: bool | None = None


@contextmanager
def rows_hold_several(several: bool) -> Iterator[None]:
    """Within the block, models of transformers take from here whether rows hold several documents.

    If they do, `position_ids` begin at 0 at each document.
    """
    global _known
    before, _known = _known, several
    try:
        yield
    finally:
        _known = before


def _documents_of(position_ids: Tensor) -> Tensor | None:
    """Number the documents of each row, [b, t]; None: each row is one."""
    if _known is None:
        return _theirs(position_ids)
    return (position_ids == 0).cumsum(-1) if _known else None


masking_utils.find_packed_sequence_indices = _documents_of
