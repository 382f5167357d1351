"""Precision in which models write and are evaluated. On a GPU it is the same for all of them, so that they compare.

    a GPU with bfloat16 ─▶ bfloat16, by autocast ─┐ unless `eval` or the training
    another GPU ─────────▶ the weights' dtype ────┘ asks for another
    a CPU, Apple's GPUs ─▶ the weights' dtype, where the device computes it natively (distributed/native_bf16.py)

What a GPU computes in float32 takes its products in TF32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmtrain.distributed.native_bf16 import has_native_bf16

AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
"""Dtype of products for each `trainer.precision`; others take that of the weights."""


def autocast_dtype(device: torch.device, precision: str | None = None) -> torch.dtype | None:
    """Return the dtype of a model's products on `device`; None: that of its weights.

    `precision`: a value of trainer.precision that was asked for; None: the usual one of the device.
    """
    if device.type != "cuda":
        return None
    if precision is None:
        return torch.bfloat16 if has_native_bf16(str(device)) else None
    return AUTOCAST.get(precision)


@contextmanager
def computing_in(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Compute products in `dtype` within the block, or if it is None in that of the weights; on a GPU never in float32.

    Weights in float32 are rounded once in the block, so enter it for many forward passes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def named_precision(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> str:
    """Return the precision of a model's products in words, for what is recorded of an evaluation."""
    if dtype is not None:
        return f"{_name(dtype)} (autocast)"
    stored: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            stored[parameter.dtype] += parameter.numel()
    most = max(stored, key=lambda one: stored[one])
    if most == torch.float32 and device.type == "cuda" and has_native_bf16(str(device)):  # such GPUs have TF32, too
        return "float32, products in TF32"
    return _name(most)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
