"""Metrics of the machine: peak memory, and model FLOPs utilisation (MFU). The peak FLOP/s of GPUs are in `gpus`.

torch is imported only in functions, since commands that do without it measure memory too.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger("llmtrain.device")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the most memory that this process has held so far, in bytes.

    On CUDA it is the memory of torch's tensors on the device, without the few hundred MB of the context. Elsewhere it
    is the resident memory of this process, including code and libraries but not data workers.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    # ru_maxrss survives exec: a small process that a large one started reports the large one's peak. VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_flops_utilisation(
    tokens_per_sec: float, *, flops_per_token: float, peak_flops: float | None, num_devices: int
) -> float | None:
    """Return MFU from 0 to 1 as the PaLM paper defines it (arXiv 2204.02311, appendix B): useful over possible FLOPs.

    `tokens_per_sec` is that of all devices; `flops_per_token` counts forward and backward, without recomputation;
    `peak_flops` is that of one device. Return None if the peak is not known, and, with a warning, if it is exceeded,
    which only a wrong value can do.
    """
    if peak_flops is None:
        return None
    mfu = tokens_per_sec * flops_per_token / (peak_flops * num_devices)
    if mfu > 1:
        log.warning("MFU is left out: it would be %.0f %%, so the speed or the device's peak is wrong", 100 * mfu)
        return None
    return mfu
