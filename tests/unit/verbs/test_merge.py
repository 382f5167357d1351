"""`merge`: base and adapter in one model that says what the two say, also where the base was in 4 bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.errors import ConfigError, RunError
from llmtrain.generation.open_model import open_model
from llmtrain.models.huggingface.folder import read_huggingface_folder
from llmtrain.models.huggingface.load import build_huggingface, quantization_config
from llmtrain.models.huggingface.quantization import Quantized, round_as_quantized
from llmtrain.publishing.exported import Request
from llmtrain.publishing.transformers_folder import write_network
from llmtrain.verbs.merge import merge
from llmtrain.verbs.train import train
from tests.support.chat import CHATML
from tests.support.tiny_huggingface import write_tiny_adapter, write_tiny_chat_folder
from tests.support.tiny_run import write_config

Kind = Literal["nf4", "int8"]

IDS = torch.tensor([[5, 17, 3, 40, 9, 100, 31]])


def as_run(root: Path, adapter: Path, *, base: Path, model: dict[str, Any]) -> Path:
    """The adapter as the checkpoint of a run with such a `model` section."""
    run = root / "tuned"
    shutil.copytree(adapter, run / "checkpoints" / "step_000010" / "model")
    keys = {"model": {"name": "huggingface", "path": str(base), **model}, "data": {"name": "chat", "train": "gone"}}
    for place in (run / "config.yaml", run / "checkpoints" / "step_000010" / "config.yaml"):
        place.write_text(json.dumps(keys))
    (run / "meta.json").write_text("{}")
    (run / "checkpoints" / "latest").symlink_to("step_000010")
    return run


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {}),
        ("llama", {"dora": True}),
        ("qwen3", {"rslora": True}),
        ("gpt2", {}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": r".*(q_proj|lm_head|embed_tokens)"}),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]}),
    ],
    ids=["llama", "dora", "qwen3-rslora", "gpt2", "lm_head", "embedding", "tied-head", "tied-both", "experts"],
)
def test_the_merged_model_says_what_base_and_adapter_say(tmp_path: Path, family: str, lora: dict[str, Any]) -> None:
    tied: dict[str, Any] = {"tie_word_embeddings": True} if family == "llama" and "dora" not in lora else {}
    base = write_tiny_chat_folder(tmp_path / "base", family, **tied)
    adapter = write_tiny_adapter(tmp_path / "adapter", base, **lora)
    result = merge(str(adapter), Request(to=str(tmp_path / "out"), device="cpu"))
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(merged, both, rtol=0, atol=1e-4)
    untouched = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert float((untouched - merged).abs().max()) > 0.1
    assert result["max_logit_difference"] < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert not list((tmp_path / "out").glob("adapter*"))
    assert result["source"]["base"] == "base"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_rounding_gives_the_weights_of_a_model_that_is_loaded_in_few_bits(
    tmp_path: Path, family: str, quantization: Kind
) -> None:
    base = write_tiny_chat_folder(tmp_path / "base", family)
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    untouched = {name: tensor.clone() for name, tensor in ours.named_parameters()}
    round_as_quantized(ours, Quantized(quantization))
    settings = quantization_config(quantization)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
    ).dequantize()
    changed = 0
    for name, weight in theirs.named_parameters():
        mine = ours.get_parameter(name)
        if ".c_" in name and mine.ndim == 2:  # their layers keep GPT-2's matrices turned
            mine, untouched[name] = mine.t(), untouched[name].t()
        # What they give back of 8 bits is rounded once more, to 16.
        torch.testing.assert_close(mine, weight.float(), rtol=0 if quantization == "nf4" else 2**-8, atol=0)
        changed += not torch.equal(mine, untouched[name])
    assert changed == (14 if family == "llama" else 8)


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_in_few_bits_is_merged_with_the_values_that_it_had_there(tmp_path: Path, quantization: Kind) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base)
    run = as_run(tmp_path / "runs", adapter, base=base, model={"lora": {"r": 4}, "quantization": quantization})
    result = merge(str(run), Request(to=str(tmp_path / "out"), device="cpu"))
    assert result["base_quantization"] == quantization
    assert result["dtype"] == "bfloat16"
    assert 1e-4 < result["max_logit_difference"] < 0.05
    network = AutoModelForCausalLM.from_pretrained(base)
    round_as_quantized(network, Quantized(quantization))
    trained = PeftModel.from_pretrained(network, str(adapter))(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    wide = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(IDS).logits
    assert float((merged - trained).abs().mean()) < 0.5 * float((wide - trained).abs().mean())


def test_an_adapter_that_meets_its_base_in_more_bits_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base)
    run = as_run(tmp_path / "runs", adapter, base=base, model={"lora": {"r": 4}, "quantization": "nf4"})
    with caplog.at_level("INFO"):
        open_model(str(run), device="cpu")
    assert "was trained on its base in nf4; here the base is used as it is stored" in caplog.text


def test_rounding_alone_is_no_reason_to_refuse_and_hides_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base)
    request = Request(to=str(tmp_path / "out"), device="cpu", dtype="bfloat16")
    result = merge(str(adapter), request)
    assert result["max_difference_as_written"] < 1e-5 < 1e-3 < result["max_logit_difference"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    exact = merge(str(adapter), replace(request, dtype="float32", to=str(tmp_path / "exact")))
    assert exact["max_logit_difference"] < 1e-4
    for name, tensor in load_file(tmp_path / "exact" / "model.safetensors").items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16)), f"{name} is rounded once"

    def spoil(folder: Path, network: nn.Module, *, dtype: torch.dtype) -> None:
        next(iter(network.parameters())).data.mul_(1.004)  # no more than bfloat16 rounds
        write_network(folder, network, dtype=dtype)

    monkeypatch.setattr("llmtrain.verbs.merge.write_network", spoil)
    with pytest.raises(RunError, match=r"logits differ by .* over the tolerance of 1e-04"):
        merge(str(adapter), replace(request, to=str(tmp_path / "spoiled")))
    assert not (tmp_path / "spoiled").exists()


def test_a_merge_that_is_wrong_before_it_is_rounded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr("llmtrain.verbs.merge.merge_adapter", lambda tuned: tuned.unload())  # without the adapter
    with pytest.raises(RunError, match="before its weights are rounded"):
        merge(str(adapter), Request(to=str(tmp_path / "out"), device="cpu", dtype="bfloat16"))


def test_what_cannot_be_merged_is_said(tmp_path: Path) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    with pytest.raises(ConfigError, match="is a whole model, without an adapter to merge: llmtrain export"):
        merge(str(base), Request(to=str(tmp_path / "out"), device="cpu"))
    adapter = write_tiny_adapter(tmp_path / "adapter", base)
    rounded = Request(to=str(tmp_path / "out"), device="cpu", dtype="bfloat16")
    with pytest.raises(
        RunError, match=r"does not agree.*exactly with --dtype float32, or accept .*--tolerance"
    ) as found:
        merge(str(adapter), replace(rounded, tolerance=1e-6))
    assert not (tmp_path / "out").exists()
    advised = float(str(found.value).rpartition(" ")[2])
    assert advised < 0.1
    merge(str(adapter), replace(rounded, tolerance=advised, to=str(tmp_path / "accepted")))
    merge(str(adapter), replace(rounded, dtype="float32", to=str(tmp_path / "exact")))
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="its base model cannot be opened"):
        merge(str(adapter), Request(to=str(tmp_path / "out"), device="cpu"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_run_on_4_bits_is_merged_as_it_was_trained(tmp_path: Path, precision: str) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} red", "completion": " green blue"}) + "\n" for n in range(24)))
    keys = {
        "run": {"name": "tuned", "device": "cpu"},
        "model": {"name": "huggingface", "path": str(base), "quantization": "nf4", "lora": {"r": 4, "alpha": 8}},
        "data": {"name": "chat", "train": str(rows), "val_fraction": 0.2, "seq_len": 64, "cache_dir": str(tmp_path)},
        "trainer": {"max_steps": 6, "micro_batch_size": 4, "precision": precision, "compile": False},
        "optimizer": {"lr": 0.02},
        "tracking": {"tensorboard": {"enabled": False}},
        "output": {"root_dir": str(tmp_path / "runs"), "run_id": "tuned"},
    }
    with torch.enable_grad():
        done = train(load_config(str(write_config(tmp_path / "tuned.yaml", keys))))
    result = merge(done["run"], Request(to=str(tmp_path / "out"), device="cpu", dtype="float32"))
    assert result["base_quantization"] == "nf4"
    config = HuggingFaceConfig.model_validate(keys["model"])
    trained = build_huggingface(config, base, seed=0, precision=precision).eval()
    read_huggingface_folder(Path(done["model"]), trained)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    theirs = trained.logits(IDS).float()
    exact = 1e-4 if precision == "32" else 0.02  # there products were rounded
    assert float((merged - theirs).abs().max()) < exact * float(theirs.abs().max())
