"""Tells whether a device computes in bfloat16 without being slower, in what it computes otherwise, and the slowdown.

    stored bfloat16 ─┬─ native, and not slower ──▶ computed in bfloat16
                     └─ emulated, or slower ─────▶ computed in float32; if the config requests bfloat16, a warning

Native instructions do not guarantee a gain: an Intel Xeon whose AMX tiles the hypervisor hides multiplies bfloat16 at
half of the speed of float32 (docs/performance.md). So a CPU that has them is measured, for a tenth of a second.

The precision of a run is resolved in `resolve`, the dtype of trained and frozen weights in `models.huggingface.load`.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import TypeVar

import torch
from torch import nn

log = logging.getLogger("llmtrain.device")
Module = TypeVar("Module", bound=nn.Module)

ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
WITHOUT_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of these variables at which oneDNN, which multiplies bfloat16 on CPUs, uses no bfloat16 instructions."""
SMALL_GEMM = 256
"""Rows and columns of a matrix product that takes 0.03 s at 1 GFLOP/s, the speed of emulated bfloat16."""
SMALL_GEMM_SEC = 0.05
"""Seconds for which a measurement repeats such products. It takes at most about 0.15 s, with the first and last one."""


def computes_bf16(device: str) -> bool:
    """Return whether to compute in bfloat16 on `device`: it is native there, and on a CPU not slower than float32."""
    return has_native_bf16(device) and (device != "cpu" or bf16_slowdown() < 1)


def has_native_bf16(device: str) -> bool:
    """Return whether the hardware multiplies bfloat16 natively: CUDA ≥ 8.0, or a CPU with AVX512-BF16 or AMX.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` does not help: it is true for CPUs that emulate it.
    """
    if device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(torch.device(device))
        return int(major) >= 8
    if device == "cpu" and not any(os.environ.get(name, "").upper() in WITHOUT_BF16 for name in ISA_VARIABLES):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may disappear
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in with weights of dtype `stored`: float32 where `device` emulates that dtype."""
    emulated = (stored == torch.bfloat16 and not computes_bf16(str(device))) or (
        stored == torch.float16 and device.type == "cpu"
    )
    return torch.float32 if emulated else stored


def with_computing_dtype(module: Module, device: torch.device) -> Module:
    """Convert the weights of `module` to float32 if `device` emulates their dtype. They are not moved to `device`."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if any(computing_dtype(dtype, device) != dtype for dtype in dtypes):
        module = module.float()
    choose_compute_dtype(module, device)
    return module


def choose_compute_dtype(module: nn.Module, device: torch.device) -> None:
    """Set the dtype that quantized layers compute in (their `compute_dtype`) to one that is native to `device`."""
    for layer in module.modules():
        if isinstance(dtype := getattr(layer, "compute_dtype", None), torch.dtype):
            layer.compute_dtype = computing_dtype(dtype, device)  # type: ignore[assignment]


def matmul_flops(dtype: torch.dtype, *, size: int = SMALL_GEMM, seconds: float = SMALL_GEMM_SEC) -> float:
    """Return the highest FLOP/s that square matrix products reach on this CPU within about `seconds`."""
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@functools.cache
def bf16_slowdown() -> float:
    """Return the time of a bfloat16 matrix product on this CPU over that of a float32 one, measured once.

    One thread computes: on a busy machine several would wait for each other, which distorts the shorter product most.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return matmul_flops(torch.float32) / matmul_flops(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def warn_if_emulated(key: str, value: str, *, device: str, instead: str) -> None:
    """Warn that `key` of the config requests bfloat16 on a CPU that is slower in it. Only rank 0 measures and warns."""
    if device != "cpu" or computes_bf16(device) or os.environ.get("RANK", "0") != "0":
        return
    factor = bf16_slowdown()
    if factor > 1:
        log.warning(
            "%s is %s, but this CPU %s: matrix products take %s times as long as in float32 (measured); use %s",
            key,
            value,
            "is slow in bfloat16" if has_native_bf16(device) else "has no native bfloat16",
            f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}",
            instead,
        )
