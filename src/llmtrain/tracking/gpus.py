"""The table of GPUs: peak FLOP/s (for MFU and `plan`) and memory (for `plan`).

torch is imported only in functions, since commands that do without it read the table too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GpuSpec:
    """A GPU: peak of dense matrix products by data type, in TFLOP/s; None if it does not have the type."""

    pattern: str
    """Regular expression of the full name that torch reports, without the brand."""
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float
    option: str | None = None
    """Its name for `plan --device`; None: `plan` does not offer it."""
    memory_gb: int = 0
    """0 if `plan` does not offer it."""
    name: str = ""
    """One of the names that `pattern` matches, if there are several."""
    fp8: bool = False
    """True if it has float8 too, whose peak is twice that of bf16 by the same data sheets."""

    @property
    def full_name(self) -> str:
        """Name as torch reports it, without the brand."""
        return self.name or self.pattern

    def flops(self, precision: str) -> float | None:
        """Return the peak FLOP/s at a config's `precision`; None if this GPU does not have that data type."""
        import torch

        flops = {
            "bf16-mixed": self.bf16,
            "bf16-true": self.bf16,
            "16-mixed": self.fp16,
            "16-true": self.fp16,
            "32": self.fp32 if torch.get_float32_matmul_precision() == "highest" else self.tf32 or self.fp32,
        }[precision]
        return None if flops is None else flops * 1e12


# Without sparsity; fp16 and bf16 with fp32 accumulation, for which GeForce cards have half the rate. Parts of a GPU
# (MIG, vGPU), laptop and regional versions have other peaks than the card whose name they begin with: not listed.
GPUS: Final = (
    # NVIDIA's data sheets of GB200 NVL72 and HGX B200, divided by their GPUs; memory: Blackwell architecture brief
    GpuSpec(r"GB200", 2500, 2500, 1250, 80, fp8=True),
    GpuSpec(r"B200", 2250, 2250, 1125, 75, "b200", 192, fp8=True),
    # NVIDIA's data sheets of H200 (SXM and NVL) and H100 (SXM, NVL and PCIe), whose values with sparsity are halved
    GpuSpec(r"H200 NVL", 835.5, 835.5, 417.5, 60, fp8=True),
    GpuSpec(r"(GH200|H200)( \d+GB)?", 989.4, 989.4, 494.7, 66.9, "h200", 141, "H200", fp8=True),
    GpuSpec(
        r"(H100 80GB HBM3|H100 SXM5|H800)( \d+GB)?", 989.4, 989.4, 494.7, 66.9, "h100", 80, "H100 80GB HBM3", fp8=True
    ),
    GpuSpec(r"H100 NVL", 835.5, 835.5, 417.5, 60, fp8=True),
    GpuSpec(r"H100 PCIe", 756, 756, 378, 51.2, "h100-pcie", 80, fp8=True),
    # Server makers' specifications of HGX H20: NVIDIA publishes none
    GpuSpec(r"H20", 148, 148, 74, 44, fp8=True),
    # NVIDIA's data sheets of A100, A40, A30 and A10
    GpuSpec(
        r"(A100|A800)[- ](SXM4?|PCIE)-80GB|(A100|A800) 80GB PCIe", 312, 312, 156, 19.5, "a100", 80, "A100-SXM4-80GB"
    ),
    GpuSpec(r"(A100|A800)[- ](SXM4?|PCIE)-40GB", 312, 312, 156, 19.5, "a100-40gb", 40, "A100-SXM4-40GB"),
    GpuSpec(r"A40", 149.7, 149.7, 74.8, 37.4, "a40", 48),
    GpuSpec(r"A30", 165, 165, 82, 10.3, "a30", 24),
    GpuSpec(r"A10", 125, 125, 62.5, 31.2, "a10", 24),
    # NVIDIA's product brief of A10G, which AWS alone offers (instances G5)
    GpuSpec(r"A10G", 70, 70, 35, 31.5, "a10g", 24),
    # NVIDIA's data sheets of L40S, L40 and L4, whose values with sparsity are halved
    GpuSpec(r"L40S", 362, 362, 183, 91.6, "l40s", 48, fp8=True),
    GpuSpec(r"L40", 181, 181, 90.5, 90.5, fp8=True),
    GpuSpec(r"L4", 121, 121, 60, 30.3, "l4", 24, fp8=True),
    # NVIDIA's architecture papers (Ada, Ampere GA102, Blackwell RTX); for RTX 4070 and 3060 their rates a core, times
    # the cores and the boost clock of NVIDIA's product pages
    GpuSpec(r"RTX 6000 Ada Generation", 364.2, 364.2, 182.1, 91.1, fp8=True),
    GpuSpec(r"RTX A6000", 154.8, 154.8, 77.4, 38.7),
    GpuSpec(r"RTX 5090", 209.5, 209.5, 104.8, 104.8, "rtx5090", 32, fp8=True),
    GpuSpec(r"RTX 4090", 165.2, 165.2, 82.6, 82.6, "rtx4090", 24, fp8=True),
    GpuSpec(r"RTX 3090 Ti", 80, 80, 40, 40),
    GpuSpec(r"RTX 3090", 71, 71, 35.6, 35.6, "rtx3090", 24),
    GpuSpec(r"RTX 4070", 58.3, 58.3, 29.1, 29.1, "rtx4070", 12, fp8=True),
    GpuSpec(r"RTX 3060", 25.4, 25.4, 12.7, 12.7, "rtx3060", 12),
    # NVIDIA's data sheets of V100 and T4
    GpuSpec(r"V100-(SXM2|SXM3)-(16|32)GB(-LS)?", None, 125, None, 15.7, "v100", 32, "V100-SXM2-32GB"),
    GpuSpec(r"V100-PCIE-(16|32)GB", None, 112, None, 14),
    GpuSpec(r"T4", None, 65, None, 8.1, "t4", 16),
    # AMD's data sheet of Instinct MI300X
    GpuSpec(r"MI300X( VF)?", 1307.4, 1307.4, 653.7, 163.4, "mi300x", 192, "MI300X", fp8=True),
)
GPU_OPTIONS: Final = {gpu.option: gpu for gpu in GPUS if gpu.option}
"""GPUs that `plan --device` offers, by option."""
_BRAND: Final = re.compile(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct|Quadro) )+")


def find_gpu(device_name: str) -> GpuSpec | None:
    """Return the GPU to which torch gives this name; None if the table does not have it."""
    name = _BRAND.sub("", device_name.strip())
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)


def device_peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the peak FLOP/s of `device` in the config's `precision`; None if it is not known.

    It is not known for CPUs: it depends on the clock of their vector and matrix units under load, which no interface
    reports. So a run on a CPU has no MFU.
    """
    import torch

    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.flops(precision)
