"""`prepare` with quality steps: what is written of them, and when the work is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import Manifest, StepRecord, read_manifest, write_manifest
from llmtrain.data.prepare.dropped import read_dropped
from llmtrain.data.prepare.token_shards import ensure_shards, prepare
from llmtrain.errors import ConfigError
from tests.support.planted_duplicates import plant

STEPS: list[dict[str, Any]] = [
    {"name": "length", "min_chars": 20},
    {"name": "mask_pii"},
    {"name": "exact_duplicates"},
    {"name": "near_duplicates"},
]


def _config(folder: Path, **options: Any) -> Config:
    section = {
        "input": [str(folder / "a"), str(folder / "b")],
        "output": str(folder / "out"),
        "val_fraction": 0,
        "tokenizer": {"vocab_size": 300},
        "keep_text": True,
        "steps": STEPS,
        **options,
    }
    return Config.model_validate({"data": {"name": "tokens", "train": str(folder / "out/train")}, "prepare": section})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two inputs: `a` has a short text, an address, and originals; `b` has what repeats them, exactly and nearly."""
    planted = plant(6, seed=3)
    text = planted.texts[0]
    of_a = ["short", f"{text} Write to bob@example.org.", *planted.texts[2:4]]
    of_b = [f"{text} Write to al@example.org.", f"{planted.texts[2]} More.", "short too", "short three", "short 4"]
    for name, texts in (("a", of_a), ("b", of_b)):
        (tmp_path / name).mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name / "rows.jsonl").write_text(rows)
    return tmp_path


def test_each_step_is_counted_by_rule_and_source(corpus: Path) -> None:
    result = prepare(_config(corpus))
    manifest = read_manifest(corpus / "out")
    assert manifest.counts.model_dump() == {"read": 9, "train": 3, "val": 0, "dropped": 6, "empty": 0, "errors": 0}
    length, mask, exact, near = manifest.steps
    assert [step.name for step in manifest.steps] == [step["name"] for step in STEPS]
    assert [step.documents for step in manifest.steps] == [9, 5, 5, 4]
    assert (length.dropped["too_short"].documents, length.dropped["too_short"].by_source) == (4, {"a": 1, "b": 3})
    assert length.dropped["too_short"].bytes == len("shortshort tooshort threeshort 4")
    assert (mask.altered, mask.dropped, mask.bytes_after) == (2, {}, exact.bytes)
    assert mask.bytes - mask.bytes_after == len("bob@example.orgal@example.org") - 2 * len("<email>")
    assert exact.dropped["duplicate"].by_source == near.dropped["duplicate"].by_source == {"b": 1}
    assert near.bytes_after == manifest.splits["train"].bytes
    assert near.library is not None
    assert near.library.startswith("rensa ")
    assert result["steps"] == [step.model_dump(mode="json") for step in manifest.steps]
    [shard] = manifest.splits["train"].shards
    texts = pq.read_table(corpus / "out" / shard.path)["text"].to_pylist()
    assert texts[0].endswith("Write to <email>.")


def test_some_of_what_was_dropped_can_be_looked_at(corpus: Path) -> None:
    prepare(_config(corpus))
    found = read_dropped(corpus / "out")
    assert [(one["name"], one["rule"], one["source"], one.get("repeats")) for one in found] == [
        ("length", "too_short", "a:rows.jsonl:0", None),
        ("length", "too_short", "b:rows.jsonl:2", None),
        ("length", "too_short", "b:rows.jsonl:3", None),  # and not the fourth
        ("exact_duplicates", "duplicate", "b:rows.jsonl:0", "a:rows.jsonl:1"),
        ("near_duplicates", "duplicate", "b:rows.jsonl:1", "a:rows.jsonl:2"),
    ]
    assert found[0]["text"] == "short"
    assert len(found[3]["text"]) == 500
    prepare(_config(corpus, steps=[]))
    assert read_dropped(corpus / "out") == []


def test_another_list_or_another_version_of_a_step_is_noticed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(_config(corpus))
    ensure_shards(_config(corpus))
    for steps in (STEPS[1:], STEPS[::-1], [{**STEPS[0], "min_chars": 21}, *STEPS[1:]]):
        with pytest.raises(ConfigError, match=r"made otherwise: prepare\.steps was .*, and is "):
            ensure_shards(_config(corpus, steps=steps))
    out = corpus / "out"
    manifest = read_manifest(out)

    def changed(**update: Any) -> Manifest:
        records = [record.model_copy(update=update if record.name == "mask_pii" else {}) for record in manifest.steps]
        return manifest.model_copy(update={"steps": tuple(records)})

    write_manifest(out, changed(version=0))
    with pytest.raises(ConfigError, match=r"prepare\.steps\[1\] \(mask_pii\) was version 0, and is 1"):
        ensure_shards(_config(corpus))
    write_manifest(out, changed(library="other 1.0"))
    ensure_shards(_config(corpus))  # a library alone may get new versions
    monkeypatch.setattr("llmtrain.data.prepare.quality.records._installed", lambda name: None)
    ensure_shards(_config(corpus))  # and need not be there to read shards


def test_another_function_of_ones_own_is_noticed(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_prepare.py").write_text("def step(text):\n    return text.strip()\n")
    config = _config(corpus, steps=[{"name": "own", "function": "own_prepare:step"}])
    prepare(config)
    ensure_shards(config)
    out = corpus / "out"
    manifest = read_manifest(out)
    [record] = manifest.steps
    assert record.function_sha256 is not None
    write_manifest(out, manifest.model_copy(update={"steps": (record.model_copy(update={"function_sha256": "0"}),)}))
    with pytest.raises(ConfigError, match=r"prepare\.steps\[0\] \(own\) has another function"):
        ensure_shards(config)


def test_shards_of_earlier_versions_are_still_right(corpus: Path) -> None:
    equal = {"name": "exact_duplicates"}
    for steps, old in (
        ([equal], {"min_length": 1, "deduplicate": True}),
        ([{"name": "length", "min_chars": 8}, equal], {"min_length": 8, "deduplicate": True}),
        ([], {"min_length": 0, "deduplicate": False}),
    ):
        config = _config(corpus, steps=steps)
        prepare(config)
        path = corpus / "out" / "manifest.json"
        document = json.loads(path.read_text())
        del document["steps"], document["options"]["steps"]
        document["options"] |= old
        document["counts"] |= {"duplicates": 0, "too_short": document["counts"].pop("dropped")}
        path.write_text(json.dumps(document))
        ensure_shards(config)
        assert read_manifest(corpus / "out").counts.read == 9
        with pytest.raises(ConfigError, match=r"prepare\.steps was "):
            ensure_shards(_config(corpus))


def test_a_record_names_what_differs() -> None:
    record = StepRecord(name="length", version=1)
    assert not record.differs(record.model_copy(update={"documents": 3, "library": "x 1"}))
    assert record.differs(record.model_copy(update={"version": 2}))
    assert record.differs(record.model_copy(update={"function_sha256": "0"}))
