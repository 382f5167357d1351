"""Copies of a snapshot's tensors: through page-locked memory of a bounded size where they come from a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.training.checkpoint import CheckpointError, staging
from llmtrain.training.checkpoint.staging import PINNED_BYTES, PinnedTransfer, Staging

TENSORS = {
    "smaller than a buffer": torch.arange(7, dtype=torch.int16),
    "as large as a buffer": torch.arange(16, dtype=torch.float32),
    "many buffers and a rest": torch.randn(37, 11, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(50, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "bool": torch.arange(99) % 3 == 0,
    "a number": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.arange(60.0).reshape(6, 10).T,
    "complex": torch.complex(torch.arange(9.0), -torch.arange(9.0)),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that were made, in bytes; these are not page-locked, which needs a GPU."""
    sizes: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(staging, "_pinned", allocate)
    return sizes


def test_all_bytes_arrive_through_two_buffers_of_half_the_bound(allocated: list[int]) -> None:
    transfer = PinnedTransfer(num_bytes=128, allocate=staging._pinned)
    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in TENSORS.items()}
    for _ in range(2):  # a second save makes no third buffer
        for name, tensor in TENSORS.items():
            transfer.copy(tensor, copies[name])
        transfer.finish()
        for name, tensor in TENSORS.items():
            torch.testing.assert_close(copies[name], tensor, rtol=0, atol=0, msg=name)
            copies[name].zero_()
    assert allocated == [64, 64]


def test_a_piece_is_delivered_before_its_buffer_takes_another() -> None:
    transfer = PinnedTransfer(num_bytes=16, allocate=lambda size: torch.empty(size, dtype=torch.uint8))
    first, second = torch.full((2,), 1.0), torch.full((2,), 2.0)
    targets = [torch.zeros(2) for _ in range(4)]
    for source, target in zip((first, second, first, second), targets, strict=True):
        transfer.copy(source, target)
    assert [float(target[0]) for target in targets] == [1.0, 2.0, 0.0, 0.0], "two are on their way"
    transfer.finish()
    assert [float(target[0]) for target in targets] == [1.0, 2.0, 1.0, 2.0]


def test_page_locked_memory_is_bounded_whatever_the_model_holds() -> None:
    assert PinnedTransfer().num_bytes == PINNED_BYTES == 256 << 20


def test_memory_of_the_machine_that_is_too_small_is_not_called_the_gpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CheckpointError, match=r"the machine's own memory \(not the GPU's\) has no 134 MB") as raised:
        PinnedTransfer().copy(torch.ones(3), torch.zeros(3))
    assert "TORCH_USE_CUDA_DSA" not in str(raised.value)
    with pytest.raises(CheckpointError, match="has no 4 MB"):
        staging._host_memory(torch.ones(1_000_000))


def test_copies_on_a_cpu_need_no_page_locked_memory(allocated: list[int]) -> None:
    copies = Staging().copy(TENSORS, {})
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(copies.model[name].local, tensor, rtol=0, atol=0)
    assert not allocated
