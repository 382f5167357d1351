"""Resolves every `auto` of a config once for a run: device, precision, compilation, strategy, backend.

config + environment + machine         ─┬─▶ Resolved ─▶ recorded ─▶ used again when the run resumes
Resolved of before, if the run resumes ─┘
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.limits import memory_bytes
from llmtrain.distributed.native_bf16 import computes_bf16, has_native_bf16, warn_if_emulated
from llmtrain.distributed.rendezvous import complete_environment, local_world_size_of
from llmtrain.distributed.strategy import SHARDING, Choice, reject_backend
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra

log = logging.getLogger("llmtrain.device")

FLOAT8_CAPABILITY = (8, 9)
"""Compute capability from which on GPUs of NVIDIA multiply in float8."""


class Choose(Protocol):
    """Function that chooses a strategy for several processes when the config says `auto`."""

    def __call__(self, *, world_size: int, precision: str, memory_bytes: int) -> Choice: ...


@dataclass(frozen=True)
class Resolved:
    """Values of every key that may be `auto`, resolved once for a run and used again when it resumes."""

    device: str
    precision: str
    compile: bool
    strategy: str
    backend: str
    because: str = ""
    """Reason for the strategy, if the config says `auto`."""
    float8: bool = False
    """True if linear layers multiply in float8; `precision` is that of everything else."""
    bf16: bool = False
    """True if the device computes in bfloat16 and is not slower in it. Then Muon multiplies in it."""
    max_steps: int | None = None
    """Number of steps that fitted into trainer.max_minutes, if the config has that limit."""
    recomputed_blocks: int | None = None
    """Number of blocks that the backward pass computes again; None until the model is known."""
    reduce_each_micro_batch: bool | None = None
    """True if sharded gradients are summed over the ranks after each micro-batch, since full ones would not fit."""
    stage_items: tuple[int, ...] | None = None
    """Position in the data at which each later stage of data.mixture begins; None if there are no stages."""

    def as_dict(self) -> dict[str, Any]:
        """Return the values for state.json and meta.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def resolve(
    run: RunConfig,
    trainer: TrainerConfig,
    distributed: DistributedConfig,
    *,
    previous: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
) -> Resolved:
    """Resolve every `auto`: as in `previous`, if the run is resumed, else by what this machine has.

    `choose` returns a strategy for several processes from their number, the precision and the memory of each. Without
    it, the strategy is ddp.

    Raises ConfigError if this machine cannot do what the config or the resumed run asks for, or if the config and the
    environment contradict each other about the processes.
    """
    complete_environment(distributed.rendezvous)
    previous = previous or {}
    device = resolve_device(run.device)
    precision = _precision(trainer, previous, device=device)
    compiles = _compiles(trainer, previous)
    choice = _strategy(distributed, previous, choose, device=device, precision=precision)
    backend = distributed.backend
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") else "gloo"
    reject_backend(backend, device=device)
    return Resolved(
        device=device,
        precision=precision,
        compile=compiles,
        strategy=choice.strategy,
        backend=backend,
        because=choice.because,
        float8=trainer.in_float8,
        bf16=previous["bf16"] and has_native_bf16(device) if "bf16" in previous else computes_bf16(device),
        max_steps=previous.get("max_steps"),
        recomputed_blocks=previous.get("recomputed_blocks"),
        reduce_each_micro_batch=previous.get("reduce_each_micro_batch"),
        stage_items=tuple(previous["stage_items"]) if "stage_items" in previous else None,
    )


def resolve_device(requested: str) -> str:
    """Return the device that `run.device` names on this machine. Raises ConfigError if the machine does not have it."""
    if requested == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if requested.startswith("cuda"):
        index = int(requested.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"run.device is {requested}, but this machine has {torch.cuda.device_count()} CUDA devices: set it to "
                "auto or cpu, or use another machine"
            )
    if requested == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device is mps, but this machine has no such device: set it to auto or cpu")
    return requested


def missing_for_compile() -> str | None:
    """Return what torch.compile needs and this machine lacks, with the fix in parentheses; None if it has all."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found (install g++ or clang++, or name one in CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C headers were not found (install python3-dev)"
    return None


def _precision(trainer: TrainerConfig, previous: Mapping[str, Any], *, device: str) -> str:
    precision = trainer.autocast_precision
    if trainer.in_float8:
        _reject_float8_without_hardware(device)
    if precision == "auto":
        precision = previous.get("precision") or ("bf16-mixed" if computes_bf16(device) else "32")
        if precision.startswith("bf16") and not has_native_bf16(device):
            raise ConfigError(
                f"the run was trained in {precision}, which this machine's {device} does not compute natively: resume "
                "it on a machine that does, or set trainer.precision=32 (the losses will differ)"
            )
    elif precision.startswith("bf16"):
        warn_if_emulated("trainer.precision", precision, device=device, instead="trainer.precision=auto or 32")
    return precision


def _reject_float8_without_hardware(device: str) -> None:
    """Raise ConfigError if `device` has no float8, or torchao is not installed."""
    found = device
    if device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(torch.device(device))
        if capability >= FLOAT8_CAPABILITY:
            if find_spec("torchao") is None:
                raise ConfigError(
                    f"trainer.precision fp8-mixed needs torchao: `{install_extra('fp8')}`, or set it to bf16-mixed"
                )
            return
        found = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    raise ConfigError(
        f"trainer.precision is fp8-mixed, but the device is {found}, which does not multiply in float8: set it to "
        "auto, or use a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    )


def _compiles(trainer: TrainerConfig, previous: Mapping[str, Any]) -> bool:
    requested = previous.get("compile", True) if trainer.compile == "auto" else trainer.compile
    missing = missing_for_compile() if requested else None
    if missing:
        log.warning("torch.compile is off: %s; the run continues without it, at about half the speed", missing)
    return bool(requested) and not missing


def _strategy(
    distributed: DistributedConfig,
    previous: Mapping[str, Any],
    choose: Choose | None,
    *,
    device: str,
    precision: str,
) -> Choice:
    strategy, world_size = str(distributed.strategy), int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but {world_size} processes were started: "
            "set it to ddp or auto, or start one process"
        )
    if strategy in ("ddp", *SHARDING) and world_size == 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"distributed.strategy is {strategy}, but this is one process: add --nproc N, start it as "
            "`torchrun --nproc-per-node N -m llmtrain train …`, or set distributed.strategy=auto"
        )
    if strategy != "auto":
        return Choice(strategy, "")
    if world_size == 1:
        return Choice("single", "one process")
    before = previous.get("strategy")
    if before in ("ddp", *SHARDING):
        return Choice(str(before), previous.get("because") or "as before the run was resumed")
    if choose is None:
        return Choice("ddp", "every process holds the full model")
    available = _memory_per_process(device, local_world_size=local_world_size_of(world_size))
    return choose(world_size=world_size, precision=precision, memory_bytes=available)


def _memory_per_process(device: str, *, local_world_size: int) -> int:
    """Return the memory of one process in bytes: that of its GPU, or its share of this machine's or container's."""
    if device.startswith("cuda"):
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return int(torch.cuda.get_device_properties(index).total_memory)
    return memory_bytes() // local_world_size
