"""Inspection of a mixture: the shares of its sources, by the weights and in the first epoch, and where they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmtrain.data.mixture import Mixture
from llmtrain.data.mixture_report import changes_of, source_rows


def describe_mixture(mixture: Mixture | None, tokens: Sequence[int]) -> dict[str, Any]:
    """Describe the sources, the later stages and the changes; all empty without a mixture.

    `tokens`: number of tokens of each source. Stages whose begin depends on the length of a run are not among the
    changes.
    """
    if mixture is None:
        return {"mixture": None, "stages": [], "changes": []}
    spec = mixture.spec
    rows = source_rows(mixture, sum(mixture.num_sequences))
    limits = spec.max_epochs or [None] * len(rows)
    return {
        "mixture": [
            {
                "path": row["source"],
                "tokens": num_tokens,
                "share": share,
                "passes_an_epoch": share * sum(tokens) / num_tokens,
                "max_epochs": limit,
                "first_epoch": {key: row[key] for key in ("by", "asked", "share", "sequences", "epochs")},
            }
            for row, num_tokens, share, limit in zip(rows, tokens, mixture.stage_shares(0), limits, strict=True)
        ],
        "stages": [
            {"begins": stage.begins, "shares": dict(zip(spec.names, mixture.stage_shares(number), strict=True))}
            for number, stage in enumerate(spec.stages, 1)
        ],
        "changes": changes_of(mixture),
    }
