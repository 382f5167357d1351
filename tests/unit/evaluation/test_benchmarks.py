"""`eval --tasks`: the harness's scores for a task made of local files, those of its own model where it has one."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.cli.app import run as command
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.verbs.evaluate import evaluate
from tests.support.bfloat16 import no_bfloat16_products, set_native_bfloat16, store_in_bfloat16
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_huggingface import tiny_network
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_config

QUESTIONS = [
    {"question": "def f(x):", "choices": ["return x", "cat", "import x - 1"], "answer": 0},
    {"question": "x + 1 is", "choices": ["old", "x - 1", "a much longer answer than the others"], "answer": 2},
    {"question": "g", "choices": ["(x)", "def", "(y)"], "answer": 0},
    {"question": "return", "choices": ["x", "x + 1", "y"], "answer": 1},
]
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[2]}} {{choices[2]}} {{choices[2]}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = []
    for kind, keys in KINDS.items():
        about = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}",
        }
        files.append(str(write_config(folder / f"{kind}.yaml", {**about, **keys})))
    return files


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "network"
    tokenizer = tiny_chat_tokenizer(CHATML, adds_bos=True)
    tokenizer.save_pretrained(folder)
    tiny_network("llama", vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(folder)
    return folder


def scores(model: Path, tasks: list[str], root: Path, **settings: Any) -> dict[str, dict[str, float]]:
    found = evaluate(str(model), settings={"tasks": tasks, **settings}, root_dir=str(root))
    assert json.loads((Path(found["output"]) / "metrics.json").read_text())["tasks"] == found["tasks"]
    return {name: task["scores"] for name, task in found["tasks"].items()}


def test_scores_are_those_of_the_harness_s_own_model(network: Path, tasks: list[str], tmp_path: Path) -> None:
    ours = scores(network, tasks, tmp_path, batch_size=3)
    own = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(network),
        tokenizer=AutoTokenizer.from_pretrained(network),
        batch_size=1,
        max_length=64,
        device="cpu",
    )
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    theirs = run_harness(own, loaded, log_samples=False)
    assert theirs is not None
    compared = 0
    for name, found in ours.items():
        for metric, value in found.items():
            wanted = theirs["results"][name][f"{metric},none"]
            if isinstance(wanted, float) and "stderr" not in metric:
                assert value == pytest.approx(wanted, rel=1e-4), (name, metric)
                compared += 1
    assert compared == 6


def test_a_model_stored_in_bfloat16_is_computed_in_float32_where_bfloat16_is_emulated(
    network: Path, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store_in_bfloat16(Path(shutil.copytree(network, tmp_path / "stored")))
    set_native_bfloat16(monkeypatch, native=False)
    with no_bfloat16_products():
        found = scores(stored, tasks, tmp_path)
    assert set(found) == {f"local_{kind}" for kind in KINDS}


def test_benchmarks_measure_the_native_decoder(tasks: list[str], tmp_path: Path) -> None:
    decoder = write_tiny_model(tmp_path / "decoder")
    tokenizer = load_tokenizer(tmp_path / "decoder")
    found = scores(tmp_path / "decoder", tasks, tmp_path)

    def log_probability(question: str, choice: str) -> float:
        context, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {choice}")
        with torch.no_grad():
            logits = decoder.logits(torch.tensor([whole[:-1]]))[0]
        start = len(context) - 1
        return -float(F.cross_entropy(logits[start:], torch.tensor(whole[start + 1 :]), reduction="sum"))

    right = 0
    for row in QUESTIONS:
        likely = [log_probability(str(row["question"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        right += likely.index(max(likely)) == row["answer"]
    assert found["local_choices"]["acc"] == right / 4
    assert 0 < found["local_rolling"]["bits_per_byte"] < 30
    assert math.isfinite(found["local_writing"]["chrf"])


def test_the_command_prints_a_table(network: Path, tasks: list[str], tmp_path: Path, capsys: Any) -> None:
    line = ["eval", str(network), "--tasks", tasks[0], "--root-dir", str(tmp_path), "--max-samples", "2"]
    assert command([*line, "--num-fewshot", "1"]) == 0
    out = capsys.readouterr().out
    rows = [row.split() for row in out.splitlines() if "local_choices" in row]
    assert [row[:2] for row in rows] == [["local_choices", "acc"], ["local_choices", "acc_norm"]]
    assert rows[0][-2:] == ["1", "2"], "one example before, two rows"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["gone.yaml"]}, "gone.yaml: no such file"),
        ({"tasks": ["no_such_task_of_all"]}, "no_such_task_of_all cannot be loaded"),
        ({"temperature": 1.0}, "--temperature is for rows"),
        ({"baseline": "x"}, "measure the baseline by the same --tasks"),
    ],
)
def test_mistakes_are_one_message(
    network: Path, tasks: list[str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(str(network), settings={"tasks": tasks[:1], **settings}, root_dir=str(tmp_path))


def test_without_the_harness_it_says_what_to_install(
    network: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.verbs.evaluate.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\[eval\]'"):
        evaluate(str(network), settings={"tasks": tasks[:1]})


def test_a_task_that_draws_at_random_draws_the_same_each_time(network: Path, tasks: list[str], tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.txt"
    (tmp_path / "drawing.py").write_text(
        f"""
import random, datasets
def shuffled(docs):
    rows = [dict(doc) for doc in docs]
    for row in rows:
        random.shuffle(row["choices"])
    with open({str(drawn)!r}, "a") as file:
        print([row["choices"] for row in rows], file=file)
    return datasets.Dataset.from_list(rows)
"""
    )
    text = Path(tasks[0]).read_text().replace("local_choices", "local_drawing")
    (tmp_path / "drawing.yaml").write_text(f"{text}process_docs: !function drawing.shuffled\n")
    for seed in (1, 2):
        random.seed(seed)
        before = random.getstate()
        scores(network, [str(tmp_path / "drawing.yaml")], tmp_path)
        assert random.getstate() == before
    lines = drawn.read_text().splitlines()  # the harness asks for the rows several times
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    assert len(set(lines)) > 1
