"""Device and size at which a section runs."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.gpu.document import Recorder, Skipped

Size = TypeVar("Size")
PACKAGES = ("torch", "triton", "transformers", "peft", "lightning-fabric", "accelerate", "trl", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that a section is given."""

    smoke: bool
    """Tiny sizes on a CPU, where nothing is compiled: the logic alone."""
    work: Path
    """A folder for all sections, removed at the end."""
    recorder: Recorder

    @property
    def device(self) -> torch.device:
        """Device that is measured."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def half(self) -> torch.dtype:
        """Dtype of kernels: bfloat16 on a GPU."""
        return torch.float32 if self.smoke else torch.bfloat16

    def sized(self, full: Size, *, smoke: Size) -> Size:
        """Choose a size."""
        return smoke if self.smoke else full

    def synchronize(self) -> None:
        """Wait until the device has computed everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call, with all that it lets the device do."""
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def median_seconds(self, call: Callable[[], object], *, calls: int = 10, rounds: int = 5) -> float:
        """Return the seconds of a call: the median over rounds of several calls each."""
        calls, rounds = self.sized((calls, rounds), smoke=(1, 2))

        def several() -> None:
            for _ in range(calls):
                call()

        return statistics.median(self.seconds(several) for _ in range(rounds)) / calls

    def forget(self) -> None:
        """Give back what the last case held, and count the peak memory of the next one from nothing."""
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_gb(self) -> float | None:
        """Return the most that tensors held since `forget`; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def describe_machine(self) -> None:
        """Write down what the figures depend on."""
        about = {name: importlib.metadata.version(name) for name in PACKAGES if is_installed(name)}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            about |= {
                "gpu": properties.name,
                "memory_gb": f"{properties.total_memory / 1e9:.0f}",
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": str(torch.version.cuda),
                "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            }
        self.recorder.machine(python=platform.python_version(), **about)


def is_installed(name: str) -> bool:
    """Return whether a distribution is here."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def need(*modules: str) -> None:
    """Raise Skipped if one of the modules is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise Skipped(f"{module} is not installed")
