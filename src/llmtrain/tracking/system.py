"""Metrics of the machine: peak memory, and model FLOPs utilisation (MFU). What GPUs compute at best is in `gpus`.

Where the run's time goes is in `times`. torch is imported where it is needed only: work without it uses memory too.
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
    """Return the most memory that this run has held so far, in bytes.

    On CUDA that is what torch's tensors held on the device, without the context's few hundred MB. Elsewhere it is the
    resident memory of this process with code and libraries, without data workers' processes.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    # ru_maxrss outlives exec: a small process started by a large one reports the large one's peak. VmHWM does not.
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
        log.warning("MFU is left out: %.0f %% of the device's peak cannot be, so one of its values is wrong", 100 * mfu)
        return None
    return mfu
