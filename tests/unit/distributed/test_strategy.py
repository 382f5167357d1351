"""`auto` chooses a strategy for several processes and says why; impossible strategies are rejected early."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.strategy import Choice, choose_strategy

GB = 10**9


def test_the_strategy_follows_from_memory_and_number_of_processes() -> None:
    assert choose_strategy(world_size=1, state_bytes=900 * GB, memory_bytes=80 * GB).strategy == "single"
    fits = choose_strategy(world_size=8, state_bytes=48 * GB, memory_bytes=80 * GB)
    assert fits == Choice(
        "ddp", "weights, gradients and optimizer state take 48 GB, which fit into the 80 GB of each process"
    )
    sharded = choose_strategy(world_size=8, state_bytes=112 * GB, memory_bytes=80 * GB)
    assert sharded == Choice(
        "fsdp",
        "weights, gradients and optimizer state take 112 GB, over 60% of the 80 GB of a process: each of 8 processes "
        "holds 14 GB",
    )


def test_a_process_of_several_replicas_holds_a_larger_shard() -> None:
    chosen = choose_strategy(world_size=16, state_bytes=112 * GB, memory_bytes=80 * GB, replicate=2)
    assert chosen.strategy == "fsdp"
    assert chosen.because.endswith("each of 16 processes holds 14 GB")


def test_auto_calls_choose_for_several_processes_and_a_resumed_run_keeps_its_strategy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("llmtrain.distributed.resolve.memory_bytes", lambda: 10**9)  # a pod's, of a larger machine
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
