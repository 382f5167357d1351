"""The strategy that `auto` takes for a model, and how `plan` shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.planning.auto_strategy import reduces_each_micro_batch, state_bytes, strategy_for
from llmtrain.verbs.plan import plan
from tests.support.tiny_huggingface import write_tiny_folder
from tests.support.tiny_run import SYNTHETIC, write_config


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "tiny.yaml", SYNTHETIC))


@pytest.mark.parametrize(
    ("optimizer", "precision", "bytes_each"),
    [("adamw", "32", 16), ("adamw", "bf16-mixed", 16), ("adamw", "bf16-true", 16), ("sgd", "32", 12)],
)
def test_state_bytes_are_counted_from_the_parameters(optimizer: str, precision: str, bytes_each: int) -> None:
    model = load_config("quickstart").config.decoder(wanted_by="a test")
    decoder = Decoder(model, 300)
    config = OptimizerConfig.model_validate({"name": optimizer})
    assert state_bytes(decoder, optimizer=config, precision=precision) == bytes_each * decoder.num_parameters()
    decoder.requires_grad_(False)
    assert state_bytes(decoder, optimizer=config, precision="32") == 4 * decoder.num_parameters()


@pytest.mark.parametrize(
    ("strategy", "accumulation", "memory", "reduces"),
    [
        ("fsdp", 4, 0.99, True),  # a shard of 16 / 4 bytes a weight and a full gradient of 4
        ("fsdp", 4, 1.01, False),
        ("fsdp", 1, 0.5, False),  # nothing to sum before
        ("ddp", 4, 0.5, False),
        ("fsdp_tp", 4, 0.76, False),  # two processes share a gradient
        ("fsdp_tp", 4, 0.74, True),
    ],
)
def test_gradients_are_summed_after_each_micro_batch_where_full_ones_would_not_fit(
    tiny: str, strategy: str, accumulation: int, memory: float, reduces: bool
) -> None:
    config = load_config(tiny, [f"distributed.strategy={strategy}"]).config
    decoder = Decoder(config.decoder(wanted_by="a test"), 300)
    found = reduces_each_micro_batch(
        config,
        decoder,
        strategy=strategy,
        precision="32",
        world_size=4,
        batch_size=accumulation * config.trainer.micro_batch_size * (2 if strategy == "fsdp_tp" else 4),
        memory_bytes=memory * 8 * decoder.num_parameters() / 0.6,
    )
    assert found is reduces


def test_frozen_weights_have_no_gradients_or_optimizer_state(tmp_path: Path) -> None:
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


def test_a_plan_shows_the_chosen_strategy_and_its_memory(tiny: str) -> None:
    large = ["model.d_model=8192", "model.num_layers=48", "model.attention.num_heads=64", "trainer.micro_batch_size=1"]
    config = load_config(tiny, [*large, "model.ffn.d_ff=256", "data.seq_len=8"]).config
    sharded = plan(config, device="h100", num_ranks=16)
    assert sharded["layout"]["strategy"] == "fsdp"
    assert "each of 16 processes holds" in sharded["layout"]["because"]
    ddp = plan(load_config(tiny, [*large, "model.ffn.d_ff=256", "data.seq_len=8", "distributed.strategy=ddp"]).config)
    for part in ("parameters", "gradients", "optimizer_state"):
        assert sharded["memory"]["parts"][part] == ddp["memory"]["parts"][part] // 16
    assert sharded["memory"]["parts"]["gathered"] > 0
    assert "gathered" not in ddp["memory"]["parts"]


def test_a_plan_with_replicas_divides_the_state_by_the_processes_of_one(tiny: str) -> None:
    keys = ["distributed.strategy=fsdp", "model.d_model=256", "model.attention.num_heads=4"]
    sharded, replicated = (
        plan(load_config(tiny, [*keys, f"distributed.replicate={n}"]).config, device="h100", num_ranks=16)
        for n in (1, 4)
    )
    assert replicated["layout"]["replicas"] == 4
    assert replicated["layout"]["batch_size"] == sharded["layout"]["batch_size"]
    for part in ("parameters", "optimizer_state"):
        assert replicated["memory"]["parts"][part] == pytest.approx(4 * sharded["memory"]["parts"][part], abs=4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["fsdp", "replicate=3"], r"replicate is 3, which does not divide the 8 processes: set it to the number of"),
        (["fsdp_tp", "tensor_parallel=2", "replicate=3"], r"the 4 groups of processes that share a matrix"),
    ],
)
def test_replicas_that_do_not_divide_the_processes_are_rejected(tiny: str, keys: list[str], message: str) -> None:
    strategy, *others = keys
    config = load_config(tiny, [f"distributed.strategy={strategy}", *(f"distributed.{key}" for key in others)]).config
    with pytest.raises(ConfigError, match=message):
        plan(config, device="h100", num_ranks=8)


def test_a_plan_with_tensor_parallelism_has_fewer_data_parallel_ranks(tiny: str) -> None:
    keys = ["distributed.strategy=fsdp_tp", "distributed.tensor_parallel=2"]
    layout = plan(load_config(tiny, keys).config, device="h100", num_ranks=8)["layout"]
    assert (layout["strategy"], layout["tensor_parallel"], layout["batch_size"]) == ("fsdp_tp", 2, 16)
