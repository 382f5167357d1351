"""What `auto` takes for several processes, and what it says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.load import load_config
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.distributed.engine import resolve
from llmtrain.distributed.strategy import Choice, choose_strategy
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.recipes.plan import plan
from llmtrain.recipes.planning.planned import strategy_for
from llmtrain.testing.tiny_huggingface import write_tiny_folder
from llmtrain.testing.tiny_run import SYNTHETIC, write_config
from llmtrain.training.memory import Part, StepMemory, cut, state_bytes

GB = 10**9


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "tiny.yaml", SYNTHETIC))


def test_the_strategy_follows_from_memory_and_number_of_processes() -> None:
    assert choose_strategy(world_size=1, state_bytes=900 * GB, memory_bytes=80 * GB).strategy == "single"
    fits = choose_strategy(world_size=8, state_bytes=48 * GB, memory_bytes=80 * GB)
    assert fits == Choice(
        "ddp", "weights, gradients and optimizer state take 48 GB, which fit into the 80 GB of each process"
    )
    cut = choose_strategy(world_size=8, state_bytes=112 * GB, memory_bytes=80 * GB)
    assert cut == Choice(
        "fsdp",
        "weights, gradients and optimizer state take 112 GB, over 60% of the 80 GB of a process: each of 8 processes "
        "holds 14 GB",
    )


@pytest.mark.parametrize(
    ("optimizer", "precision", "bytes_each"),
    [("adamw", "32", 16), ("adamw", "bf16-mixed", 16), ("adamw", "bf16-true", 8), ("sgd", "32", 12)],
)
def test_what_training_keeps_is_counted_from_the_parameters(optimizer: str, precision: str, bytes_each: int) -> None:
    model = load_config("quickstart").config.decoder(wanted_by="a test")
    decoder = Decoder(model, 300)
    config = OptimizerConfig.model_validate({"name": optimizer})
    assert state_bytes(decoder, optimizer=config, precision=precision) == bytes_each * decoder.num_parameters()
    decoder.requires_grad_(False)
    assert state_bytes(decoder, optimizer=config, precision="32") == 4 * decoder.num_parameters()


def test_several_processes_ask_and_a_resumed_run_keeps_its_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("llmtrain.distributed.engine.memory_bytes", lambda: 10**9)  # a pod's, of a larger machine
    asked: list[dict[str, Any]] = []

    def choose(**given: Any) -> Choice:
        asked.append(given)
        return Choice("fsdp", "so it was decided")

    sections = (RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), DistributedConfig())
    resolved = resolve(*sections, choose=choose)
    assert (resolved.strategy, resolved.because) == ("fsdp", "so it was decided")
    assert asked[0]["world_size"] == 4
    assert asked[0]["precision"] == "32"
    assert asked[0]["memory_bytes"] == 10**9 // 2
    again = resolve(*sections, previous={"strategy": "ddp"}, choose=choose)
    assert again.strategy == "ddp"
    assert resolve(*sections, previous={"strategy": "single"}, choose=choose).strategy == "fsdp"
    assert len(asked) == 2


def test_of_a_model_of_transformers_the_frozen_weights_count_once(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "base")
    model = {"name": "huggingface", "path": str(folder)}
    file = str(write_config(tmp_path / "run.yaml", SYNTHETIC | {"model": model}))
    whole = strategy_for(load_config(file).config, world_size=2, precision="32", memory_bytes=10**6)
    lora = strategy_for(
        load_config(file, ["model.lora.r=1"]).config, world_size=2, precision="bf16-mixed", memory_bytes=10**6
    )
    assert (whole.strategy, lora.strategy) == ("ddp", "ddp")
    tight = strategy_for(load_config(file).config, world_size=2, precision="32", memory_bytes=2 * 10**5)
    assert tight.strategy == "fsdp"
    quantized = load_config(file, ["model.quantization=nf4", "model.lora.r=1"]).config
    assert strategy_for(quantized, world_size=2, precision="bf16-mixed", memory_bytes=1).strategy == "ddp"


def test_a_rank_holds_its_share_and_what_is_gathered_for_the_moment() -> None:
    decoder = Decoder(load_config("quickstart").config.decoder(wanted_by="a test"), 300)
    parts: dict[Part, int] = {"parameters": 4 * GB, "gradients": 4 * GB, "optimizer_state": 8 * GB, "logits": GB}
    of_one = StepMemory(parts=parts, persistent=12 * GB)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    rest = decoder.num_parameters() - len(decoder.blocks) * block
    found = cut(of_one, decoder, ranks=4, precision="bf16-mixed")
    assert found.parts == {
        "parameters": GB,
        "gradients": GB,
        "optimizer_state": 2 * GB,
        "logits": GB,
        "gathered": 2 * (rest + 2 * block) + 4 * max(rest, block),
    }
    assert found.persistent == 3 * GB
    adding_up = cut(of_one, decoder, ranks=4, precision="bf16-mixed", num_micro_batches=2)
    assert adding_up.parts == {**found.parts, "gradients": 4 * GB}


def test_a_plan_shows_the_choice_and_counts_the_parts(tiny: str) -> None:
    large = ["model.d_model=8192", "model.num_layers=48", "model.attention.num_heads=64", "trainer.micro_batch_size=1"]
    config = load_config(tiny, [*large, "model.ffn.d_ff=256", "data.seq_len=8"]).config
    cut = plan(config, device="h100", num_ranks=16)
    assert cut["layout"]["strategy"] == "fsdp"
    assert "each of 16 processes holds" in cut["layout"]["because"]
    ddp = plan(load_config(tiny, [*large, "model.ffn.d_ff=256", "data.seq_len=8", "distributed.strategy=ddp"]).config)
    for part in ("parameters", "gradients", "optimizer_state"):
        assert cut["memory"]["parts"][part] == ddp["memory"]["parts"][part] // 16
    assert cut["memory"]["parts"]["gathered"] > 0
    assert "gathered" not in ddp["memory"]["parts"]


def test_a_plan_with_split_matrices_has_fewer_data_parallel_ranks(tiny: str) -> None:
    keys = ["distributed.strategy=fsdp_tp", "distributed.tensor_parallel=2"]
    layout = plan(load_config(tiny, keys).config, device="h100", num_ranks=8)["layout"]
    assert (layout["strategy"], layout["tensor_parallel"], layout["batch_size"]) == ("fsdp_tp", 2, 16)
