"""The plan of a config, on this machine and on devices that are not here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config, shipped_configs
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.planning import target as plan_target
from llmtrain.verbs.plan import plan
from tests.support.tiny_run import SYNTHETIC, write_config
from tests.support.token_shards import cut_stream, write_token_shards


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "tiny.yaml", SYNTHETIC))


@pytest.fixture(autouse=True)
def _quick_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_target, "GEMM_SEC", 0.01)
    monkeypatch.setattr(plan_target, "GEMM_SIZE", 128)


def planned(ref: str, *overrides: str, **options: Any) -> dict[str, Any]:
    return plan(load_config(ref, overrides).config, **options)


def test_counts_are_those_of_the_model(tiny: str) -> None:
    model = Decoder(load_config(tiny).config.decoder(wanted_by="a test"), 300)
    found = planned(tiny)
    assert found["parameters"]["total"] == found["parameters"]["trainable"] == model.num_parameters()
    assert found["parameters"]["non_embedding"] == model.num_parameters() - 300 * 32, "tied or not"
    assert found["flops_per_token"] == model.flops_per_token(32)


@pytest.mark.parametrize(
    ("limit", "steps", "items"),
    [("max_steps=7", 7, 7 * 24), ("max_epochs=1.5", 7, 150), ("max_tokens=4000", 6, 6 * 24)],
)
def test_steps_and_tokens_are_those_of_the_run(tiny: str, limit: str, steps: int, items: int) -> None:
    found = planned(tiny, f"trainer.{limit}", "trainer.grad_accum_steps=3", num_ranks=2)
    assert found["layout"]["batch_size"] == 24
    assert found["layout"]["grad_accum_steps"] == 3
    assert found["layout"]["strategy"] == "ddp"
    assert found["run"] == {
        "steps": steps,
        "tokens": items * 32,
        "supervised_share": None,
        "tokens_per_step": 24 * 32,
        "items_per_epoch": 100,
        "epochs": items / 100,
    }
    assert found["flops"] == items * 32 * found["flops_per_token"]


def test_parts_of_the_memory_add_up(tiny: str) -> None:
    memory = planned(tiny)["memory"]
    assert sum(memory["parts"].values()) == memory["peak_bytes"]
    assert memory["fits"] is True


def test_processes_share_the_memory_that_the_container_leaves(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need = planned(tiny, num_ranks=2)["memory"]["peak_bytes"]
    for leaves, fits in ((4 * need, True), (need * 3 // 2, False)):
        monkeypatch.setattr("llmtrain.planning.target.memory_bytes", lambda leaves=leaves: leaves)
        memory = planned(tiny, "distributed.strategy=ddp", num_ranks=2)["memory"]
        assert (memory["device_bytes"], memory["fits"]) == (leaves // 2, fits)


def test_activation_checkpointing_shows_in_the_memory(tiny: str) -> None:
    deep = ("model.num_layers=12", "data.seq_len=64")
    modes = ("none", "selective", "full")
    found = [planned(tiny, *deep, f"trainer.activation_checkpointing={mode}") for mode in modes]
    kept, half, less = (each["memory"]["parts"]["activations"] for each in found)
    assert less < 0.4 * kept
    assert less < half < kept
    assert [each["layout"]["recomputed_blocks"] for each in found] == [0, 6, 12]
    auto = ("trainer.activation_checkpointing=auto", "trainer.memory_budget_gb=1000")
    assert planned(tiny, *deep, *auto)["memory"]["parts"]["activations"] == kept
    total = found[2]["memory"]["peak_bytes"], found[0]["memory"]["peak_bytes"]
    between = planned(tiny, *deep, auto[0], f"trainer.memory_budget_gb={sum(total) / 2e9}")
    assert 0 < between["layout"]["recomputed_blocks"] < 12
    assert total[0] < between["memory"]["peak_bytes"] < sum(total) / 2


def test_the_time_is_tokens_over_speed(tiny: str) -> None:
    found = planned(tiny, "trainer.max_steps=10", device="h100", num_ranks=4)
    when = found["time"]
    assert when["flops_per_sec"] == pytest.approx(66.9e12)
    assert when["tokens_per_sec"] == pytest.approx(66.9e12 * 0.25 * 4 / found["flops_per_token"])
    assert when["seconds"] == pytest.approx(10 * 4 * 4 * 32 / when["tokens_per_sec"])


def test_an_unknown_device_lists_those_that_are_known(tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"--device h1000 is not known: use this, cpu or one of .*h100, "):
        planned(tiny, device="h1000")


def test_without_shards_it_says_what_it_assumed(tmp_path: Path) -> None:
    keys = SYNTHETIC | {"data": {"name": "tokens", "train": str(tmp_path / "nowhere"), "seq_len": 32}}
    ref = str(write_config(tmp_path / "config.yaml", keys))
    found = planned(ref, "trainer.max_epochs=2", device="a100")
    assert found["run"]["steps"] is found["run"]["epochs"] is found["flops"] is found["time"]["seconds"] is None
    assert any("no token shards yet" in each for each in found["assumed"])
    assert any("a vocabulary of 50,257" in each for each in found["assumed"])
    asked = planned(ref, "model.vocab_size=500", "trainer.max_steps=3", device="a100")
    assert asked["run"]["steps"] == 3
    assert not any("vocabulary" in each for each in asked["assumed"])


NEED_A_MODEL = ("eval", "finetune-")


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.startswith(NEED_A_MODEL)])
def test_every_config_that_ships_can_be_planned(name: str) -> None:
    found = planned(name, device="h100")
    assert found["parameters"]["total"] > 1_000_000
    assert found["memory"]["peak_bytes"] > 4 * found["parameters"]["total"]
    assert found["time"]["tokens_per_sec"] > 0


def test_eight_billion_parameters_are_planned_in_seconds_without_their_memory(tmp_path: Path) -> None:
    llama = {
        "max_seq_len": 4096,
        "d_model": 4096,
        "num_layers": 32,
        "vocab_size": 128_256,
        "tie_embeddings": False,
        "attention": {"variant": "gqa", "num_heads": 32, "num_kv_heads": 8},
        "ffn": {"d_ff": 14_336},
    }
    keys = {
        "data": {"name": "synthetic", "seq_len": 4096, "vocab_size": 128_256},
        "model": llama,
        "trainer": {"micro_batch_size": 1, "compile": False},
    }
    began = time.process_time()
    found = planned(str(write_config(tmp_path / "8b.yaml", keys)), device="h100")
    assert time.process_time() - began < 30
    assert found["parameters"]["total"] == 8_030_261_248
    assert found["memory"]["fits"] is False


def test_the_command_prints_one_document_or_a_page(tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", tiny, "--json", "--device", "l4", "trainer.max_steps=5"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert set(document) == {
        *(
            "config",
            "model",
            "parameters",
            "flops_per_token",
            "flops",
            "run",
            "layout",
            "memory",
            "time",
            "assumed",
            "mixture",
        ),
    }
    assert document["time"]["device"] == "L4"
    assert run(["plan", tiny, "trainer.max_steps=5"]) == 0
    page = capfd.readouterr().out
    assert "peak memory of the process" in page
    assert "1 process (single) × 1 micro-batch of 4 × 32 tokens = 4 sequences a step" in page


def test_a_gpu_that_is_not_here_has_to_be_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.device is cuda, but this machine has no such device: .*--device h100"):
        planned(tiny, "run.device=cuda")


def test_a_decoder_that_begins_from_another_is_planned_as_that_one_with_its_adapters(tmp_path: Path) -> None:
    base = Decoder(
        load_config(str(write_config(tmp_path / "base.yaml", SYNTHETIC))).config.decoder(wanted_by="a test"), 300
    )
    config = load_config(str(tmp_path / "base.yaml")).config.decoder(wanted_by="a test")
    write_model_folder(
        tmp_path / "model",
        config=config,
        vocab_size=300,
        state_dict=base.state_dict(),
        tokenizer_folder=None,
        eos_id=None,
    )
    keys = {**SYNTHETIC, "model": {"init_from": str(tmp_path / "model"), "lora": {"r": 2}}}
    found = planned(str(write_config(tmp_path / "tune.yaml", keys)))
    layers = [module for module in base.blocks.modules() if isinstance(module, torch.nn.Linear)]
    adapters = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert found["parameters"]["adapters"] == found["parameters"]["trainable"] == adapters
    assert found["parameters"]["total"] == base.num_parameters() + adapters
    assert found["memory"]["parts"]["optimizer_state"] == 8 * adapters + 4 * 2 * len(layers)


def test_steps_end_where_the_sources_are_used_up_and_stages_begin_at_steps(tmp_path: Path) -> None:
    for name, sequences in (("web", 300), ("code", 100)):
        write_token_shards(tmp_path / name, {"train": cut_stream([1] * (32 * sequences) + [0])}, vocab_size=300)
    train = [{"path": str(tmp_path / name / "train"), "weight": 1, "max_epochs": 1} for name in ("web", "code")]
    data = {"name": "tokens", "train": train, "seq_len": 32, "mixture": {"by": "tokens"}}
    file = str(write_config(tmp_path / "c.yaml", {**SYNTHETIC, "data": data}))
    found = planned(file)
    assert (found["run"]["steps"], found["run"]["items_per_epoch"], found["run"]["epochs"]) == (100, 400, 1)
    assert [row["epochs"] for row in found["mixture"]["sources"]] == [1, 1]
    assert planned(file, "trainer.max_epochs=0.25")["run"]["steps"] == 25
    assert planned(file, "trainer.max_epochs=3")["run"]["steps"] == 100
    stages = "data.mixture.stages=[{from_fraction: 0.5, weights: [1, 0]}]"
    staged = planned(file, stages, "trainer.max_steps=40")
    assert [change["sequence"] for change in staged["mixture"]["changes"]] == [80]
    assert [row["sequences"] for row in staged["mixture"]["sources"]] == [120, 40]
    assert planned(file, "data.mixture.at_limit=stop")["run"]["steps"] == 50
