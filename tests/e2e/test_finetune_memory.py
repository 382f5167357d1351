"""Fine-tuning in less memory, through the whole recipe: weights in 4, 8 and 16 bits, optimizer state in 8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llmtrain.config.loading.load import load_config
from llmtrain.errors import Preempted
from llmtrain.verbs.train import train
from tests.support.tiny_huggingface import write_tiny_chat_folder
from tests.support.tiny_run import tiny_tuning, weight_hash, write_config

LORA: dict[str, Any] = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nf4": ({**LORA, "quantization": "nf4"}, []),
    "int8": ({**LORA, "quantization": "int8"}, ["trainer.precision=bf16-mixed"]),
    "nf4 and adamw8bit": (
        {"lora": {"r": 64}, "quantization": "nf4"},  # adapters large enough for 8 bits
        ["optimizer.name=adamw8bit", "trainer.precision=bf16-mixed", "trainer.activation_checkpointing=true"],
    ),
    "full with adamw8bit": ({}, ["optimizer.name=adamw8bit"]),
    "full in bfloat16": ({}, ["trainer.precision=bf16-true"]),
    "full in bfloat16 with adamw8bit": ({}, ["trainer.precision=bf16-true", "optimizer.name=adamw8bit"]),
}


def config_of(folder: Path, model: dict[str, Any]) -> str:
    base = write_tiny_chat_folder(folder / "base", hidden_size=64, intermediate_size=128)
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(150)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = {"log_every_steps": 1, "eval_every_steps": 6, "save_every_steps": 6}
    tuned = {"name": "huggingface", "path": str(base), **model}
    keys = tiny_tuning(folder, folder / "rows.jsonl", tuned, seq_len=64, max_steps=20, **every)
    return str(write_config(folder / "tuned.yaml", keys))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_learns_resumes_bit_for_bit_and_loads_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, keys = RUNS[name]
    config = config_of(tmp_path, model)
    whole = train(load_config(config, [*keys, "output.run_id=whole"]))
    assert whole["val_loss"] < whole["first_loss"] - 0.5
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=9")
    with pytest.raises(Preempted):
        train(load_config(config, [*keys, "output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    stopped = train(None, resume=str(tmp_path / "runs" / "stopped"))
    assert weight_hash(Path(stopped["run"])) == weight_hash(Path(whole["run"]))

    held = optimizer_state(Path(whole["run"]))
    assert any(key.endswith("/absmax1") for key in held) is ("adamw8bit" in name)
    assert any(key.endswith("/master") for key in held) is ("bfloat16" in name)
    folder = Path(whole["model"])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        before = untouched(ids).logits
        loaded = (
            PeftModel.from_pretrained(untouched, folder)
            if model
            else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        )
        assert not torch.allclose(loaded(ids).logits, before, atol=1e-2)


def optimizer_state(run: Path) -> set[str]:
    names: set[str] = set()
    for file in (run / "checkpoints" / "latest" / "optimizer").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    return names
