"""The type of device whose code a model runs: explicit or fused attention, larger or smaller chunks of the loss.

It is the device of the tensors, except where a step on a GPU is tried on tensors without storage (planning/): these can
be on a GPU only where there is one, so they are on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_assumed: str | None = None


def device_type_of(device: torch.device) -> str:
    """Return the type of `device`, or the one that is assumed in its place."""
    return _assumed or device.type


@contextmanager
def assume_device_type(device_type: str) -> Iterator[None]:
    """Let models run the code for this type of device while the block runs, wherever their tensors are."""
    global _assumed
    before, _assumed = _assumed, device_type
    try:
        yield
    finally:
        _assumed = before
