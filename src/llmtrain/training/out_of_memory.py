"""What is known when a device or this machine has no more memory: what was asked for, what there is, what holds it."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import psutil
import torch
from torch import Tensor, nn

from llmtrain.distributed.limits import memory_limit
from llmtrain.distributed.sharding import part_of
from llmtrain.tracking.system import peak_memory_bytes
from llmtrain.training.optimizers import NamedOptimizer

_SAYS_SO: Final = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED|out of memory", re.IGNORECASE
)
_ASKED: Final = re.compile(r"tried to allocate\s+([\d.]+) (bytes|[KMGT]i?B)", re.IGNORECASE)
_UNITS: Final = {
    "bytes": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 2**10,
    "mb": 2**20,
    "gb": 2**30,
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: that of CUDA, of the CPU, of MPS, Python's own, or the system (ENOMEM)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _SAYS_SO.search(str(error)) is not None


def asked_bytes(error: BaseException) -> int:
    """What was refused, in bytes; 0 where the message does not say."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on this rank's device (CPU: of this process) when something was refused."""

    parameters: int
    gradients: int
    optimizer_state: int
    peak: int
    """The most that was held at once so far, all together."""
    asked: int
    """What was refused on top; 0 if that is not known."""
    available: int
    """What this process can have: what it holds, and what is free."""
    total: int
    """What there is, others' share included."""

    @property
    def rest(self) -> int:
        """What came and went: activations, logits, and on a CPU the process itself."""
        return max(0, self.peak - self.parameters - self.gradients - self.optimizer_state)

    @property
    def would_fail_again(self) -> bool:
        """Whether it would not fit though nobody else held anything."""
        return self.peak + self.asked > 0.95 * self.total


def held_when(error: BaseException, *, model: nn.Module, optimizer: NamedOptimizer, device: torch.device) -> Held:
    """Measure it. Comes first of all after the error, before anything is freed."""
    parameters = list(model.parameters())
    on_gpu = device.type == "cuda"
    available, total = _room_on_gpu(device) if on_gpu else _room_here()
    return Held(
        parameters=_size((*parameters, *model.buffers())),
        gradients=_size(p.grad for p in parameters if p.grad is not None),
        optimizer_state=_size(optimizer.state_tensors().values()),
        peak=torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory_bytes(),
        asked=asked_bytes(error),
        available=available,
        total=total,
    )


def _room_on_gpu(device: torch.device) -> tuple[int, int]:
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), total


def _room_here() -> tuple[int, int]:
    memory, process = psutil.virtual_memory(), psutil.Process().memory_info()
    available, total = memory.available + process.rss, memory.total
    if (group := memory_limit()) is not None:  # a container's or a pod's
        total = min(total, group.limit)
        available = min(available, group.limit - group.used + process.rss)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    if limit != resource.RLIM_INFINITY:
        total = min(total, max(0, limit - (process.vms - process.rss)))
    return min(available, total), total


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages; of a tensor that is cut over the ranks, this rank's."""
    local = [part_of(tensor).local for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())
