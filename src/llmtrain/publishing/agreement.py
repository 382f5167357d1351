"""Compares two models: their logits on the same rows, and their greedy continuations of these rows.

    source ─ answer ─▶ Answers ─┐                     the source's answers are kept on the CPU, so that the two models
                                ├─▶ ModelAgreement       need not be in memory together
    result ─ answer ─▶ Answers ─┘

Only forward passes without a cache are compared, since every format has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""[b, t] int64 token ids → [b, t, vocab] scores."""

NUM_WRITTEN = 4
"""Number of rows whose first half is continued."""
NEW_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Logits and continuations of a model for some rows, on the CPU, in float32."""

    logits: list[Tensor]
    """[t, vocab] of each row."""
    written: list[list[int]]
    """Tokens chosen greedily after the first half of each of the first NUM_WRITTEN rows."""
    chosen_from: list[list[Tensor]]
    """[vocab] logits from which each of these tokens was chosen."""


@dataclass(frozen=True, kw_only=True)
class ModelAgreement:
    """Differences between a result and its source."""

    rows: int
    tokens: int
    max_difference: float
    """Largest difference of two logits, as a share of the source's largest logit."""
    mean_kl: float
    """Mean KL divergence of the distributions of the next token, in nats a token."""
    written: int
    """Number of tokens that the source chose greedily."""
    written_equal: int
    """Number of these that the result chose too, up to the first that differs in each row."""
    largest_gap: float
    """Gap at the first difference in a row: the source's logit of its own token less that of the result's token, as a
    share of the source's largest logit; the largest over the rows."""

    def why_not_within(self, tolerance: float) -> str | None:
        """Return the difference that is over `tolerance`, a share of the largest logit; None if there is none.

        Two tokens whose logits are within twice the tolerance are a tie, and either may be chosen.
        """
        if not self.max_difference <= tolerance:  # also for NaN
            return f"logits differ by {self.max_difference:.2e} of the largest, over the tolerance of {tolerance:.0e}"
        if not self.largest_gap <= 2 * tolerance:
            return (
                f"greedy texts differ at a token that the source prefers by {self.largest_gap:.2e} of the largest logit"
            )
        return None


@torch.inference_mode()
def answer(logits: Logits, rows: Sequence[Sequence[int]], *, limit: int | None = None) -> Answers:
    """Return a model's answers to `rows` of at least two tokens. Rows are continued to at most `limit` tokens."""
    written, chosen_from = [], []
    for row in rows[:NUM_WRITTEN]:
        ids, scores = list(row[: max(1, len(row) // 2)]), []
        prompt = len(ids)
        for _ in range(NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - prompt)):
            last_v = _scores(logits, [ids])[0, -1]
            scores.append(last_v)
            ids.append(int(last_v.argmax()))
        written.append(ids[prompt:])
        chosen_from.append(scores)
    return Answers(logits=[_scores(logits, [row])[0] for row in rows], written=written, chosen_from=chosen_from)


def compare(source: Answers, result: Answers) -> ModelAgreement:
    """Return the differences between `result` and `source`, both answers to the same rows."""
    largest = max(float(row.abs().max()) for row in source.logits) or 1.0
    differences = [
        float((ours - theirs).abs().max()) for ours, theirs in zip(result.logits, source.logits, strict=True)
    ]
    kl = [_kl(theirs, ours) for ours, theirs in zip(result.logits, source.logits, strict=True)]
    num_tokens = sum(len(row) for row in source.logits)
    equal, gaps = 0, [0.0]
    for ours, theirs, scores in zip(result.written, source.written, source.chosen_from, strict=True):
        same = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        equal += len(theirs) if same is None else same
        if same is not None:
            gaps.append(float(scores[same][theirs[same]] - scores[same][ours[same]]) / largest)
    return ModelAgreement(
        rows=len(source.logits),
        tokens=num_tokens,
        max_difference=_worst(differences) / largest,
        mean_kl=sum(kl) / num_tokens,
        written=sum(map(len, source.written)),
        written_equal=equal,
        largest_gap=_worst(gaps),
    )


def values(agreement: ModelAgreement) -> dict[str, Any]:
    """Return the values for export.json and the terminal."""
    return {
        "rows": agreement.rows,
        "tokens": agreement.tokens,
        "max_logit_difference": agreement.max_difference,
        "mean_kl_nats": agreement.mean_kl,
        "greedy_tokens": agreement.written,
        "greedy_tokens_equal": agreement.written_equal,
        "greedy_largest_gap": agreement.largest_gap,
    }


def _scores(logits: Logits, ids: list[Any]) -> Tensor:
    return logits(torch.tensor([list(row) for row in ids])).detach().float().cpu()


def _kl(source_tv: Tensor, result_tv: Tensor) -> float:
    """Return the KL divergence in nats, summed over the row's tokens."""
    source, result = source_tv.double().log_softmax(-1), result_tv.double().log_softmax(-1)
    return float((source.exp() * (source - result)).sum())


def _worst(values: Sequence[float]) -> float:
    """Return the largest value; NaN if one is NaN."""
    return float(torch.tensor(values, dtype=torch.float64).max())
