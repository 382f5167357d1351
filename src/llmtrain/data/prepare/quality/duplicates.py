"""The steps that compare documents, settled in the order of the list after all documents were read.

A comparing step looks at the documents that no step before it dropped. What a step after it would say of a document is
known already, and gives way when the comparing step drops the document.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.prepare.quality.near_duplicates import SignatureFiles
from llmtrain.data.prepare.quality.plan import ExactDuplicates, Plan, Rule

NUM_NAMED = 3
"""Duplicates whose original is remembered, of each step."""


def drop_duplicates(
    plan: Plan,
    *,
    hashes: NDArray[np.uint64],
    dropped_by: NDArray[np.uint16],
    has_text: NDArray[np.bool_],
    signatures: Mapping[int, SignatureFiles],
) -> tuple[NDArray[np.uint16], dict[int, int]]:
    """Return the rule that drops each document, by all steps, and for some duplicates the document that they repeat.

    hashes: as in `Examined`; dropped_by: by the steps that look at one document; signatures: by the step's position.
    """
    dropped_by = dropped_by.copy()
    positions = np.array([len(plan.steps), *(rule.position for rule in plan.rules)])
    originals: dict[int, int] = {}
    for position, step in enumerate(plan.steps):
        if not (isinstance(step, ExactDuplicates) or position in signatures):
            continue
        given = np.flatnonzero(has_text & (positions[dropped_by] > position))
        if isinstance(step, ExactDuplicates):
            repeated, first = _equal(given, hashes[plan.versions_before[position]][given])
        else:
            repeated, first = signatures[position].duplicates(given)
        dropped_by[repeated] = 1 + plan.rules.index(Rule(position, "duplicate"))
        originals |= dict(zip(repeated[:NUM_NAMED].tolist(), first[:NUM_NAMED].tolist(), strict=True))
    return dropped_by, originals


def _equal(documents: NDArray[np.int64], hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the documents whose hash an earlier one has, ascending, and the first that has it, for each."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in reading order
    in_order = hashes[order]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    starts = np.flatnonzero(begins)
    firsts = np.repeat(order[starts], np.diff(starts, append=len(order)))
    repeated = np.argsort(order[~begins])
    return documents[order[~begins][repeated]], documents[firsts[~begins][repeated]]
