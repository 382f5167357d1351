"""`lineage`: every ingredient of a model with its hash, through several models, and what has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llmtrain.cli.app import run as command
from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.runs.lineage import LINEAGE_NAME, hashed_files, read_lineage
from llmtrain.verbs.lineage import lineage
from llmtrain.verbs.publish import publish
from llmtrain.verbs.train import train
from tests.support.tiny_run import tiny_config, tiny_tuning, write_config

SHORT = ["trainer.max_steps=2", "trainer.eval_steps=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a model that was trained on it, and one that was tuned from that and published."""
    folder = tmp_path_factory.mktemp("lineage")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    keys = tiny_config(folder / "shards", folder / "runs")
    keys["prepare"] |= {"input": str(folder / "text"), "include": ["*.txt"]}
    train(load_config(str(write_config(folder / "base.yaml", keys)), [*SHORT, "output.run_id=base"]))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"def f{n}", "completion": f"(x): {n}"}) + "\n" for n in range(20)))
    tuning = tiny_tuning(folder, rows, {"init_from": "base"}, seq_len=32, max_steps=2)
    tuning["data"]["tokenizer"] = str(folder / "runs" / "base" / "model")
    train(load_config(str(write_config(folder / "tuned.yaml", tuning)), ["output.run_id=tuned"]))
    publish("tuned", given={"license": "mit", "to": str(folder / "out")}, root_dir=str(folder / "runs"))
    return folder


def kinds(node: dict[str, Any]) -> list[Any]:
    return [node["kind"], *([[kinds(child) for child in node["made_from"]]] if node["made_from"] else [])]


def test_a_published_model_is_followed_back_to_the_text(made: Path) -> None:
    found = lineage(str(made / "out"), root_dir=str(made / "runs"))["lineage"]
    shards = [["tokenizer"], ["training data", [["input"]]], ["validation data", [["input"]]]]
    tuned = [["base model", [["run", shards]]], ["tokenizer"], ["training data"]]
    assert kinds(found) == ["published model", [["run", tuned]]]
    (tuned_run,) = found["made_from"]
    assert (tuned_run["name"], tuned_run["facts"]["checkpoint"]) == ("tuned", "step_000002")
    (base_run,) = tuned_run["made_from"][0]["made_from"]
    data = base_run["made_from"][1]
    assert data["facts"]["files"].startswith("manifest.json ")
    assert "val/" not in data["facts"]["files"]
    assert "vocab_size 400" in data["facts"]["options"]
    assert data["facts"]["steps"] == "name exact_duplicates, version 1, documents 40, dropped 0"
    assert data["made_from"][0]["facts"]["files"] == "40"


@pytest.mark.parametrize(
    "path", ["train", "../shards/train", "train/*.parquet", "tr*", "train/shard_00000.parquet", "val/../train"]
)
def test_shards_are_recorded_however_the_config_names_them(made: Path, path: str) -> None:
    keys = ["output.run_id=named", f"data.train={made}/shards/{path}"]
    run = train(load_config(str(made / "base.yaml"), [*SHORT, *keys]))["run"]
    try:
        data = next(one for one in read_lineage(Path(run), problems=[]) if one.kind == "training data")
    finally:
        shutil.rmtree(run)
    assert set(data.files) == {"manifest.json", "train/shard_00000.parquet"}
    assert data.folder == str(made / "shards")
    assert data.changes() == []


def test_what_is_unchanged_is_said_to_be(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["lineage", str(made / "out"), "--verify", "--root-dir", str(made / "runs")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("everything is as it was\n")
    assert max(len(line) for line in out.splitlines() if " " in line.strip("│├└─ ")) <= 120


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("rows.jsonl", "rows.jsonl: its content has changed"),
        ("shards/train/shard_00000.parquet", "shard_00000.parquet: its content has changed"),
        ("shards/manifest.json", "manifest.json: its content has changed"),
        ("text/7.txt", "text have changed"),
        ("runs/base/checkpoints/step_000002/model/model.safetensors", "model.safetensors: its content has changed"),
        ("runs/tuned/checkpoints/step_000002/state.json", "state.json"),
        ("out/README.md", "README.md: its content has changed"),
    ],
)
def test_a_file_that_changed_is_named(file: str, message: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made / file
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    try:
        found = lineage(str(made / "out"), root_dir=str(made / "runs"), check=True)
        assert found["unchanged"] is False
        assert message in "\n".join(found["problems"])
        assert command(["lineage", str(made / "out"), "--verify", "--root-dir", str(made / "runs")]) == 1
        assert "✗" in capsys.readouterr().out
    finally:
        path.write_bytes(before)


def test_files_that_are_gone_are_named(made: Path) -> None:
    shutil.move(made / "text", made / "elsewhere")
    try:
        problems = lineage("base", root_dir=str(made / "runs"), check=True)["problems"]
    finally:
        shutil.move(made / "elsewhere", made / "text")
    assert any("not all of this text is here any more" in problem for problem in problems)


def test_a_run_without_a_record_says_so_and_gets_one_when_it_goes_on(made: Path) -> None:
    runs = made / "more"
    shutil.copytree(made / "runs" / "base", runs / "base", symlinks=True)
    (runs / "base" / LINEAGE_NAME).unlink()
    found = lineage("base", root_dir=str(runs))
    assert found["lineage"]["made_from"] == []
    assert "did not record its ingredients" in found["problems"][0]
    train(None, resume=str(runs / "base"), overrides=["trainer.max_steps=3"])
    assert len(lineage("base", root_dir=str(runs))["lineage"]["made_from"]) == 3


def test_the_picture_has_a_box_for_each_and_no_markup_of_theirs(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "a <b>&.svg"
    lineage("base", root_dir=str(made / "runs"), picture=str(out))
    tree = ElementTree.parse(out)
    titles = [element.text for element in tree.iter() if element.get("class") == "title"]
    assert titles[0] == "run: base"
    assert len(titles) == 6
    with pytest.raises(ConfigError, match="cannot be written"):
        lineage("base", root_dir=str(made / "runs"), picture=str(tmp_path / "gone" / "a.svg"))


def test_a_file_of_the_hub_s_cache_is_not_read_for_its_hash(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_text("weights")
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_text("{}")
    found = hashed_files(snapshot, ("*.safetensors", "config.json", "*.bin"))
    assert found["model.safetensors"] == "ab" * 32
    assert len(found["config.json"]) == 64
    assert set(found) == {"model.safetensors", "config.json"}
