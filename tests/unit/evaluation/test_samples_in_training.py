"""Samples while a run trains: written at each evaluation, and training stays the same; what cannot be is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.running import SamplesConfig
from llmtrain.errors import ConfigError
from llmtrain.evaluation.samples_in_training import Samples
from llmtrain.reports.document import run_document
from llmtrain.verbs.train import train
from tests.support.tiny_run import tiny_config, weight_hash, write_config

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
def test_samples_that_cannot_be_written_give_a_warning_and_stop_nothing(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, lines: list[str]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtrain.evaluation.samples_in_training.append_lines", refuse)
    folder = train_with(config, "full", 'tracking.samples.prompts=["a"]')
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    said = capsys.readouterr().err
    assert said.count("samples.jsonl cannot be written; the run goes on without it (No space left on device)") == 1


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("max_new_tokens", "batches"), [(64, [16, 4]), (1000, [4] * 5), (9000, [1] * 20)])
def test_ranks_meet_before_each_batch_whether_they_write_or_not(
    is_main: bool, max_new_tokens: int, batches: list[int], tmp_path: Path
) -> None:
    """So that none waits longer than a batch takes."""
    happened: list[Any] = []

    class Writer:
        model, chats = nn.Linear(1, 1), False

        def generate(self, prompts: list[str], **settings: Any) -> list[Any]:
            happened.append((prompts, settings["seed"]))
            return [SimpleNamespace(prompt=prompt, completion="!") for prompt in prompts]

    settings = SamplesConfig(prompts=[str(number) for number in range(20)], max_new_tokens=max_new_tokens)
    engine: Any = SimpleNamespace(is_main=is_main, is_sharded=False, generating=lambda _: nullcontext())
    writer: Any = Writer()
    samples = Samples(writer, settings, seed=7, engine=engine)
    samples.write(tmp_path, step=3, before_batch=lambda: happened.append("met"))
    assert happened.count("met") == len(batches)
    if not is_main:
        assert set(happened) == {"met"}
        return
    assert happened[0::2] == ["met"] * len(batches)
    assert [len(prompts) for prompts, _ in happened[1::2]] == batches
    assert len({seed for _, seed in happened[1::2]}) == len(batches), "equal prompts of two batches differ"
    assert [line["prompt"] for line in lines_of(tmp_path)] == settings.prompts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f'tracking.samples.prompts=["{"x y " * 60}"]'], r"prompts: prompt 1 has \d+ tokens, but the model's context"),
        (['tracking.samples.prompts=["a"]', "data.val=null"], r"there is no validation data; name it in data.val"),
    ],
)
def test_samples_that_cannot_be_generated_are_rejected_before_the_run(
    config: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(config, [*overrides, "output.run_id=refused"]))
    assert not (Path(config).parent / "runs" / "refused").exists()


def test_samples_are_rejected_with_tensor_parallelism(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    split = ["distributed.strategy=fsdp_tp", "distributed.tensor_parallel=2"]
    assert run(["validate", config, *split, 'tracking.samples.prompts=["a"]']) == 2
    assert "with distributed.strategy fsdp_tp each process has a part of its heads" in capsys.readouterr().err
