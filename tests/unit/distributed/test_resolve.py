"""Every `auto` is decided once: by the machine and the number of processes, or as the run decided before."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.strategy import Choice
from llmtrain.errors import ConfigError


def test_a_strategy_is_chosen_for_several_processes_and_kept_on_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("llmtrain.distributed.resolve.memory_bytes", lambda: 10**9)  # a pod's, of a larger machine
    calls: list[dict[str, Any]] = []

    def choose(**given: Any) -> Choice:
        calls.append(given)
        return Choice("fsdp", "so it was decided")

    sections = (RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), DistributedConfig())
    resolved = resolve(*sections, choose=choose)
    assert (resolved.strategy, resolved.because) == ("fsdp", "so it was decided")
    assert calls[0]["world_size"] == 4
    assert calls[0]["precision"] == "32"
    assert calls[0]["memory_bytes"] == 10**9 // 2
    again = resolve(*sections, previous={"strategy": "ddp"}, choose=choose)
    assert again.strategy == "ddp"
    assert resolve(*sections, previous={"strategy": "single"}, choose=choose).strategy == "fsdp"
    assert len(calls) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_a_strategy_for_several_processes_is_rejected_for_one(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed = DistributedConfig.model_validate({"strategy": strategy})
    with pytest.raises(ConfigError, match=f"strategy is {strategy}, but this is one process: add --nproc N"):
        resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)
