"""The device that a run is planned for: one that is here, or one of a list, with every `auto` decided for it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Config
from llmtrain.distributed.engine import computes_bf16, keep_to_usable_cores, missing_for_compile
from llmtrain.distributed.limits import memory_bytes
from llmtrain.tracking.system import flops_at, peak_of

MFU_OF_GPU = 0.40
MFU_OF_GPU_EAGER = 0.25
SHARE_OF_CPU = 0.75
SHARE_OF_CPU_EAGER = 0.45
"""The share of the peak (a CPU: of the measured matrix products) that a step is assumed to reach."""
GEMM_SEC = 1.0
GEMM_SIZE = 1024

_GB = 1e9
GPUS = {
    "b200": ("B200", 192),
    "h200": ("H200", 141),
    "h100": ("H100 80GB HBM3", 80),
    "h100-pcie": ("H100 PCIe", 80),
    "a100": ("A100-SXM4-80GB", 80),
    "a100-40gb": ("A100-SXM4-40GB", 40),
    "a40": ("A40", 48),
    "a30": ("A30", 24),
    "a10": ("A10", 24),
    "a10g": ("A10G", 24),
    "l40s": ("L40S", 48),
    "l4": ("L4", 24),
    "rtx5090": ("RTX 5090", 32),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
    "rtx4070": ("RTX 4070", 12),
    "rtx3060": ("RTX 3060", 12),
    "v100": ("V100-SXM2-32GB", 32),
    "t4": ("T4", 16),
    "mi300x": ("MI300X", 192),
}
"""Names for --device: the name in the table of peaks (tracking/system.py), and GB of memory."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that the run is planned for, with every `auto` decided for it."""

    name: str
    on_gpu: bool
    precision: str
    compiled: bool
    memory_bytes: int
    flops: float | None
    """Per second: a GPU's peak, or what this CPU's matrix products were measured to reach."""

    @property
    def utilisation(self) -> float:
        """The share of `flops` that a step is assumed to reach."""
        if self.on_gpu:
            return MFU_OF_GPU if self.compiled else MFU_OF_GPU_EAGER
        return SHARE_OF_CPU if self.compiled else SHARE_OF_CPU_EAGER


def target_of(config: Config, device: str, assumed: list[str]) -> Target:
    """The device of this name: one of GPUS, cpu, or this (the machine's own, as `train` would take it).

    What had to be assumed of it is added to `assumed`. Raises ConfigError if it is not known.
    """
    wanted = device.lower().removeprefix("nvidia ").replace(" ", "")
    if wanted in ("this", "cpu"):
        has_gpu = torch.cuda.is_available() and config.run.device != "cpu"
        if wanted == "this" and config.run.device.startswith("cuda") and not has_gpu:
            raise ConfigError(
                f"run.device is {config.run.device}, and there is no such device here: name the one to plan for, such "
                f"as --device h100 ({', '.join(GPUS)})"
            )
        return _gpu_here(config, assumed) if has_gpu and wanted == "this" else _cpu_here(config, assumed)
    if wanted not in GPUS:
        raise ConfigError(f"--device {device}: not known; it is this, cpu or one of {', '.join(GPUS)}")
    name, gigabytes = GPUS[wanted]
    return _gpu(config, name, memory_bytes=round(gigabytes * _GB), assumed=assumed)


def _gpu_here(config: Config, assumed: list[str]) -> Target:
    index = int(config.run.device.partition(":")[2] or 0)
    properties = torch.cuda.get_device_properties(index)
    return _gpu(config, properties.name, memory_bytes=properties.total_memory, assumed=assumed)


def _gpu(config: Config, name: str, *, memory_bytes: int, assumed: list[str]) -> Target:
    peak = peak_of(name)
    precision: str = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if peak is None or peak.bf16 else "32"
    flops = None if peak is None else flops_at(peak, precision)
    compiled = config.trainer.compile is not False
    share = MFU_OF_GPU if compiled else MFU_OF_GPU_EAGER
    if flops is None:
        assumed.append(f"no time: the peak of {name} in {precision} is not known")
    else:
        assumed.append(
            f"time: {share:.0%} of the {flops / 1e12:.0f} TFLOP/s that {name} has at best in {precision}; "
            "a small model or batch reaches less"
        )
    return Target(
        name=name, on_gpu=True, precision=precision, compiled=compiled, memory_bytes=memory_bytes, flops=flops
    )


def _cpu_here(config: Config, assumed: list[str]) -> Target:
    precision: str = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if computes_bf16("cpu") else "32"
    compiled = config.trainer.compile is not False and missing_for_compile() is None
    keep_to_usable_cores()
    flops = _measure_gemm(torch.float32 if precision == "32" else torch.bfloat16)
    share = SHARE_OF_CPU if compiled else SHARE_OF_CPU_EAGER
    assumed.append(
        f"time: {share:.0%} of the {flops / 1e12:.2g} TFLOP/s that matrix products in {precision} reached here just "
        f"now ({torch.get_num_threads()} threads)"
    )
    return Target(
        name="cpu", on_gpu=False, precision=precision, compiled=compiled, memory_bytes=memory_bytes(), flops=flops
    )


def _measure_gemm(dtype: torch.dtype) -> float:
    """FLOP/s of square products on this CPU, the best of about a second."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    torch.mm(matrix, matrix)
    best, end = float("inf"), time.perf_counter() + GEMM_SEC
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * GEMM_SIZE**3 / best
