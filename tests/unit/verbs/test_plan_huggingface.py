"""The plan of models of transformers: it has their config.json, and none of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.errors import ConfigError
from llmtrain.models.huggingface.load import build_huggingface, read_transformers_config
from llmtrain.models.huggingface.spec import huggingface_spec
from llmtrain.planning import target as plan_target
from llmtrain.verbs.plan import plan
from tests.support.chat import tiny_chat_tokenizer
from tests.support.tiny_huggingface import FAMILIES, write_tiny_folder
from tests.support.tiny_run import write_config

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
}


@pytest.fixture(autouse=True)
def _quick_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_target, "GEMM_SEC", 0.01)
    monkeypatch.setattr(plan_target, "GEMM_SIZE", 128)


def config_only(folder: Path, described: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def tiny(folder: Path, family: str = "llama") -> Path:
    """A folder with a config.json, and nothing else."""
    whole = write_tiny_folder(folder / "whole", family)
    return config_only(folder / "tiny", json.loads((whole / "config.json").read_text()))


def planned(tmp_path: Path, folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    keys = {
        "model": {"name": "huggingface", "path": str(folder)},
        "data": {"name": "chat", "train": str(tmp_path / "rows.jsonl"), "seq_len": 32},
        "trainer": {"max_steps": 10, "micro_batch_size": 2, "precision": "32", "compile": False},
    }
    return plan(load_config(str(write_config(tmp_path / "config.yaml", keys)), overrides).config, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", [{}, {"lora": {"r": 3}}])
def test_the_outline_is_the_model_that_is_built(family: str, tuning: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model", family)
    config = HuggingFaceConfig.model_validate({"path": str(folder), **tuning})
    built = build_huggingface(config, folder, seed=0, precision="bf16-mixed")
    outline = huggingface_spec(config, read_transformers_config(config, folder), precision="bf16-mixed")
    as_table = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (built, outline)
    ]
    assert as_table[0] == as_table[1]


def test_a_config_alone_gives_parameters_flops_and_memory(tmp_path: Path) -> None:
    whole = write_tiny_folder(tmp_path / "model")
    model = build_huggingface(HuggingFaceConfig(path=str(whole)), whole, seed=0, precision="32")
    found = planned(tmp_path, tiny(tmp_path))
    assert found["parameters"]["total"] == found["parameters"]["trainable"] == model.num_parameters()
    assert found["parameters"]["non_embedding"] == model.num_parameters() - 64 * 32
    assert found["flops_per_token"] == model.flops_per_token(32)
    assert found["memory"]["parts"]["parameters"] >= 4 * model.num_parameters()
    assert found["memory"]["parts"]["optimizer_state"] >= 8 * model.num_parameters()
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak_bytes"]


def test_of_adapters_alone_there_are_gradients_and_optimizer_state(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    found = planned(tmp_path, folder, "model.lora.r=4")
    # q, k, v, o, gate, up, down of two layers: r × (in + out)
    expected = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert found["parameters"]["adapters"] == found["parameters"]["trainable"] == expected
    parts = found["memory"]["parts"]
    num_tensors = 2 * 7 * 2
    assert parts["optimizer_state"] == 8 * expected + 4 * num_tensors
    assert parts["parameters"] < planned(tmp_path, folder)["memory"]["parts"]["parameters"] + 4 * expected + 1000


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("experts", [False, True])
def test_a_mixture_of_experts_is_planned_and_what_has_no_adapter_is_said(
    tmp_path: Path, precision: str, experts: bool
) -> None:
    names = "model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj,mlp.gate.weight]"
    more = [names] if experts else []
    found = planned(tmp_path, tiny(tmp_path, "mixtral"), "model.lora.r=2", f"trainer.precision={precision}", *more)
    assert found["memory"]["parts"]["activations"] > 0
    assert any("LoRA does not adapt mlp.gate.weight" in line for line in found["assumed"]) is not experts
    whole = planned(tmp_path, tiny(tmp_path / "2", "mixtral"), f"trainer.precision={precision}")
    assert whole["memory"]["parts"]["optimizer_state"] >= 8 * whole["parameters"]["trainable"]


def test_adapters_trained_in_bfloat16_have_float32_copies(tmp_path: Path) -> None:
    found = planned(tmp_path, tiny(tmp_path), "model.lora.r=4", "trainer.precision=bf16-true")
    adapters, num_tensors = found["parameters"]["adapters"], 2 * 7 * 2
    assert found["memory"]["parts"]["optimizer_state"] == (4 + 8) * adapters + 4 * num_tensors


@pytest.mark.slow
def test_eight_billion_parameters_in_four_bits_fit_where_whole_ones_do_not(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "llama", LLAMA_8B)
    common = ("data.seq_len=1024", "trainer.activation_checkpointing=true", "trainer.precision=bf16-mixed")
    found = {
        name: planned(tmp_path, folder, *common, *more, device="rtx4090")
        for name, more in (
            ("full", ()),
            ("lora", ("model.lora.r=16",)),
            ("qlora", ("model.lora.r=16", "model.quantization=nf4")),
            ("int8", ("model.lora.r=16", "model.quantization=int8")),
        )
    }
    billions = {name: each["memory"]["parts"]["parameters"] / 1e9 for name, each in found.items()}
    assert found["full"]["parameters"]["total"] == 8_030_261_248
    assert billions["full"] == pytest.approx(16.1, abs=0.1)  # bfloat16, whose float32 masters are optimizer state
    assert found["full"]["memory"]["parts"]["optimizer_state"] / 1e9 == pytest.approx(12 * 8.03, abs=0.1)
    assert billions["lora"] == pytest.approx(16.2, abs=0.1)  # bfloat16, and 42M in float32
    # 6.98e9 weights in 4 bits and a byte for 64 of them, embedding and output in bfloat16, adapters in float32
    assert billions["qlora"] == pytest.approx(6.98 / 2 + 6.98 / 64 + 1.0507 * 2 + 0.0419 * 4, abs=0.02)
    assert billions["int8"] == pytest.approx(6.98 + 1.0507 * 2 + 0.0419 * 4, abs=0.02)
    assert {name: each["memory"]["fits"] for name, each in found.items()} == {
        "full": False,
        "lora": True,
        "qlora": True,
        "int8": True,
    }
    assert len({each["flops_per_token"] for name, each in found.items() if name != "full"}) == 1


@pytest.mark.slow
def test_checkpointed_blocks_show_in_the_memory(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 99, "num_hidden_layers": 12}
    folder = config_only(tmp_path / "deep", {**LLAMA_8B, **small})
    rest = ("data.seq_len=256", "model.lora.r=4", "model.attn_implementation=sdpa")
    for more in ([], ["trainer.compile=true"]):
        less, plain = (
            planned(tmp_path, folder, *rest, *more, f"trainer.activation_checkpointing={on}")["memory"]["parts"]
            for on in ("true", "false")
        )
        assert less["activations"] < 0.3 * plain["activations"], more


def test_rows_are_counted_where_they_are_here(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model", vocab_size=400)
    tiny_chat_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}").save_pretrained(folder)
    rows = [{"prompt": "What is it?", "completion": f"It is {number}."} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = planned(tmp_path, folder, "trainer.max_steps=null", "trainer.max_epochs=2", "data.packing=true")
    alone = planned(tmp_path, folder, "trainer.max_steps=null", "trainer.max_epochs=2", "data.packing=false")
    assert alone["run"]["items_per_epoch"] == 40
    assert alone["run"]["steps"] == 40  # 80 rows, 2 at a time
    assert packed["run"]["items_per_epoch"] < 40
    assert packed["run"]["tokens"] == pytest.approx(alone["run"]["tokens"], rel=0.02)
    assert 0 < alone["run"]["supervised_share"] < 1
    assert alone["assumed"][1:] == []  # but how fast this machine is


def test_what_a_run_would_reject_is_rejected_by_the_plan(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.seq_len is 128, but the model in .* takes at most 64 tokens"):
        planned(tmp_path, folder, "data.seq_len=128")
    with pytest.raises(ConfigError, match=r"target_modules: 'c_attn' matches no linear layer of the model\. There are"):
        planned(tmp_path, folder, "model.lora.target_modules=[c_attn]")
    with pytest.raises(ConfigError, match=r"lacks config\.json"):
        planned(tmp_path, tmp_path)
