"""A CPU without native bfloat16 never multiplies in it: training, evaluation, generation, merge, export, plan, smoke.

There a product in bfloat16 takes about a hundred times as long as in float32. Weights keep the dtype that they are
stored in; only what is computed is float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtrain.api import load_decoder
from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.generation.open_model import open_model
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.models.huggingface.load import build_huggingface
from llmtrain.planning import target as plan_target
from llmtrain.publishing import agreement
from llmtrain.publishing.exported import Request
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.export import export
from llmtrain.verbs.merge import merge
from llmtrain.verbs.plan import plan
from llmtrain.verbs.publish import publish
from llmtrain.verbs.train import train
from tests.support.bfloat16 import (
    count_bfloat16_products,
    no_bfloat16_products,
    set_native_bfloat16,
    store_in_bfloat16,
)
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny import random_batch, tiny_config, tiny_decoder
from tests.support.tiny_huggingface import write_tiny_adapter, write_tiny_chat_folder
from tests.support.tiny_run import SYNTHETIC, tiny_tuning, write_config

LORA = {"r": 4, "alpha": 8}


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch, models: Path, rows: Path) -> Iterator[None]:
    """The models are made before the guard stands."""
    set_native_bfloat16(monkeypatch, native=False)
    monkeypatch.setattr(plan_target, "GEMM_SEC", 0.01)
    monkeypatch.setattr(agreement, "NEW_TOKENS", 3)
    with no_bfloat16_products():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models stored in bfloat16: `network` of transformers, `decoder`; and `adapter`, `dora` for the network."""
    folder = tmp_path_factory.mktemp("models")
    network = write_tiny_chat_folder(folder / "network")
    write_tiny_adapter(folder / "adapter", network, **LORA)
    write_tiny_adapter(folder / "dora", network, **LORA, dora=True)
    write_decoder(folder / "decoder")
    for name in ("network", "decoder"):
        store_in_bfloat16(folder / name)
    return folder


def write_decoder(folder: Path) -> None:
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    config = tiny_config(max_seq_len=128)
    torch.manual_seed(0)
    weights = Decoder(config, len(tokenizer)).state_dict()
    write_model_folder(
        folder, config=config, vocab_size=len(tokenizer), state_dict=weights, eos_id=tokenizer.eos_token_id
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} red", "completion": " green blue"}) + "\n" for n in range(12)))
    return file


def tuned(folder: Path, rows: Path, model: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Two steps of fine-tuning, with evaluations that let the model answer, and samples of what it writes."""
    keys = tiny_tuning(folder, rows, model, seq_len=32, max_steps=2, precision="auto")
    keys["evaluation"] = {"data": str(rows), "every_steps": 1, "train_samples": 2, "max_new_tokens": 4}
    keys["tracking"]["samples"] = {"prompts": ["red"], "max_new_tokens": 2}
    return train(load_config(str(write_config(folder / "tuned.yaml", keys)), ["output.run_id=tuned", *overrides]))


def stored(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon", "adamw8bit"])
def test_a_step_of_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    keys = {**SYNTHETIC, "trainer": {"max_steps": 2, "precision": "auto", "compile": False}}
    keys |= {"optimizer": {"name": optimizer}, "output": {"root_dir": str(tmp_path), "run_id": "one"}}
    done = train(load_config(str(write_config(tmp_path / "one.yaml", keys)), ["run.device=cpu"]))
    assert stored(Path(done["model"])) == {torch.float32}
    assert json.loads((tmp_path / "one" / "meta.json").read_text())["resolved"]["precision"] == "32"


@pytest.mark.parametrize(
    "model",
    [{"lora": LORA}, {"lora": {**LORA, "dora": True}}, {}]
    + [{"lora": LORA, "quantization": kind} for kind in ("nf4", "int8")],
    ids=["lora", "dora", "full", "nf4", "int8"],
)
def test_fine_tuning_a_model_of_transformers(models: Path, rows: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    tuned(tmp_path, rows, {"name": "huggingface", "path": str(models / "network"), **model}, "data.packing=false")


@pytest.mark.parametrize("model", [{"lora": LORA}, {}], ids=["lora", "full"])
def test_fine_tuning_a_decoder(models: Path, rows: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    done = tuned(
        tmp_path, rows, {"init_from": str(models / "decoder"), **model}, f"data.tokenizer={models / 'decoder'}"
    )
    if model:
        merge(done["run"], Request(to=str(tmp_path / "out"), device="cpu", dtype="bfloat16"))
        assert stored(tmp_path / "out") == {torch.bfloat16}


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 compiles nothing once a dispatch mode was there")
def test_a_compiled_step() -> None:
    """Compiled code is not seen by the guard: what it would compute is counted in its graphs."""
    counts = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(count_bfloat16_products(graph))
        return graph

    distributed = DistributedConfig()
    resolved = resolve(RunConfig(device="cpu"), TrainerConfig(compile=False), distributed)
    decoder = tiny_decoder().train()
    decoder.compile_parts(backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    engine = Engine(resolved, distributed=distributed)
    with _disable_current_modes():  # under a dispatch mode nothing is compiled
        loss_sum, _ = engine.setup(decoder)(random_batch())
        engine.backward(loss_sum)
    assert counts
    assert sum(counts) == 0


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["network", "decoder", "adapter", "dora"])
def test_evaluation_and_generation(models: Path, rows: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"data": [str(rows)], "max_new_tokens": 4, "baseline": None}
    found = evaluate(str(models / name), settings=settings, root_dir=str(tmp_path))
    assert found["rows"] == 12
    model = open_model(str(models / name), device="cpu")
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    assert model.generate("red", max_new_tokens=4)[0].tokens <= 4


def test_the_loss_of_text(models: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} red green"}) + "\n" for n in range(4)))
    for name in ("network", "decoder"):
        found = evaluate(str(models / name), settings={"data": [str(text)]}, root_dir=str(tmp_path))
        assert found["loss"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_of_a_machine_with_native_bfloat16_is_evaluated_in_float32(
    models: Path, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model").symlink_to(models / "decoder")
    keys = {**SYNTHETIC, "trainer": {"precision": precision}, "run": {"device": "cpu"}}
    write_config(checkpoint / "config.yaml", keys)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "red green"}) + "\n")
    found = evaluate(str(checkpoint), settings={"data": [str(text)]}, root_dir=str(tmp_path))
    assert found["loss"] > 0
    assert "no native bfloat16" not in caplog.text


def test_a_decoder_from_its_weights_alone(models: Path) -> None:
    folder = models / "decoder"
    model = load_decoder(folder / "config.json", folder / "model.safetensors", tokenizer=folder, device="cpu")
    assert model.generate("def", max_new_tokens=4)[0].tokens <= 4


def test_a_folder_in_four_bits_that_asks_for_bfloat16(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor for which bitsandbytes would pack the weights anew, in place."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    network = AutoModelForCausalLM.from_pretrained(
        models / "network", quantization_config=settings, device_map={"": "cpu"}
    )
    network.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).symlink_to(models / "network" / name)
    model = open_model(str(tmp_path / "small"), device="cpu")
    assert model.generate("red", max_new_tokens=4, chat=False)[0].tokens <= 4
    config = HuggingFaceConfig.model_validate({"path": str(tmp_path / "small"), "lora": LORA})
    tuned = build_huggingface(config, tmp_path / "small", seed=0, precision="32").train()
    tuned(random_batch(50))[0].backward()


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", pytest.param("dora", marks=pytest.mark.slow)])
def test_merge(models: Path, tmp_path: Path, name: str) -> None:
    result = merge(str(models / name), Request(to=str(tmp_path / "out"), device="cpu"))
    assert result["dtype"] == "bfloat16"
    assert stored(tmp_path / "out") == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_into_a_base_in_few_bits(models: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = tmp_path / "runs" / "tuned" / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model").symlink_to(models / "adapter")
    model = {"name": "huggingface", "path": str(models / "network"), "lora": LORA, "quantization": kind}
    (checkpoint / "config.yaml").write_text(json.dumps({"model": model, "data": {"name": "chat", "train": "gone"}}))
    result = merge(str(checkpoint), Request(to=str(tmp_path / "out"), device="cpu"))
    assert result["dtype"] == "bfloat16"
    assert stored(tmp_path / "out") == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("network", "hf"),
        ("decoder", "hf"),
        ("decoder", "safetensors"),
        ("decoder", "torch-export"),
        pytest.param("network", "torch-export", marks=pytest.mark.slow),
    ],
)
def test_export(models: Path, tmp_path: Path, name: str, format: str) -> None:
    """In the dtype that the source is stored in, which is kept though it is computed in float32."""
    is_graph = format == "torch-export"
    request = Request(to=str(tmp_path / "out"), device="cpu", dtype="bfloat16" if is_graph else None)
    result = export(str(models / name), request, format=format)
    assert result["dtype"] == "bfloat16"
    if is_graph:
        weights = torch.export.load(tmp_path / "out" / "model.pt2").state_dict
        assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.bfloat16}
    else:
        assert stored(tmp_path / "out") == {torch.bfloat16}


def test_publish(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = publish(str(models / "network"), given={"license": "mit"}, root_dir=str(tmp_path / "runs"))
    assert stored(Path(done["to"])) == {torch.bfloat16}


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["decoder", "network"])
@pytest.mark.parametrize("device", ["this", "h100"])
def test_plan(models: Path, rows: Path, tmp_path: Path, model: str, device: str) -> None:
    keys: dict[str, Any] = {**SYNTHETIC, "trainer": {"precision": "auto", "compile": False}, "run": {"device": "cpu"}}
    if model == "network":
        section = {"name": "huggingface", "path": str(models / "network"), "lora": LORA}
        keys = tiny_tuning(tmp_path, rows, section, seq_len=32, precision="auto")
    found = plan(load_config(str(write_config(tmp_path / "one.yaml", keys))).config, device=device)
    assert found["layout"]["precision"] == ("32" if device == "this" else "bf16-mixed")


def test_plan_in_float16(tmp_path: Path) -> None:
    keys = {**SYNTHETIC, "trainer": {"precision": "16-mixed", "compile": False}, "run": {"device": "cpu"}}
    assert plan(load_config(str(write_config(tmp_path / "one.yaml", keys))).config)["time"]["flops_per_sec"] > 0


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smoke", "--samples", "256", "--batch-size", "64", "--features", "16", "--device", "cpu"]) == 0
