"""Compression and languages of the text, measured on the beginnings of some documents."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from llmtrain.installing import install_extra

MAX_EXCERPTS = 2000
EXCERPT_CHARACTERS = 4096
LANGUAGE_CHARACTERS = 800
"""Characters of an excerpt that its language is told by: more take longer and change little."""
LANGUAGE_FEWEST_CHARACTERS = 20
FEWEST_BYTES = 256
"""Shorter excerpts have no compression ratio of their own, since the header of the format would decide it."""
NUM_REPETITIVE = 5
SHOWN_CHARACTERS = 160


class Excerpt(NamedTuple):
    """The beginning of a document."""

    name: str
    text: str
    """At most EXCERPT_CHARACTERS characters."""
    num_tokens: int | None
    """Tokens that the text stands for; None where it was cut inside a token."""


def describe_compression(excerpts: Sequence[Excerpt]) -> dict[str, Any] | None:
    """Return the ratio of bytes to bytes compressed by zlib, of all excerpts as one text and of each.

    A high ratio means text that repeats itself; the documents with the highest are named. None where there is no text.
    """
    encoded = [(one, one.text.encode("utf-8", "surrogatepass")) for one in excerpts if one.text]
    if not encoded:
        return None
    compressor, compressed = zlib.compressobj(), 0
    for _, data in encoded:
        compressed += len(compressor.compress(data))
    compressed += len(compressor.flush())
    num_bytes = sum(len(data) for _, data in encoded)
    ratios = [(len(data) / len(zlib.compress(data)), one) for one, data in encoded if len(data) >= FEWEST_BYTES]
    highest = sorted(ratios, key=lambda entry: -entry[0])[:NUM_REPETITIVE]
    return {
        "excerpts": len(encoded),
        "bytes": num_bytes,
        "compressed_bytes": compressed,
        "ratio": num_bytes / compressed,
        "by_excerpt": _quantiles([ratio for ratio, _ in ratios]),
        "histogram": _histogram([ratio for ratio, _ in ratios]),
        "most_repetitive": [
            {"document": one.name, "ratio": ratio, "text": one.text[:SHOWN_CHARACTERS]} for ratio, one in highest
        ],
    }


def bytes_per_token(excerpts: Sequence[Excerpt]) -> float | None:
    """Return UTF-8 bytes a token over the excerpts whose tokens are known; None where there are none."""
    known = [one for one in excerpts if one.num_tokens]
    num_tokens = sum(one.num_tokens or 0 for one in known)
    num_bytes = sum(len(one.text.encode("utf-8", "surrogatepass")) for one in known)
    return num_bytes / num_tokens if num_tokens else None


def describe_languages(excerpts: Sequence[Excerpt]) -> dict[str, Any]:
    """Return the number of excerpts in each language, the most frequent first, or why that was not measured."""
    if find_spec("py3langid") is None:
        return {"not_measured": f"telling languages needs py3langid: {install_extra('quality')}"}
    import py3langid  # takes a second, and only this needs it

    texts = [one.text.strip()[:LANGUAGE_CHARACTERS] for one in excerpts]
    texts = [text for text in texts if len(text) >= LANGUAGE_FEWEST_CHARACTERS]
    found = Counter(str(py3langid.classify(text)[0]) for text in texts)
    return {
        "excerpts": len(texts),
        "too_short": len(excerpts) - len(texts),
        "by_language": [
            {"language": language, "excerpts": count, "share": count / len(texts)}
            for language, count in sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
        ],
    }


def _quantiles(ratios: Sequence[float]) -> dict[str, float] | None:
    if not ratios:
        return None
    names = {"lowest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "highest": 1.0}
    values = np.quantile(ratios, list(names.values()), method="inverted_cdf")
    return dict(zip(names, values.tolist(), strict=True))


def _histogram(ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Return the number of excerpts by ratio in steps of a half, all from 10 on together."""
    counts = Counter(min(int(2 * ratio), 20) for ratio in ratios)
    return [
        {"from": step / 2, "to": (step + 1) / 2 if step < 20 else None, "excerpts": counts[step]}
        for step in range(min(counts, default=0), max(counts, default=-1) + 1)
    ]
