"""Settings of the process: determinism ends with the engines that need it, and the environment comes first."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.process import use_expandable_segments
from llmtrain.distributed.resolve import resolve


def cpu_engine() -> Engine:
    distributed = DistributedConfig()
    resolved = resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)
    return Engine(resolved, distributed=distributed)


def test_torch_is_deterministic_until_the_last_engine_that_needs_it_is_closed() -> None:
    gc.collect()  # engines of other tests
    before = torch.are_deterministic_algorithms_enabled()
    one, two = cpu_engine(), cpu_engine()
    one.close()
    assert torch.are_deterministic_algorithms_enabled()
    two.close()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_an_engine_that_is_garbage_collected_restores_torchs_settings() -> None:
    gc.collect()
    before = torch.are_deterministic_algorithms_enabled()
    engine = cpu_engine()
    assert torch.are_deterministic_algorithms_enabled()
    del engine
    gc.collect()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_cuda_s_allocator_is_configured_unless_the_environment_does(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64")
        if name != given:
            monkeypatch.delenv(name)
    use_expandable_segments()
    found = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    assert found == ({given: "max_split_size_mb:64"} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
