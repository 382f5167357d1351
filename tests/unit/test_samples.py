"""Samples while a run trains: written at each evaluation, and training stays the same; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load_config
from llmtrain.recipes.pages.document import run_document
from llmtrain.recipes.train import train
from llmtrain.testing.tiny_run import tiny_config, weight_hash, write_config

PROMPTS = ["def f", "import "]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("samples")
    return str(write_config(folder / "tiny.yaml", tiny_config(folder / "shards", folder / "runs")))


def train_with(config: str, run_id: str, *overrides: str) -> Path:
    """A run of six steps with evaluations after three and six."""
    short = ["trainer.max_steps=6", "trainer.eval_every_steps=3", "trainer.eval_steps=1", f"output.run_id={run_id}"]
    return Path(train(load_config(config, [*short, *overrides]))["run"])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_model_in_training_writes_at_each_evaluation_and_trains_the_same(config: str) -> None:
    asked = [f"tracking.samples.prompts={json.dumps(PROMPTS)}", "tracking.samples.max_new_tokens=9"]
    with_samples, again, without = (
        train_with(config, "with", *asked),
        train_with(config, "again", *asked),
        train_with(config, "without"),
    )
    lines = lines_of(with_samples)
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, prompt) for s in (3, 6) for prompt in PROMPTS]
    assert all(line["completion"] for line in lines)
    assert lines_of(again) == lines
    assert not (without / "samples.jsonl").exists()
    assert weight_hash(with_samples) == weight_hash(without)
    assert run_document(with_samples)["samples"] == lines


@pytest.mark.slow
def test_samples_that_cannot_be_written_cost_a_warning_and_no_step(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, lines: list[str]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtrain.recipes.run.samples.append_lines", refuse)
    folder = train_with(config, "full", 'tracking.samples.prompts=["a"]')
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    said = capsys.readouterr().err
    assert said.count("samples.jsonl cannot be written; the run goes on without it (No space left on device)") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f'tracking.samples.prompts=["{"x y " * 60}"]'], r"prompts: prompt 1 has \d+ tokens, but the model's context"),
        (['tracking.samples.prompts=["a"]', "data.val=null"], r"there is no validation data; name it in data.val"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_run(config: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(config, [*overrides, "output.run_id=refused"]))
    assert not (Path(config).parent / "runs" / "refused").exists()


def test_with_split_heads_nobody_can_be_asked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    split = ["distributed.strategy=fsdp_tp", "distributed.tensor_parallel=2"]
    assert run(["validate", config, *split, 'tracking.samples.prompts=["a"]']) == 2
    assert "with distributed.strategy fsdp_tp each process has a part of its heads" in capsys.readouterr().err
