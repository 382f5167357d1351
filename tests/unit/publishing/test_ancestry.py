"""What shards were made of is compared with what would be made now, whatever options they were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import read_manifest
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.publishing.ancestry import _changed_inputs
from llmtrain.runs.lineage import Ingredient
from llmtrain.training.setup.ingredients import _facts


def _made(folder: Path, **options: Any) -> Ingredient:
    (folder / "in.jsonl").write_text("".join(f'{{"body": "document number {n}"}}\n' for n in range(9)))
    section = {"input": str(folder / "in.jsonl"), "output": str(folder / "out"), "tokenizer": {"vocab_size": 300}}
    data = {"name": "tokens", "train": str(folder / "out/train")}
    prepare(Config.model_validate({"data": data, "prepare": {**section, "val_fraction": 0, **options}}))
    return Ingredient(
        kind="training data", name="out", folder=str(folder / "out"), facts=_facts(read_manifest(folder / "out"))
    )


def test_an_adapter_and_a_step_of_ones_own_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_ancestry.py").write_text(
        "def row(row):\n    return row['body']\n\ndef step(text):\n    return text\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    steps = [{"name": "own", "function": "own_ancestry:step"}, {"name": "length", "min_chars": 3}]
    found = _made(tmp_path, adapter="own_ancestry:row", steps=steps)
    assert _changed_inputs(found, tmp_path / "out") == []
    assert [step["name"] for step in found.facts["steps"]] == ["own", "length"]
    (tmp_path / "in.jsonl").write_text('{"body": "another"}\n')
    [problem] = _changed_inputs(found, tmp_path / "out")
    assert "have changed" in problem


def test_runs_of_earlier_versions_are_compared(tmp_path: Path) -> None:
    found = _made(tmp_path)
    options = dict(found.facts["options"])
    del options["steps"]
    old = {**options, "min_length": 1, "deduplicate": True}
    earlier = Ingredient(kind=found.kind, name="out", folder=found.folder, facts={**found.facts, "options": old})
    assert _changed_inputs(earlier, tmp_path / "out") == []
