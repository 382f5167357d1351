"""The list of quality steps: its order, and that one reading gives what step after step would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.prepare import documents
from llmtrain.data.prepare.documents import open_corpus
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.data.prepare.parallel import LocalExecutor
from llmtrain.data.prepare.quality.near_duplicates import NearDuplicates, SignatureFiles
from llmtrain.data.prepare.quality.plan import ExactDuplicates, Plan
from llmtrain.data.prepare.quality.step import Dropped
from llmtrain.data.prepare.selection import Corpus, Fate, scan
from llmtrain.errors import ConfigError, RunError

OWN = """
def shout(text):
    return None if "drop" in text else text.replace("loud", "LOUD!")

def fail(text):
    if "bad" in text:
        raise ValueError("bad text")
    return text

calls = []
def unsteady(text):
    calls.append(text)
    return text + str(len(calls))
"""
ASIDE = {"name": "own", "function": "own_order:shout"}


@pytest.fixture(autouse=True)
def _own_module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_order.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))


def _scanned(folder: Path, texts: list[str], steps: list[dict[str, Any]], *, num_workers: int = 1) -> Corpus:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig.model_validate(
        {"input": str(folder / "rows.jsonl"), "output": "out", "val_fraction": 0, "steps": steps, "on_error": "skip"}
    )
    reader = open_corpus(find_inputs(config), config)
    return scan(reader, options=config, scratch=folder, executor=LocalExecutor(num_workers), advance=lambda _: None)


def _outcome(corpus: Corpus) -> list[str]:
    """The last text of each document that stays, or the step and rule that dropped it, or its fate."""
    kept: dict[int, str] = {}
    stays = corpus.fates == Fate.TRAIN
    for portion in corpus.portions(stays):
        texts = [document.text for document in corpus.rereader.reread(portion)]
        kept |= {portion.unit.first_document + at: text for at, text in zip(portion.chosen, texts, strict=True)}
    rules = corpus.steps.plan.rules
    return [
        f"stays: {kept[number]}"
        if fate == Fate.TRAIN
        else f"{rules[by - 1].position} {rules[by - 1].name}"
        if fate == Fate.DROPPED
        else Fate(fate).name
        for number, (fate, by) in enumerate(zip(corpus.fates, corpus.dropped_by.tolist(), strict=True))
    ]


def _step_after_step(texts: list[str], options: list[dict[str, Any]]) -> list[str]:
    """What `_outcome` has to be, in the plainest way."""
    steps = PrepareConfig.model_validate({"input": "in", "output": "out", "steps": options}).steps
    outcome = ["" if text.strip() else "EMPTY" for text in texts]
    texts = list(texts)
    for position, step in enumerate(Plan(steps).steps):
        here = [number for number, found in enumerate(outcome) if not found]
        if isinstance(step, ExactDuplicates):
            for at, number in enumerate(here):
                if texts[number] in [texts[earlier] for earlier in here[:at]]:
                    outcome[number] = f"{position} duplicate"
        elif isinstance(step, NearDuplicates):
            files = SignatureFiles(step, None)
            files.add(step.signatures([texts[number] for number in here]))
            for at in files.duplicates(np.arange(len(here)))[0]:
                outcome[here[at]] = f"{position} duplicate"
        else:
            for number in here:
                made = step.apply(texts[number])
                if isinstance(made, Dropped):
                    outcome[number] = f"{position} {made.rule}"
                elif not made.strip():
                    outcome[number] = f"{position} empty"
                else:
                    texts[number] = made
    return [found or f"stays: {text}" for found, text in zip(outcome, texts, strict=True)]


STEPS = st.lists(
    st.sampled_from(
        [
            {"name": "exact_duplicates"},
            {"name": "near_duplicates", "ngram": 1},
            {"name": "near_duplicates", "ngram": 2, "threshold": 0.5},
            {"name": "length", "min_chars": 12},
            {"name": "length", "max_chars": 60},
            {"name": "mask_pii"},
            {"name": "c4", "skip": ["few_sentences"]},
            {"name": "c4", "skip": ["terminal_punctuation", "short_lines", "few_sentences"]},
            ASIDE,
        ]
    ),
    max_size=6,
)
PARTS = st.sampled_from(
    [
        "bob@example.org",
        "al@example.org",
        "loud",
        "drop it",
        "One two three four five.",
        "six seven\n",
        "{",
        " ",
        "8.8.8.8",
    ]
)
TEXTS = st.lists(st.lists(PARTS, max_size=5).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(TEXTS, STEPS)
def test_one_reading_gives_what_step_after_step_gives(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], steps: list[dict[str, Any]]
) -> None:
    corpus = _scanned(tmp_path_factory.mktemp("order"), texts, steps)
    assert _outcome(corpus) == _step_after_step(texts, steps)
    counts, records = corpus.counts(), corpus.step_records()
    dropped = [sum(rule.documents for rule in record.dropped.values()) for record in records]
    assert sum(dropped) == counts.dropped
    documents_left, bytes_left = counts.read - counts.empty, sum(len(text.encode()) for text in texts if text.strip())
    for record, number in zip(records, dropped, strict=True):
        assert (record.documents, record.bytes) == (documents_left, bytes_left)
        assert record.altered <= documents_left - number
        documents_left, bytes_left = documents_left - number, record.bytes_after
        for rule in record.dropped.values():
            assert rule.by_source == {corpus.reader.inputs[0].name: rule.documents}
    assert (documents_left, bytes_left) == (counts.train, corpus.kept_bytes())


def test_neither_workers_nor_blocks_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 700)
    texts = [f"text {n % 37} " + "word " * (n % 37) + ("bob@example.org" if n % 5 else "") for n in range(300)]
    steps: list[dict[str, Any]] = [
        {"name": "mask_pii"},
        {"name": "near_duplicates", "ngram": 1},
        ASIDE,
        {"name": "exact_duplicates"},
    ]
    corpora = [_scanned(tmp_path, texts, steps, num_workers=workers) for workers in (1, 2, 7)]
    assert len(corpora[0].units) > 20
    for other in corpora[1:]:
        for name in ("version_hashes", "version_bytes", "fates", "dropped_by"):
            assert np.array_equal(getattr(other, name), getattr(corpora[0], name)), name
        assert other.originals == corpora[0].originals
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]  # nothing of the search is left


def test_masking_before_the_search_for_duplicates_finds_those_that_differ_in_an_address(tmp_path: Path) -> None:
    texts = ["write to bob@example.org", "write to al@example.org"]
    mask, equal = {"name": "mask_pii"}, {"name": "exact_duplicates"}
    assert _outcome(_scanned(tmp_path, texts, [mask, equal])) == ["stays: write to <email>", "1 duplicate"]
    assert _outcome(_scanned(tmp_path, texts, [equal, mask])) == ["stays: write to <email>"] * 2


def test_a_document_that_an_earlier_step_dropped_is_no_original(tmp_path: Path) -> None:
    texts = ["one two three four five", "One two three four five!"]
    near, short = {"name": "near_duplicates"}, {"name": "length", "min_chars": 24}
    assert _outcome(_scanned(tmp_path, texts, [short, near])) == ["0 too_short", f"stays: {texts[1]}"]
    assert _outcome(_scanned(tmp_path, texts, [near, short])) == ["1 too_short", "0 duplicate"]


def test_a_step_twice_does_nothing_the_second_time(tmp_path: Path) -> None:
    texts = [f"a text about {n // 2} and bob{n}@example.org" for n in range(10)]
    for step in ({"name": "exact_duplicates"}, {"name": "near_duplicates"}, {"name": "mask_pii"}):
        records = _scanned(tmp_path, texts, [step, step]).step_records()
        assert (records[1].altered, records[1].dropped) == (0, {})


def test_a_fault_of_ones_own_function_has_the_place_of_the_document(tmp_path: Path) -> None:
    steps = [{"name": "length"}, {"name": "own", "function": "own_order:fail"}]
    corpus = _scanned(tmp_path, ["good", "a bad one", "good too"], steps)
    assert _outcome(corpus) == ["stays: good", "ERROR", "stays: good too"]
    [error] = corpus.errors
    assert error.startswith(
        f"{tmp_path}/rows.jsonl:2: prepare.steps[1]: own_order:fail failed (ValueError: bad text at "
    )
    assert error.endswith("own_order.py:7)")
    assert corpus.counts().errors == 1
    config = PrepareConfig.model_validate({"input": str(tmp_path), "output": "out", "steps": steps})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: prepare\.steps\[1\].*prepare\.on_error: skip"):
        scan(
            open_corpus(find_inputs(config), config), options=config, executor=LocalExecutor(2), advance=lambda _: None
        )


def test_a_function_that_does_not_repeat_itself_ends_it(tmp_path: Path) -> None:
    corpus = _scanned(tmp_path, ["text"], [{"name": "own", "function": "own_order:unsteady"}])
    with pytest.raises(RunError, match="the same for the same text, whenever it is called: it made another text"):
        _outcome(corpus)
