"""Figures of the machine: peak memory, and what a device could compute at best (for MFU).

Where the run's time goes is in `times`. torch is imported only where it is asked: work without it has a memory too.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

log = logging.getLogger("llmtrain.device")


@dataclass(frozen=True)
class DevicePeak:
    """Dense matrix FLOP/s by data type, in units of 1e12. None: the device does not have it."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float


# Vendors' data sheets, without sparsity; fp16 and bf16 with fp32 accumulation, which GeForce cards do at half rate.
# The pattern must match the whole name that torch reports, less the brand: parts of a GPU (MIG, vGPU), laptop and
# regional versions have other peaks than the card whose name they begin with, and are unknown here.
_PEAKS: Final[tuple[tuple[str, DevicePeak], ...]] = (
    (r"GB200", DevicePeak(2500, 2500, 1250, 80)),
    (r"B200", DevicePeak(2250, 2250, 1125, 75)),
    (r"H200 NVL", DevicePeak(835.5, 835.5, 417.5, 60)),
    (r"(GH200|H200|H100 80GB HBM3|H100 SXM5|H800)( \d+GB)?", DevicePeak(989.4, 989.4, 494.7, 66.9)),
    (r"H100 NVL", DevicePeak(835.5, 835.5, 417.5, 60)),
    (r"H100 PCIe", DevicePeak(756, 756, 378, 51.2)),
    (r"H20", DevicePeak(148, 148, 74, 44)),
    (r"(A100|A800)[- ](SXM4?|PCIE)-(40|80)GB|(A100|A800) 80GB PCIe", DevicePeak(312, 312, 156, 19.5)),
    (r"A40", DevicePeak(149.7, 149.7, 74.8, 37.4)),
    (r"A30", DevicePeak(165, 165, 82, 10.3)),
    (r"A10", DevicePeak(125, 125, 62.5, 31.2)),
    (r"A10G", DevicePeak(70, 70, 35, 31.5)),
    (r"L40S", DevicePeak(362, 362, 183, 91.6)),
    (r"L40", DevicePeak(181, 181, 90.5, 90.5)),
    (r"L4", DevicePeak(121, 121, 60, 30.3)),
    (r"RTX 6000 Ada Generation", DevicePeak(364.2, 364.2, 182.1, 91.1)),
    (r"RTX A6000", DevicePeak(154.8, 154.8, 77.4, 38.7)),
    (r"RTX 5090", DevicePeak(209.5, 209.5, 104.8, 104.8)),
    (r"RTX 4090", DevicePeak(165.2, 165.2, 82.6, 82.6)),
    (r"RTX 4070", DevicePeak(58.3, 58.3, 29.1, 29.1)),
    (r"RTX 3060", DevicePeak(25.4, 25.4, 12.7, 12.7)),
    (r"RTX 3090 Ti", DevicePeak(80, 80, 40, 40)),
    (r"RTX 3090", DevicePeak(71, 71, 35.6, 35.6)),
    (r"V100-(SXM2|SXM3)-(16|32)GB(-LS)?", DevicePeak(None, 125, None, 15.7)),
    (r"V100-PCIE-(16|32)GB", DevicePeak(None, 112, None, 14)),
    (r"T4", DevicePeak(None, 65, None, 8.1)),
    (r"MI300X( VF)?", DevicePeak(1307.4, 1307.4, 653.7, 163.4)),
)
_BRAND = re.compile(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct|Quadro) )+")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory this run has held so far, in bytes.

    On CUDA what torch's tensors held on the device (without the context's few hundred MB); elsewhere the resident
    memory of this process, code and libraries included; data workers' processes are not.
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


def device_peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Dense FLOP/s that `device` reaches at best in the config's `precision`; None if it is not known.

    A CPU's is not: it hangs on the clock that its vector and matrix units hold under load, which no interface tells,
    so a run on a CPU has no MFU rather than one that nobody can compare.
    """
    import torch

    if device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    return flops_at(peak, precision)


def flops_at(peak: DevicePeak, precision: str) -> float | None:
    """Dense FLOP/s at a config's `precision` of a device with this peak; None: it does not have it."""
    import torch

    flops = {
        "bf16-mixed": peak.bf16,
        "bf16-true": peak.bf16,
        "16-mixed": peak.fp16,
        "16-true": peak.fp16,
        "32": peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32 or peak.fp32,
    }[precision]
    return None if flops is None else flops * 1e12


def peak_of(device_name: str) -> DevicePeak | None:
    """The peak of the device that torch calls by this name; None if it is not in the table."""
    name = _BRAND.sub("", device_name.strip())
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)


def model_flops_utilisation(
    tokens_per_sec: float, *, flops_per_token: float, peak_flops: float | None, num_devices: int
) -> float | None:
    """MFU from 0 to 1 in the PaLM paper's sense (arXiv 2204.02311, appendix B): useful FLOPs over what is possible.

    `tokens_per_sec` over all devices; `flops_per_token` forward and backward, recomputation not counted; `peak_flops`
    of one device. None if the peak is not known, or if it is exceeded, which only a wrong figure can do: that is said.
    """
    if peak_flops is None:
        return None
    mfu = tokens_per_sec * flops_per_token / (peak_flops * num_devices)
    if mfu > 1:
        log.warning(
            "MFU is left out: %.0f %% of the device's peak cannot be, so one of its figures is wrong", 100 * mfu
        )
        return None
    return mfu
