"""Where documents begin in a batch, for any documents, rows and padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.contracts import PADDING_DOCUMENT
from llmtrain.data.document_bounds import cu_seqlens


@st.composite
def rows_of_documents(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the documents of each row, and of its padding, which is the last one."""
    width = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        ends = sorted(draw(st.sets(st.integers(1, width), max_size=6)) | {width})
        rows.append([end - begin for begin, end in pairwise([0, *ends])])
    return rows


@given(rows_of_documents(), st.booleans())
def test_every_document_of_every_row_is_one_sequence_and_so_is_padding(rows: list[list[int]], padded: bool) -> None:
    numbers = [[PADDING_DOCUMENT if padded and n == len(row) - 1 else n for n in range(len(row))] for row in rows]
    ids = np.array([np.repeat(names, row) for names, row in zip(numbers, rows, strict=True)], dtype=np.int32)
    found = cu_seqlens(ids)
    lengths = [length for row in rows for length in row]
    assert found.dtype == np.int32
    assert np.diff(found).tolist() == lengths + [0] * (len(found) - 1 - len(lengths))
    assert (found[0], found[-1]) == (0, ids.size)
    assert found.size.bit_count() == 1, "a power of two, so that there are few shapes"
    assert found.size <= 2 * (len(lengths) + 1), "no more than twice what is needed"
