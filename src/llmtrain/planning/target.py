"""The device that a run is planned for: this machine's or one of the table of GPUs, with every `auto` resolved."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmtrain.config.sections.schema import Config
from llmtrain.distributed.limits import memory_bytes
from llmtrain.distributed.native_bf16 import SMALL_GEMM, computes_bf16, has_native_bf16, matmul_flops, warn_if_emulated
from llmtrain.distributed.process import keep_to_usable_cores
from llmtrain.distributed.resolve import Resolved, missing_for_compile
from llmtrain.errors import ConfigError
from llmtrain.tracking.gpus import GPU_OPTIONS, find_gpu

MFU_OF_GPU = 0.40
MFU_OF_GPU_EAGER = 0.25
SHARE_OF_CPU = 0.75
SHARE_OF_CPU_EAGER = 0.45
"""Share of the peak FLOP/s (on a CPU: of measured matrix products) that a step is assumed to reach."""
GEMM_SEC = 1.0
GEMM_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that a run is planned for, with every `auto` resolved for it."""

    name: str
    on_gpu: bool
    precision: str
    """Precision of everything that is not in float8."""
    compiled: bool
    memory_bytes: int
    flops: float | None
    """FLOP/s: a GPU's peak, or the measured speed of matrix products on this CPU; None if it is not known."""

    @property
    def utilisation(self) -> float:
        """Share of `flops` that a step is assumed to reach."""
        if self.on_gpu:
            return MFU_OF_GPU if self.compiled else MFU_OF_GPU_EAGER
        return SHARE_OF_CPU if self.compiled else SHARE_OF_CPU_EAGER

    def tokens_per_sec(self, flops_per_token: int, *, world_size: int) -> float | None:
        """Return the predicted speed of `world_size` such devices together; None if `flops` is not known."""
        return None if self.flops is None else self.flops * self.utilisation * world_size / flops_per_token

    def bytes_of_each(self, world_size: int) -> int:
        """Return the memory of each of `world_size` processes: that of a GPU, or a share of this machine's."""
        return self.memory_bytes if self.on_gpu else self.memory_bytes // world_size

    def resolved(self, *, strategy: str) -> Resolved:
        """Return how a step is computed on such devices."""
        device, backend = ("cuda", "nccl") if self.on_gpu else ("cpu", "gloo")
        return Resolved(device, self.precision, self.compiled, strategy, backend)


def find_target(config: Config, device: str, assumed: list[str]) -> Target:
    """Return the device of this name: one of GPU_OPTIONS, cpu, or this (the device that `train` would use here).

    Add a line to `assumed` for each assumption. Raises ConfigError if the device is not known.
    """
    wanted = device.lower().removeprefix("nvidia ").replace(" ", "")
    if wanted in ("this", "cpu"):
        has_gpu = torch.cuda.is_available() and config.run.device != "cpu"
        if wanted == "this" and config.run.device.startswith("cuda") and not has_gpu:
            raise ConfigError(
                f"run.device is {config.run.device}, but this machine has no such device: name the one to plan for, "
                f"such as --device h100 ({', '.join(GPU_OPTIONS)})"
            )
        return _gpu_here(config, assumed) if has_gpu and wanted == "this" else _cpu_here(config, assumed)
    if wanted not in GPU_OPTIONS:
        raise ConfigError(f"--device {device} is not known: use this, cpu or one of {', '.join(GPU_OPTIONS)}")
    gpu = GPU_OPTIONS[wanted]
    return _gpu(config, gpu.full_name, memory_bytes=gpu.memory_gb * 10**9, assumed=assumed)


def _gpu_here(config: Config, assumed: list[str]) -> Target:
    index = int(config.run.device.partition(":")[2] or 0)
    properties = torch.cuda.get_device_properties(index)
    return _gpu(config, properties.name, memory_bytes=properties.total_memory, assumed=assumed)


def _gpu(config: Config, name: str, *, memory_bytes: int, assumed: list[str]) -> Target:
    gpu = find_gpu(name)
    if config.trainer.in_float8 and gpu is not None and not gpu.fp8:
        raise _no_float8(name)
    precision = config.trainer.autocast_precision
    if precision == "auto":
        precision = "bf16-mixed" if gpu is None or gpu.bf16 else "32"
    target = Target(
        name=name,
        on_gpu=True,
        precision=precision,
        compiled=config.trainer.compile is not False,
        memory_bytes=memory_bytes,
        flops=None if gpu is None else gpu.flops(precision),
    )
    if target.flops is None:
        assumed.append(f"no time: the peak of {name} in {precision} is not known")
    else:
        assumed.append(
            f"time: {target.utilisation:.0%} of the peak of {name} in {precision}, {target.flops / 1e12:.0f} TFLOP/s; "
            "a small model or batch reaches less"
        )
    return target


def _no_float8(name: str) -> ConfigError:
    return ConfigError(
        f"trainer.precision is fp8-mixed, but {name} does not multiply in float8: set it to bf16-mixed, or name a GPU "
        f"that does (--device {', '.join(option for option, gpu in GPU_OPTIONS.items() if gpu.fp8)})"
    )


def _cpu_here(config: Config, assumed: list[str]) -> Target:
    if config.trainer.in_float8:
        raise _no_float8("a CPU")
    precision = config.trainer.autocast_precision
    if precision == "auto":
        precision = precision_of_cpu()
    if precision.startswith("bf16"):
        warn_if_emulated("trainer.precision", precision, device="cpu", instead="trainer.precision=auto or 32")
    flops = products_per_second(precision)
    target = Target(
        name="cpu",
        on_gpu=False,
        precision=precision,
        compiled=config.trainer.compile is not False and missing_for_compile() is None,
        memory_bytes=memory_bytes(),
        flops=flops,
    )
    assumed.append(
        f"time: {target.utilisation:.0%} of the {flops / 1e12:.2g} TFLOP/s that matrix products in {precision} reached "
        f"here just now ({torch.get_num_threads()} threads)"
    )
    return target


def precision_of_cpu() -> str:
    """Return the precision to which trainer.precision=auto resolves on this machine's CPU."""
    return "bf16-mixed" if computes_bf16("cpu") else "32"


def products_per_second(precision: str) -> float:
    """Return the highest FLOP/s that square matrix products reach within a second on the cores of this process.

    The matrices are small if the CPU emulates the dtype of `precision`.
    """
    keep_to_usable_cores()
    dtype = {"32": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
    emulated = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_native_bf16("cpu"))
    return matmul_flops(dtype, size=min(SMALL_GEMM, GEMM_SIZE) if emulated else GEMM_SIZE, seconds=GEMM_SEC)
