"""A run on a mixture: it is what `plan` says, it tells what changes, and it is the same after a stop and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.data.tokenizers import train_bpe
from llmtrain.errors import ConfigError, Preempted
from llmtrain.planning import target as plan_target
from llmtrain.runs.events import read_events
from llmtrain.verbs.plan import plan
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash, write_config
from tests.support.token_shards import cut_stream, write_token_shards

SEQUENCES = {"web": 30, "code": 25, "extra": 10}
SEQ_LEN = 8
STAGES = {
    "by": "tokens",
    "stages": [{"from_step": 8, "weights": [1, 1, 2]}, {"from_fraction": 0.8, "weights": [0, 1, 0]}],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of shards, of so many sequences."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = train_bpe(["def f(x):\n    return x\n"], vocab_size=260)
    for number, (name, sequences) in enumerate(SEQUENCES.items(), 1):
        tokens = [tokenizer.eos_id if place % 40 == 39 else 100 + number for place in range(sequences * SEQ_LEN + 1)]
        cut = cut_stream(tokens, eos_id=tokenizer.eos_id)
        write_token_shards(folder / name, {"train": cut}, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
        tokenizer.save(folder / name / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def _quick_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_target, "GEMM_SEC", 0.01)
    monkeypatch.setattr(plan_target, "GEMM_SIZE", 64)


def config_of(folder: Path, sources: Path, asked: dict[str, dict[str, Any]], **data: Any) -> str:
    train = [{"path": str(sources / name / "train"), **keys} for name, keys in asked.items()]
    keys = {
        "run": {"device": "cpu", "seed": 7},
        "data": {"name": "tokens", "train": train, "seq_len": SEQ_LEN, **data},
        "model": {"max_seq_len": 16, "d_model": 16, "num_layers": 1, "attention": {"num_heads": 2}},
        "trainer": {"micro_batch_size": 4, "precision": "32", "compile": False, "save_every_steps": 5},
        "tracking": {"tensorboard": {"enabled": False}},
        "output": {"root_dir": str(folder / "runs")},
    }
    return str(write_config(folder / "c.yaml", keys))


def weights(web: float, code: float, extra: float) -> dict[str, dict[str, Any]]:
    return {"web": {"weight": web, "max_epochs": 1}, "code": {"weight": code}, "extra": {"weight": extra}}


def changes(run: Path) -> list[tuple[int, str]]:
    return [
        (event["sequence"], event["what"].partition(";")[0])
        for event in read_events(run / "events.jsonl")
        if event["event"] == "mixture"
    ]


def test_a_run_is_what_plan_says_and_goes_on_the_same_after_a_stop(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, sources, weights(9, 1, 0), mixture=STAGES)
    limit = "trainer.max_steps=20"
    planned = plan(load_config(config, [limit]).config)["mixture"]
    whole = train(load_config(config, [limit, "output.run_id=whole"]))
    assert whole["mixture"] == planned["sources"]
    assert [row["sequences"] for row in whole["mixture"]] == [30, 30, 20]
    told = [(place["sequence"], place["what"].partition(";")[0]) for place in planned["changes"]]
    runs = tmp_path / "runs"
    assert changes(runs / "whole") == told
    assert [what for _, what in told] == ["stage 1 begins", f"{sources}/web/train is used up", "stage 2 begins"]
    assert told[0][0] == 8 * 4
    assert told[2][0] == 16 * 4

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=11")
    with pytest.raises(Preempted):
        train(load_config(config, [limit, "output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    resumed = train(None, resume="stopped", overrides=[f"output.root_dir={runs}"])
    assert weight_hash(runs / "stopped") == weight_hash(runs / "whole")
    assert resumed["mixture"] == whole["mixture"]
    assert changes(runs / "stopped") == told


def test_stages_stay_where_they_were_when_batches_and_the_length_change(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, sources, weights(1, 1, 0), mixture=STAGES)
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=3")
    with pytest.raises(Preempted):
        train(load_config(config, ["trainer.max_steps=20", "output.run_id=one"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    runs = tmp_path / "runs"
    overrides = [f"output.root_dir={runs}", "trainer.micro_batch_size=8", "trainer.max_steps=14"]
    result = train(None, resume="one", overrides=overrides)
    assert [item for item, what in changes(runs / "one") if what.startswith("stage")] == [8 * 4, 16 * 4]
    assert sum(row["sequences"] for row in result["mixture"]) == 3 * 4 + 11 * 8
    other = [*overrides, "data.mixture.by=documents"]
    with pytest.raises(ConfigError, match="was made with another data"):
        train(None, resume="one", overrides=other)


def test_with_epochs_a_run_without_a_limit_uses_each_source_so_often_and_ends(
    tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, sources, {"web": {"epochs": 1}, "code": {"epochs": 0.2}, "extra": {"epochs": 3}})
    planned = plan(load_config(config).config)
    assert planned["run"]["steps"] == 17
    assert planned["run"]["epochs"] == pytest.approx(65 / 65)
    result = train(load_config(config, ["output.run_id=one"]))
    assert result["steps"] == 17
    assert [row["epochs"] for row in result["mixture"]] == [1, 0.2, 3]
    said = capsys.readouterr().err
    assert "46.15% of the sequences (asked: 46.15%), 30 sequences, 1 epochs" in said
    assert "before each source was used" not in said
    train(load_config(config, ["output.run_id=two", "trainer.max_steps=3"]))
    assert "the run ends after 12 sequences, before each source was used as often as" in capsys.readouterr().err
    assert changes(tmp_path / "runs/one")[-1][0] == 65


def test_a_source_of_weight_0_is_as_if_it_were_not_named(
    tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"web": {"weight": 3}, "gone": {"weight": 0}, "code": {"weight": 1}}
    config = config_of(tmp_path, sources, asked)
    train(load_config(config, ["output.run_id=with", "trainer.max_steps=3"]))
    assert f"{sources}/gone/train is left out: its weight is 0" in capsys.readouterr().err
    del asked["gone"]
    train(load_config(config_of(tmp_path, sources, asked), ["output.run_id=without", "trainer.max_steps=3"]))
    assert weight_hash(tmp_path / "runs/with") == weight_hash(tmp_path / "runs/without")


def test_stages_that_do_not_follow_each_other_are_a_mistake(tmp_path: Path, sources: Path) -> None:
    config = config_of(tmp_path, sources, weights(1, 1, 1), mixture=STAGES)
    said = r"data\.mixture\.stages\[1\] begins at step 8, but the stage before it at step 8"
    with pytest.raises(ConfigError, match=said):
        train(load_config(config, ["trainer.max_steps=10"]))
    with pytest.raises(ConfigError, match=said):
        plan(load_config(config, ["trainer.max_steps=10"]).config)


def test_summary_and_metadata_hold_what_the_mixture_came_to(tmp_path: Path, sources: Path) -> None:
    config = config_of(tmp_path, sources, weights(1, 1, 0), mixture=STAGES)
    result = train(load_config(config, ["trainer.max_steps=12", "output.run_id=one"]))
    run = tmp_path / "runs/one"
    assert json.loads((run / "summary.json").read_text())["mixture"] == result["mixture"]
    assert json.loads((run / "meta.json").read_text())["resolved"]["stage_items"] == [32, 40]
