"""Report of a mixture, as plain values and in words: shares and epochs of its sources, and where they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtrain.data.mixture import Change, Mixture
from llmtrain.screen import counted


def source_rows(mixture: Mixture, item: int) -> list[dict[str, Any]]:
    """Describe each source over the items before `item`: realised share, asked share, epochs; `by` is the unit of both.

    The asked share is that of the weights, as if no source were used up.
    """
    counts = mixture.counts(item)
    realised, asked = mixture.in_unit(counts), mixture.in_unit(mixture.asked(item))
    return [
        {
            "source": mixture.spec.names[source] if mixture.spec.names else str(source),
            "by": mixture.spec.by,
            "sequences": count,
            "share": realised[source] / max(1.0, sum(realised)),
            "asked": asked[source] / max(1.0, sum(asked)),
            "epochs": count / mixture.num_sequences[source],
        }
        for source, count in enumerate(counts)
    ]


def changes_of(mixture: Mixture) -> list[dict[str, Any]]:
    """Describe the places of the order where a stage begins or a source is used up."""
    return [{"sequence": change.item, "what": change_in_words(change, mixture)} for change in mixture.changes]


def lines_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each source."""
    for row in rows:
        share = f"{row['share']:.2%} of the {row['by']} (asked: {row['asked']:.2%})"
        yield f"{row['source']}: {share}, {counted(row['sequences'], 'sequence')}, {row['epochs']:.3g} epochs"


def change_in_words(change: Change, mixture: Mixture) -> str:
    """Return what changes at a place of the order, and the shares after it."""
    names = mixture.spec.names or tuple(map(str, range(mixture.num_sources)))
    gone = ", ".join(names[source] for source in change.used_up)
    what = [f"{gone} is used up"] if gone else []
    if change.item == mixture.end:
        return "; ".join([*what, "the data end"])
    if change.item in (mixture.spec.stage_items or ()):
        what.append(f"stage {change.stage} begins")
    parts = zip(names, mixture.shares(change.item), strict=True)
    shares = ", ".join(f"{name} {share:.2%}" for name, share in parts if share)
    return f"{'; '.join(what)}; sequences from now on: {shares}"
