"""From a run to what others load: its best checkpoint, compared on its own validation data; adapters of the decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmtrain.config.loading.load import load_config
from llmtrain.publishing.exported import Request
from llmtrain.verbs.export import export
from llmtrain.verbs.merge import merge
from llmtrain.verbs.train import train
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_tuning, write_config


def test_a_runs_best_model_is_compared_on_its_validation_data(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(load_config(str(config_file), ["output.run_id=one"]))
    monkeypatch.chdir(tmp_path)
    result = export("latest", Request(device="cpu"))
    assert result["output"] == str(tmp_path / "artifacts" / "hf" / "one")
    assert result["compared_on"].endswith("val")
    assert result["rows"] == 8
    assert result["source"]["name"] == "one"
    assert result["source"]["checkpoint"] == Path(done["model"]).resolve().parent.name
    AutoModelForCausalLM.from_pretrained(result["output"])


@pytest.mark.parametrize("variant", ["mha", "complex"])
def test_what_a_run_merged_is_held_against_base_and_adapter(tmp_path: Path, variant: str) -> None:
    write_tiny_model(tmp_path / "base", attention={"variant": variant})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"def f{n}(x):", "completion": " return"}) + "\n" for n in range(40)))
    model = {"init_from": str(tmp_path / "base"), "lora": {"r": 4, "alpha": 16}}
    keys = tiny_tuning(tmp_path, rows, model, seq_len=32, max_steps=6)
    done = train(load_config(str(write_config(tmp_path / "tuned.yaml", keys))))
    result = merge(done["run"], Request(to=str(tmp_path / "out"), device="cpu"))
    assert result["max_logit_difference"] < 1e-5
    assert not (tmp_path / "out" / "adapter").exists()
    if variant == "mha":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
