"""`eval` of a tuned run: by its own config or one that ships, by one process or two; what it was trained on."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError, Preempted
from llmtrain.evaluation.answers_in_training import AnswersInTraining
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.train import train
from tests.support.tiny_huggingface import write_tiny_chat_folder
from tests.support.tiny_run import weight_hash, write_config
from tests.support.worker_groups import GroupServer

WORDS = ["red", "green", "blue", "round", "old"]


def write_rows(file: Path, numbers: range) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for number in numbers:
            words = [WORDS[(number + place) % 5] for place in range(1 + number % 3)]
            turns = [{"role": "user", "content": f"{number} {' '.join(words)}"}]
            turns.append({"role": "assistant", "content": " ".join(reversed(words))})
            out.write(json.dumps({"messages": turns}) + "\n")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: data/, data/eval/, base/ and the run `tuned`, which was trained on ten of the questions."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_chat_folder(folder / "base")
    write_rows(folder / "data" / "rows.jsonl", range(60))
    for name, numbers in {"test": range(50, 70), "dev": range(100, 110), "adversarial": range(200, 205)}.items():
        write_rows(folder / "data" / "eval" / f"{name}.jsonl", numbers)
    keys: dict[str, Any] = {
        "run": {"name": "tuned", "seed": 7, "device": "cpu"},
        "model": {"name": "huggingface", "path": str(folder / "base"), "lora": {"r": 4}},
        "data": {
            "name": "chat",
            "train": str(folder / "data" / "rows.jsonl"),
            "seq_len": 96,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"max_steps": 12, "micro_batch_size": 4, "precision": "32", "compile": False},
        "optimizer": {"lr": 0.01},
        "scheduler": {"warmup_steps": 2},
        "evaluation": {"data": str(folder / "data" / "eval" / "test.jsonl"), "max_new_tokens": 12},
        "tracking": {"tensorboard": {"enabled": False}},
        "output": {"root_dir": str(folder / "runs"), "run_id": "tuned"},
    }
    train(load_config(str(write_config(folder / "tuned.yaml", keys))))
    return folder


def test_the_run_s_own_config_says_what_is_asked(tuned: Path) -> None:
    found = evaluate(str(tuned / "runs" / "tuned"))
    assert list(found["files"]) == ["test.jsonl"]
    assert found["output"].startswith(str(tuned / "runs" / "tuned" / "eval"))
    assert found["baseline"] == str(tuned / "base")
    assert found["comparison"]["loss"]["verdict"] == "better"
    by_config = evaluate(config=str(tuned / "tuned.yaml"), overrides=["evaluation.metrics=[rougeL]"])
    assert by_config["model"] == found["model"]
    assert by_config["scores"]["rougeL"] == found["scores"]["rougeL"]
    assert "bleu" not in by_config["scores"]


def test_questions_that_were_trained_on_are_named_and_left_out_once(tuned: Path) -> None:
    found = evaluate(str(tuned / "runs" / "tuned"), settings={"baseline": None})
    contamination = found["contamination"]
    assert (contamination["checked"], contamination["rows"], contamination["exact"]) == (True, 10, 10)
    assert contamination["named"][0] == f"{tuned}/data/eval/test.jsonl:1 = {tuned}/data/rows.jsonl:51 (exact)"
    assert contamination["scores_with"]["loss"] == found["loss"]
    lines = [json.loads(line) for line in (Path(found["output"]) / "predictions.jsonl").read_text().splitlines()]
    assert [bool(line.get("trained_on")) for line in lines] == [True] * 10 + [False] * 10
    clean = [line["scores"]["rougeL"] for line in lines[10:]]
    assert contamination["scores_without"]["rougeL"] == pytest.approx(sum(clean) / 10)


def test_the_configs_that_ship_ask_the_files_in_data_eval(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tuned)
    settings = {"max_new_tokens": 8}
    found = evaluate(config="eval", settings=settings)
    assert {name: part["rows"] for name, part in found["files"].items()} == {
        "test.jsonl": 20,
        "dev.jsonl": 10,
        "adversarial.jsonl": 5,
    }
    assert found["rows"] == 35
    base = evaluate(config="eval-baseline", settings=settings)
    assert base["model"] == found["baseline"] == str(tuned / "base")
    assert base["comparison"] == {}
    assert base["scores"] == pytest.approx(found["baseline_scores"]), "the same prompts and decoding for both"


def training_config(tuned: Path) -> str:
    return str(tuned / "tuned.yaml")


ASKING = ["evaluation.every_steps=4", "evaluation.train_samples=6", "evaluation.metrics=[rougeL, chrf]"]


def test_a_model_is_asked_while_it_trains_and_trains_as_if_it_were_not(tuned: Path) -> None:
    silent = train(load_config(training_config(tuned), ["output.run_id=silent"]))
    asked = train(load_config(training_config(tuned), [*ASKING, "output.run_id=asked", "trainer.save_every_steps=4"]))
    assert weight_hash(Path(asked["run"])) == weight_hash(Path(silent["run"]))
    lines = [line for line in read_metrics(Path(asked["run"]) / "metrics.jsonl") if "eval/rougeL" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert asked["eval_chrf"] == lines[-1]["eval/chrf"] > 0

    rows = evaluation_rows(tuned)
    asked_rows = [rows[number] for number in sorted(random.Random(7).sample(range(20), 6))]
    sample = tuned / "sample.jsonl"
    sample.write_text("".join(asked_rows))
    final = evaluate(asked["run"], settings={"baseline": None, "data": str(sample)})
    assert final["scores"]["chrf"] == pytest.approx(lines[-1]["eval/chrf"]), "as `eval` measures the same rows"


def evaluation_rows(tuned: Path) -> list[str]:
    return (tuned / "data" / "eval" / "test.jsonl").read_text().splitlines(keepends=True)


def test_the_best_checkpoint_and_the_end_may_go_by_answers(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.2, 0.6, 0.4, 0.5, 0.1])

    def metrics(subject: AnswersInTraining, answers: object) -> dict[str, float]:
        return {"eval/rougeL": next(measured), "eval/chrf": 1.0}

    monkeypatch.setattr(AnswersInTraining, "metrics", metrics)
    keys = [*ASKING, "trainer.max_steps=40", "trainer.keep_best=eval/rougeL", "output.run_id=best"]
    run = train(
        load_config(training_config(tuned), [*keys, "trainer.early_stopping={patience: 2, metric: eval/rougeL}"])
    )
    assert run["steps"] == 16, "0.4 and 0.5 are no gain"
    again = evaluate(run["run"], overrides=["evaluation.metrics=[bleu]"], settings={"baseline": None})
    assert "bleu" in again["scores"], "what the run went by need not be measured again"
    assert (Path(run["run"]) / "checkpoints" / "best").resolve().name == "step_000008"


def test_a_run_that_is_asked_and_stopped_goes_on_where_it_was(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(load_config(training_config(tuned), [*ASKING, "output.run_id=unstopped"]))
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@evaluation:step=8")
    with pytest.raises(Preempted):
        train(load_config(training_config(tuned), [*ASKING, "output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    resumed = train(None, resume=str(tuned / "runs" / "stopped"))
    assert weight_hash(Path(resumed["run"])) == weight_hash(Path(whole["run"]))
    steps = [line["step"] for line in read_metrics(Path(resumed["run"]) / "metrics.jsonl") if "eval/rougeL" in line]
    assert steps == [4, 8, 12]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["evaluation.data=gone.jsonl"], "evaluation.data: gone.jsonl: no such file"),
        (["evaluation.metrics=[rogueL]"], "there is no metric 'rogueL'"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_written(tuned: Path, keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(load_config(training_config(tuned), [*ASKING, *keys, "output.run_id=refused"]))
    assert not (tuned / "runs" / "refused").exists()


@pytest.mark.slow
def test_two_processes_are_asked_what_one_is(tuned: Path, groups: GroupServer) -> None:
    keys = [*ASKING, "evaluation.train_samples=7", "evaluation.batch_size=2", "trainer.micro_batch_size=2"]
    one = train(load_config(training_config(tuned), [*keys, "trainer.global_batch_size=4", "output.run_id=one"]))
    arguments = ["train", training_config(tuned), *keys, "trainer.global_batch_size=4", "output.run_id=two"]
    group = groups.start(arguments, world_size=2)
    assert group.wait() == [0, 0], group.stderr
    two = [line for line in read_metrics(tuned / "runs" / "two" / "metrics.jsonl") if "eval/chrf" in line]
    assert [line["step"] for line in two] == [4, 8, 12]
    assert two[0]["eval/chrf"] > 0
    first = [line for line in read_metrics(Path(one["run"]) / "metrics.jsonl") if "eval/chrf" in line]
    assert two[0]["eval/chrf"] == pytest.approx(first[0]["eval/chrf"], rel=0.2), "weights differ by rounding"


@pytest.mark.slow
# Greedy takes forty seconds, and draws less than sampling does.
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.nightly), 0.9])
def test_processes_that_hold_parts_of_a_model_answer_as_one_does(
    tuned: Path, groups: GroupServer, temperature: float
) -> None:
    named = f"{temperature:.0f}"
    keys = [
        "model.lora=null",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        f"data.val={tuned / 'data' / 'eval' / 'dev.jsonl'}",
        "trainer.eval_every_steps=6",
    ]
    asking = [
        *ASKING,
        "evaluation.train_samples=7",
        "evaluation.batch_size=2",
        f"evaluation.temperature={temperature}",
        "trainer.keep_best=eval/chrf",
        "tracking.samples.prompts=[red green]",
        f"output.run_id=whole-{named}",
    ]
    whole = Path(train(load_config(training_config(tuned), [*keys, *asking]))["run"])
    parts, silent = tuned / "runs" / f"parts-{named}", tuned / "runs" / f"silent-{named}"
    cut = ["train", training_config(tuned), *keys, "distributed.strategy=fsdp"]
    for more in ([*asking, f"output.run_id={parts.name}"], [f"output.run_id={silent.name}"]):
        group = groups.start([*cut, *more], world_size=2)
        assert group.wait() == [0, 0], group.stderr

    def answers(run: Path) -> list[list[float]]:
        names = ("step", "eval/chrf", "eval/rougeL")
        return [[line[name] for name in names] for line in read_metrics(run / "metrics.jsonl") if "eval/chrf" in line]

    assert [line[0] for line in answers(parts)] == [4, 8, 12]
    assert answers(parts) == [pytest.approx(line, rel=1e-9) for line in answers(whole)], "the same text, so the same"
    best = [(run / "checkpoints" / "best").resolve().name for run in (parts, whole)]
    step, _, _ = max(answers(parts), key=lambda line: line[1])
    assert best == [f"step_{int(step):06d}"] * 2
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert weight_hash(parts) == weight_hash(silent), "asking changes nothing of the training"


@pytest.mark.slow
def test_two_processes_share_share_the_rows_and_give_what_one_gives(tuned: Path, groups: GroupServer) -> None:
    one = evaluate(str(tuned / "runs" / "tuned"))
    group = groups.start(["eval", str(tuned / "runs" / "tuned"), "--json"], world_size=2)
    assert group.wait() == [0, 0], group.stderr
    two = json.loads(group.stdout)
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-5)
    first, second = ((Path(found["output"]) / "predictions.jsonl").read_text().splitlines() for found in (one, two))
    assert [json.loads(line)["prediction"] for line in first] == [json.loads(line)["prediction"] for line in second]
