"""Fine-tuning through the whole recipe: rows in, a folder that peft or transformers loads out; resumed bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError, Preempted, WillFailAgain
from llmtrain.training.non_finite import Policy, StepNumbers, judge
from llmtrain.training.state import RunState
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.generate import generate
from llmtrain.verbs.train import train
from tests.support.tiny_huggingface import write_tiny_chat_folder
from tests.support.tiny_run import tiny_tuning, weight_hash, write_config

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "near"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of its own and a ChatML template."""
    return write_tiny_chat_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations: the answer repeats the question's words backwards."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w") as out:
        for number in range(120):
            words = [WORDS[number % 10], WORDS[number // 10 % 10], WORDS[number * 7 % 10]][: 1 + number % 3]
            turns = [
                {"role": "user", "content": f"{number} {' '.join(words)}"},
                {"role": "assistant", "content": " ".join(reversed(words))},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def config_of(folder: Path, base: Path, rows: Path, **model: Any) -> Path:
    every = {"log_every_steps": 1, "eval_every_steps": 10, "save_every_steps": 10}
    tuned = {"name": "huggingface", "path": str(base), **model}
    keys = tiny_tuning(folder, rows, tuned, seq_len=96, max_epochs=4, **every)
    return write_config(folder / "tuned.yaml", keys)


LORA: dict[str, Any] = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("model", [LORA, {}], ids=["lora", "full"])
def test_a_tuned_model_is_better_loads_elsewhere_and_resumes_bit_for_bit(
    base: Path, rows: Path, tmp_path: Path, model: dict[str, Any], packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(config_of(tmp_path, base, rows, **model))
    keys = [f"data.packing={str(packing).lower()}"]
    whole = train(load_config(config, [*keys, "output.run_id=whole"]))
    assert whole["state"] == "finished"
    assert whole["val_loss"] < whole["first_loss"] - 0.5
    if model:
        assert whole["parameters"]["trainable"] < whole["parameters"]["total"] / 4

    folder = Path(whole["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    network = AutoModelForCausalLM.from_pretrained(base if model else folder)
    tuned = PeftModel.from_pretrained(network, folder) if model else network
    ids = tokenizer("red green", return_tensors="pt").input_ids
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        assert not torch.allclose(tuned(ids).logits, untouched, atol=1e-3)

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=7")
    with pytest.raises(Preempted):
        train(load_config(config, [*keys, "output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    stopped = train(None, resume=str(tmp_path / "runs" / "stopped"))
    assert weight_hash(Path(stopped["run"])) == weight_hash(Path(whole["run"]))


def test_packing_changes_the_number_of_items_and_not_the_rows(base: Path, rows: Path, tmp_path: Path) -> None:
    config = str(config_of(tmp_path, base, rows, **LORA))
    packed = train(load_config(config, ["trainer.max_epochs=1", "output.run_id=packed"]))
    alone = train(load_config(config, ["trainer.max_epochs=1", "output.run_id=alone", "data.packing=false"]))
    assert packed["tokens"] == alone["tokens"], "as many supervised tokens"
    assert packed["steps"] < alone["steps"] / 2


def test_few_rows_train_without_validation_and_it_is_said(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    keys = ["data.val_fraction=0.01", "data.packing=false", "trainer.micro_batch_size=1", "trainer.max_epochs=1"]
    summary = train(load_config(str(config_of(tmp_path, base, tmp_path / "few.jsonl", **LORA)), keys))
    assert (summary["state"], summary["steps"], summary["val_loss"]) == ("finished", 3, None)
    assert "data.val_fraction: 0.01 holds out none of 3 rows, which are few" in capsys.readouterr().err


def test_the_decoder_trains_on_rows_too(base: Path, rows: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, base, rows)
    model = {"name": "decoder", "d_model": 32, "num_layers": 2, "max_seq_len": 96, "attention": {"num_heads": 2}}
    text = load_config(str(config)).as_written
    start, end = text.index("model:"), text.index("data:")
    config.write_text(f"{text[:start]}model: {json.dumps(model)}\n{text[end:]}")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: the decoder has no tokenizer of its own"):
        train(load_config(str(config)))
    summary = train(load_config(str(config), [f"data.tokenizer={base}"]))
    assert summary["val_loss"] < summary["first_loss"] - 0.5
    assert AutoTokenizer.from_pretrained(summary["model"]).chat_template


def test_bad_rows_are_told_by_file_and_line_before_anything_is_written(base: Path, rows: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"messages": []}\n{"question": "?"}\nno json\n')
    config = config_of(tmp_path, base, bad)
    with pytest.raises(ConfigError) as caught:
        train(load_config(str(config)))
    for line in (121, 122, 123):
        assert f"bad.jsonl:{line}" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_names_the_rows(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge_spoilt(found: StepNumbers, state: RunState, *, policy: Policy) -> None:
        judge(found._replace(loss=float("nan")), state, policy=policy)

    monkeypatch.setattr("llmtrain.training.step.judge", judge_spoilt)
    config = str(config_of(tmp_path, base, rows, **LORA))
    with pytest.raises(WillFailAgain, match=r"sequences 0 to 1\).*Its rows: .*rows\.jsonl:\d+, .*rows\.jsonl:\d+$"):
        train(load_config(config, ["data.packing=false"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.seq_len=500", "data.seq_len is 500, but the model in .* takes at most 128 tokens"),
        ("optimizer.name=muon", "optimizer.name is muon, but no matrix of the decoder's blocks is trained"),
        ("model.lora.target_modules=[q_prj]", "q_proj"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    base: Path, rows: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(str(config_of(tmp_path, base, rows, **LORA)), [override]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", [LORA, {}], ids=["lora", "full"])
def test_a_tuned_run_is_evaluated_and_writes(
    base: Path, rows: Path, tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(config_of(tmp_path, base, rows, **model))
    run = train(load_config(config, ["output.run_id=tuned", "trainer.eval_steps=null"]))
    monkeypatch.chdir(tmp_path)
    measured = evaluate("tuned")
    assert measured["loss"] == pytest.approx(run["val_loss"], rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(run["val_loss"]), rel=1e-4)
    supervised = [json.loads(line)["messages"][1]["content"] for line in rows.read_text().splitlines()]
    held_out = evaluate("runs/latest", settings={"data": [str(rows)], "max_new_tokens": 8})
    assert held_out["tokens"] > len(supervised)
    num_bytes = sum(len(text.encode()) for text in supervised)
    assert held_out["bits_per_byte"] * num_bytes * math.log(2) == pytest.approx(
        held_out["loss"] * held_out["tokens"], rel=1e-6
    )
    assert held_out["baseline"] == str(base), "of a tuned model, what it was tuned from"
    compared = held_out["comparison"]["loss"]
    assert compared["base"] > compared["tuned"] + 0.5, "the base has learned nothing"
    assert compared["verdict"] == "better"
    asked = ["7 red green", "0 red", "11 green", "22 blue", "30 red"]
    answers = generate("tuned", prompts=asked, temperature=0.0, max_new_tokens=30, device="cpu")
    assert answers[0]["rendered"] == "<|im_start|>user\n7 red green<|im_end|>\n<|im_start|>assistant\n"
    assert "end" in {answer["ended_by"] for answer in answers}, "it has learned that an answer ends"
    (text,) = generate("tuned", prompts=["7 red green"], chat=False, max_new_tokens=4, device="cpu")
    assert "rendered" not in text
    if model:
        shutil.move(str(base), str(tmp_path / "away"))
        with pytest.raises(ConfigError, match="is an adapter, and its base model cannot be opened"):
            evaluate("tuned")
        shutil.move(str(tmp_path / "away"), str(base))


def test_a_run_tuned_on_prompts_is_asked_in_plain_text(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": " red"}) + "\n" for n in range(30)))
    run = train(load_config(str(config_of(tmp_path, base, file, **LORA)), ["trainer.max_epochs=1"]))
    (answer,) = generate(run["run"], prompts=["7:"], temperature=0.0, max_new_tokens=2, device="cpu")
    assert "rendered" not in answer
