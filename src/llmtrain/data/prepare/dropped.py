"""dropped.jsonl, beside the shards: the first documents that each rule of each quality step left out, to be looked at.

    {"step": 2, "name": "gopher", "rule": "stop_words", "source": "docs:a.jsonl:17", "characters": 812, "text": "…"}

`text` is the beginning of the text as the step was given it; a duplicate has `repeats`, the source of the earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.atomic import write_text
from llmtrain.data.prepare.documents import CorpusDocument
from llmtrain.data.prepare.encode import source_of
from llmtrain.data.prepare.rereading import ScannedUnit
from llmtrain.data.prepare.selection import Corpus

DROPPED_NAME = "dropped.jsonl"
PER_RULE = 3
"""Documents of each rule."""
SHOWN_CHARS = 500
SEARCHED_BYTES = 1 << 30
"""They are looked for in this much text from the beginning, since it is read once more for them."""


def write_dropped(folder: Path, corpus: Corpus) -> None:
    """Write the file into `folder`; there is none when no step left out any. Raises RunError when the text changed."""
    chosen = _chosen(corpus)
    wanted = {*chosen, *(corpus.originals[number] for number in chosen if number in corpus.originals)}
    found = {number: (unit, document) for number, unit, document in _read(corpus, wanted)}
    entries = [
        _entry(corpus, number, found) for number in sorted(chosen, key=lambda one: (corpus.dropped_by[one], one))
    ]
    if entries:
        write_text(folder / DROPPED_NAME, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def read_dropped(folder: Path) -> list[dict[str, Any]]:
    """Return the documents that the file in `folder` has; none where there is no file."""
    try:
        lines = (folder / DROPPED_NAME).read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    return [json.loads(line) for line in lines if line]


def _chosen(corpus: Corpus) -> list[int]:
    within = int(np.searchsorted(np.cumsum(corpus.version_bytes[0]), SEARCHED_BYTES)) + 1
    return [
        number
        for index in range(len(corpus.steps.plan.rules))
        for number in np.flatnonzero(corpus.dropped_by[:within] == index + 1)[:PER_RULE].tolist()
    ]


def _read(corpus: Corpus, wanted: set[int]) -> Iterator[tuple[int, ScannedUnit, CorpusDocument]]:
    """Yield the documents as their files have them, up to the last that is wanted."""
    if not wanted:
        return
    mask = np.zeros(len(corpus.fates), np.bool_)
    mask[list(wanted)] = True
    last = max(wanted)
    for unit, piece in corpus.pieces_with(mask):
        documents = corpus.read_raw(unit, piece)
        for index in np.flatnonzero(mask[unit.span]).tolist():
            yield unit.first_document + index, unit, documents[index]
        if unit.span.stop > last:
            return


def _entry(corpus: Corpus, number: int, found: dict[int, tuple[ScannedUnit, CorpusDocument]]) -> dict[str, Any]:
    unit, document = found[number]
    plan = corpus.steps.plan
    rule = plan.rules[corpus.dropped_by[number] - 1]
    [text] = plan.alter([document.text], until=rule.position)
    entry = {
        "step": rule.position,
        "name": corpus.steps.options[rule.position].name,
        "rule": rule.name,
        "source": source_of(unit, document),
        "characters": len(text),
        "text": text[:SHOWN_CHARS],
    }
    if (original := corpus.originals.get(number)) is not None:
        entry["repeats"] = source_of(*found[original])
    return entry
