"""`eval` of a tuned run: by its own config or one that ships, by one process or two; what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.load import load_config
from llmtrain.recipes.evaluate import evaluate
from llmtrain.recipes.train import train
from llmtrain.testing.chat import CHATML, tiny_chat_tokenizer
from llmtrain.testing.gang import GangServer
from llmtrain.testing.tiny_huggingface import tiny_network
from llmtrain.testing.tiny_run import write_config

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
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(folder / "base")
    network = tiny_network("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    network.save_pretrained(folder / "base")
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


@pytest.mark.slow
def test_two_processes_share_the_rows_and_give_what_one_gives(tuned: Path, gangs: GangServer) -> None:
    one = evaluate(str(tuned / "runs" / "tuned"))
    gang = gangs.start(["eval", str(tuned / "runs" / "tuned"), "--json"], world_size=2)
    assert gang.wait() == [0, 0], gang.stderr
    two = json.loads(gang.stdout)
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-5)
    first, second = ((Path(found["output"]) / "predictions.jsonl").read_text().splitlines() for found in (one, two))
    assert [json.loads(line)["prediction"] for line in first] == [json.loads(line)["prediction"] for line in second]
