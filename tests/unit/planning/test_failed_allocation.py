"""How a failed allocation is recognized, and the memory that this machine leaves a process."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import psutil
import pytest
import torch

from llmtrain.distributed.limits import MemoryLimit
from llmtrain.planning import failed_allocation
from llmtrain.planning.failed_allocation import available_here, requested_bytes
from llmtrain.training.failures import is_out_of_memory

MB = 2**20


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has …"), round(20.5 * 2**30)),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 2.00 MB on …"), 2 * 2**20),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error"), 123),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 0),
        (MemoryError(), 0),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 0),
    ],
)
def test_an_allocators_message_is_recognized_and_its_size_read(error: Exception, requested: int) -> None:
    assert is_out_of_memory(error)
    assert requested_bytes(error) == requested


@pytest.mark.parametrize(
    "error", [RuntimeError("inconsistent tensor size"), ValueError("out of memory"), OSError(errno.ENOSPC, "full")]
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_available_memory_is_limited_by_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = 10 * MB
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=resident, vms=resident))
    monkeypatch.setattr(failed_allocation, "memory_limit", lambda: MemoryLimit(80 * MB, used=30 * MB))
    assert available_here() == (60 * MB, 80 * MB)
