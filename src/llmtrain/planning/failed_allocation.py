"""An allocation that failed: its size, the memory that the process held at that moment, and what it can have."""

from __future__ import annotations

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

_REQUESTED: Final = re.compile(r"tried to allocate\s+([\d.]+) (?:bytes|([KMGT])i?B)", re.IGNORECASE)


def requested_bytes(error: BaseException) -> int:
    """Return the size of the allocation that failed; 0 if the message does not say it."""
    found = _REQUESTED.search(str(error))
    if not found:
        return 0
    size, unit = found.groups(default="")
    power = " KMGT".index(unit.upper() or " ")
    return round(float(size) * (1 << 10 * power))  # torch's MB and GB are MiB and GiB


@dataclass(frozen=True, kw_only=True)
class HeldMemory:
    """Bytes that were held on this rank's device (on a CPU: by this process) when an allocation failed."""

    parameters: int
    gradients: int
    optimizer_state: int
    peak: int
    """The most that was held at any one time so far, in total."""
    requested: int
    """Bytes of the allocation that failed; 0 if they are not known."""
    available: int
    """Bytes that this process can have in total: those that it holds and those that are free."""
    total: int
    """Bytes of the device, including those that other processes hold."""

    @property
    def rest(self) -> int:
        """Bytes of temporary tensors (activations, logits) and, on a CPU, of the process itself."""
        return max(0, self.peak - self.parameters - self.gradients - self.optimizer_state)

    @property
    def would_fail_again(self) -> bool:
        """True if the run would not fit even if no other process held memory."""
        return self.peak + self.requested > 0.95 * self.total


def measure_held_memory(
    error: BaseException, *, model: nn.Module, optimizer: NamedOptimizer, device: torch.device
) -> HeldMemory:
    """Measure the memory right after `error`, before anything is freed."""
    parameters = list(model.parameters())
    available, total = available_memory(device)
    return HeldMemory(
        parameters=_size((*parameters, *model.buffers())),
        gradients=_size(p.grad for p in parameters if p.grad is not None),
        optimizer_state=_size((*optimizer.state_tensors().values(), *optimizer.masters)),
        peak=peak_memory_bytes(device),
        requested=requested_bytes(error),
        available=available,
        total=total,
    )


def available_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a device (not a GPU: of main memory) that this process can have, and those that all share."""
    if device.type != "cuda":
        return available_here()
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), total


def available_here() -> tuple[int, int]:
    """Return the bytes of main memory that this process can have, and those that all processes share."""
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
    """Return the bytes of the distinct storages of the tensors; a sharded tensor counts with this rank's part."""
    local = [part_of(tensor).local for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())
