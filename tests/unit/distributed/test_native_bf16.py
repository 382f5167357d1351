"""Where bfloat16 is native, what models are computed in there and elsewhere, and the warning with a measured factor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed import native_bf16
from llmtrain.distributed.native_bf16 import bf16_slowdown, computes_bf16, computing_dtype, warn_if_emulated
from llmtrain.distributed.resolve import resolve
from llmtrain.generation.open_model import open_model
from llmtrain.models.huggingface.load import build_huggingface, quantization_config, read_huggingface
from llmtrain.planning import target as plan_target
from tests.support.bfloat16 import set_native_bfloat16, store_in_bfloat16
from tests.support.tiny_huggingface import write_tiny_folder
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import SYNTHETIC, write_config

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    set_native_bfloat16(monkeypatch, native=request.param)
    return bool(request.param)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    set_native_bfloat16(monkeypatch, native=False)


def resolved(precision: str, **run: Any) -> str:
    trainer = TrainerConfig.model_validate({"precision": precision, "compile": False})
    return resolve(RunConfig(device="cpu"), trainer, DistributedConfig(), **run).precision


def test_auto_precision_is_bfloat16_only_where_it_is_native(native: bool) -> None:
    assert computes_bf16("cpu") is native
    assert resolved("auto") == ("bf16-mixed" if native else "32")


def test_models_compute_in_their_stored_dtype_only_where_it_is_native(native: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if native else torch.float32
    assert computing_dtype(torch.bfloat16, CPU) == dtype
    network = store_in_bfloat16(write_tiny_folder(tmp_path / "network"))
    write_tiny_model(tmp_path / "decoder")
    decoder = open_model(str(store_in_bfloat16(tmp_path / "decoder")), device="cpu").model
    for model in (read_huggingface(network, device=CPU), decoder):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_frozen_weights_and_four_bit_products_follow_the_precision(native: bool, tmp_path: Path) -> None:
    folder = store_in_bfloat16(write_tiny_folder(tmp_path / "network"))
    dtype = torch.bfloat16 if native else torch.float32
    for quantization in ("none", "nf4"):
        config = HuggingFaceConfig.model_validate({"path": str(folder), "lora": {"r": 2}, "quantization": quantization})
        model = build_huggingface(config, folder, seed=0, precision=resolved("auto"))
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
        assert frozen == {dtype}
        chosen = {layer.compute_dtype for layer in model.modules() if hasattr(layer, "compute_dtype")}
        assert chosen == (set() if quantization == "none" else {dtype})
    assert quantization_config("nf4").bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core"])
def test_instructions_that_onednn_may_not_use_are_not_native(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    set_native_bfloat16(monkeypatch, native=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert computes_bf16("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert not computes_bf16("cpu")


def test_native_bfloat16_that_is_slower_than_float32_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_native_bfloat16(monkeypatch, native=True)
    monkeypatch.setattr(native_bf16, "bf16_slowdown", lambda: 1.9)
    assert resolved("auto") == "32"
    assert resolved("auto", previous={"precision": "bf16-mixed"}) == "bf16-mixed", "a run goes on as it began"
    sections = RunConfig(device="cpu"), TrainerConfig(compile=False), DistributedConfig()
    assert not resolve(*sections).bf16
    assert resolve(*sections, previous={"bf16": True}).bf16
    set_native_bfloat16(monkeypatch, native=False)
    assert not resolve(*sections, previous={"bf16": True}).bf16, "it would be emulated"
    set_native_bfloat16(monkeypatch, native=True)
    monkeypatch.setattr(native_bf16, "bf16_slowdown", lambda: 1.9)
    assert computing_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32
    assert caplog.text == ""
    assert resolved("bf16-mixed") == "bf16-mixed"
    assert "this CPU is slow in bfloat16: matrix products take 1.9 times as long as in float32" in caplog.text


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.usefixtures("emulated")
def test_a_warning_about_emulated_bfloat16_gives_the_slowdown(
    precision: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolved(precision) == precision
    assert (
        f"trainer.precision is {precision}, but this CPU has no native bfloat16: matrix products take 118 times as "
        "long as in float32 (measured); use trainer.precision=auto or 32"
    ) in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    warn_if_emulated("trainer.precision", precision, device="cpu", instead="32")
    assert caplog.text == "", "one rank says it"


@pytest.mark.usefixtures("emulated")
def test_requested_weights_in_bfloat16_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_folder(tmp_path)
    config = HuggingFaceConfig.model_validate({"path": str(folder), "dtype": "bfloat16"})
    build_huggingface(config, folder, seed=0, precision="32")
    assert "model.dtype is bfloat16, but this CPU has no native bfloat16" in caplog.text
    assert "use model.dtype=auto or float32" in caplog.text
    caplog.clear()
    build_huggingface(config, folder, seed=0, precision="bf16-mixed")
    assert "native" not in caplog.text, "the precision was warned of"


@pytest.mark.usefixtures("emulated")
def test_plan_warns_about_emulated_bfloat16_and_measures_small_products(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, assumed = list[tuple[torch.dtype, int]](), list[str]()

    def measure(dtype: torch.dtype, *, size: int, seconds: float) -> float:
        sizes.append((dtype, size))
        return 1e9

    monkeypatch.setattr(plan_target, "matmul_flops", measure)
    for precision in ("bf16-mixed", "16-mixed", "32"):
        keys = {**SYNTHETIC, "trainer": {"precision": precision, "compile": False}}
        plan_target.find_target(load_config(str(write_config(tmp_path / "one.yaml", keys))).config, "cpu", assumed)
    assert sizes == [(torch.bfloat16, 256), (torch.float16, 256), (torch.float32, 1024)]
    assert caplog.text.count("trainer.precision is bf16-mixed, but this CPU has no native bfloat16") == 1


def test_native_bfloat16_on_a_gpu_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_native_bfloat16(monkeypatch, native=True)
    monkeypatch.setattr(native_bf16, "matmul_flops", None)
    assert resolved("bf16-mixed") == "bf16-mixed"
    assert caplog.text == ""


def test_the_slowdown_is_measured_once_and_quickly() -> None:
    bf16_slowdown.cache_clear()
    began = time.perf_counter()
    factor = bf16_slowdown()
    assert factor > 0
    assert bf16_slowdown() == factor
    assert time.perf_counter() - began < 5, "0.2 s on an idle machine; this one may be busy"
