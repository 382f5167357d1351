"""Describe a machine for training (cores, memory, devices, network) and list its problems, each with its fix.

    look_at_machine ─▶ MachineFacts ─▶ system_findings, device_findings, network_findings

`doctor` adds what other rooms know: versions, disks, secrets.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import llmtrain.distributed.engine  # noqa: F401  # fails here, with its name, if a package that training needs is missing
from llmtrain.distributed.limits import memory_bytes, usable_cores
from llmtrain.distributed.native_bf16 import computes_bf16
from llmtrain.distributed.nccl import infiniband_adapters, network_faults, network_interfaces
from llmtrain.distributed.process import keep_to_usable_cores
from llmtrain.distributed.resolve import missing_for_compile

OLDEST_CUDA_CAPABILITY = (7, 0)
LOW_MEMORY_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Finding:
    """A problem of this machine, and its fix."""

    severity: Literal["fatal", "warning"]
    """fatal: nothing can be trained here; warning: something is slower, smaller or missing."""
    what: str
    fix: str


def fatal(what: str, fix: str) -> Finding:
    """Return a finding that keeps every run from training."""
    return Finding("fatal", what, fix)


def warning(what: str, fix: str) -> Finding:
    """Return a finding that makes runs slower or smaller."""
    return Finding("warning", what, fix)


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """A GPU of this machine."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """Cores, memory, devices and network of the machine that this process may use."""

    system: str
    """Name of the operating system, from platform.system(): Linux, Darwin, Windows."""
    is_wsl: bool
    cores: int
    threads: int
    """Threads that torch computes with."""
    memory_bytes: int
    gpus: list[CudaDevice]
    mps: bool
    cuda_built: bool
    nvidia_driver: bool
    bf16_on_cpu: bool
    """True if the CPU multiplies bfloat16 natively, and faster than float32."""
    missing_for_compile: str | None
    interfaces: list[str]
    adapters: list[str]
    """Names of the InfiniBand adapters."""


def look_at_machine() -> MachineFacts:
    """Measure the machine, and limit torch's threads to the cores that this process may use."""
    keep_to_usable_cores()
    return MachineFacts(
        system=platform.system(),
        is_wsl="microsoft" in platform.release().lower(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        gpus=_cuda_devices(),
        mps=torch.backends.mps.is_available(),
        cuda_built=torch.version.cuda is not None,
        nvidia_driver=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists(),
        bf16_on_cpu=computes_bf16("cpu"),
        missing_for_compile=missing_for_compile(),
        interfaces=network_interfaces(),
        adapters=infiniband_adapters(),
    )


def _cuda_devices() -> list[CudaDevice]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability, bf16 = (gpu.major, gpu.minor), computes_bf16(f"cuda:{index}")
        found.append(CudaDevice(name=gpu.name, memory_bytes=gpu.total_memory, capability=capability, bf16=bf16))
    return found


def system_findings(facts: MachineFacts, environ: Mapping[str, str]) -> list[Finding]:
    """Return the problems of the operating system, the memory and the number of threads."""
    found = []
    if facts.system not in ("Linux", "Darwin"):
        fix = "on Windows, install WSL2 (`wsl --install`) and work inside it"
        found.append(fatal(f"{facts.system} is not supported", fix))
    if facts.memory_bytes < LOW_MEMORY_BYTES:
        fix = "train small models, and check their memory with `llmtrain plan CONFIG` first"
        found.append(warning(f"{facts.memory_bytes / 1e9:.1f} GB of memory", fix))
    threads = environ.get("OMP_NUM_THREADS")
    if threads is not None and not facts.gpus and facts.threads < facts.cores:
        what = f"OMP_NUM_THREADS={threads} lets a run on the CPU use {facts.threads} of {facts.cores} cores"
        found.append(warning(what, "unset it, unless several processes share the machine"))
    return found


def device_findings(facts: MachineFacts) -> list[Finding]:
    """Return the problems of the GPUs, the CPU's bfloat16 and torch.compile."""
    found = []
    if facts.nvidia_driver and not facts.gpus:
        fix = "compare `nvidia-smi` with CUDA_VISIBLE_DEVICES, and the driver's version with torch's CUDA version"
        if not facts.cuda_built:
            fix = "install a build of torch for CUDA (pytorch.org/get-started)"
        found.append(warning("there is an NVIDIA driver, but torch sees no GPU: runs use the CPU", fix))
    for gpu in facts.gpus:
        if gpu.capability < OLDEST_CUDA_CAPABILITY:
            found.append(
                warning(f"{gpu.name} is too old for torch.compile", "trainer.compile=false, or run.device=cpu")
            )
        elif not gpu.bf16:
            fix = "trainer.precision=16-mixed is faster there than auto's 32"
            found.append(warning(f"{gpu.name} does not compute bf16", fix))
    if not facts.gpus and not facts.mps and not facts.bf16_on_cpu:
        found.append(
            warning(
                "this CPU gains nothing by bf16: precision auto is 32, slower than bf16 on a CPU that does",
                "leave precision at auto, since bf16-mixed is slower here, and by far where it is emulated; a CPU that "
                "gains by AVX512-BF16 or AMX, or a GPU, is faster",
            )
        )
    if facts.missing_for_compile is not None:
        what, _, fix = facts.missing_for_compile.partition(" (")
        what = f"torch.compile is off, so a run takes about twice as long: {what}"
        found.append(warning(what, fix.removesuffix(")") or "install it"))
    return found


def network_findings(facts: MachineFacts, environ: Mapping[str, str]) -> list[Finding]:
    """Return the settings of NCCL and gloo that match nothing on this machine."""
    faults = network_faults(environ, interfaces=facts.interfaces, adapters=facts.adapters)
    return [warning(what, fix) for what, fix in faults]
