"""Measure the most that the card can do: matrix products, and copies within it and to and from the host."""

from __future__ import annotations

import torch

from benchmarks.gpu.setting import Setting
from llmtrain.tracking.gpus import device_peak_flops

SHAPES = ((8192, 8192, 8192), (32_768, 768, 50_304), (32_768, 768, 2048), (8192, 4096, 14_336), (8192, 4096, 16))
"""Rows, inner dimension, columns: square; output layer and feed-forward of 124M; feed-forward and LoRA of 8B."""


def measure(setting: Setting) -> None:
    """Describe the machine; measure products and copies."""
    setting.describe_machine()
    peak = device_peak_flops(setting.device, precision="bf16-mixed")
    dtypes = setting.sized((torch.bfloat16, torch.float16, torch.float32), smoke=(torch.float32,))
    for rows, inner, columns in setting.sized(SHAPES, smoke=((64, 64, 64),)):
        for dtype in dtypes:
            name = f"{rows}×{inner}×{columns}"
            with setting.recorder.trying(what="GEMM", shape=name, dtype=str(dtype)):
                left = torch.randn(rows, inner, device=setting.device, dtype=dtype)
                right = torch.randn(inner, columns, device=setting.device, dtype=dtype)
                out = left @ right
                seconds = setting.median_seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))  # type: ignore[misc]
                reached = 2 * rows * inner * columns / seconds
                of_peak = reached / peak if peak and dtype == torch.bfloat16 else None
                setting.recorder.row(what="GEMM", shape=name, dtype=str(dtype), tflops=reached / 1e12, of_peak=of_peak)
    num_bytes = setting.sized(2**30, smoke=2**16)
    for name in ("device to device", "pinned to device", "pageable to device", "device to pinned"):
        with setting.recorder.trying(what="copy", shape=name):
            source, target = _ends(name, num_bytes, setting)
            seconds = setting.median_seconds(lambda a=source, b=target: b.copy_(a, non_blocking=True), calls=2)  # type: ignore[misc]
            moved = num_bytes * (2 if name == "device to device" else 1)
            setting.recorder.row(what="copy", shape=name, gb_per_sec=moved / seconds / 1e9)


def _ends(name: str, num_bytes: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensors from which and to which a copy goes."""
    made = []
    for place in name.split(" to "):
        device = setting.device if place == "device" else torch.device("cpu")
        pinned = place == "pinned" and setting.device.type == "cuda"
        made.append(torch.zeros(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned))
    return made[0], made[1]
