"""Which documents stay and which are held out."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.prepare import documents
from llmtrain.data.prepare.documents import open_corpus
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.data.prepare.parallel import LocalExecutor
from llmtrain.data.prepare.selection import Corpus, Fate, fingerprint, scan, select, training_sample
from llmtrain.errors import ConfigError, RunError


def _scan(folder: Path, *, num_workers: int = 1, **options: Any) -> tuple[Corpus, PrepareConfig]:
    config = PrepareConfig.model_validate({"input": str(folder), "output": "out", "val_fraction": 0, **options})
    reader = open_corpus(find_inputs(config), config)
    corpus = scan(reader, options=config, executor=LocalExecutor(num_workers), advance=lambda _: None)
    return corpus, config


def _select(folder: Path, **options: Any) -> Corpus:
    return select(*_scan(folder, **options))


def _write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def test_every_document_has_one_fate_and_the_first_of_equal_ones_stays(tmp_path: Path) -> None:
    texts = {
        "a.txt": "one\n",
        "b.txt": "two",
        "c.txt": "one\n",
        "d.txt": "",
        "e.txt": " \n",
        "f.txt": "x",
        "g.txt": "one",
    }
    (_write(tmp_path, texts) / "h.txt").write_bytes(b"\xff")
    steps = [{"name": "length", "min_chars": 2}, {"name": "exact_duplicates"}]
    corpus = _select(tmp_path, steps=steps, on_error="skip")
    assert [Fate(fate).name for fate in corpus.fates] == [
        "TRAIN", "TRAIN", "DROPPED", "EMPTY", "EMPTY", "DROPPED", "TRAIN", "ERROR",
    ]  # fmt: skip
    assert corpus.counts().model_dump() == {
        "read": 8, "train": 3, "val": 0, "dropped": 2, "empty": 2, "errors": 1,
    }  # fmt: skip
    assert corpus.kept_bytes() == len("one\ntwoone")
    assert _select(tmp_path, steps=[], on_error="skip").counts().train == 5


def test_length_counts_characters_not_bytes(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "éé", "b.txt": "ééé"})
    assert _select(tmp_path, steps=[{"name": "length", "min_chars": 3}]).counts().dropped == 1


def test_a_lost_document_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "one"})
    counts = _select(tmp_path).counts()
    with pytest.raises(AssertionError, match="documents were lost"):
        counts.model_copy(update={"train": 0}).check()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, alphabet=st.characters(codec="utf-8", exclude_characters="\r")), min_size=1))
def test_what_is_held_out_depends_on_the_text_alone(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    def held_out(order: list[str], steps: list[dict[str, str]]) -> set[str]:
        folder = _write(tmp_path_factory.mktemp("order"), {f"{i:03d}.txt": text for i, text in enumerate(order)})
        corpus = _select(folder, val_fraction=0.5, steps=steps)
        return {text for text, fate in zip(order, corpus.fates, strict=True) if fate == Fate.VAL}

    kept = {text for text in texts if text.strip()}
    expected = {text for text in kept if hashlib.sha256(text.encode()).digest()[0] < 128}
    assume(expected not in (set(), kept))
    for order in (texts, texts[::-1]):
        for steps in ([{"name": "exact_duplicates"}], []):
            assert held_out(order, steps) == expected


def test_the_held_out_share_is_the_fraction(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(20_000)))
    counts = _select(tmp_path, val_fraction=0.05).counts()
    assert abs(counts.val - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    assert counts.train + counts.val == 20_000


def test_nothing_held_out_is_a_clear_error(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "one"})
    with pytest.raises(ConfigError, match=r"val_fraction: 1e-06 of 1 document held out none: .* too few documents"):
        _select(tmp_path, val_fraction=1e-6)
    with pytest.raises(ConfigError, match="held out all of them"):
        _select(tmp_path, val_fraction=0.999999)


def test_nothing_left_is_a_clear_error(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "", "b.txt": "x"})
    with pytest.raises(
        ConfigError, match=r"of 2 documents read, 1 has no text, 0 have errors, length dropped 1 \(too_short\)"
    ):
        _select(tmp_path, steps=[{"name": "length", "min_chars": 5}])
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="there is no document"):
        _select(tmp_path / "rows")


def test_the_first_bad_line_ends_it_or_is_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 40)  # lines are counted across blocks
    lines = [f'{{"text": "line {number}"}}' for number in range(1, 21)]
    lines[11], lines[17] = "{", '{"txt": "?"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for num_workers in (1, 4):
        with pytest.raises(ConfigError, match=r"rows\.jsonl:12: is no JSON .*prepare\.on_error: skip"):
            _scan(tmp_path, num_workers=num_workers)
    corpus, _ = _scan(tmp_path, on_error="skip")
    assert [error.split(": ")[0] for error in corpus.errors] == [f"{tmp_path}/rows.jsonl:{line}" for line in (12, 18)]
    assert corpus.counts().errors == 2
    assert f"left out: {tmp_path}/rows.jsonl:18: has no field 'text', only 'txt'" in caplog.text


def test_many_bad_lines_are_counted_and_the_first_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + "{\n" * 100)
    corpus, _ = _scan(tmp_path, on_error="skip")
    assert (len(corpus.errors), corpus.counts().errors) == (20, 100)
    assert "left out: 80 more bad files and rows" in caplog.text


def test_the_fingerprint_is_that_of_the_scan_and_changes_with_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 16)
    _write(tmp_path, {"a.txt": "x" * 100, "b.txt": "", "c.jsonl": '{"text": "x"}\n' * 9, "d.jsonl": ""})
    corpus, config = _scan(tmp_path)
    assert fingerprint(find_inputs(config), executor=LocalExecutor(2)) == corpus.inputs
    assert (corpus.inputs[0].files, corpus.inputs[0].bytes) == (4, 100 + 14 * 9)
    (tmp_path / "a.txt").write_text("x" * 50 + "y" + "x" * 49)
    [changed] = fingerprint(find_inputs(config), executor=LocalExecutor(2))
    assert changed is not None
    assert changed.sha256 != corpus.inputs[0].sha256


def test_a_file_that_changes_while_it_is_read_ends_it(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "one"})
    corpus = _select(tmp_path)
    everything = np.ones(1, np.bool_)
    [portion] = corpus.portions(everything)
    assert [document.text for document in corpus.rereader.reread(portion)] == ["one"]
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(RunError, match=r"a\.txt changed while it was read"):
        corpus.rereader.reread(portion)
    _write(tmp_path, {"b.txt": "another"})
    corpus = replace(corpus, reader=open_corpus(find_inputs(config := _scan(tmp_path)[1]), config))
    with pytest.raises(RunError, match=r"a\.txt changed while it was read"):
        list(corpus.pieces_with(everything))


def test_the_sample_for_the_tokenizer_is_drawn_by_hash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "document {n:04d}"}}\n' for n in range(1000)))
    corpus = _select(tmp_path, val_fraction=0.1)
    train = corpus.fates == Fate.TRAIN
    assert (training_sample(corpus, max_bytes=10**9) == train).all()
    sample = training_sample(corpus, max_bytes=130 * 13)
    assert sample.sum() == 130
    assert not sample[~train].any()
    assert np.flatnonzero(sample)[0] < 50 < 950 < np.flatnonzero(sample)[-1]
    assert training_sample(corpus, max_bytes=1).sum() == 1
