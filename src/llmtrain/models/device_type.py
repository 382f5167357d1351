"""The type of device for which a model chooses its code: kind of attention, size of the loss's chunks.

It is the type of the tensors' device, except when planning/ runs a step for a GPU on tensors without storage: these are
on the CPU, since a machine without a GPU can have no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_assumed: str | None = None


def device_type_of(device: torch.device) -> str:
    """Return the type of `device`, or the one that `assume_device_type` sets."""
    return _assumed or device.type


@contextmanager
def assume_device_type(device_type: str) -> Iterator[None]:
    """Let models run the code for this type of device within the block, on any device."""
    global _assumed
    before, _assumed = _assumed, device_type
    try:
        yield
    finally:
        _assumed = before
